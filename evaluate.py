"""Run a trained decoder on features, write its masks, and score them where annotations exist.

    python evaluate.py --model runs/simple --features features/alexnet-val
    python evaluate.py --data holiday.mp4   # your own clip, by the decoder that comes with it
    python evaluate.py --predictions MASKS --data DAVIS --split val   # score masks from anywhere

writes results/<name>/: outputs/*.png (255 * probability), paths.json, metadata.json, frames.csv,
with annotations scores.json, and report.html with overlay videos of the clips in overlays/.
"""
import argparse
import math
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import data
import models
from vos import cli, clips, featurizers, results, sources, tracking
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
    group.add_argument("--masks", type=Path, help="masks drawn of some frames, by clip and frame "
                       "name, to adapt to and to keep; beside --predictions, to score with")
    group.add_argument("--predictions", help="score this folder of mask PNGs instead: "
                       "<clip>/<frame>.png, or one a frame in order; or wandb:...")
    group.add_argument("--weights", help="the featurizer's, for --data (default: pretrained)")
    group.add_argument("--adapt", type=cli.count(10**6, least=0), metavar="STEPS",
                       help="to train on each clip (default: the decoder's)")
    group.add_argument("--refine", choices=["guided", "none"],
                       help="upsample masks along the frames' edges (default: the decoder's)")
    group = parser.add_argument_group("results")
    group.add_argument("--out", type=Path, help="folder to write (default: results/<run>)")
    group.add_argument("--protocol", choices=PROTOCOLS, default="all", help="frames that J and F "
                       "are over: all, or davis2016 without each clip's first and last")
    group.add_argument("--no-pictures", action="store_true", help="no report and no overlays")
    cli.add_run_flags(parser)
    args = parser.parse_args()

    if args.data and not (args.model or args.features or args.predictions):
        args.model = str(PRETRAINED)
    if not (args.predictions and args.data) and not (args.model and (args.features or args.data)):
        raise BadInput("--model: expected with --features or --data; or --predictions with --data")
    useless = {
        "predictions": ["model", "features", "weights", "adapt", "refine"],
        "features": ["split", "weights"]}
    for source in [name for name in useless if getattr(args, name)]:
        for flag in useless[source]:
            if getattr(args, flag) is not None:
                raise BadInput(f"--{flag}: has no effect beside --{source}; leave it out")
    return args


def open_decoders(path: Path) -> tuple[dict[str, list[Path]], dict]:
    """Return the model files of each clip, "" for all others, and what a model says of itself.

    Of a run's folds those that held the clip out, of its seeds all, after their last steps.
    """
    trainings = sorted([*path.glob("fold-*/checkpoints"), *path.glob("seed-*/checkpoints")])
    if not trainings:
        return {"": [path]}, models.load_model(path)[1]
    files: dict[str, list[Path]] = {}
    for training in trainings:
        file = max(training.glob("model-*.pt"))
        model = models.load_model(file)[1]
        for clip in model["held_out"] or [""]:
            files.setdefault(clip, []).append(file)
    return files, model


def keep_features(place: Path, source: sources.Source, root: Path, model: dict,
                  args: argparse.Namespace, device: torch.device) -> None:
    """Write features of frames, made about as large as the model's were, unless they are there."""
    height, width = source.sizes[0]
    scale = math.sqrt(math.prod(model["size"]) / (height * width))
    size = round(height * scale), round(width * scale)
    featurizer = featurizers.build_featurizer(model["featurizer"], list(model["shapes"]),
                                              args.weights, "auto", device)
    if featurizer.digest != model["weights"]:
        raise BadInput(f"{args.model}: was trained on features of other {model['featurizer']} "
                       "weights; pass the same --weights as to featurize.py")
    frames = [frame._replace(annotation=None) for frame in source.frames]
    cues = models.DECODERS[model["decoder"]].cues > 0
    plan = sources.plan_features(source._replace(frames=frames, meaning=None), root, featurizer,
                                 size, cues, split=args.split)
    if sources.is_fresh(place, plan):
        print(f"takes the features that are in {place}")
        return
    cli.say(f"featurizing {len(frames)} frames at {size[1]} x {size[0]} into {place}, for the next "
            "time too")
    sources.write_features(place, plan, featurizer, device, args.overwrite, [root])


def part_drawn(source: sources.Source, masks: Path | None) -> tuple[sources.Source, sources.Source]:
    """Return the source without, and with only, the masks in a folder: they are not scored."""
    frames = [frame._replace(annotation=None) for frame in source.frames]
    if not masks:
        return source, source._replace(frames=frames)
    frames = clips.pair_masks(frames, masks)
    clips.check_frames(frames)
    meaning = clips.decide_meaning([frame.annotation for frame in frames])
    left = [own._replace(annotation=None) if given.annotation else own
            for own, given in zip(source.frames, frames)]
    return source._replace(frames=left), sources.Source(frames, source.sizes, meaning)


