"""The report: one HTML file that shows how well a model segments clips, and where it does not.

    write_report("results/simple/report.html", scores, rows, picture, facts)

The file holds its pictures, style and script, so it opens from disk with no network. Its words and numbers
are plain HTML tables; the script does nothing but sort one of them. Split from pictures.py, which draws.
"""
import html
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from string import Template

import numpy as np

import pictures
from files import write_text

PICTURE_SIDE = 480  # pixels, the longest side: three pictures a clip come to about 0.1 MB
COLUMNS = {"mean_iou": "Mean IoU", "J_mean": "J", "J_decay": "J decay", "F_mean": "F", "F_decay": "F decay"}  # of the table of clips
NONE = "–"

LEGEND = '<span class="legend"><span class="fill"></span> filled blue: the prediction</span>'
LEGEND_TRUTH = '<span class="legend"><span class="outline"></span> outlined orange: the truth</span>'

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1b1b1b; --quiet: #595959; --rule: #d6d6d6; --band: #f3f5f7; --line: #0072b2; --link: #00598c
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #161616; --ink: #ececec; --quiet: #b0b0b0; --rule: #404040; --band: #222628; --line: #56b4e9; --link: #7cc7f2 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1280px; padding: 1rem clamp(.75rem, 3vw, 2rem) 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem }
h3 span { font-weight: 400 }
a { color: var(--link) }
:focus-visible { outline: 3px solid var(--line); outline-offset: 2px }
.quiet { color: var(--quiet); margin: .25rem 0 .75rem }

dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1rem; margin: 0 }
dt { color: var(--quiet) }
dd { margin: 0 }
code { font: .875rem/1.5 ui-monospace, monospace }
code span { white-space: nowrap }

.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .75rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }
th:first-child, #clips th:last-child { text-align: left }
th:first-child { padding-left: .25rem }
tbody th { font-weight: 400 }
#clips { width: 100% }
#clips tbody th { position: sticky; left: 0; background: var(--paper) }
#clips tbody tr:hover > * { background: var(--band) }
#clips button { font: inherit; color: inherit; background: none; border: 0; padding: .25rem 0; cursor: pointer; white-space: nowrap }
#clips button::after { content: "\\2195"; display: inline-block; width: 1em; text-align: center; color: var(--quiet) }
#clips [aria-sort=ascending] button::after { content: "\\2191"; color: inherit }
#clips [aria-sort=descending] button::after { content: "\\2193"; color: inherit }
.spark { display: block; width: 160px; height: 32px }
.spark polyline { fill: none; stroke: var(--line); stroke-width: 1.5; vector-effect: non-scaling-stroke }
.spark line { stroke: var(--rule); vector-effect: non-scaling-stroke }

