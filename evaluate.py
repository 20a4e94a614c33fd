"""Run a trained decoder on features, write its masks, and score them where annotations exist.

    python evaluate.py --model runs/simple --features features/alexnet-val
    python evaluate.py --data holiday.mp4   # your own clip, by the decoder that comes with it
    python evaluate.py --predictions MASKS --data DAVIS --split val   # score masks from anywhere

writes results/<name>/: outputs/*.png (255 * probability), paths.json, metadata.json, frames.csv,
with annotations scores.json, and report.html with overlay videos of the clips in overlays/.
"""
import argparse
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
from vos import cli, clips, featurizers, results, sources, video
from vos.inputs import BadInput
from vos.layers import count_flops
from vos.metrics import MEASURES, PROTOCOLS
from vos.outputs import check_output, new_folder, write_json
from vos.refine import adapt

PRETRAINED = Path(__file__).with_name("pretrained") / "temporal.pt"


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--model", help="run folder, model.pt or wandb:... (default: pretrained)")
    group.add_argument("--features", help="feature folder written by featurize.py, or wandb:...")
    group.add_argument("--data", help="frames, a video or wandb:... to featurize on the fly; "
                       "beside --features, where their frames are now")
    group.add_argument("--split", help="the split of a DAVIS root in --data")
    group.add_argument("--masks", type=Path, help="masks of --data by clip and frame name")
    group.add_argument("--predictions", help="score this folder of mask PNGs instead: "
                       "<clip>/<frame>.png, or one a frame in order; or wandb:...")
    group.add_argument("--weights", help="the featurizer's, for --data (default: pretrained)")
    group.add_argument("--resident", choices=["device", "disk"],
                       help="where features are kept (default: on the device, if they fit)")
    group.add_argument("--adapt", type=cli.count(10**6, least=0), metavar="STEPS",
                       help="to train on a clip's own sure predictions (default: the decoder's)")
    group.add_argument("--refine", choices=["guided", "none"],
                       help="upsample masks along the frames' edges (default: the decoder's)")
    group = parser.add_argument_group("results")
    group.add_argument("--out", type=Path, help="folder to write (default: results/<run>)")
    group.add_argument("--protocol", choices=PROTOCOLS, default="all", help="frames that J and F "
                       "are over: all, or davis2016 without each clip's first and last")
    group.add_argument("--no-pictures", action="store_true", help="no report and no overlays")
    group.add_argument("--video", choices=["gif", "mp4", "none"], default="gif", help="of overlays")
    cli.add_run_flags(parser)
    args = parser.parse_args()

    if args.data and not (args.model or args.features or args.predictions):
        args.model = str(PRETRAINED)
    if not (args.predictions and args.data) and not (args.model and (args.features or args.data)):
        raise BadInput("--model: expected with --features or --data; or --predictions with --data")
    useless = {
        "predictions": ["model", "features", "weights", "resident", "adapt", "refine"],
        "features": ["split", "masks", "weights"], "data": ["resident"]}
    source = next(name for name in useless if getattr(args, name))
    for flag in useless[source]:
        if getattr(args, flag) is not None:
            raise BadInput(f"--{flag}: has no effect beside --{source}; leave it out")
    return args


def featurize(source: sources.Source, model_path: Path, model: dict, weights: str | None,
              device: torch.device, threads: int) -> tuple[models.Decoder, data.Features]:
    """Return the decoder and features for frames made about as large as its training frames."""
    height, width = source.sizes[0]
    scale = math.sqrt(math.prod(model["size"]) / (height * width))
    size = round(height * scale), round(width * scale)
    featurizer = featurizers.build_featurizer(model["featurizer"], list(model["shapes"]), weights,
                                              "auto", device)
    if featurizer.digest != model["weights"]:
        raise BadInput(f"{model_path}: was trained on features of other {model['featurizer']} "
                       "weights; pass the same --weights as to featurize.py")
    shapes = {level: (c, h, w) for level, (c, h, w) in featurizer.shapes(size).items()}
    decoder = models.load_model(model_path, size, shapes)[0]
    cli.say(f"featurizing {len(source.frames)} frames at {size[1]} x {size[0]}")

    ranges = sources.clip_ranges(source.frames)
    parts = sources.featurize_clips(featurizer, source.frames, ranges, size,
                                    "float16", decoder.cues > 0, device, threads)
    levels = [torch.cat(level).to(device) for level in zip(*parts)]
    return decoder, data.Features(list(shapes), levels, device, torch.arange(len(source.frames)))


def predict_clips(decoder: models.Decoder, features: data.Features, frames: list[clips.Frame],
                  shown: Iterator[np.ndarray] | None) -> Iterator[np.ndarray]:
    """Yield each frame's mask, uint8 [H, W]; the decoder is adapted to each clip if it asks."""
    for first, stop in sources.clip_ranges(frames):
        index = torch.arange(first, stop)
        tuned = adapt(decoder, features, index) if decoder.adapt_steps else decoder
        for pixels in models.predict(tuned, features, index, 16, shown):
            yield pixels.cpu().numpy()


