"""The comparison with the contest notebook's own pipeline: same clips, same threads, each in processes of its own.

What is compared, and where the clocks start and stop:

    featurize   decode frames and masks, run AlexNet: the notebook keeps features in memory and drops the masks, ours
                writes both to disk. Both without imports and model building.
    train       101 steps (--steps) of 32 frames. The notebook's loop decodes each mask in its first epoch; ours pools all
                masks into targets before its first step, which `train_ratio` counts and `train_ratio_steps` does not.
    score       predict, write a PNG a frame, read it again and score it. Ours scores what it wrote without reading
                it, and J and F besides the contest's IoU.
    memory      the most memory resident at once in any one process.
    after       train.py and evaluate.py from start to exit, imports and loading included: ours alone.
"""
import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import data
import measure
from files import BadInput, read_json
from measure import run_child, run_script, spread

BATCH = 32  # the notebook's
CHECKED = 64  # frames whose features are compared with float32's
NOTEBOOK_STEPS = 6  # steps of the notebook's loop, about 0.5 s each


def peer(args: argparse.Namespace) -> None:
    """Compare with the contest notebook's pipeline: each stage's time, memory, losses."""
    before = measure.machine()
    threads, reference = args.threads or before["cores"], read_reference(args.reference)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        theirs, ours = [], []
        for turn in range(args.repeats):
            print(f"turn {turn + 1} of {args.repeats}: the notebook, then ours, on {threads} threads", flush=True)
            theirs.append(run_notebook(args, threads))
            ours.append(run_ours(args, threads, Path(folder)))
        results = {**compare(theirs, ours, args.steps), "compute": ours[0]["compute"], "threads": threads,
                   "train_frames": theirs[0]["train_frames"], "val_frames": theirs[0]["val_frames"],
                   **check_losses(Path(folder), threads, args.steps, reference),
                   "features_difference": check_features(args, threads, Path(folder)),
                   "mean_iou": ours[0]["mean_iou"], "reference_mean_iou": reference.get("contest_mean_iou")}
    measure.write_result(args.out, args.name or "peer", args.repeats, results, results.pop("rows"), before)


def read_reference(file: Path | None) -> dict:
    """Read what the notebook gave, {"losses": [...], "contest_mean_iou": ...}; empty without a file."""
    reference = {} if file is None else read_json(file)
    if file and not (isinstance(reference, dict) and isinstance(reference.get("losses"), list)):
        raise BadInput(f"{file}: expected a JSON object with the notebook's 'losses', a number a step")
    return reference


# --- one turn ----------------------------------------------------------------------------------


def run_notebook(args: argparse.Namespace, threads: int) -> dict:
    """Run the notebook's pipeline once: its own JSON, and its peak memory."""
    child = run_child(sys.executable, args.peer, "--data", args.data, "--weights", args.weights, "--steps", args.steps,
                      "--threads", threads, *limit_flags(args.limit))
    try:
        found = json.loads(child.out)
        return {key: found[key] for key in ("seconds", "train_frames", "val_frames")} | {"peak": child.peak}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{args.peer}: expected one JSON object with seconds, train_frames and val_frames on standard output") from error


def run_ours(args: argparse.Namespace, threads: int, folder: Path) -> dict:
    """Run our command lines once into `folder`: seconds of each stage, and the peak memory of each process."""
    seconds, children = {}, {}
    for split in ("train", "val"):
        children[f"featurize {split}"] = featurize(args, threads, split, args.limit, folder / split, "--compute", args.compute)
        seconds[f"featurize_{split}"] = children[f"featurize {split}"].stage()
    children["train"] = train(threads, folder / "train", folder / "run", args.steps, args.steps)
    children["evaluate"] = run_script("evaluate.py", "--model", folder / "run", "--features", folder / "val", "--out", folder / "results",
                                      "--no-pictures", "--device", "cpu", "--threads", threads, "--overwrite")
    first, last = (measure.lines_of(folder / "run" / "times.jsonl")[at]["seconds"] for at in (0, -1))  # both include the targets
    seconds |= {"train": last, "train_steps": (last - first) * args.steps / (args.steps - 1),
                "predict_write_score": children["evaluate"].stage(),
                "after_featurize": children["train"].seconds + children["evaluate"].seconds}
    return {"seconds": seconds, "peaks": {name: child.peak for name, child in children.items()},
            "compute": data.open_features(folder / "val").meta["preprocessing"]["compute"],
            "mean_iou": read_json(folder / "results" / "scores.json")["mean_iou"]}


def featurize(args: argparse.Namespace, threads: int, split: str, limit: int | None, out: Path, *flags) -> measure.Child:
    """Run featurize.py with the notebook's network on one split."""
    return run_script("featurize.py", "--data", args.data, "--split", split, "--featurizer", "alexnet", "--weights", args.weights,
                      "--out", out, "--device", "cpu", "--threads", threads, "--overwrite", *limit_flags(limit), *flags)


def train(threads: int, features: Path, out: Path, steps: int, log_every: int) -> measure.Child:
    """Run train.py with the notebook's decoder, optimiser and order of frames."""
    return run_script("train.py", "--features", features, "--decoder", "simple", "--steps", steps, "--batch-size", BATCH, "--seed", 0,
                      "--log-every", log_every, "--no-pictures", "--out", out, "--device", "cpu", "--threads", threads, "--overwrite")


def limit_flags(limit: int | None) -> list:
    return [] if limit is None else ["--limit", limit]


