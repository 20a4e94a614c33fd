"""Run a trained decoder on features, write its masks, and score them where annotations exist.

    python evaluate.py --model runs/simple --features features/alexnet-val
    python evaluate.py --model runs/temporal --data holiday.mp4       # your own clip, featurized on the fly
    python evaluate.py --predictions MASKS --data DAVIS --split val   # score masks from anywhere

writes results/<name>/: outputs/*.png (255 * probability), paths.json, metadata.json, frames.csv, with
annotations scores.json, and report.html with overlay videos of the clips in overlays/.

N frames, C channels, h w feature grid, H W frame.
"""
import argparse
import itertools
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import data
import models
from vos import cli, clips, cues, distributed, featurizers, images, results, sources, video
from vos.inputs import BadInput
from vos.layers import count_flops, count_parameters
from vos.metrics import PROTOCOLS
from vos.outputs import check_output, new_folder, write_json
from vos.refine import adapt
from vos.sources import Source, clip_ranges

BATCH = 16  # frames at a time


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--model", help="run folder or model.pt written by train.py, or wandb:...")
    group.add_argument("--features", help="feature folder written by featurize.py, or wandb:...")
    group.add_argument("--data", help="frames, a video or wandb:... to featurize on the fly; beside "
                       "--features, where their frames are now")
    group.add_argument("--split", help="the split of a DAVIS root in --data")
    group.add_argument("--masks", type=Path, help="masks of --data by clip and frame name, to score")
    group.add_argument("--predictions", help="score this folder of mask PNGs instead: "
                       "<clip>/<frame>.png, or one a frame in order; or wandb:...")
    group.add_argument("--weights", help="the featurizer's weights, for --data (default: pretrained)")
    group.add_argument("--resident", choices=["device", "disk"],
                       help="where features are kept (default: on the device, if they fit)")
    group.add_argument("--adapt", type=cli.count(10**6, least=0), metavar="STEPS",
                       help="train on each clip's own confident predictions first (default: as the "
                       "decoder asks)")
    group.add_argument("--views", type=cli.count(2), help="2: average a frame and its mirror image, "
                       "for fpn and temporal (default: 2)")
    group.add_argument("--refine", choices=["guided", "none"], help="upsample masks along the frames' "
                       "edges, which needs the frames (default: as the decoder asks)")
    group = parser.add_argument_group("results")
    group.add_argument("--out", type=Path, help="folder to write (default: results/<run>)")
    group.add_argument("--protocol", choices=PROTOCOLS, default="all", help="frames that J "
                       "and F are over: all, or davis2016 without each clip's first and last")
    group.add_argument("--no-pictures", action="store_true", help="write no report and no overlays")
    group.add_argument("--video", choices=["gif", "mp4", "none"], default="gif",
                       help="kind of the overlay videos (default: gif)")
    cli.add_run_flags(parser)
    args = parser.parse_args()
    if args.predictions and (args.model or args.features or not args.data):
        raise BadInput("--predictions: goes with --data, and without --model and --features")
    if not args.predictions and not (args.model and (args.features or args.data)):
        raise BadInput("--model: expected with --features or --data; or --predictions with --data")
    if args.features and (args.split or args.masks or args.weights):
        raise BadInput("--split, --masks, --weights: are for --data alone, not with --features")
    return args


# --- from frames to masks -----------------------------------------------------------------------


