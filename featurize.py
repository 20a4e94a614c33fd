"""Turn frames into features: a frozen, pretrained image network runs over every frame once.

    python featurize.py --data DAVIS --split train --featurizer alexnet

writes features/alexnet-train/ (features.npy, masks.npy, paths.json, meta.json), 0.18 MB a frame.
A run that was stopped goes on, clip by clip, when the same command is given again.
"""
import argparse
import contextlib
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

from vos import cli, clips, cues, distributed, featurizers, folder, sources
from vos.inputs import BadInput, sha256
from vos.layers import count_flops
from vos.outputs import beside, check_output, new_folder, write_json


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--data", required=True, help="a DAVIS root, a contest folder with "
                       "paths.json, a folder of frames, a video file, or wandb:...")
    group.add_argument("--split", help="the split of a DAVIS root, e.g. train")
    group.add_argument("--masks", type=Path, help="masks by clip and frame name, for some or all")
    group.add_argument("--limit", type=cli.count(10**9), help="the first N frames (default: all)")
    group.add_argument("--size", type=cli.parse_size, metavar="HxW",
                       help="resize other frames to this (default: the first frame's size)")
    group.add_argument("--out", type=Path, help="default: features/<featurizer>-<split>")
    group = parser.add_argument_group("featurizer")
    group.add_argument("--featurizer", default="efficientnet_lite0",
                       help=f"{', '.join(featurizers.FEATURIZERS)}, or timm:NAME for a network of "
                       "timm (default: efficientnet_lite0)")
    group.add_argument("--levels", type=cli.parse_levels, help="comma-separated strides to store, "
                       "such as s8,s16,s16@0.5 (default: the featurizer's own)")
    group.add_argument("--views", type=clips.parse_views, default=[], metavar="VIEW,...",
                       help="views of every frame to train on too: zoom1.5, zoom0.7")
    group.add_argument("--cues", action=argparse.BooleanOptionalAction, help="store what whole "
                       "clips tell about each position (default: with several levels)")
    group.add_argument("--weights", help="a state dict, or 'random' (default: pretrained)")
    group.add_argument("--dtype", choices=["float16", "float32"], default="float16",
                       help="of what is stored (default: float16)")
    group.add_argument("--compute", choices=["auto", "float32", "bfloat16"], default="auto",
                       help="arithmetic of the network (default: bfloat16 where that is fast)")
    cli.add_run_flags(parser)
    return parser.parse_args()


def list_paths(paths: list[Path | None], root: Path) -> dict[str, str]:
    """Return a column of paths.json: below the data root, with slashes; a video's own name."""
    def below(path: Path) -> str:
        return path.relative_to(root).as_posix() if root in path.parents else path.name
    return {str(index): below(path or Path()) for index, path in enumerate(paths)}


