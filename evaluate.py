"""Run a trained decoder on features, write its masks, and score them where annotations exist.

    python evaluate.py --model runs/simple --features features/alexnet-val
    python evaluate.py --model runs/fpn --data holiday.mp4          # your own clip: featurized on the fly
    python evaluate.py --predictions MASKS --data DAVIS --split val   # score masks from anywhere

writes results/<name>/: outputs/*.png (255 * probability), paths.json, metadata.json, and with annotations
scores.json, frames.csv, report.html; overlay videos of the clips in overlays/.
"""
import argparse
import csv
import io
import itertools
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import artifacts
import checkpoints
import clips
import data
import distributed
import inference
import metrics
import models
import pictures
import report
import resident
import tracking
from cli import Parser, add_run_flags, choose_device, positive_int, progress, run
from files import BadInput, plain, refuse_existing, whole_folder, write_json, write_text

KINDS = ("gif", "mp4", "none")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--model", default=None, help="run folder or model.pt written by train.py, or wandb:...")
    group.add_argument("--features", default=None, help="feature folder written by featurize.py, or wandb:...")
    group.add_argument("--data", default=None,
                       help="frames, a video or wandb:... to featurize on the fly; or, beside --features, where their frames are now")
    group.add_argument("--split", default=None, help="the split of a DAVIS root in --data")
    group.add_argument("--predictions", default=None,
                       help="score this folder of mask PNGs instead: <clip>/<frame>.png, or one per frame in order; or wandb:...")
    group.add_argument("--weights", default=None, help="the featurizer's weights, for --data (default: pretrained)")
    group.add_argument("--batch-size", type=positive_int, default=16, help="frames at a time (default: 16)")
    group.add_argument("--resident", choices=resident.RESIDENT, default=None,
                       help="where the features are kept (default: on the device, else host memory, else disk: the first that fits)")
    group.add_argument("--adapt", type=int, default=None, metavar="STEPS",
                       help="train on each clip's own confident predictions first, 0 for not (default: as the decoder asks)")
    group.add_argument("--views", type=int, choices=[1, 2], default=None,
                       help="average the logits of a frame and its mirror image, or not, for fpn and temporal (default: 2)")
    group.add_argument("--refine", choices=["auto", "guided", "none"], default="auto",
                       help="upsample masks along the frames' edges, which needs the frames (default: as the decoder asks)")
    group.add_argument("--no-verify", action="store_true", help="skip the SHA-256 check of the features")
    group = parser.add_argument_group("results")
    group.add_argument("--out", type=Path, default=None, help="folder to write (default: results/<name of the run>)")
    group.add_argument("--protocol", choices=metrics.PROTOCOLS, default="all",
                       help="frames that J and F are over: all, or davis2016 without each clip's first and last (default: all)")
    group.add_argument("--no-pictures", action="store_true", help="write no report and no overlays")
    group.add_argument("--video", choices=KINDS, default="gif", help="kind of the overlay videos (default: gif)")
    tracking.add_tracking_flags(parser)
    add_run_flags(parser)
    args = parser.parse_args()
    if not args.predictions and not (args.model and (args.features or args.data)):
        parser.error("expected --model with --features or --data, or --predictions with --data")
    if args.predictions and (args.model or not args.data):
        parser.error("--predictions goes with --data (and --split), and without --model")
    return args


# --- what to predict ---------------------------------------------------------------------------


class Source(NamedTuple):
    """Frames, and the masks to score them with."""

    frames: list[clips.Frame]
    sizes: list[tuple[int, int]]  # (H, W) of every frame
    masks: resident.Rows | None  # packed, of the whole feature folder; None: read each from its annotation, if it has one

    @property
    def annotated(self) -> bool:
        return self.masks is not None or self.frames[0].annotation is not None

    def mask(self, index: int) -> np.ndarray | None:
        """Return the mask of one frame, packed uint8 [H, ceil(W / 8)], at the frame's own size; None without one."""
        if self.masks is not None:
            return self.masks.index_select(0, torch.tensor([index]))[0].numpy()
        annotation = self.frames[index].annotation
        return None if annotation is None else np.packbits(clips.read_mask(annotation), axis=1)


