"""The benchmarks that need no data: how cost grows with the number of frames, and how fast this machine trains.

N frames, B batch, C channels, h w feature grid, H W frame.
"""
import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import data
import featurizers
import measure
import models
import resident
from cli import choose_device
from files import BadInput, sha256, write_json
from measure import row, run_script, spread
from optimizer import Adam

LEVEL = "s32"
CHUNK = 500  # frames made and written at a time
PNG_BYTES = 8192  # on disk, at most, for each mask that evaluate.py writes of a synthetic frame


# --- scale: how cost grows with the number of frames --------------------------------------------


def scale(args: argparse.Namespace) -> None:
    """Train and score with ever more frames of made-up features, kept on the device, in host memory and on disk.

    A training step's time, a scored frame's time and peak resident memory for each; losses and scores must be equal.
    The disk's pages may still be in the system's cache, which the system takes back when it needs the memory.
    """
    before, results = measure.machine(), []
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.folder) as folder:
        check_disk(Path(folder), max(args.frames), args.shape, args.size)
        for frames in args.frames:
            features = Path(folder) / "features"
            write_features(features, frames, args.shape, args.size, args.seed)
            found = [one_scale(args, frames, place, Path(folder)) for place in args.resident]
            check_equal([one for one in found if one["fits"]], frames)
            for one in found:
                print(", ".join(f"{key} {value}" for key, value in one.items() if key not in ("losses", "scores")), flush=True)
            results += [{key: value for key, value in one.items() if key not in ("losses", "scores")} for one in found]
            shutil.rmtree(features)
    rows = []
    for one in filter(lambda one: one["fits"], results):
        where = f"{one['frames']:,} frames, {one['resident']}"
        rows += [row(f"{where}: training step", "ms", spread(one["ms_per_step"])),
                 row(f"{where}: peak memory of training", "GB", spread(one["train_peak_gb"]))]
        if one["ms_per_scored_frame"]:
            rows += [row(f"{where}: predict, write, score", "ms a frame", spread(one["ms_per_scored_frame"])),
                     row(f"{where}: peak memory of scoring", "GB", spread(one["score_peak_gb"]))]
    measure.write_result(args.out, args.name or "scale", args.repeats,
                         {"shape": args.shape, "size": args.size, "steps": args.steps, "losses_equal": True, "runs": results}, rows, before)