def write_arrays(place: Path, meta: dict, rows: list[clips.Frame], meaning: clips.Meaning | None,
                 featurizer: featurizers.Featurizer, device: torch.device, threads: int,
                 group: distributed.Group) -> None:
    """Write the arrays of this process's share of the clips, but for those finished earlier."""
    if group.main:
        for name, shape in folder.list_arrays(meta, masks=bool(meaning)).items():
            dtype = {"m": "uint8", "c": "float16"}.get(name[0], meta["dtype"])
            if not (place / name).exists():
                array = np.lib.format.open_memmap(place / name, "w+", np.dtype(dtype), shape)
                if hasattr(os, "posix_fallocate"):  # a full disk is an error now, no crash later
                    with open(place / name, "r+b") as handle:
                        os.posix_fallocate(handle.fileno(), 0, array.offset + array.nbytes)
    group.wait()

    ranges = sources.clip_ranges(rows)
    notes = place / "unfinished"
    done = {line for file in notes.glob("*.txt") for line in file.read_text().split()}
    todo = [run for run in ranges[group.rank::group.size] if str(run[0]) not in done]
    if done and group.main:
        print(f"going on from an earlier run: {len(done)} of {len(ranges)} clips are there")
    names = [folder.array_name(level, meta["levels"]) for level in meta["levels"]]
    names += [f"cues.{level}.npy" for level in meta["levels"] if meta["cues"]]
    made = sources.featurize_clips(featurizer, rows, todo, meta["size"], meta["dtype"],
                                   meta["cues"] is not None, device, threads)
    for (first, stop), levels in zip(todo, made):
        arrays = {name: level.numpy() for name, level in zip(names, levels)}
        if meaning:
            masks = clips.read_packed_masks(rows[first:stop], meaning, meta["size"], threads)
            arrays["masks.npy"] = np.stack(list(masks))
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise BadInput(f"{rows[first].image}: {name} would not be finite here; pass "
                               "--dtype float32 --compute float32")
            mapped = np.load(place / name, mmap_mode="r+")
            mapped[first:stop] = array
            mapped.flush()
        with open(notes / f"{group.rank}.txt", "a", encoding="ascii") as file:
            file.write(f"{first}\n")


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
    split = args.split or (root.parent.name.rpartition("-")[2] if used else root.resolve().stem)
    out = args.out or Path("features") / f"{args.featurizer.replace(':', '-')}-{split}"
    inputs = [path for path in (root, args.masks) if path]
    check_output(out, "features", args.overwrite, inputs)
    source = sources.open_frames(root, args.split, args.masks, threads, args.limit)
    if args.views and not source.annotated:
        raise BadInput(f"{root}: has no annotations, and --views are only for training")
    rows, size = list(source.frames), args.size or source.sizes[0]
    for view in args.views:
        rows += [row._replace(clip=f"{row.clip}@{view}", view=view) for row in source.frames]
    featurizer = featurizers.build_featurizer(args.featurizer, args.levels, args.weights,
                                              args.compute, device)

    shapes = featurizer.shapes(size)
    labelled = [row.annotation is not None for row in rows]
    with_cues = len(shapes) > 1 if args.cues is None else args.cues
    flops, arithmetic = count_flops(featurizer.shapes, size), str(featurizer.compute)[6:]
    meta = {
        "format": folder.FORMAT, "featurizer": args.featurizer, "levels": shapes, "size": size,
        "dtype": args.dtype, "cues": cues.VERSION if with_cues else None, "views": args.views,
        "weights": featurizer.digest, "parameters": featurizer.parameters_count,
        "preprocessing": {"mean": featurizer.mean, "std": featurizer.std, "compute": arithmetic},
        "flops_per_frame": flops, "versions": {"torch": torch.__version__},
        "clips": [row.clip for row in rows], "names": [row.name for row in rows],
        "sizes": source.sizes * (1 + len(args.views)) if set(source.sizes) != {size} else None,
        "labelled": labelled if len(set(labelled)) > 1 else None,
        "data": str(root.resolve()), "split": args.split}
    paths = {"raw": list_paths([row.image for row in rows], root)}
    if source.annotated:
        paths["annotation"] = list_paths([row.annotation for row in rows], args.masks or root)
    if group.main:
        cli.say(f"{len(rows)} frames and views, {size[1]} x {size[0]}; {args.featurizer} on "
                f"{device} in {arithmetic}, {meta['parameters']:,} parameters, {flops / 1e9:.2f} "
                f"GFLOP a frame; levels {', '.join(shapes)}; masks: {source.meaning}")

    # featurize
    started = time.perf_counter()
    logged = cli.tracked(mode if group.main else "disabled", "featurize", vars(args), used)
    making = (new_folder(out, "features", args.overwrite, inputs, json.dumps(meta | paths))
              if group.main else contextlib.nullcontext(beside(out, "partial")))
    with logged as log:
        with making as place:
            group.wait()
            write_arrays(place, meta, rows, source.meaning, featurizer, device, threads, group)
            group.wait()
            if group.main:
                write_json(place / "paths.json", paths)
                digests = {file.name: sha256(file) for file in sorted(place.glob("*.npy"))}
                write_json(place / "meta.json", meta | {"sha256": digests})
            if group.main and source.annotated:
                masks = np.load(place / "masks.npy", mmap_mode="r")  # without one, all background
                pixels = sum(np.bitwise_count(mask).sum(dtype=int) for mask in masks)
                share = pixels / (sum(labelled) * math.prod(size))
                print(f"foreground: {share:.2%} of all pixels")
                if not 0.001 <= share <= 0.9:
                    print("warning: that is hardly an object; are these the right masks?")
        if log:
            files = {path.name: path for path in out.iterdir()}
            facts = {key: meta[key] for key in ("featurizer", "levels", "weights", "size")}
            log.artifact(f"{args.featurizer}-featurized-{split}", "featurized-data", files, facts)
    if group.main:
        print(f"seconds: {time.perf_counter() - started:.3f} ({len(rows)} frames)")
        cli.say(f"wrote {out}")
        cli.say(f"next: python train.py --features {shlex.quote(str(out))}")


if __name__ == "__main__":
    sys.exit(cli.run(main, several=True))