def open_source(folder: data.FeatureFolder, root: Path | None, verify: bool, pictures: bool) -> Source:
    """The frames of a feature folder; masks come from it unless frames differ in size and were resized for it.

    Raises BadInput when the frames are needed, for pictures or masks, and are no longer where they were featurized.
    """
    frames, sizes = data.folder_frames(folder, root), folder.meta["sizes"]
    gone = [frame.image for frame in frames if not frame.image.is_file()] if pictures or sizes is not None else []
    if gone:
        raise BadInput(f"{gone[0]}: no such file, though {folder.path} was made from it; pass --data with the folder that its "
                       "frames are in now, or the wandb:... they come from" + (", or --no-pictures" if sizes is None else ""))
    masks = resident.load_masks(folder, torch.device("cpu"), verify=verify) if folder.masks and sizes is None else None
    return Source(frames, [tuple(size) for size in (sizes or [folder.size] * folder.frames)[:folder.originals]], masks)


def featurize(frames: list[clips.Frame], sizes: list[tuple[int, int]], model: dict, decoder: models.Decoder,
              args: argparse.Namespace, device: torch.device) -> tuple[models.Decoder, resident.Features]:
    """Featurize frames as the model's training frames were, in memory. Returns the decoder for their size, and the features.

    Frames keep their aspect ratio and get about as many pixels as the model's training frames had.
    """
    import featurizers  # brings torchvision: a second of imports that only clips without features pay
    height, width = sizes[0]
    scale = math.sqrt(math.prod(model["size"]) / (height * width))
    size = tuple(model["size"]) if abs(scale - 1) < 1e-3 else (round(height * scale), round(width * scale))
    featurizer = featurizers.build_featurizer(model["featurizer"], model["featurizer_levels"], args.weights, args.seed,
                                              featurizers.choose_compute("auto", device))
    if featurizer.digest != model["weights"]:
        raise BadInput(f"{args.model}: was trained on features of other {model['featurizer']} weights "
                       f"({model['weights']}, found {featurizer.digest}); pass the same --weights as to featurize.py")
    shapes, levels = featurizer.shapes(size), list(model["shapes"])
    total = len(frames) * sum(math.prod(shapes[level]) for level in levels) * 2
    print(f"featurizing {len(frames)} frames at {size[1]} x {size[0]}: {total / 1e6:,.0f} MB of features in memory")
    images = clips.read_images(frames, args.threads or os.cpu_count() or 2)
    featurizer.to(device)
    parts = []
    for _ in progress(range(0, len(frames), args.batch_size), "featurize"):
        batch = featurizers.run_featurizer(featurizer, list(itertools.islice(images, args.batch_size)), size, device)
        parts.append([level.half() for name, level in zip(featurizer.levels, batch) if name in levels])
    decoder = checkpoints.rebuild(model, decoder.state_dict(), {level: shapes[level] for level in levels}, size).to(device)
    return decoder, resident.Features([torch.cat(level) for level in zip(*parts)], device)


def read_predictions(folder: Path, frames: list[clips.Frame]) -> list[Path]:
    """Return the PNG of each frame: <clip>/<frame>.png, or as many PNGs as frames, in order of their names.

    Raises BadInput naming the first that is missing, or both counts.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder of masks")
    folder = folder / "outputs" if (folder / "outputs").is_dir() else folder
    flat = [path for path in clips.images_in(folder) if path.suffix.lower() == ".png"]
    if flat and len(flat) != len(frames):
        raise BadInput(f"{folder}: {len(flat)} PNGs for {len(frames)} frames; expected one a frame")
    files = flat or [folder / frame.clip / f"{frame.name}.png" for frame in frames]
    for file in files:
        if not file.is_file():
            raise BadInput(f"{file}: no such file; expected <clip>/<frame>.png, or one PNG a frame in order")
    return files


def read_prediction(file: Path, size: tuple[int, int]) -> np.ndarray:
    """Decode a prediction to uint8 [H, W] as `read_grey` does. Raises BadInput when that is not `size` = (H, W)."""
    pixels = read_grey(file)
    if pixels.shape != size:
        raise BadInput(f"{file}: is {pixels.shape[1]} x {pixels.shape[0]}, its frame {size[1]} x {size[0]}; expected the same size")
    return pixels


def read_grey(file: Path) -> np.ndarray:
    """Decode a mask to uint8 [H, W]: 255 where an indexed one, as DAVIS's tools write them, is not 0; any other as grey."""
    return clips.read_mask(file) * np.uint8(255) if clips.is_indexed(file) else clips.decode(file, "L")