def predict_clips(decoders: dict[str, list[models.Decoder]], features: data.Features,
                  source: sources.Source, drawn: sources.Source,
                  shown: Iterator[np.ndarray] | None, adapts: int | None) -> Iterator[np.ndarray]:
    """Yield each frame's mask, uint8 [H, W]: as drawn, or by the clip's decoders adapted to it."""
    for first, stop in sources.clip_ranges(source.frames):
        index = torch.arange(first, stop)
        given = [row for row in range(first, stop) if drawn.frames[row].annotation]
        tuned = decoders.get(source.frames[first].clip) or decoders[""]
        steps = tuned[0].drawn_steps if given else tuned[0].adapt_steps
        if steps if adapts is None else adapts:
            learned = pool_drawn(tuned[0], given, drawn)
            tuned = [adapt(each, features, index, *learned, adapts or steps) for each in tuned]
        masks = models.predict(models.Mean(tuned), features, index, 16, shown)
        for row, pixels in enumerate(masks, first):
            mask = drawn.mask(row)
            yield pixels.cpu().numpy() if mask is None else mask * np.uint8(255)


def pool_drawn(decoder: models.Decoder, given: list[int],
               drawn: sources.Source) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows that are drawn, int64 [m], and their targets [m, gh, gw]."""
    masks = np.zeros((len(given), *decoder.size), bool)
    for mask, row in zip(masks, given):
        mask[:] = clips.resize(drawn.mask(row), decoder.size)
    packed = torch.from_numpy(np.packbits(masks, axis=2))
    alone = data.Features([], [], decoder.area.device, torch.arange(len(given)), packed)
    return torch.tensor(given, dtype=torch.long), data.pool_masks(alone, decoder.cells)


def open_model(args: argparse.Namespace, path: Path, folder_path: Path | None, root: Path | None,
               out: Path, device: torch.device):
    """Return what --model predicts: the source, its masks one by one, metadata.json."""
    files, model = open_decoders(path)
    decoder = models.DECODERS[model["decoder"]]
    for flag in ("adapt", "refine", "masks") if decoder.returns != "logits" else ():
        if getattr(args, flag) not in (None, 0, "none"):
            raise BadInput(f"--{flag} {getattr(args, flag)}: needs logits, and "
                           f"{model['decoder']} returns {decoder.returns}; leave it out")
    guided = decoder.guided if args.refine is None else args.refine == "guided"
    cues = decoder.cues > 0
    if folder_path:
        folder = data.open_features(folder_path)
        folder.check_fit(model, args.model, cues)
        source = sources.open_folder(folder, root, guided or not args.no_pictures)
    else:
        source = sources.open_frames(root, args.split, None)
    names = {frame.clip for frame in source.frames}
    for clip in sorted(names - files.keys()) if "" not in files else []:
        raise BadInput(f"{path}: no fold held out the clip {clip}; expected one for each clip")
    seen = names & set(model.get("clips", [])) if "" in files else set()
    if seen and source.annotated:
        print(f"note: trained on {len(seen)} of these {len(names)} clips; their scores say little")
    source, drawn = part_drawn(source, args.masks)

    if not folder_path:
        folder_path = out.with_name(f"{out.name}-features")
        keep_features(folder_path, source, root, model, args, device)
        folder = data.open_features(folder_path)
    shapes = {level: folder.shapes[level] for level in model["shapes"]}
    features = data.load_features(folder, list(shapes), cues, device, labelled=False)
    if not source.meaning:
        source = source._replace(masks=features.masks)

    shown = clips.read_images(source.frames) if guided else None
    decoders = {clip: [models.load_model(file, folder.size, shapes)[0].to(device)
                       for file in several] for clip, several in files.items()}
    masks = predict_clips(decoders, features, source, drawn, shown, args.adapt)
    whole = models.Mean(next(iter(decoders.values())))
    own = sum(weight.numel() for weight in whole.parameters())
    flops = count_flops(whole, features.batch(torch.tensor([0])))
    metadata = {
        "nparams": own + model["featurizer_parameters"], "decoder": model["decoder"],
        "featurizer": model["featurizer"], "flops_per_frame": flops + model["featurizer_flops"],
        "frames": len(source.frames), "annotated": source.annotated, "size": source.sizes[0],
        "sizes": source.sizes if len(set(source.sizes)) > 1 else None,
        "val_iou": model.get("val_iou")}
    return source, masks, metadata


def ask_for_mask(args: argparse.Namespace, out: Path, frame: clips.Frame, several: bool) -> None:
    """Print the commands by which the frame least sure of gets drawn, and all goes on from it."""
    masks = args.masks or Path("drawn")
    folder = masks / frame.clip if several else masks
    again = sys.argv[1:] + ["--masks", str(masks)] * (not args.masks)
    again += ["--overwrite"] * (not args.overwrite)
    cli.say(f"least sure of frame {frame.name} of {frame.clip}: correct its mask in any editor, by "
            f"the frame beside it in {out / 'draw'}")
    start = shlex.join(["cp", f"{out}/draw/{frame.name}.png", str(folder)])
    cli.say(f"next: mkdir -p {shlex.quote(str(folder))} && {start}")
    cli.say(f"then: python {shlex.join(['evaluate.py', *again])}")


def main() -> None:
    args = parse_args()
    device = cli.choose_device(args.device, args.threads)

    # open what the flags name, and check that it fits together
    used: list[str] = []
    given = args.model or args.predictions
    scored, folder, root = (cli.fetch(source, args.wandb, used)
                            for source in (given, args.features, args.data))
    inside = scored.is_file() or given.startswith("wandb:")  # which has a folder of versions
    name = (scored.parent if inside else scored).resolve().name
    if scored == PRETRAINED:
        print(f"no --model: takes {PRETRAINED.parent.name}/{PRETRAINED.name}, see the README there")
        name = (root or folder).resolve().stem
    out = args.out or Path("results") / name
    inputs = [path for path in (scored, folder, root, args.masks) if path]
    check_output(out, "results", args.overwrite, inputs)
    files, meaning = None, {"grey": "above 127"}  # of our own outputs
    if args.predictions:
        source = sources.open_frames(root, args.split, args.masks)
        if not source.annotated:
            raise BadInput(f"{root}: has no annotations to score {scored} with; pass --masks")
        files = sources.find_predictions(scored, source.frames)
        meaning = clips.decide_meaning(files, predictions=True)
        masks = (clips.read_mask(file, meaning) * np.uint8(255) for file in files)
        metadata = {"predictions": given, "meaning": meaning, "frames": len(files)}
    else:
        source, masks, metadata = open_model(args, scored, folder, root, out, device)

    # predict, write, score, draw
    command = f"python {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"
    job = "val-eval" if source.annotated else "run-test"
    logged = cli.tracked(args.wandb, job, {**vars(args), "command": command}, used)
    with new_folder(out, "results", args.overwrite, inputs) as place, logged as log:
        started = time.perf_counter()
        rows, doubts = results.write_outputs(place, masks, source, write=not files)
        seconds = time.perf_counter() - started
        write_json(place / "metadata.json", metadata)
        scores = results.write_scores(place, rows, args.protocol)
        files = files or [place / f"outputs/{row['index']:05d}.png" for row in rows]
        unsure = int(np.argmax(doubts))
        asks = not args.predictions and (args.masks or not (args.features or source.annotated))
        if asks and doubts[unsure]:
            results.write_unsure(place / "draw", source.frames[unsure], files[unsure], meaning)
        if not args.no_pictures:
            results.write_pictures(place, name, source, files, meaning, rows, scores,
                                   metadata | {"command": command}, scored / "curves.svg")
        if log:
            tracking.log_result(log, place, metadata, name, args.split, source, files, rows, scores)

    if scores:
        print(f"protocol {args.protocol}; mean_iou is over frames, J and F are means over clips")
        print(f"{'clip':<24}{'frames':>10}" + "".join(f"{key:>10}" for key in MEASURES))
        for clip, row in [*scores["per_clip"].items(), ("all", scores)]:
            cells = ["-" if row[key] is None else f"{row[key]:.4f}" for key in MEASURES]
            print(f"{clip:<24}{row['frames']:>10}" + "".join(f"{cell:>10}" for cell in cells))
        if metadata.get("val_iou") is not None:
            print(f"train.py's val IoU was {metadata['val_iou']:.4f}: on its validation clips, at "
                  "the featurizer's size, not adapted to clips, not along the frames' edges")
    print(f"seconds: predict, write and score {seconds:.3f} ({len(rows) / seconds:,.0f} frames/s)")
    look = "" if args.no_pictures else f"; open {out / 'report.html'}"
    cli.say(f"wrote {out}: {len(rows)} frames{look}")
    if asks and doubts[unsure]:
        ask_for_mask(args, out, source.frames[unsure], len({row["clip"] for row in rows}) > 1)
    elif not args.predictions:
        cli.say(f"next: python package.py --results {shlex.quote(str(out))}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