# --- what came of it ---------------------------------------------------------------------------


def compare(theirs: list[dict], ours: list[dict], steps: int) -> dict:
    """Return the ratios, each the median over turns (how many times faster ours is; `memory_ratio`: ours / the notebook's).

    Also every stage's figures, and the rows of the table.
    """
    frames = {split: theirs[0][f"{split}_frames"] for split in ("train", "val")}
    both = sum(frames.values())
    names = "featurize", "train", "train_steps", "predict_write_score", "peak"
    peer = dict(zip(names, zip(*((both / (t["featurize_train"] + t["featurize_val"]), t["train"], t["train"],
                                  frames["val"] / (t["predict_and_write"] + t["score"]), turn["peak"] / 1e9)
                                 for turn in theirs for t in [turn["seconds"]]))))
    own = dict(zip(names, zip(*((both / (t["featurize_train"] + t["featurize_val"]), t["train"], t["train_steps"],
                                 frames["val"] / t["predict_write_score"], max(turn["peaks"].values()) / 1e9)
                                for turn in ours for t in [turn["seconds"]]))))
    rates = "featurize", "predict_write_score"  # frames/s: more is better; of the others less is
    ratios = {name: statistics.median(b / a if name in rates else a / b for a, b in zip(peer[name], own[name])) for name in names}
    after = spread([turn["seconds"]["after_featurize"] for turn in ours])
    theirs_spread, ours_spread = ({name: spread(list(values)) for name, values in figures.items()} for figures in (peer, own))
    wanted = "2.5x or more" if ours[0]["compute"] == "bfloat16" else "1.25x or more"
    lines = [("featurize", f"AlexNet features in {ours[0]['compute']}", "frames/s", wanted),
             ("train", f"{steps} training steps, targets included", "s", "50x or more"),
             ("train_steps", f"{steps} training steps, targets apart", "s", None),
             ("predict_write_score", "predict, write and score", "frames/s", "5x or more"),
             ("peak", "peak memory", "GB", "3x or more")]
    rows = [measure.row(what, unit, ours_spread[name], theirs_spread[name], ratios[name], goal) for name, what, unit, goal in lines]
    rows.append(measure.row("everything after featurizing, imports included", "s", after, goal="6 s or less"))
    return {"featurize_ratio": ratios["featurize"], "train_ratio": ratios["train"], "train_ratio_steps": ratios["train_steps"],
            "after_featurize_seconds": after["median"], "predict_write_score_ratio": ratios["predict_write_score"],
            "memory_ratio": 1 / ratios["peak"], "turns": {"notebook": theirs, "ours": ours}, "rows": rows}


def check_losses(folder: Path, threads: int, steps: int, reference: dict) -> dict:
    """Return the largest relative difference between our losses and the notebook's loop's, on the same features.

    Ours are train.py's, logged each step. With a reference also the difference from its losses, whose features
    were float32 throughout.
    """
    train(threads, folder / "train", folder / "run-logged", steps, 1)
    ours = [line["loss"] for line in measure.lines_of(folder / "run-logged" / "log.jsonl")]
    differences = {"loss_difference": largest_difference(ours, notebook_losses(folder / "train", min(steps, NOTEBOOK_STEPS), threads)),
                   "reference_loss_difference": None}
    if reference:
        differences["reference_loss_difference"] = largest_difference(ours, reference["losses"])
    return differences


def largest_difference(found: list[float], expected: list[float]) -> float:
    """Return max |found - expected| / |expected| over the steps that both have."""
    count = min(len(found), len(expected))
    a, b = np.array(found[:count]), np.array(expected[:count])
    return float(np.max(np.abs(a - b) / np.abs(b)))


def notebook_losses(features: Path, steps: int, threads: int) -> list[float]:
    """Train as the notebook does, over every pixel of float masks, on a feature folder of ours. Returns each step's loss."""
    torch.set_num_threads(threads)
    folder = data.open_features(features)
    assert folder.masks is not None
    levels, packed = (np.load(file, mmap_mode="r") for file in (*folder.files.values(), folder.masks))  # [N, C, h, w], [N, H, W / 8]
    torch.manual_seed(0)
    conv, resize = torch.nn.Conv2d(levels.shape[1], 1, kernel_size=3), torch.nn.AdaptiveAvgPool2d(folder.size)
    optimizer = torch.optim.Adam(conv.parameters(), lr=5e-4, betas=(0.9, 0.999))
    losses = []
    for step in range(steps):
        first = step % -(-folder.frames // BATCH) * BATCH
        xs = torch.from_numpy(levels[first:first + BATCH].astype(np.float32))
        ys = torch.from_numpy(np.unpackbits(packed[first:first + BATCH], axis=2, count=folder.size[1]).astype(np.float32))[:, None]
        loss = torch.nn.functional.binary_cross_entropy(resize(torch.sigmoid(conv(xs))), ys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def check_features(args: argparse.Namespace, threads: int, folder: Path) -> float:
    """Return how far the first val features are from float32 ones, stored as float32: |difference| / |float32|, the worst frame's."""
    featurize(args, threads, "val", min(CHECKED, args.limit or CHECKED), folder / "exact", "--compute", "float32", "--dtype", "float32")
    exact, found = (np.load(folder / name / "features.npy", mmap_mode="r") for name in ("exact", "val"))
    norms = [(np.linalg.norm(b.astype(np.float32) - a), np.linalg.norm(a)) for a, b in zip(exact, found)]
    return float(max(difference / norm for difference, norm in norms))
