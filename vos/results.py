"""What evaluate.py leaves: outputs, scores, and pictures for people who look. H W frame."""
import csv
import io
import math
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path

import numpy as np

from vos import clips, contest, metrics, pictures, report, video
from vos.cli import progress
from vos.masks import read_mask
from vos.outputs import write_json, write_text
from vos.sources import Source, clip_ranges


def write_outputs(out: Path, predictions: Iterable[np.ndarray], source: Source, threads: int,
                  write: bool) -> list[dict]:
    """Score every prediction, uint8 [H, W], and write it to outputs/ if asked.

    Returns a row a frame: index, clip, frame, and iou, J and F, None where there is nothing to say.
    """
    def finish(item: tuple[int, np.ndarray]) -> dict:
        index, pixels = item
        frame, mask = source.frames[index], source.mask(index)
        pixels = clips.resize(pixels, source.sizes[index])
        if write:
            pictures.write_grey(out / f"outputs/{index:05d}.png", pixels)
        row = {"index": index, "clip": frame.clip, "frame": frame.name}
        if mask is None:
            return row | {"iou": None, "J": None, "F": None}
        packed = np.packbits([contest.foreground(pixels), mask], axis=2)
        scores = metrics.score_frames(packed[:1], packed[1:], pixels.shape[1])
        iou, J, F = (float(score[0]) for score in scores)
        return row | {"iou": None if math.isnan(iou) else iou, "J": J, "F": F}

    if write:
        (out / "outputs").mkdir()
        names = {str(index): f"outputs/{index:05d}.png" for index in range(len(source.frames))}
        write_json(out / "paths.json", {"output": names})
    numbered = enumerate(progress(predictions, "predict", len(source.frames)))
    return list(clips.in_threads(finish, numbered, threads))


def write_scores(out: Path, rows: list[dict], protocol: str) -> dict | None:
    """Write frames.csv, and scores.json when there are scores; return these."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:  # what a spreadsheet would run as a formula is quoted
        writer.writerow(["'" + cell if isinstance(cell, str) and cell[:1] in "=+-@" else cell
                         for cell in row.values()])
    write_text(out / "frames.csv", text.getvalue())

    scored = [row for row in rows if row["J"] is not None]
    if not scored:
        return None
    iou, J, F = (np.array([row[key] for row in scored], dtype=float) for key in ("iou", "J", "F"))
    scores = metrics.summarize([row["clip"] for row in scored], iou, J, F, protocol)
    write_json(out / "scores.json", scores)
    return scores


def write_pictures(out: Path, name: str, source: Source, files: list[Path], meaning: dict[str, str],
                   rows: list[dict], scores: dict | None, facts: dict, kind: str,
                   curve: Path) -> None:
    """Write report.html, and an overlay video a clip in overlays/ unless `kind` is "none".

    files: the mask of every frame, read as `meaning` says. curve: an SVG, if there is one.
    """
    def draw(first: int, stop: int) -> Iterator[np.ndarray]:
        for index, frame in zip(range(first, stop), clips.read_images(source.frames[first:stop])):
            prediction = read_mask(files[index], meaning)
            yield pictures.overlay(frame, prediction, source.mask(index))

    videos = []
    for first, stop in progress(clip_ranges(source.frames) if kind != "none" else [], "pictures"):
        (out / "overlays").mkdir(exist_ok=True)
        videos.append(f"overlays/{source.frames[first].clip}.{kind}")
        video.write_video(out / videos[-1], draw(first, stop), 24, kind)
    drawn = curve.read_text(encoding="utf-8") if curve.is_file() else None
    report.write_report(out / "report.html", f"{name}, {date.today()}", scores, rows,
                        lambda index: next(draw(index, index + 1)), facts, videos, drawn)


def log(tracker, out: Path, metadata: dict, name: str, split: str, source: Source,
        files: list[Path], rows: list[dict], scores: dict | None) -> None:
    """Log the submission, and the scores with the contest's table, to Weights & Biases."""
    from vos import tracking
    decoder = metadata.get("decoder", name.removesuffix("-result"))
    if "decoder" in metadata:
        names = [*(f"outputs/{file.name}" for file in files), "paths.json", "metadata.json"]
        tracking.log_results(tracker, decoder, {name: out / name for name in names}, metadata)
    if scores:
        table = [(file, source.mask(row["index"]) * np.uint8(255),
                  -1.0 if row["iou"] is None else row["iou"])
                 for file, row in zip(files, rows) if row["J"] is not None]
        tracking.log_scores(tracker, decoder, split, table, scores)


def print_scores(scores: dict) -> None:
    """Print the scores as a table, a clip a line, the whole set last."""
    keys = ["mean_iou", "J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay"]
    print(f"protocol {scores['protocol']}; mean_iou is the contest's, over frames; J and F are "
          "means over clips")
    print(f"{'clip':<24}{'frames':>10}" + "".join(f"{key:>10}" for key in keys))
    for name, row in [*scores["per_clip"].items(), ("all", scores)]:
        cells = ["-" if row[key] is None else f"{row[key]:.4f}" for key in keys]
        print(f"{name:<24}{row['frames']:>10}" + "".join(f"{cell:>10}" for cell in cells))
