"""Turn frames into features: a frozen, pretrained network runs over every frame once.

    python featurize.py --data DAVIS --split train --featurizer alexnet

writes features/alexnet-train/ (features.npy, masks.npy, paths.json, meta.json), about 0.18 MB a frame.
A run that was stopped goes on where it was when the same command is given again.
"""
import argparse
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

import artifacts
import clips
import data
import distributed
import tracking
from cli import Parser, add_run_flags, choose_device, positive_int, progress, run
from distributed import Group
from featurizers import FEATURIZERS, Featurizer, build_featurizer, choose_compute, count_flops, run_featurizer
from files import BadInput, plain, refuse_existing
from models import count_parameters
from partial import PartialFolder
from views import parse_views


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--data", required=True,
                       help="a DAVIS root, a contest folder with paths.json, a folder of frames, a video file, or wandb:...")
    group.add_argument("--split", default=None, help="the split of a DAVIS root, e.g. train (its ImageSets name it)")
    group.add_argument("--limit", type=positive_int, default=None, help="only the first N frames (default: all)")
    group.add_argument("--size", type=parse_size, default=None, metavar="HxW",
                       help="resize frames of another size to this (default: the first frame's size)")
    group.add_argument("--out", type=Path, default=None, help="folder to write (default: features/<featurizer>-<split>)")
    group = parser.add_argument_group("featurizer")
    group.add_argument("--featurizer", default="efficientnet_lite0",
                       help=f"{', '.join(FEATURIZERS)}, or a torchvision network such as resnet50 (default: efficientnet_lite0)")
    group.add_argument("--levels", default=None,
                       help="comma-separated strides to store, e.g. s8,s16,s32,s16@0.5 (default: s32 of alexnet, s8,s16,s32 of others)")
    group.add_argument("--views", type=parse_views, default=[], metavar="VIEW,...",
                       help="also featurize these views of every frame, to train on: mirror, zoom1.5, zoom0.7 (default: none)")
    group.add_argument("--weights", default=None, help="a state dict to load, or 'random' (default: pretrained on ImageNet)")
    group.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="of what is stored (default: float16)")
    group.add_argument("--compute", choices=["auto", "float32", "bfloat16"], default="auto",
                       help="arithmetic of the network (default: bfloat16 where the device is fast at it)")
    group.add_argument("--batch-size", type=positive_int, default=None, help="frames at a time (default: 4 on the CPU, else 32)")
    tracking.add_tracking_flags(parser)
    add_run_flags(parser)
    return parser.parse_args()


def parse_size(text: str) -> tuple[int, int]:
    """Parse "480x854" as (H, W) (argparse type)."""
    try:
        height, width = map(int, text.lower().split("x"))
        if min(height, width) >= 32:
            return height, width
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels, at least 32x32, found {text}")