.frames { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1rem }
figure { margin: 0 }
img { display: block; width: 100%; height: auto; border-radius: 4px }
figcaption { padding-top: .25rem }
figcaption span { color: var(--quiet) }
.legend { display: inline-block; margin-right: 1rem }
.legend span { display: inline-block; width: 1.4em; height: .9em; vertical-align: -.05em }
.fill { background: #0072b2 }
.outline { border: 3px solid #e69f00; outline: 1px solid #000; outline-offset: -4px }

@media (max-width: 480px) {
  dl { display: block }
  dd { margin-bottom: .5rem }
  th, td { padding: .3rem .45rem }
}
</style>
</head>
<body>
<main>
<h1>$title</h1>
<dl>
$facts
</dl>
$tables
<h2>Frames</h2>
<p>$legend</p>
$frames
</main>
<script>
"use strict";
// Sorts the table of clips: the first press of a heading puts the lowest first, the next the highest.
// Clips without a value stay last.
for (const button of document.querySelectorAll("#clips th button")) button.addEventListener("click", () => {
  const heading = button.parentElement, body = document.querySelector("#clips tbody");
  const order = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  for (const other of document.querySelectorAll("#clips thead th")) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", order);
  const value = row => row.cells[heading.cellIndex].dataset.value, sign = order === "ascending" ? 1 : -1;
  const compare = (a, b) => heading.cellIndex === 0 ? a.localeCompare(b, "en", {numeric: true}) : a - b;
  body.append(...[...body.rows].sort((a, b) => (value(a) === "") - (value(b) === "") || sign * compare(value(a), value(b))));
});
</script>
</body>
</html>
""")


def write_report(path: Path, scores: dict | None, rows: Sequence[dict], picture: Callable[[int], np.ndarray], facts: dict[str, object],
                 title: str = "Segmentation report") -> None:
    """Write the report to `path`, whole or not at all. Raises BadInput when it cannot be written.

    scores: what scores.json holds, or None when there are no annotations; any number in it may be None.
    rows: one dict a frame, `index`, `clip`, `frame` and, of scored frames, `iou`, `J` and `F`, which may be None or NaN.
    picture: gives the overlay of a frame, uint8 [H, W, 3], from its `index`; called for at most three frames a clip.
    facts: what the reader should know of the model and the run, name -> text or number, in the order shown; `command` is set as code.
    """
    clips = group_by_clip(rows)
    write_text(path, PAGE.substitute(
        title=html.escape(title), facts="\n".join(fact(name, value) for name, value in facts.items()),
        tables=overall_table(scores) + clip_table(scores, clips) if scores else '<p class="quiet">No annotations, so no scores.</p>',
        legend=f"{LEGEND} {LEGEND_TRUTH}" if scores else LEGEND,
        frames="\n".join(clip_section(number, clip, clips[clip], picture) for number, clip in enumerate(clips))))


def group_by_clip(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Return the rows of each clip, clips and rows in the order they come."""
    clips: dict[str, list[dict]] = {}
    for row in rows:
        clips.setdefault(row["clip"], []).append(row)
    return clips


def known(value: float | None) -> bool:
    """Return whether a score is there: not None, not NaN."""
    return value is not None and math.isfinite(value)


def number(value: float | None) -> str:
    """Return a score as people read it, or a dash where there is none."""
    return f"{value:z.3f}".replace("-", "−") if known(value) else NONE


def fact(name: str, value: object) -> str:
    """Return one line of the header's list; whole numbers get thousands separators, a command's flags are not broken over lines."""
    text = html.escape(f"{value:,}" if isinstance(value, int) else str(value))
    if name == "command":
        text = "<code>" + re.sub(r"(?<= )--?[a-z-]+", r"<span>\g<0></span>", text) + "</code>"
    return f"<dt>{html.escape(name)}</dt><dd>{text}</dd>"


def overall_table(scores: dict) -> str:
    """Return the scores over all clips: mean IoU, then J and F with mean, recall and decay."""
    protocol = html.escape(str(scores.get("protocol", NONE)))
    lines = [f'<tr><th scope="row">Mean IoU</th><td>{number(scores.get("mean_iou"))}</td><td>{NONE}</td><td>{NONE}</td></tr>']
    for letter, meaning in (("J", "region"), ("F", "boundary")):
        cells = "".join(f"<td>{number(scores.get(f'{letter}_{kind}'))}</td>" for kind in ("mean", "recall", "decay"))
        lines.append(f'<tr><th scope="row">{letter}, {meaning}</th>{cells}</tr>')
    headings = "".join(f'<th scope="col">{name}</th>' for name in ("Measure", "Mean", "Recall", "Decay"))
    return ('<h2>Scores</h2>\n<p class="quiet">Mean IoU is the contest’s, over frames. J and F are means over clips. '
            "Recall: the share of frames above 0.5. Decay: how much is lost from a clip’s first quarter to its last. "
            f"Protocol: {protocol}; {scores.get('frames', NONE)} frames.</p>\n"
            f"<table><thead><tr>{headings}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table>\n")


def clip_table(scores: dict, clips: dict[str, list[dict]]) -> str:
    """Return the table of clips: a sortable column each for name and scores, then J drawn frame by frame."""
    headings = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in ("Clip", *COLUMNS.values()))
    lines = []
    for position, (clip, rows) in enumerate(clips.items()):
        values = [scores["per_clip"].get(clip, {}).get(key) for key in COLUMNS]
        cells = "".join(f'<td data-value="{float(value) if known(value) else ""}">{number(value)}</td>' for value in values)
        name, line = html.escape(clip), sparkline([row.get("J") for row in rows])
        lines.append(f'<tr><th scope="row" data-value="{name}"><a href="#clip-{position}">{name}</a></th>{cells}<td>{line}</td></tr>')
    return ('<h2 id="about-clips">Clips</h2>\n'
            '<p class="quiet">Press a heading to sort by it. A clip’s name leads to its frames.</p>\n'
            '<div class="scroll" role="region" aria-labelledby="about-clips" tabindex="0">\n'
            '<table id="clips" aria-labelledby="about-clips">\n'
            f'<thead><tr>{headings}<th scope="col">J, frame by frame</th></tr></thead>\n'
            "<tbody>\n" + "\n".join(lines) + "\n</tbody></table>\n</div>\n")


def sparkline(values: Sequence[float | None]) -> str:
    """Return a small SVG line of `values` in 0..1, one a frame, over a rule at 0.5; broken where a value is missing."""
    there = [value for value in values if value is not None and known(value)]
    if not there:
        return NONE
    runs: list[list[str]] = [[]]
    for index, value in enumerate(values):
        if value is not None and known(value):
            runs[-1].append(f"{index + 0.5:g},{round(30 - 28 * value, 1):g}")
        elif runs[-1]:
            runs.append([])
    lines = "".join(f'<polyline points="{" ".join(run if len(run) > 1 else run * 2)}"/>' for run in runs if run)
    return (f'<svg class="spark" viewBox="0 0 {len(values)} 32" preserveAspectRatio="none" role="img" '
            f'aria-label="J of {len(values)} frames, from {min(there):.2f} to {max(there):.2f}">'
            f'<line x1="0" x2="{len(values)}" y1="16" y2="16"/>{lines}</svg>')


def choose_frames(rows: Sequence[dict]) -> Iterator[tuple[str, dict]]:
    """Yield (word, row) of the frames to show of one clip: its worst, median and best by IoU, or first, middle and last.

    Frames with nothing to find and nothing found have no IoU and are passed over. A short clip yields fewer.
    """
    scored = sorted((row for row in rows if known(row.get("iou"))), key=lambda row: row["iou"])
    words, chosen = (("Worst", "Median", "Best"), scored) if scored else (("First", "Middle", "Last"), list(rows))
    yield words[0], chosen[0]
    if len(chosen) > 2:
        yield words[1], chosen[len(chosen) // 2]
    if len(chosen) > 1:
        yield words[2], chosen[-1]


def clip_section(position: int, clip: str, rows: Sequence[dict], picture: Callable[[int], np.ndarray]) -> str:
    """Return a clip's heading and its pictures."""
    figures = [figure(word, clip, row, picture(row["index"])) for word, row in choose_frames(rows)]
    return (f'<section aria-labelledby="clip-{position}">\n'
            f'<h3 id="clip-{position}">{html.escape(clip)} <span class="quiet">{len(rows)} frames</span></h3>\n'
            '<div class="frames">\n' + "\n".join(figures) + "\n</div>\n</section>")


def figure(word: str, clip: str, row: dict, image: np.ndarray) -> str:
    """Return one picture, uint8 [H, W, 3], with its caption, and with words for those who do not see it."""
    image = pictures.shrink(image, PICTURE_SIDE)
    height, width = image.shape[:2]
    frame, shown, scores = html.escape(str(row["frame"])), "the prediction filled blue", ""
    if known(row.get("iou")):
        shown += ", the truth outlined orange"
        scores = f'IoU {number(row["iou"])}, F {number(row.get("F"))}'
    alt = f"Frame {frame} of {html.escape(clip)}: {shown}. {scores}".strip()
    return (f'<figure><img src="{pictures.jpeg_uri(image)}" width="{width}" height="{height}" alt="{alt}">'
            f"<figcaption>{word}: frame {frame} <span>{scores}</span></figcaption></figure>")
