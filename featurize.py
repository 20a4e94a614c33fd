"""Turn frames into features: a frozen, pretrained image network runs over every frame once.

    python featurize.py --data DAVIS --split train --featurizer alexnet

writes features/alexnet-train/ (features.npy, masks.npy, paths.json, meta.json), 0.18 MB a frame.
A run that was stopped goes on, clip by clip, when the same command is given again.
"""
import argparse
import shlex
import sys
import time
from pathlib import Path

from vos import cli, clips, featurizers, sources
from vos.inputs import BadInput
from vos.outputs import check_output


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
                       help="views of every second frame to train on too: zoom1.5, zoom0.7")
    group.add_argument("--cues", action=argparse.BooleanOptionalAction, help="store what whole "
                       "clips tell about each position (default: with several levels)")
    group.add_argument("--weights", help="a state dict, or 'random' (default: pretrained)")
    group.add_argument("--dtype", choices=["float16", "float32"], default="float16",
                       help="of what is stored (default: float16)")
    group.add_argument("--compute", choices=["auto", "float32", "bfloat16"], default="auto",
                       help="arithmetic of the network (default: bfloat16 where that is fast)")
    cli.add_run_flags(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    group, device = cli.join(cli.choose_device(args.device, args.threads))

    # find the frames, and check them and all else before anything long
    used: list[str] = []
    root = cli.fetch(args.data, args.wandb, used)
    split = args.split or (root.parent.name.rpartition("-")[2] if used else root.resolve().stem)
    out = args.out or Path("features") / f"{args.featurizer.replace(':', '-')}-{split}"
    inputs = [path for path in (root, args.masks) if path]
    check_output(out, "features", args.overwrite, inputs)
    source = sources.open_frames(root, args.split, args.masks, args.limit)
    if args.views and not source.annotated:
        raise BadInput(f"{root}: has no annotations, and --views are only for training")
    featurizer = featurizers.build_featurizer(args.featurizer, args.levels, args.weights,
                                              args.compute, device)
    size = args.size or source.sizes[0]
    with_cues = len(featurizer.levels) > 1 if args.cues is None else args.cues
    plan = sources.plan_features(source, root, featurizer, size, with_cues, args.dtype, args.views,
                                 args.split, args.masks)
    if group.main:
        meta = plan.meta
        cli.say(f"{len(plan.rows)} frames and views, {size[1]} x {size[0]}; {args.featurizer} on "
                f"{device} in {meta['preprocessing']['compute']}, {meta['parameters']:,} "
                f"parameters, {meta['flops_per_frame'] / 1e9:.2f} GFLOP a frame; levels "
                f"{', '.join(featurizer.levels)}; masks: {source.meaning}")

    # featurize
    started = time.perf_counter()
    logged = cli.tracked(args.wandb if group.main else "disabled", "featurize", vars(args), used)
    with logged as log:
        sources.write_features(out, plan, featurizer, device, args.overwrite, inputs, group)
        if log:
            files = {path.name: path for path in out.iterdir()}
            facts = {key: plan.meta[key] for key in ("featurizer", "levels", "weights", "size")}
            log.artifact(f"{args.featurizer}-featurized-{split}", "featurized-data", files, facts)
    if group.main:
        print(f"seconds: {time.perf_counter() - started:.3f} ({len(plan.rows)} frames)")
        validates = source.annotated and split in ("val", "test")
        cli.say(f"wrote {out}{', to pass to train.py as --val-features' if validates else ''}")
        if source.annotated and not validates:
            single, pyramid = len(featurizer.levels) == 1, "temporal" if with_cues else "fpn"
            command = ["--features", str(out), "--decoder", "simple" if single else pyramid]
            cli.say(f"next: python train.py {shlex.join(command)}")


if __name__ == "__main__":
    sys.exit(cli.run(main, several=True))
