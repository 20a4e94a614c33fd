"""Turn frames into features: a frozen, pretrained image network runs over every frame once.

    python featurize.py --data DAVIS --split train --featurizer alexnet

writes features/alexnet-train/ (features.npy, masks.npy, paths.json, meta.json), about 0.18 MB a frame.
A run that was stopped goes on, clip by clip, when the same command is given again.
"""
import argparse
import itertools
import math
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

from vos import cli, clips, cues, distributed, featurizers, folder, images, views
from vos.inputs import BadInput, sha256
from vos.outputs import check_output, write_json


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--data", required=True, help="a DAVIS root, a contest folder with paths.json, "
                       "a folder of frames, a video file, or wandb:...")
    group.add_argument("--split", help="the split of a DAVIS root, e.g. train")
    group.add_argument("--masks", type=Path, help="masks by clip and frame name, for some frames or all")
    group.add_argument("--limit", type=cli.count(10**9), help="only the first N frames (default: all)")
    group.add_argument("--size", type=parse_size, metavar="HxW",
                       help="resize other frames to this (default: the first frame's size)")
    group.add_argument("--out", type=Path,
                       help="folder to write (default: features/<featurizer>-<split>)")
    group = parser.add_argument_group("featurizer")
    group.add_argument("--featurizer", default="efficientnet_lite0",
                       help=f"{', '.join(featurizers.FEATURIZERS)}, or timm:NAME for a network of timm "
                       "(default: efficientnet_lite0)")
    group.add_argument("--levels", type=cli.parse_levels, help="comma-separated strides to store, such "
                       "as s8,s16,s16@0.5 (default: the featurizer's own)")
    group.add_argument("--views", type=views.parse_views, default=[], metavar="VIEW,...",
                       help="views of every frame to train on too: mirror, zoom1.5, zoom0.7")
    group.add_argument("--cues", action=argparse.BooleanOptionalAction, help="store what whole clips "
                       "tell about each position, for temporal (default: with several levels)")
    group.add_argument("--weights", help="a state dict, or 'random' (default: pretrained on ImageNet)")
    group.add_argument("--dtype", choices=["float16", "float32"], default="float16",
                       help="of what is stored (default: float16)")
    group.add_argument("--compute", choices=["auto", "float32", "bfloat16"], default="auto",
                       help="arithmetic of the network (default: bfloat16 where that is fast)")
    cli.add_run_flags(parser)
    return parser.parse_args()


def parse_size(text: str) -> tuple[int, int]:
    """Parse "480x854" as (H, W) (argparse type)."""
    height, _, width = text.lower().partition("x")
    if height.isdecimal() and width.isdecimal() and len(text) < 12:
        size = int(height), int(width)
        if min(size) >= 32 and size[0] * size[1] <= images.PIXELS_LIMIT:
            return size
    raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH, at least 32x32 pixels, found {text}")


