"""What evaluate.py leaves: outputs, scores, and pictures for people who look. H W frame."""
import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np

from vos import clips, metrics
from vos.cli import progress
from vos.images import write_animation, write_image, write_mask
from vos.outputs import write_json, write_text
from vos.pictures import overlay
from vos.sources import Source, clip_ranges


def write_outputs(out: Path, predictions: Iterable[np.ndarray], source: Source,
                  write: bool) -> tuple[list[dict], list[float]]:
    """Score predictions, uint8 [H, W], and `write` them to outputs/. Returns frames.csv's rows, and
    how many pixels of each frame are unsure for one of the object."""
    def finish(item: tuple[int, np.ndarray]) -> tuple[dict, float]:
        index, pixels = item
        frame, mask = source.frames[index], source.mask(index)
        pixels = clips.resize(pixels, source.sizes[index])
        if write:
            write_mask(out / f"outputs/{index:05d}.png", pixels)
        scores = (None,) * 3 if mask is None else metrics.score_frame(pixels > 127, mask)
        row = {"index": index, "clip": frame.clip, "frame": frame.name}
        unsure, found = (pixels > 25) & (pixels < 230), pixels > 127
        doubt = float(np.count_nonzero(unsure) / (np.count_nonzero(found) + 1))
        return row | dict(zip(("iou", "J", "F"), scores)), doubt

    if write:
        (out / "outputs").mkdir()
        names = {str(index): f"outputs/{index:05d}.png" for index in range(len(source.frames))}
        write_json(out / "paths.json", {"output": names})
    numbered = enumerate(progress(predictions, "predict", len(source.frames)))
    rows, doubts = zip(*clips.in_threads(finish, numbered))
    return list(rows), list(doubts)


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
                   rows: list[dict], scores: dict | None, facts: dict, curve: Path) -> None:
    """Write report.html, and overlays/<clip>.webp of the masks in `files`, which it shows.

    curve: the training's curves.svg, which is shown too, if it is there.
    """
    def draw(first: int, stop: int) -> Iterator[np.ndarray]:
        for index, frame in zip(range(first, stop), clips.read_images(source.frames[first:stop])):
            yield overlay(frame, clips.read_mask(files[index], meaning), source.mask(index))

    (out / "overlays").mkdir()
    for first, stop in progress(clip_ranges(source.frames), "pictures"):
        file = out / f"overlays/{source.frames[first].clip}.webp"
        write_animation(file, draw(first, stop), 24)
    drawn = curve.read_text(encoding="utf-8") if curve.is_file() else ""
    write_report(out / "report.html", f"{name}, {date.today()}", rows, scores, facts, drawn)


def write_unsure(out: Path, frame: clips.Frame, file: Path, meaning: dict[str, str]) -> None:
    """Write a frame and its mask side by side in `out`: what to start from to draw it by hand."""
    out.mkdir()
    write_image(out / f"{frame.name}.jpg", next(clips.read_images([frame])))
    write_image(out / f"{frame.name}.png", clips.read_mask(file, meaning) * np.uint8(255))


def write_report(path: Path, title: str, rows: Sequence[dict], scores: dict | None,
                 facts: dict, curve: str = "") -> None:
    """Write report.html: how well a model segments clips, whose overlays lie beside it."""
    clips: dict[str, list[dict]] = {}
    for row in rows:
        clips.setdefault(row["clip"], []).append(row)
    per_clip, said = {}, "No annotations, so no scores."
    if scores:
        per_clip = scores["per_clip"]
        said = f"{say_scores(scores)}; {scores['frames']} frames, protocol {scores['protocol']}"
    worst_first = sorted(clips, key=lambda clip: per_clip.get(clip, {}).get("mean_iou") or 0)
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    write_text(path, template.substitute(
        title=escape(title),
        scores=said,
        clips="\n".join(show_clip(clips[clip], per_clip.get(clip)) for clip in worst_first),
        curve=curve,
        facts="\n".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
                        for name, value in facts.items()),
    ))


def say_scores(scores: dict) -> str:
    """Say scores in words, with a dash where there is none."""
    return ", ".join(f"{key} –" if scores[key] is None else f"{key} {scores[key]:z.3f}"
                     for key in metrics.MEASURES)


def show_clip(rows: Sequence[dict], scores: dict | None) -> str:
    """Return HTML of a clip: its overlay, its scores, and which frame has the lowest IoU."""
    clip, said = escape(rows[0]["clip"]), f"{len(rows)} frames"
    scored = [row for row in rows if row["iou"] is not None]
    if scores and scored:
        worst = min(scored, key=lambda row: row["iou"])
        said += f"; {say_scores(scores)}; worst: frame {worst['frame']}, {worst['iou']:.3f}"
    source = escape(quote(f"overlays/{rows[0]['clip']}.webp"))
    return (f'<figure><img loading="lazy" alt="Overlay of {clip}" src="{source}">'
            f"<figcaption><strong>{clip}</strong> {escape(said)}</figcaption></figure>")
