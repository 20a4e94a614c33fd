"""What evaluate.py leaves: outputs, scores, and pictures for people who look. H W frame."""
import base64
import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np
from PIL import Image

from vos import clips, metrics, pictures, video
from vos.cli import progress
from vos.images import write_image
from vos.metrics import MEASURES
from vos.outputs import write_json, write_text
from vos.pictures import chart, known
from vos.sources import Source, clip_ranges


def write_outputs(out: Path, predictions: Iterable[np.ndarray], source: Source, threads: int,
                  write: bool) -> list[dict]:
    """Score predictions, uint8 [H, W], and `write` them to outputs/; return frames.csv's rows."""
    def finish(item: tuple[int, np.ndarray]) -> dict:
        index, pixels = item
        frame, mask = source.frames[index], source.mask(index)
        pixels = clips.resize(pixels, source.sizes[index])
        if write:
            write_image(out / f"outputs/{index:05d}.png", pixels, compress_level=1)
        scores = (None,) * 3 if mask is None else metrics.score_frame(pixels > 127, mask)
        return {"index": index, "clip": frame.clip, "frame": frame.name,
                **dict(zip(("iou", "J", "F"), scores))}

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
    """Write report.html, and unless `kind` is "none" overlay videos, of the masks in `files`."""
    def draw(first: int, stop: int) -> Iterator[np.ndarray]:
        for index, frame in zip(range(first, stop), clips.read_images(source.frames[first:stop])):
            prediction = clips.read_mask(files[index], meaning)
            yield pictures.overlay(frame, prediction, source.mask(index))

    videos = []
    for first, stop in progress(clip_ranges(source.frames) if kind != "none" else [], "pictures"):
        (out / "overlays").mkdir(exist_ok=True)
        videos.append(f"overlays/{source.frames[first].clip}.{kind}")
        video.write_video(out / videos[-1], draw(first, stop), 24, kind)
    drawn = curve.read_text(encoding="utf-8") if curve.is_file() else None
    write_report(out / "report.html", f"{name}, {date.today()}", scores, rows,
                 lambda index: next(draw(index, index + 1)), facts, videos, drawn)


def write_unsure(out: Path, frame: clips.Frame, file: Path, meaning: dict[str, str]) -> None:
    """Write a frame and its mask side by side in `out`: what to start from to draw it by hand."""
    out.mkdir()
    write_image(out / f"{frame.name}.jpg", next(clips.read_images([frame])))
    write_image(out / f"{frame.name}.png", clips.read_mask(file, meaning) * np.uint8(255))


def write_report(path: Path, title: str, scores: dict | None, rows: Sequence[dict],
                 picture: Callable[[int], np.ndarray], facts: dict[str, object],
                 videos: Sequence[str] = (), curve: str | None = None) -> None:
    """Write report.html, filled in: how well a model segments clips, and where not."""
    clips: dict[str, list[dict]] = {}
    for row in rows:
        clips.setdefault(row["clip"], []).append(row)
    summary, figures = scores or {"per_clip": {}}, ""
    for file in videos:
        source, name = escape(quote(file)), escape(Path(file).stem)
        shown = f'<video controls preload="none" src="{source}"></video>'
        if file.endswith(".gif"):
            shown = f'<img loading="lazy" alt="Overlay of {name}" src="{source}">'
        figures += f'<figure>{shown}<figcaption><a href="{source}">{name}</a></figcaption></figure>'
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    write_text(path, template.substitute(
        title=escape(title),
        scored="" if scores else "hidden",
        count=summary.get("frames"),
        protocol=summary.get("protocol"),
        **{key: number(summary.get(key)) for key in MEASURES},
        clips="\n".join(clip_row(clip, summary["per_clip"].get(clip, {}), clips[clip])
                        for clip in clips),
        frames="\n".join(clip_section(clip, clips[clip], picture) for clip in clips),
        videos=figures,
        curve=curve or "",
        facts="\n".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
                        for name, value in facts.items()),
    ))


def number(value: float | None) -> str:
    """Return a score as people read it, or a dash where there is none."""
    return f"{value:z.3f}".replace("-", "−") if known(value) else "–"


def clip_row(clip: str, scores: dict, rows: Sequence[dict]) -> str:
    """Return a row of the table of clips: its name, its scores, and J drawn frame by frame."""
    name, anchor = escape(clip), f"#clip-{rows[0]['index']}"
    cells = f'<th scope="row" data-value="{name}"><a href="{anchor}">{name}</a></th>'
    for value in [scores.get(key) for key in MEASURES if "recall" not in key]:
        cells += f'<td data-value="{value if known(value) else ""}">{number(value)}</td>'
    values = [(index, row.get("J")) for index, row in enumerate(rows)]
    line = chart(values, (0, len(rows) - 1), 1, (22, 6, 174, 36))
    label = f'role="img" aria-label="J of {len(rows)} frames"'
    return f'<tr>{cells}<td><svg class="spark" viewBox="0 0 200 48" {label}>{line}</svg></td></tr>'


def clip_section(clip: str, rows: Sequence[dict], picture: Callable[[int], np.ndarray]) -> str:
    """Return a clip's heading, and its worst, median and best frame by IoU, else first to last."""
    scored = sorted((row for row in rows if known(row.get("iou"))), key=lambda row: row["iou"])
    words = ("Worst", "Median", "Best") if scored else ("First", "Middle", "Last")
    chosen = scored or rows
    figures = ""
    for place, word in dict(zip((0, len(chosen) // 2, len(chosen) - 1), words)).items():
        row, memory = chosen[place], io.BytesIO()
        small = Image.fromarray(picture(row["index"]))
        small.thumbnail((480, 480), Image.Resampling.BOX)
        small.save(memory, "JPEG", quality=80)  # about 30 kB
        source = base64.b64encode(memory.getvalue()).decode("ascii")
        caption = f"{word}: frame {escape(str(row['frame']))}"
        if scored:
            caption += f" <span>IoU {number(row['iou'])}, F {number(row.get('F'))}</span>"
        figures += (f'<figure><img alt="{escape(clip)}, {word.lower()} frame" src="data:image/jpeg;'
                    f'base64,{source}"><figcaption>{caption}</figcaption></figure>\n')
    heading = f'{escape(clip)} <span class="quiet">{len(rows)} frames</span>'
    return (f'<h3 id="clip-{rows[0]["index"]}">{heading}</h3>\n'
            f'<div class="frames">\n{figures}</div>')


def log(tracker, out: Path, metadata: dict, name: str, split: str, source: Source,
        files: list[Path], rows: list[dict], scores: dict | None) -> None:
    """Log the submission, and the scores with the contest's table, to Weights & Biases."""
    from vos import tracking
    decoder = metadata.get("decoder", name.removesuffix("-result"))
    if "decoder" in metadata:
        names = [*(f"outputs/{file.name}" for file in files), "paths.json", "metadata.json"]
        entries = {name: out / name for name in names}
        tracker.artifact(f"{decoder}-result", "result", entries, metadata)
    if scores:
        table = [(file, source.mask(row["index"]) * np.uint8(255),
                  -1.0 if row["iou"] is None else row["iou"])
                 for file, row in zip(files, rows) if row["J"] is not None]
        tracking.log_scores(tracker, decoder, split, table, scores)