def describe(args: argparse.Namespace, root: Path, rows: list[clips.Frame], size: tuple[int, int],
             sizes: list[tuple[int, int]], featurizer: featurizers.Featurizer) -> dict:
    """Return meta.json but for the digests of the arrays."""
    shapes = featurizer.shapes(size)
    labelled = [row.annotation is not None for row in rows]
    wanted = len(shapes) > 1 if args.cues is None else args.cues
    return {
        "format": folder.FORMAT, "featurizer": args.featurizer, "levels": shapes, "dtype": args.dtype,
        "weights": featurizer.digest, "parameters": featurizer.parameters_count,
        "flops_per_frame": featurizers.count_flops(featurizer, size),
        "preprocessing": {"mean": featurizer.mean, "std": featurizer.std,
                          "compute": str(featurizer.compute)[6:]},
        "size": size, "sizes": None if set(sizes) == {size} else sizes,
        "clips": [row.clip for row in rows], "names": [row.name for row in rows],
        "labelled": None if len(set(labelled)) == 1 else labelled, "views": args.views,
        "cues": cues.VERSION if wanted else None, "data": str(root.resolve()), "split": args.split,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def list_paths(paths: list[Path | None], root: Path) -> dict[str, str]:
    """Return a column of paths.json: below the data root, with slashes; a video's own name."""
    def below(path: Path) -> str:
        return path.relative_to(root).as_posix() if root in path.parents else path.name
    return {str(index): below(path or Path()) for index, path in enumerate(paths)}


def write_arrays(place: Path, meta: dict, rows: list[clips.Frame], meaning, featurizer,
                 device: torch.device, threads: int, group: distributed.Group) -> None:
    """Write the arrays of a feature folder clip by clip, but for clips that an earlier run finished.

    Each process takes its share of the clips. Raises BadInput for features that do not fit the dtype.
    """
    if group.main:
        for name, shape in folder.list_arrays(meta, masks=bool(meaning)).items():
            dtype = {"m": "uint8", "c": "float16"}.get(name[0], meta["dtype"])
            if not (place / name).exists():
                folder.make_array(place / name, shape, dtype)
    group.wait()

    runs = [list(run) for _, run in itertools.groupby(range(len(rows)), lambda row: rows[row].clip)]
    finished = {line for file in place.glob("finished-*.txt") for line in file.read_text().split()}
    todo = [run for run in runs[group.rank::group.size] if str(run[0]) not in finished]
    if finished and group.main:
        print(f"going on from an earlier run: {len(finished)} of {len(runs)} clips are there")
    size, batch = tuple(meta["size"]), 4 if device.type == "cpu" else 32
    shown = clips.read_images([rows[row] for run in todo for row in run], threads)
    bar = cli.progress([], "featurize", sum(map(len, todo)))
    for run in todo:
        parts = []
        for first in range(0, len(run), batch):
            pictures = list(itertools.islice(shown, len(run[first:first + batch])))
            levels = featurizers.run_featurizer(featurizer, pictures, size, device)
            parts.append([level.cpu() for level in levels])
            bar.update(len(pictures))

        arrays = {}
        for level, whole in zip(featurizer.levels, map(torch.cat, zip(*parts))):
            stored = whole.to(getattr(torch, meta["dtype"]))
            arrays[folder.array_name(level, meta["levels"])] = stored.numpy()
            if meta["cues"]:
                arrays[f"cues.{level}.npy"] = cues.clip_cues(stored.to(device)).half().cpu().numpy()
        if meaning:
            masks = clips.read_packed_masks([rows[row] for row in run], meaning, size, threads)
            arrays["masks.npy"] = np.stack(list(masks))
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise BadInput(f"{rows[run[0]].image}: {name} would not be finite for its clip; pass "
                               "--dtype float32 --compute float32")
            folder.write_rows(place / name, run[0], array)
        with open(place / f"finished-{group.rank}.txt", "a", encoding="ascii") as file:
            file.write(f"{run[0]}\n")


def say_foreground(place: Path, rows: list[clips.Frame], area: int) -> None:
    """Print the share of foreground of all masks, and of the clips that have least and most."""
    masks = np.load(place / "masks.npy", mmap_mode="r")
    shares: dict[str, list[float]] = {}
    for mask, row in zip(masks, rows):
        if row.annotation:
            shares.setdefault(row.clip, []).append(np.bitwise_count(mask).sum(dtype=int) / area)
    whole = np.mean(sum(shares.values(), []))
    least, *_, most = sorted((np.mean(share), clip) for clip, share in shares.items()) * 2
    cli.say(f"foreground: {whole:.2%} of all pixels; {least[0]:.2%} in {least[1]}, {most[0]:.2%} in "
            f"{most[1]}")
    if not 0.001 <= whole <= 0.9:
        print("warning: that is hardly an object; are these the right masks?")


def main() -> None:
    args = parse_args()
    mode = cli.wandb_mode(args.wandb)
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = args.threads or os.cpu_count() or 2
    group, device = distributed.join(cli.choose_device(args.device))

    # find the frames, and check them and all else before anything long
    used: list[str] = []
    root = cli.fetch(args.data, mode, used)
    named = used[0].rpartition("/")[2].partition(":")[0].rpartition("-")[2] if used else ""
    split = args.split or named or root.resolve().stem
    out = args.out or Path("features") / f"{args.featurizer.replace(':', '-')}-{split}"
    inputs = [path for path in (root, args.masks) if path]
    check_output(out, "features", args.overwrite, inputs)
    frames = clips.find_frames(root, args.split, args.masks)[:args.limit]
    sizes = clips.check_frames(frames, threads)
    size = args.size or sizes[0]
    annotations = [frame.annotation for frame in frames if frame.annotation]
    meaning = images.decide_meaning(annotations, threads) if annotations else None
    if args.views and not meaning:
        raise BadInput(f"{root}: has no annotations, and --views are only for training; leave them out")
    rows = frames + [frame._replace(clip=f"{frame.clip}@{view}", view=view)
                     for view in args.views for frame in frames]
    featurizer = featurizers.build_featurizer(
        args.featurizer, args.levels, args.weights, featurizers.choose_compute(args.compute, device))
    meta = describe(args, root, rows, size, sizes * (1 + len(args.views)), featurizer)
    megabytes = sum(math.prod(shape) for shape in meta["levels"].values()) * len(rows)
    megabytes *= np.dtype(args.dtype).itemsize / 1e6
    if group.main:
        cli.say(f"{len(frames)} frames of {len({frame.clip for frame in frames})} clips"
                f"{''.join(f', and {view}' for view in args.views)}, {size[1]} x {size[0]}; "
                f"{args.featurizer} on {device} in {meta['preprocessing']['compute']}, "
                f"{meta['parameters']:,} parameters, {meta['flops_per_frame'] / 1e9:.2f} GFLOP a frame")
        print(f"levels {', '.join(meta['levels'])}: {megabytes:,.0f} MB of {args.dtype}")
        print(f"masks: {meaning}" if meaning else "no masks")

    # featurize
    started = time.perf_counter()
    paths = {"raw": list_paths([row.image for row in rows], root)}
    if meaning:
        paths["annotation"] = list_paths([row.annotation for row in rows], args.masks or root)
    logged = cli.tracked(mode if group.main else "disabled", "featurize", vars(args), used)
    plan = {**meta, **paths}
    with logged as log:
        with folder.unfinished_folder(out, args.overwrite, inputs, plan, group) as place:
            write_arrays(place, meta, rows, meaning, featurizer.to(device), device, threads, group)
            group.wait()
            if group.main:
                write_json(place / "paths.json", paths)
                digests = {file.name: sha256(file) for file in sorted(place.glob("*.npy"))}
                write_json(place / "meta.json", {**meta, "sha256": digests})
                if meaning:
                    say_foreground(place, rows, math.prod(size))
        if log:
            from vos import tracking
            facts = {key: meta[key] for key in ("featurizer", "levels", "weights", "size")}
            tracking.log_features(log, out, args.featurizer, split, facts)
    if group.main:
        print(f"seconds: {time.perf_counter() - started:.3f} ({len(rows)} frames)")
        cli.say(f"wrote {out}: {megabytes:,.0f} MB")
        cli.say(f"next: python train.py --features {cli.quote(out)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