def check_disk(folder: Path, frames: int, shape: tuple[int, int, int], size: tuple[int, int]) -> None:
    """Raise BadInput, naming both numbers, when the largest folder and the masks predicted from it do not fit."""
    needed = frames * (math.prod(shape) * 2 + size[0] * -(-size[1] // 8) + PNG_BYTES)
    free = shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise BadInput(f"{folder}: {frames:,} frames take {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there; "
                       "pass a smaller --frames or --shape, or another --folder")


def write_features(path: Path, frames: int, shape: tuple[int, int, int], size: tuple[int, int], seed: int) -> None:
    """Write a feature folder of noise in which the first channel is brighter on the mask, a box; memory stays flat.

    shape: (C, h, w) of the features; size: (H, W) of the masks.
    """
    path.mkdir()
    (height, width), (_, grid_height, grid_width) = size, shape
    rng = np.random.default_rng(seed)
    writers = [data.ArrayWriter(path / "features.npy", (frames, *shape), np.dtype(np.float16)),
               data.ArrayWriter(path / "masks.npy", (frames, height, -(-width // 8)), np.dtype(np.uint8))]
    noise = rng.standard_normal((CHUNK, *shape), dtype=np.float32).astype(np.float16)
    for first in range(0, frames, CHUNK):
        count = min(CHUNK, frames - first)
        masks, features = np.zeros((count, height, width), bool), np.roll(noise[:count], rng.integers(grid_width), axis=3)
        for mask, feature, (top, left) in zip(masks, features, rng.uniform(0, 0.6, (count, 2))):
            mask[int(top * height):int((top + 0.4) * height), int(left * width):int((left + 0.4) * width)] = True
            feature[0, int(top * grid_height):int((top + 0.4) * grid_height), int(left * grid_width):int((left + 0.4) * grid_width)] += 2
        writers[0].write(first, features)
        writers[1].write(first, np.packbits(masks, axis=2))
    for writer in writers:
        writer.close()
    write_json(path / "paths.json", {"raw": data.as_column([f"{index:07d}.jpg" for index in range(frames)])})
    write_json(path / "meta.json", {
        "format": data.FORMAT, "featurizer": "noise", "levels": {LEVEL: shape}, "weights": "none", "preprocessing": {}, "size": size,
        "sizes": None, "clips": [f"clip-{index // 100}" for index in range(frames)], "names": [f"{index:07d}" for index in range(frames)],
        "parameters": 0, "flops_per_frame": 0, "sha256": {name: sha256(path / name) for name in ("features.npy", "masks.npy")},
        "versions": {}, "data": "nowhere", "split": None})


def one_scale(args: argparse.Namespace, frames: int, place: str, folder: Path) -> dict:
    """Train and score `repeats` times with the features kept in one place; "fits" is false when they do not fit there."""
    one: dict = {"frames": frames, "resident": place, "fits": True, "ms_per_step": [], "train_peak_gb": [], "ms_per_scored_frame": [],
           "score_peak_gb": []}
    common = ["--resident", place, "--device", args.device, "--threads", args.threads or measure.cores(), "--no-pictures", "--overwrite"]
    for _ in range(args.repeats):
        child = run_script("train.py", "--features", folder / "features", "--out", folder / "run", "--decoder", "simple", "--shuffle",
                           "--steps", args.steps, "--log-every", args.steps, "--seed", args.seed, *common, may_fail=True)
        if child.status:
            if child.status == 2 and f"--resident {place}" in child.err:
                return {**one, "fits": False}
            raise BadInput(f"train.py ended with status {child.status}: {child.err.strip().splitlines()[-1]}")
        first, last = (measure.lines_of(folder / "run" / "times.jsonl")[at]["seconds"] for at in (0, -1))
        one["ms_per_step"].append(1000 * (last - first) / (args.steps - 1))  # the first step waits for the targets
        one["train_peak_gb"].append(child.peak / 1e9)
        one["losses"] = [line["loss"] for line in measure.lines_of(folder / "run" / "log.jsonl")]
        if args.score:
            child = run_script("evaluate.py", "--model", folder / "run", "--features", folder / "features",
                               "--out", folder / "results", *common)
            one["ms_per_scored_frame"].append(1000 * child.stage() / frames)
            one["score_peak_gb"].append(child.peak / 1e9)
            one["scores"] = (folder / "results" / "scores.json").read_text()
            shutil.rmtree(folder / "results")
    return one


def check_equal(found: list[dict], frames: int) -> None:
    """Raise BadInput unless losses and scores are the same wherever the features were kept."""
    for key in ("losses", "scores"):
        if any(one.get(key) != found[0].get(key) for one in found):
            raise BadInput(f"{frames:,} frames: the {key} differ between --resident {' and '.join(one['resident'] for one in found)}; "
                           "expected the same: this is a defect")


# --- train: how fast this machine is -------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    """Time training each decoder on made-up features that sit on the device, and going from frame to mask."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device, before = choose_device(args.device), measure.machine()
    compute = featurizers.choose_compute("auto", device)
    featurizer = featurizers.build_featurizer(args.featurizer, None, "random", args.seed, compute).to(device)
    shapes = {level: (c, h, w) for level, (c, h, w) in featurizer.shapes(args.size).items()}
    copy = copy_rate(device, args.repeats)
    results = {"device": str(device), "featurizer": args.featurizer, "shapes": shapes, "compute": str(featurizer.compute)[6:],
               "amp": args.amp, "copy_gb_per_second": copy, "decoders": {}}
    rows = [row(f"copy on {device.type}, read and written", "GB/s", copy)]
    for name in models.DECODERS:
        one = results["decoders"][name] = time_decoder(name, featurizer, shapes, args, device)
        one["share_of_copy"] = one["gathered_gb_per_second"] / copy["median"]
        case = f"{name} on {args.featurizer}, {one['frames_per_step']} frames a step"
        rows += [row(f"{case}: training", "steps/s", one["steps_per_second"]),
                 row(f"{case}: training", "frames/s", one["frames_per_second"]),
                 row(f"{case}: frame to mask", "frames/s", one["frame_to_mask_per_second"])]
        print(f"{name}: gathers {one['gathered_gb_per_second']:.2f} GB/s of features, {one['share_of_copy']:.1%} of what a copy "
              f"on this device moves; peak device memory {one['peak_device_gb'] or 'not counted on this device'}", flush=True)
    measure.write_result(args.out, args.name or f"train-{device.type}", args.repeats, results, rows, before)


def time_decoder(name: str, featurizer: featurizers.Featurizer, shapes: models.Shapes, args: argparse.Namespace,
                 device: torch.device) -> dict:
    """Time one decoder; one that takes a single level gets the coarsest."""
    try:
        decoder = models.make_decoder(name, shapes, args.size).to(device)
    except BadInput:
        shapes = dict(list(shapes.items())[:1])
        decoder = models.make_decoder(name, shapes, args.size).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(args.seed)
    levels: list[resident.Rows] = [torch.randn(args.frames, *shape, dtype=torch.float16, device=device) for shape in shapes.values()]
    features = models.look_at_clips(name, resident.Features(levels, device), [f"clip-{index // 64}" for index in range(args.frames)])
    decoder.standardise(features, torch.arange(args.frames))
    targets, batch = torch.rand(args.frames, *decoder.grid, device=device), decoder.recipe.batch
    seconds = spread(time_steps(decoder, features, targets, args, device))
    bytes_per_step = batch * sum(level[0].numel() * level.element_size() for level in features.levels if isinstance(level, torch.Tensor))
    both = spread(time_frames(featurizer, name, decoder.eval(), list(shapes), args, device))
    return {"levels": list(shapes), "frames_per_step": batch, "steps_per_second": inverse(seconds, args.steps),
            "frames_per_second": inverse(seconds, args.steps * batch), "frame_to_mask_per_second": inverse(both, args.batch_size),
            "gathered_gb_per_second": bytes_per_step * args.steps / seconds["median"] / 1e9,
            "peak_device_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None}


def time_steps(decoder: models.Decoder, features: resident.Features, targets: torch.Tensor, args: argparse.Namespace,
               device: torch.device) -> list[float]:
    """Return the seconds of `steps` training steps, `repeats` times, after as many to warm up: train.py's step, without its log."""
    area = torch.full(targets.shape[1:], 1 / targets[0].numel(), device=device)
    optimizer = Adam(decoder.parameters())
    orders = torch.randint(len(targets), (args.steps, decoder.recipe.batch), device=device)

    def steps() -> None:
        for order in orders:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                loss = decoder.loss(decoder(features.batch(order)), targets[order], area).mean()
            decoder.zero_grad()
            loss.backward()
            optimizer.step(decoder.recipe.lr)

    return time_on(device, steps, args.repeats)


@torch.inference_mode()
def time_frames(featurizer: featurizers.Featurizer, name: str, decoder: models.Decoder, levels: list[str],
                args: argparse.Namespace, device: torch.device) -> list[float]:
    """Return the seconds from a clip of `batch_size` decoded frames in host memory to its masks there, `repeats` times."""
    everything, clips = torch.arange(args.batch_size, device=device), ["clip"] * args.batch_size
    frames = torch.randint(0, 256, (args.batch_size, 3, *args.size), dtype=torch.uint8)

    def frame_to_mask() -> None:
        maps = dict(zip(featurizer.levels, featurizer(frames.to(device))))
        features = models.look_at_clips(name, resident.Features([maps[level] for level in levels], device), clips)
        output = decoder(features.batch(everything))
        (decoder.probabilities(output.float()) * 255).to(torch.uint8).cpu()

    return time_on(device, frame_to_mask, args.repeats)


def copy_rate(device: torch.device, repeats: int, size: int = 1 << 28) -> dict:
    """Return the GB/s that copying `size` bytes on the device reads (it writes as many): the limit of a gather."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return inverse(spread(time_on(device, lambda: target.copy_(source), repeats)), size / 1e9)


def time_on(device: torch.device, work: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of `work`, `repeats` times after one to warm up, waiting for the device at both ends."""
    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    work()
    seconds = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started)
    return seconds


def inverse(seconds: dict, amount: float) -> dict:
    """Turn a spread of seconds into one of `amount` per second."""
    return spread([amount / run for run in seconds["runs"]])