def choose_guided(asked: str, decoder: models.Decoder, source: Source) -> bool:
    """Whether to upsample along the frames' edges. Raises BadInput when that is wanted and a frame is gone."""
    if asked == "none" or (asked == "auto" and not decoder.guided):
        return False
    gone = [frame.image for frame in source.frames if not frame.image.is_file()]
    if gone:
        raise BadInput(f"{gone[0]}: no such frame, and masks are refined along the frames' edges; pass --data with the "
                       "folder that holds the frames now, or --refine none")
    return True


def predict_clips(decoder: models.Decoder, features: resident.Features, index: torch.Tensor, names: list[str],
                  args: argparse.Namespace, images: Iterator[np.ndarray] | None) -> Iterator[np.ndarray]:
    """Yield the mask of every frame, uint8 [H, W], clip by clip, the decoder adapted to each clip if it wants that."""
    for _, first, stop in data.clip_ranges(names):
        part = index[first:stop]
        tuned = inference.adapt(decoder, features, part, args.seed) if decoder.adapt_steps else decoder
        yield from (pixels.cpu().numpy() for pixels in inference.predict(tuned, features, part, args.batch_size, images))


# --- what to write -----------------------------------------------------------------------------


def finish_frame(pixels: np.ndarray, index: int, source: Source, file: Path | None) -> dict:
    """Write one prediction to `file` (None: it is there already) and score it if its frame is annotated.

    Returns the frame's row: index, clip, frame, and with an annotation iou (None where both are empty), J, F.

    pixels: uint8 [H, W], floor(255 * probability), resized here to the frame's own size where it differs.
    """
    size = source.sizes[index]
    if file is not None:
        if pixels.shape != size:
            resized = torch.nn.functional.interpolate(torch.from_numpy(pixels)[None, None].float(), size, mode="bilinear")
            pixels = resized[0, 0].to(torch.uint8).numpy()
        pictures.write_grey(file, pixels)
    row = {"index": index, "clip": source.frames[index].clip, "frame": source.frames[index].name}
    mask = source.mask(index)
    if mask is None:
        return row
    packed = np.packbits(metrics.foreground(pixels), axis=1)
    iou, J, F = (float(values[0]) for values in metrics.score_frames(packed[None], mask[None], size[1]))
    return row | {"iou": None if math.isnan(iou) else iou, "J": J, "F": F}


def write_scores(out: Path, rows: list[dict], protocol: str) -> dict:
    """Write scores.json and frames.csv from a row per frame; return the scores."""
    iou, J, F = (np.array([row[key] for row in rows], dtype=float) for key in ("iou", "J", "F"))
    summary = metrics.summarize([row["clip"] for row in rows], iou, J, F, protocol)
    write_json(out / "scores.json", summary)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "frames.csv", text.getvalue())
    return summary