def make_meta(args: argparse.Namespace, root: Path, frames: list[clips.Frame], sizes: list[tuple[int, int]], size: tuple[int, int],
              featurizer: Featurizer, shapes: dict[str, list[int]], flops: int) -> dict:
    """Return meta.json but for the digests of the arrays."""
    return {
        "format": data.FORMAT, "featurizer": args.featurizer, "levels": shapes, "dtype": args.dtype,
        "weights": featurizer.digest, "parameters": count_parameters(featurizer), "flops_per_frame": flops,
        "preprocessing": {"mean": featurizer.mean, "std": featurizer.std, "compute": str(featurizer.compute)[6:]},
        "size": size, "sizes": None if all(other == size for other in sizes) else sizes,
        "clips": [frame.clip for frame in frames], "names": [frame.name for frame in frames],
        "data": str(root.resolve()), "split": args.split, **({"views": args.views} if args.views else {}),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def relative(path: Path, root: Path) -> str:
    """A path as paths.json holds it: below the data root, with slashes; a video's own name for its frames."""
    return path.name if path == root else path.relative_to(root).as_posix()


def write_masks(frames: list[clips.Frame], size: tuple[int, int], file: Path, threads: int) -> None:
    """Decode every annotation and write masks.npy, packed."""
    height, width = size
    writer = data.ArrayWriter(file, (len(frames), height, -(-width // 8)), np.uint8)
    masks = clips.read_packed_masks(frames, size, threads)
    for first, part in enumerate(progress(masks, "masks", len(frames))):
        writer.write(first, part)
    writer.close()


def write_features(partial: PartialFolder, frames: list[clips.Frame], featurizer: Featurizer, shapes: dict[str, list[int]],
                   size: tuple[int, int], args: argparse.Namespace, device: torch.device, group: Group) -> None:
    """Write the arrays of a feature folder, but for what an earlier run wrote; each process its share of the batches."""
    dtype, threads = np.dtype(args.dtype), args.threads or os.cpu_count() or 2
    if group.main and frames[0].annotation is not None and not partial.has("masks.npy"):
        write_masks(frames, size, partial.path / "masks.npy", threads)
        partial.note("masks.npy")
    if group.main:
        for level, shape in shapes.items():  # made at full length by one process, written to by all
            data.ArrayWriter(partial.path / data.level_file(level, shapes), (len(frames), *shape), dtype).close()
    group.wait()
    writers = [data.ArrayWriter(partial.path / data.level_file(level, shapes), (len(frames), *shape), dtype)
               for level, shape in shapes.items()]
    firsts = range(0, len(frames), args.batch_size)[group.rank::group.size]
    batches = [range(first, min(first + args.batch_size, len(frames))) for first in firsts]
    todo = [batch for batch in batches if not partial.has_rows(batch[0], len(batch), writers)]
    if len(todo) < len(batches):
        print(f"going on from an earlier run: {len(batches) - len(todo)} of {len(batches)} batches are there")
    images = clips.read_images([frames[index] for batch in todo for index in batch], threads)
    for batch in progress(todo, "featurize"):
        levels = run_featurizer(featurizer, [next(images) for _ in batch], size, device)  # [B, C, h, w] each
        stored = [level.cpu().numpy().astype(dtype) for level in levels]
        if not all(np.isfinite(level).all() for level in stored):
            raise BadInput(f"{frames[batch[0]].image}: its features do not fit {args.dtype}, or are not finite; "
                           "pass --dtype float32 --compute float32")
        for writer, rows in zip(writers, stored):
            writer.write(batch[0], rows)
        partial.note_rows(batch[0], stored)
    for writer in writers:
        writer.close()


def main() -> None:
    args = parse_args()
    account = tracking.from_flags(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    group, device = distributed.join(choose_device(args.device))
    say = print if group.main else (lambda text: None)
    args.batch_size = args.batch_size or (4 if device.type == "cpu" else 32)
    root, used = artifacts.fetch(args.data, account)
    artifact = used and artifacts.plain_name(used)  # davis2016-train
    split = args.split or (artifact.rpartition("-")[2] if artifact else root.resolve().stem)
    out = args.out or Path("features") / f"{args.featurizer}-{split}"
    refuse_existing(out, args.overwrite)

    frames = clips.find_frames(root, args.split)[:args.limit]
    sizes = clips.check_frames(frames)
    size = args.size or sizes[0]
    if args.views and frames[0].annotation is None:
        raise BadInput(f"{root}: has no annotations, and --views are only for training; leave them out")
    clip_count, frame_count = len({frame.clip for frame in frames}), len(frames)
    frames += [frame._replace(clip=f"{frame.clip}@{view}", view=view) for view in args.views for frame in frames]
    sizes *= 1 + len(args.views)
    featurizer = build_featurizer(args.featurizer, args.levels and args.levels.split(","), args.weights, args.seed,
                                  choose_compute(args.compute, device))
    shapes = featurizer.shapes(size)
    meta = make_meta(args, root, frames, sizes, size, featurizer, shapes, count_flops(featurizer, size))
    total = sum(len(frames) * int(np.prod(shape)) * np.dtype(args.dtype).itemsize for shape in shapes.values())
    say(f"{frame_count} frames of {clip_count} clips{''.join(f', and {view}' for view in args.views)}, {size[1]} x {size[0]}; "
        f"{args.featurizer} on {device} in {meta['preprocessing']['compute']}, "
        f"{meta['parameters']:,} parameters, {meta['flops_per_frame'] / 1e9:.2f} GFLOP a frame")
    say(f"levels {', '.join(f'{level} {shape}' for level, shape in shapes.items())}: {total / 1e6:,.0f} MB of {args.dtype}")

    plan = {**meta, "raw": [relative(frame.image, root) for frame in frames], "batch": args.batch_size}
    with tracking.start(account if group.main else account._replace(mode="disabled"), "featurize", plain(args)) as tracker:
        tracker.use(used)
        started = time.perf_counter()
        with PartialFolder(out, plan, args.overwrite, group) as partial:
            write_features(partial, frames, featurizer.to(device), shapes, size, args, device, group)
            group.wait()
            if group.main:
                columns = {"raw": plan["raw"]}
                if frames[0].annotation is not None:
                    columns["annotation"] = [relative(frame.annotation, root) for frame in frames if frame.annotation]
                partial.finish(meta, columns)
        seconds = time.perf_counter() - started
        if not group.main:
            return
        facts = {key: meta[key] for key in ("featurizer", "levels", "weights", "parameters", "flops_per_frame", "size", "dtype")}
        tracking.log_features(tracker, out, args.featurizer, split, {**facts, "frames": len(frames)})
    print(f"seconds: masks and features {seconds:.3f} ({len(frames)} frames)")
    print(f"wrote {out}: {total / 1e6:,.0f} MB\nnext: python train.py --features {out}")


if __name__ == "__main__":
    sys.exit(run(main))
