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
import json
import math
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
import torch

import clips
import data
import featurizers
import metrics
import models
import pictures
import report
import tracking
from cli import Parser, add_run_flags, choose_device, positive_int, progress, run
from files import BadInput, refuse_existing, whole_folder, write_json, write_text

KINDS = ("gif", "mp4", "none")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--model", default=None, help="run folder or model.pt written by train.py, or wandb:...")
    group.add_argument("--features", default=None, help="feature folder written by featurize.py, or wandb:...")
    group.add_argument("--data", default=None,
                       help="frames or a video to featurize on the fly; or, beside --features, where their frames are now")
    group.add_argument("--split", default=None, help="the split of a DAVIS root in --data")
    group.add_argument("--predictions", type=Path, default=None,
                       help="score this folder of mask PNGs instead: <clip>/<frame>.png, or one per frame in order")
    group.add_argument("--weights", default=None, help="the featurizer's weights, for --data (default: pretrained)")
    group.add_argument("--batch-size", type=positive_int, default=16, help="frames at a time (default: 16)")
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
    masks: torch.Tensor | None  # packed, of the whole feature folder; None: read each from its annotation, if it has one

    def mask(self, index: int) -> np.ndarray | None:
        """Return the mask of one frame, packed uint8 [H, ceil(W / 8)], at the frame's own size; None without one."""
        if self.masks is not None:
            return self.masks[index].numpy()
        annotation = self.frames[index].annotation
        return None if annotation is None else np.packbits(clips.read_mask(annotation), axis=1)


def open_source(folder: data.FeatureFolder, root: str | None, verify: bool) -> Source:
    """The frames of a feature folder; masks come from it unless frames differ in size and were resized for it."""
    frames, sizes = data.folder_frames(folder, root and Path(root)), folder.meta["sizes"]
    masks = data.load_masks(folder, torch.device("cpu"), verify) if folder.masks and sizes is None else None
    return Source(frames, [tuple(size) for size in sizes or [folder.size] * folder.frames], masks)


def featurize(frames: list[clips.Frame], sizes: list[tuple[int, int]], model: dict, decoder: models.Decoder,
              args: argparse.Namespace, device: torch.device) -> tuple[models.Decoder, data.Features]:
    """Featurize frames as the model's training frames were, in memory. Returns the decoder for their size, and the features.

    Frames keep their aspect ratio and get about as many pixels as the model's training frames had.
    """
    height, width = sizes[0]
    scale = math.sqrt(math.prod(model["size"]) / (height * width))
    size = tuple(model["size"]) if abs(scale - 1) < 1e-3 else (round(height * scale), round(width * scale))
    featurizer = featurizers.build_featurizer(model["featurizer"], model["featurizer_levels"], args.weights, args.seed,
                                              featurizers.choose_compute("auto", device))
    digest = featurizers.weights_digest(featurizer)
    if digest != model["weights"]:
        raise BadInput(f"{args.model}: was trained on features of other {model['featurizer']} weights "
                       f"({model['weights']}, found {digest}); pass the same --weights as to featurize.py")
    shapes, levels = featurizer.shapes(size), list(model["shapes"])
    total = len(frames) * sum(math.prod(shapes[level]) for level in levels) * 2
    print(f"featurizing {len(frames)} frames at {size[1]} x {size[0]}: {total / 1e6:,.0f} MB of features in memory")
    images = clips.read_images(frames, args.threads or os.cpu_count() or 2)
    maps = featurizers.run_featurizer(featurizer.to(device), images, args.batch_size, size, device)
    parts = [[level.half() for name, level in zip(featurizer.levels, batch) if name in levels]
             for batch in progress(maps, "featurize", -(-len(frames) // args.batch_size))]
    decoder = models.rebuild(model, decoder.state_dict(), {level: shapes[level] for level in levels}, size).to(device)
    return decoder, data.Features([torch.cat(level) for level in zip(*parts)])


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


# --- what to write -----------------------------------------------------------------------------


def finish_frame(pixels: np.ndarray, index: int, source: Source, file: Path | None) -> tuple[float, float, float] | None:
    """Write one prediction to `file` (None: it is there already) and score it: (iou, J, F), or None without an annotation.

    pixels: uint8 [H, W], floor(255 * probability), resized here to the frame's own size where it differs.
    """
    size = source.sizes[index]
    if file is not None:
        if pixels.shape != size:
            pixels = torch.nn.functional.interpolate(torch.from_numpy(pixels)[None, None].float(), size, mode="bilinear")
            pixels = pixels[0, 0].to(torch.uint8).numpy()
        iio.imwrite(file, pixels, plugin="pillow", compress_level=1)
    elif pixels.shape != size:
        raise BadInput(f"prediction {index} is {pixels.shape[1]} x {pixels.shape[0]}, its frame {size[1]} x {size[0]}")
    mask = source.mask(index)
    if mask is None:
        return None
    packed = np.packbits(metrics.foreground(pixels), axis=1)
    scores = metrics.score_frames(packed[None], mask[None], size[1])
    return tuple(float(values[0]) for values in scores)


def write_scores(out: Path, source: Source, scores: list[tuple[float, float, float]], protocol: str) -> tuple[dict, list[dict]]:
    """Write scores.json and frames.csv; return the scores and a row per frame."""
    iou, J, F = np.array(scores).T
    summary = metrics.summarize([frame.clip for frame in source.frames], iou, J, F, protocol)
    rows = [{"index": index, "clip": frame.clip, "frame": frame.name, "iou": "" if math.isnan(iou[index]) else iou[index],
             "J": J[index], "F": F[index]} for index, frame in enumerate(source.frames)]
    write_json(out / "scores.json", summary)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "frames.csv", text.getvalue())
    return summary, rows