def write_pictures(out: Path, source: Source, files: list[Path], rows: list[dict], scores: dict | None, facts: dict,
                   video: str) -> None:
    """Write report.html, and one overlay video a clip in overlays/ unless `video` is "none"."""
    wanted = {row["index"] for clip_rows in report.group_by_clip(rows).values() for _, row in report.choose_frames(clip_rows)}
    shown: dict[int, np.ndarray] = {}

    def draw(first: int, stop: int) -> Iterator[np.ndarray]:
        for index, image in zip(range(first, stop), clips.read_images(source.frames[first:stop])):
            prediction = metrics.foreground(read_grey(files[index]))
            mask = source.mask(index)
            if mask is not None:
                mask = np.unpackbits(mask, axis=1, count=prediction.shape[1]).astype(bool)
            picture = pictures.overlay(image, prediction, mask)
            if index in wanted:
                shown[index] = picture
            yield picture

    for clip, first, stop in progress(list(data.clip_ranges([frame.clip for frame in source.frames])), "pictures"):
        if video == "none":
            for index in wanted & set(range(first, stop)):
                next(draw(index, index + 1))
        else:
            (out / "overlays").mkdir(exist_ok=True)
            pictures.write_video(out / "overlays" / f"{clip}.{video}", draw(first, stop), 24, video)
    report.write_report(out / "report.html", scores, rows, shown.__getitem__, facts)


# --- the whole ---------------------------------------------------------------------------------