def featurize(source: Source, model_path: Path, model: dict, args: argparse.Namespace,
              device: torch.device, threads: int) -> tuple[models.Decoder, data.Features]:
    """Featurize frames as the model's training frames were; return its decoder and the features.

    Frames keep their shape and get about as many pixels as the training frames had.
    """
    height, width = source.sizes[0]
    scale = math.sqrt(math.prod(model["size"]) / (height * width))
    size = tuple(model["size"]) if abs(scale - 1) < 1e-3 else (round(height * scale),
                                                               round(width * scale))
    featurizer = featurizers.build_featurizer(model["featurizer"], model["featurizer_levels"],
                                              args.weights, featurizers.choose_compute("auto", device))
    if featurizer.digest != model["weights"]:
        raise BadInput(f"{args.model}: was trained on features of other {model['featurizer']} weights; "
                       "pass the same --weights as to featurize.py")
    shapes = {level: tuple(shape) for level, shape in featurizer.shapes(size).items()
              if level in model["shapes"]}
    decoder = models.load_model(model_path, size, shapes)[0].to(device)

    total = len(source.frames) * sum(map(math.prod, shapes.values())) * 2
    cli.say(f"featurizing {len(source.frames)} frames at {size[1]} x {size[0]}: {total / 1e6:,.0f} MB")
    shown = clips.read_images(source.frames, threads)
    featurizer.to(device)
    parts = []
    for _ in cli.progress(range(0, len(source.frames), BATCH), "featurize"):
        batch = list(itertools.islice(shown, BATCH))
        maps = featurizers.run_featurizer(featurizer, batch, size, device)
        named = dict(zip(featurizer.levels, maps))
        parts.append([named[level].half() for level in shapes])
    levels = [torch.cat(level) for level in zip(*parts)]
    if decoder.cues:
        runs = clip_ranges(source.frames)
        levels += [torch.cat([cues.clip_cues(level[first:stop]).half() for first, stop in runs])
                   for level in levels]
    return decoder, data.Features(list(shapes), levels, device, torch.arange(len(source.frames)))


def predict_clips(decoder: models.Decoder, features: data.Features, frames: list[clips.Frame],
                  shown: Iterator[np.ndarray] | None) -> Iterator[np.ndarray]:
    """Yield the mask of every frame, uint8 [H, W]; the decoder is adapted to each clip if it asks."""
    for first, stop in clip_ranges(frames):
        index = torch.arange(first, stop)
        tuned = adapt(decoder, features, index) if decoder.adapt_steps else decoder
        for pixels in models.predict(tuned, features, index, BATCH, shown):
            yield pixels.cpu().numpy()


# --- the command -------------------------------------------------------------------------------


def choose_masks(args: argparse.Namespace, decoder: models.Decoder) -> bool:
    """Apply --views and --adapt to a decoder; return whether masks follow the frames' edges.

    Raises BadInput for a flag that the decoder has no use for.
    """
    name = type(decoder).__name__
    if args.views and args.views > decoder.views:
        raise BadInput(f"--views {args.views}: {name} looks at frames one way only; leave it out")
    if args.adapt and not decoder.adapt_steps:
        raise BadInput(f"--adapt {args.adapt}: {name} is not made to be adapted; leave it out")
    if args.refine == "guided" and decoder.returns != "logits":
        raise BadInput(f"--refine guided: needs logits, and {name} returns {decoder.returns}")
    decoder.views = args.views or decoder.views
    decoder.adapt_steps = decoder.adapt_steps if args.adapt is None else args.adapt
    return decoder.guided if args.refine is None else args.refine == "guided"


def open_model(args: argparse.Namespace, model_path: Path, folder_path: Path | None,
               root: Path | None, device: torch.device, threads: int):
    """Return what --model predicts: the source, its masks one by one, and metadata.json."""
    decoder, model = models.load_model(model_path)
    if folder_path:
        folder = data.open_features(folder_path)
        folder.check_fit(model, args.model, decoder.cues > 0)
        guided = choose_masks(args, decoder)
        features = data.load_features(folder, list(model["shapes"]), decoder.cues > 0, device,
                                      args.resident, labelled=False)
        source = sources.open_folder(folder, root, guided or not args.no_pictures, features.masks,
                                     threads)
        decoder = decoder.to(device)
    else:
        source = sources.open_frames(root, args.split, args.masks, threads)
        decoder, features = featurize(source, model_path, model, args, device, threads)
        guided = choose_masks(args, decoder)

    shown = clips.read_images(source.frames, threads) if guided else None
    own = count_parameters(decoder)
    flops = count_flops(decoder, [level.shape[1:] for level in features.levels])
    metadata = {
        "nparams": own + model["featurizer_parameters"], "decoder": model["decoder"],
        "decoder_parameters": own, "featurizer": model["featurizer"],
        "flops_per_frame": flops + model["featurizer_flops"], "frames": len(source.frames),
        "annotated": source.annotated, "size": list(source.sizes[0]),
        "sizes": None if len(set(source.sizes)) == 1 else [list(size) for size in source.sizes]}
    return source, predict_clips(decoder, features, source.frames, shown), metadata


