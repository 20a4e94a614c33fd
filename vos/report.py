"""The report: report.html, filled in; it shows how well a model segments clips, and where not."""
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np

from vos.outputs import write_text
from vos.pictures import chart, jpeg_uri, known

COLUMNS = ("mean_iou", "J_mean", "J_decay", "F_mean", "F_decay")  # of the table of clips


def write_report(path: Path, title: str, scores: dict | None, rows: Sequence[dict],
                 picture: Callable[[int], np.ndarray], facts: dict[str, object],
                 videos: Sequence[str] = (), curve: str | None = None) -> None:
    """Write the report, whole or not at all. Raises CannotWrite.

    scores: what scores.json holds; None without annotations. rows: a dict a frame of `index`,
    `clip`, `frame`, and `iou`, `J` and `F` or None. picture: gives a frame's overlay by its index,
    uint8 [H, W, 3]. videos: GIF or MP4 files, relative to the page. curve: an SVG.
    """
    clips: dict[str, list[dict]] = {}
    for row in rows:
        clips.setdefault(row["clip"], []).append(row)
    summary = scores or {"per_clip": {}}
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    write_text(path, template.substitute(
        title=escape(title),
        scored="" if scores else "hidden",
        iou=number(summary.get("mean_iou")),
        count=summary.get("frames"),
        protocol=summary.get("protocol"),
        measures="\n".join(measure_row(letter, summary) for letter in "JF"),
        clips="\n".join(clip_row(clip, summary["per_clip"].get(clip, {}), clips[clip])
                        for clip in clips),
        frames="\n".join(clip_section(clip, clips[clip], picture) for clip in clips),
        videos="\n".join(map(video_figure, videos)),
        curve=curve or "",
        facts="\n".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
                        for name, value in facts.items()),
    ))


def number(value: float | None) -> str:
    """Return a score as people read it, or a dash where there is none."""
    return f"{value:z.3f}".replace("-", "−") if known(value) else "–"


def measure_row(letter: str, scores: dict) -> str:
    """Return a row of the table of scores: mean, recall and decay of J or F."""
    values = [scores.get(f"{letter}_{statistic}") for statistic in ("mean", "recall", "decay")]
    cells = "".join(f"<td>{number(value)}</td>" for value in values)
    return f'<tr><th scope="row">{letter}</th>{cells}</tr>'


def clip_row(clip: str, scores: dict, rows: Sequence[dict]) -> str:
    """Return a row of the table of clips: its name, its scores, and J drawn frame by frame."""
    name, anchor = escape(clip), f"#clip-{rows[0]['index']}"
    cells = f'<th scope="row" data-value="{name}"><a href="{anchor}">{name}</a></th>'
    for value in map(scores.get, COLUMNS):
        cells += f'<td data-value="{value if known(value) else ""}">{number(value)}</td>'
    values = [(index, row.get("J")) for index, row in enumerate(rows)]
    line = chart(values, (0, len(rows) - 1), 1, (22, 6, 174, 36))
    label = f'role="img" aria-label="J of {len(rows)} frames"'
    return f'<tr>{cells}<td><svg class="spark" viewBox="0 0 200 48" {label}>{line}</svg></td></tr>'


def choose_frames(rows: Sequence[dict]) -> list[tuple[str, dict]]:
    """Return (word, row) of a clip's worst, median and best frame by IoU, else first to last."""
    scored = sorted((row for row in rows if known(row.get("iou"))), key=lambda row: row["iou"])
    first, middle, last = ("Worst", "Median", "Best") if scored else ("First", "Middle", "Last")
    chosen = scored or rows
    places = {0: first, len(chosen) // 2: middle, len(chosen) - 1: last}
    return [(word, chosen[place]) for place, word in places.items()]


def clip_section(clip: str, rows: Sequence[dict], picture: Callable[[int], np.ndarray]) -> str:
    """Return a clip's heading and its pictures."""
    figures = ""
    for word, row in choose_frames(rows):
        source = jpeg_uri(picture(row["index"]))
        caption = f"{word}: frame {escape(str(row['frame']))}"
        if known(row.get("iou")):
            caption += f" <span>IoU {number(row['iou'])}, F {number(row.get('F'))}</span>"
        figures += (f'<figure><img alt="{escape(clip)}, {word.lower()} frame" '
                    f'src="{source}"><figcaption>{caption}</figcaption></figure>\n')
    heading = f'{escape(clip)} <span class="quiet">{len(rows)} frames</span>'
    return (f'<h3 id="clip-{rows[0]["index"]}">{heading}</h3>\n'
            f'<div class="frames">\n{figures}</div>')


def video_figure(path: str) -> str:
    """Return a video with its name: a GIF as a picture, loaded when it comes into view."""
    source, name = escape(quote(path)), escape(Path(path).stem)
    shown = f'<video controls preload="none" src="{source}"></video>'
    if path.endswith(".gif"):
        shown = f'<img loading="lazy" alt="Overlay of {name}" src="{source}">'
    return f'<figure>{shown}<figcaption><a href="{source}">{name}</a></figcaption></figure>'