def main() -> None:
    args = parse_args()
    distributed.refuse_several("evaluate.py")
    account = tracking.from_flags(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    threads = args.threads or os.cpu_count() or 2
    if not args.no_pictures:
        pictures.check_video(args.video)
    sources = (args.model, args.features, args.data, args.predictions)
    fetched = [artifacts.fetch(source, account) if source else (None, None) for source in sources]
    (model_path, features_path, root, predictions), used = zip(*fetched)

    if predictions:
        frames = clips.find_frames(root, args.split)
        source = Source(frames, clips.check_frames(frames), None)
        if frames[0].annotation is None:
            raise BadInput(f"{args.data}: has no annotations to score {args.predictions} with")
        files = read_predictions(predictions, frames)
        name = default_name(used[3], predictions)
        out = args.out or Path("results") / name
        refuse_existing(out, args.overwrite)
        metadata = {"predictions": args.predictions, "frames": len(frames)}
        pixels: Iterable[np.ndarray] = clips.in_threads(lambda item: read_prediction(*item), zip(files, source.sizes), threads, 64)
        decoder_name = name.removesuffix("-result")
    else:
        decoder, model = checkpoints.load_model(model_path)
        decoder.views = min(decoder.views, args.views or 2)  # a decoder of one view has no other
        out = args.out or Path("results") / default_name(used[0], model_path, model["decoder"])
        refuse_existing(out, args.overwrite)
        if features_path:
            source_folder = data.open_features(features_path)
            checkpoints.check_fit(model, args.model, source_folder)
            place = resident.choose_resident(args.resident, [source_folder], list(model["shapes"]), device)
            source = open_source(source_folder, root, not args.no_verify, pictures=not args.no_pictures)
            features = resident.load_features(source_folder, list(model["shapes"]), device, place, not args.no_verify)
            decoder = decoder.to(device)
        else:
            frames = clips.find_frames(root, args.split)
            source = Source(frames, clips.check_frames(frames), None)
            decoder, features = featurize(frames, source.sizes, model, decoder, args, device)
        flops = model["featurizer_flops"] + models.count_flops(decoder, model["shapes"])
        metadata = {"nparams": models.count_all(decoder, model), "decoder": model["decoder"], "featurizer": model["featurizer"],
                    "decoder_parameters": models.count_parameters(decoder), "flops_per_frame": flops,
                    "frames": len(source.frames), "annotated": source.annotated, "size": source.sizes[0],
                    "sizes": None if len(set(source.sizes)) == 1 else source.sizes}
        names = [frame.clip for frame in source.frames]
        features = models.look_at_clips(model["decoder"], features, names, source_folder if features_path else None, list(model["shapes"]))
        index = torch.arange(len(source.frames))
        images = clips.read_images(source.frames, threads) if choose_guided(args.refine, decoder, source) else None
        decoder.adapt_steps = decoder.adapt_steps if args.adapt is None else args.adapt
        pixels = predict_clips(decoder, features, index, names, args, images)
        decoder_name, files = model["decoder"], None

    command = f"python {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"
    job = "val-eval" if source.annotated else "run-test"
    with tracking.start(account, job, {"command": command, **plain(args)}) as tracker:
        for name in used:
            tracker.use(name)
        with whole_folder(out, args.overwrite) as folder:
            outputs = files or [folder / "outputs" / f"{index:05d}.png" for index in range(len(source.frames))]
            if files is None:
                (folder / "outputs").mkdir()
                write_json(folder / "paths.json", {"output": data.as_column([f"outputs/{file.name}" for file in outputs])})
            write_json(folder / "metadata.json", metadata)
            started = time.perf_counter()
            numbered = enumerate(progress(pixels, "predict", len(source.frames)))
            rows = list(clips.in_threads(lambda item: finish_frame(item[1], item[0], source, None if files else outputs[item[0]]),
                                         numbered, threads, ahead=64))
            seconds = time.perf_counter() - started
            summary = write_scores(folder, rows, args.protocol) if source.annotated else None
            if not args.no_pictures:
                write_pictures(folder, source, outputs, rows, summary, describe(metadata, source, command), args.video)
            if files is None:
                names = [*(f"outputs/{file.name}" for file in outputs), "paths.json", "metadata.json"]
                tracking.log_results(tracker, decoder_name, {name: folder / name for name in names}, metadata)
            if tracker.run and summary is not None:
                tracking.log_scores(tracker, decoder_name, args.split or "val", score_table(source, outputs, rows), summary)
    print_scores(summary)
    print(f"seconds: predict, write and score {seconds:.3f} ({len(rows) / seconds:,.0f} frames/s)")
    print(f"wrote {out}: {len(source.frames)} frames" + ("" if args.no_pictures else f"; open {out / 'report.html'}"))
    if not args.predictions:
        print(f"next: python package.py --results {out}")


def describe(metadata: dict, source: Source, command: str) -> dict[str, object]:
    """Return what the report's header says of the model and the run, name -> text or number."""
    facts: dict[str, object] = {}
    if "decoder" in metadata:
        facts = {"decoder": f"{metadata['decoder']}, {metadata['decoder_parameters']:,} parameters", "featurizer": metadata["featurizer"],
                 "parameters": metadata["nparams"], "cost": f"{metadata['flops_per_frame'] / 1e9:.2f} GFLOP a frame"}
    sizes = sorted({f"{width} x {height}" for height, width in source.sizes})
    return facts | {"frames": len(source.frames), "frame size": ", ".join(sizes), "command": command}


def score_table(source: Source, outputs: list[Path], rows: list[dict]) -> Iterator[tuple[Path, np.ndarray, float]]:
    """Yield the rows of the contest's table: a frame's output, its target [H, W] 0 or 255, and its IoU (-1 where both are empty)."""
    for row in rows:
        index = row["index"]
        packed = source.mask(index)
        assert packed is not None  # or there would be no scores to log
        mask = np.unpackbits(packed, axis=1, count=source.sizes[index][1]) * 255
        yield outputs[index], mask, -1.0 if row["iou"] is None else row["iou"]


def default_name(used: str | None, path: Path, decoder: str | None = None) -> str:
    """What to call results: an artifact's own name, a folder's, a model.pt's run folder's, else the decoder's."""
    if used:
        return artifacts.plain_name(used)
    folder = path.parent if path.name == "model.pt" else path
    return folder.resolve().name if folder.is_dir() or decoder is None else decoder


def print_scores(scores: dict | None) -> None:
    """Print the scores as a table, a clip a line, the whole set last."""
    if scores is None:
        return
    keys = ["frames", "mean_iou", "J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay"]
    print(f"protocol {scores['protocol']}; mean_iou is the contest's, over frames; J and F are means over clips")
    print(f"{'clip':<24}" + "".join(f"{key:>10}" for key in keys))
    for name, row in [*scores["per_clip"].items(), ("all", scores)]:
        cells = ["-" if row[key] is None else f"{row[key]:.4f}" if isinstance(row[key], float) else str(row[key]) for key in keys]
        print(f"{name:<24}" + "".join(f"{cell:>10}" for cell in cells))


if __name__ == "__main__":
    sys.exit(run(main))