def open_predictions(args: argparse.Namespace, folder: Path, root: Path, threads: int):
    """Return what --predictions are scored on: the source, the masks one by one, their files."""
    source = sources.open_frames(root, args.split, args.masks, threads)
    if not source.annotated:
        raise BadInput(f"{args.data}: has no annotations to score {args.predictions} with")
    files = sources.find_predictions(folder, source.frames)
    meaning = images.decide_meaning(files, threads)
    print(f"predictions: {meaning}")
    masks = clips.in_threads(lambda item: sources.read_prediction(*item, meaning),
                             zip(files, source.sizes), threads, ahead=64)
    return source, masks, files, meaning


def main() -> None:
    args = parse_args()
    distributed.refuse_several()
    mode = cli.wandb_mode(args.wandb)
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = args.threads or os.cpu_count() or 2
    device = cli.choose_device(args.device)
    if not args.no_pictures:
        video.check_video(args.video)

    # open what the flags name, and check that it fits together
    used: list[str] = []
    flags = (args.model or args.predictions, args.features, args.data)
    scored, folder_path, root = (cli.fetch(source, mode, used) for source in flags)
    name = used[0].rpartition("/")[2].partition(":")[0] if flags[0].startswith("wandb:") else \
        (scored.parent if scored.is_file() else scored).resolve().name
    out = args.out or Path("results") / name
    inputs = [path for path in (scored, folder_path, root, args.masks) if path]
    check_output(out, "results", args.overwrite, inputs)
    files, meaning = None, {"grey": "above 127"}  # of our own outputs
    if args.predictions:
        source, masks, files, meaning = open_predictions(args, scored, root, threads)
        metadata = {"predictions": args.predictions, "frames": len(source.frames)}
    else:
        source, masks, metadata = open_model(args, scored, folder_path, root, device, threads)

    # predict, write, score, draw
    command = f"python {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"
    job = "val-eval" if source.annotated else "run-test"
    logged = cli.tracked(mode, job, {**vars(args), "command": command}, used)
    with new_folder(out, "results", args.overwrite, inputs) as place, logged as log:
        started = time.perf_counter()
        rows = results.write_outputs(place, masks, source, threads, write=not files)
        seconds = time.perf_counter() - started
        write_json(place / "metadata.json", metadata)
        scores = results.write_scores(place, rows, args.protocol)
        files = files or [place / f"outputs/{row['index']:05d}.png" for row in rows]
        if not args.no_pictures:
            facts = {**metadata, "command": command}
            curve = scored / "curves.svg" if scored.is_dir() else Path()
            results.write_pictures(place, name, source, files, meaning, rows, scores, facts,
                                   args.video, curve)
        if log:
            results.log(log, place, metadata, name, args.split or "val", source, files, rows, scores)

    if scores:
        results.print_scores(scores)
    print(f"seconds: predict, write and score {seconds:.3f} ({len(rows) / seconds:,.0f} frames/s)")
    look = "" if args.no_pictures else f"; open {out / 'report.html'}"
    cli.say(f"wrote {out}: {len(rows)} frames{look}")
    if not args.predictions:
        cli.say(f"next: python package.py --results {cli.quote(out)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