def choose_masks(args: argparse.Namespace, decoder: models.Decoder) -> bool:
    """Apply --adapt to a decoder; return whether masks follow the frames' edges."""
    name = type(decoder).__name__
    if args.adapt and not decoder.adapt_steps:
        raise BadInput(f"--adapt {args.adapt}: {name} is not made to be adapted; leave it out")
    if args.refine == "guided" and decoder.returns != "logits":
        raise BadInput(f"--refine guided: needs logits, and {name} returns {decoder.returns}")
    decoder.adapt_steps = decoder.adapt_steps if args.adapt is None else args.adapt
    return decoder.guided if args.refine is None else args.refine == "guided"


def open_model(args: argparse.Namespace, path: Path, folder_path: Path | None, root: Path | None,
               device: torch.device, threads: int):
    """Return what --model predicts: the source, its masks one by one, and metadata.json."""
    decoder, model = models.load_model(path)
    guided = choose_masks(args, decoder)
    if folder_path:
        folder = data.open_features(folder_path)
        folder.check_fit(model, args.model, decoder.cues > 0)
        features = data.load_features(folder, list(model["shapes"]), decoder.cues > 0, device,
                                      args.resident, labelled=False)
        pictures = guided or not args.no_pictures
        source = sources.open_folder(folder, root, pictures, features.masks, threads)
    else:
        source = sources.open_frames(root, args.split, args.masks, threads)
        decoder, features = featurize(source, path, model, args.weights, device, threads)
        choose_masks(args, decoder)

    shown = clips.read_images(source.frames, threads) if guided else None
    own = sum(weight.numel() for weight in decoder.to(device).parameters())
    flops = count_flops(decoder, features.batch(torch.tensor([0])))
    metadata = {
        "nparams": own + model["featurizer_parameters"], "decoder": model["decoder"],
        "featurizer": model["featurizer"], "flops_per_frame": flops + model["featurizer_flops"],
        "frames": len(source.frames), "annotated": source.annotated, "size": source.sizes[0],
        "sizes": source.sizes if len(set(source.sizes)) > 1 else None}
    return source, predict_clips(decoder, features, source.frames, shown), metadata


def main() -> None:
    args = parse_args()
    mode = cli.wandb_mode(args.wandb)
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = args.threads or os.cpu_count() or 2
    device = cli.choose_device(args.device)
    if args.video == "mp4" and not args.no_pictures:
        video.find_ffmpeg()

    # open what the flags name, and check that it fits together
    used: list[str] = []
    given = args.model or args.predictions
    scored, folder, root = (cli.fetch(p, mode, used) for p in (given, args.features, args.data))
    inside = scored.is_file() or given.startswith("wandb:")  # which has a folder of versions
    name = (scored.parent if inside else scored).resolve().name
    if scored == PRETRAINED:
        print(f"no --model: takes {PRETRAINED.parent.name}/{PRETRAINED.name}, see the README there")
        name = root.resolve().stem
    out = args.out or Path("results") / name
    inputs = [path for path in (scored, folder, root, args.masks) if path]
    check_output(out, "results", args.overwrite, inputs)
    files, meaning = None, {"grey": "above 127"}  # of our own outputs
    if args.predictions:
        source = sources.open_frames(root, args.split, args.masks, threads)
        if not source.annotated:
            raise BadInput(f"{root}: has no annotations to score {scored} with; pass --masks")
        files = sources.find_predictions(scored, source.frames, threads)
        meaning = clips.decide_meaning(files, threads, predictions=True)
        masks = (clips.read_mask(file, meaning) * np.uint8(255) for file in files)
        metadata = {"predictions": given, "meaning": meaning, "frames": len(files)}
    else:
        source, masks, metadata = open_model(args, scored, folder, root, device, threads)

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
            facts, curve = metadata | {"command": command}, scored / "curves.svg"
            results.write_pictures(place, name, source, files, meaning, rows, scores, facts,
                                   args.video, curve)
        if log:
            split = args.split or "val"
            results.log(log, place, metadata, name, split, source, files, rows, scores)

    if scores:
        print(f"protocol {args.protocol}; mean_iou is over frames, J and F are means over clips")
        print(f"{'clip':<24}{'frames':>10}" + "".join(f"{key:>10}" for key in MEASURES))
        for clip, row in [*scores["per_clip"].items(), ("all", scores)]:
            cells = ["-" if row[key] is None else f"{row[key]:.4f}" for key in MEASURES]
            print(f"{clip:<24}{row['frames']:>10}" + "".join(f"{cell:>10}" for cell in cells))
    print(f"seconds: predict, write and score {seconds:.3f} ({len(rows) / seconds:,.0f} frames/s)")
    look = "" if args.no_pictures else f"; open {out / 'report.html'}"
    cli.say(f"wrote {out}: {len(rows)} frames{look}")
    if not args.predictions:
        cli.say(f"next: python package.py --results {shlex.quote(str(out))}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
