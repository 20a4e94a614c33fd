"""List the runs of a folder, the best first, and draw their curves into its curves.svg.

    python -m vos.runs runs

A run of several folds or seeds is one row: the mean and the standard deviation of its trainings.
Values of val IoU compare where runs validated on the same clips. Settings that all runs share are
left out.
"""
import itertools
import os
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from vos import cli, runs
from vos.inputs import BadInput, opened, read_json
from vos.outputs import write_json, write_text
from vos.pictures import chart, curve

# Okabe-Ito, without its yellow, which is hard to see on white
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#808080")
MARK = "<!-- python -m vos.runs -->\n"  # the first line of a picture that may be replaced
ARGS = ("val_features", "holdout", "folds", "seeds", "seed", "levels")  # beside the recipe's fields


def spread(values: Sequence[float]) -> str:
    """Return the mean of values, and of several their sample standard deviation, as text."""
    text = f"{statistics.fmean(values):.4f}"
    return f"{text} +- {statistics.stdev(values):.4f}" if len(values) > 1 else text


def write_summary(out: Path, trainings: Sequence[tuple], ends: dict[str, dict]) -> str:
    """Write summary.json of trainings (name, clips held out, seed); return what they reached.

    ends: what `runs.find_end` found of each.
    """
    each = {name: {"seed": seed, "held_out": held, **ends[name]} for name, held, seed in trainings}
    summary: dict = {"trainings": each, "mean": {}, "std": {}}
    said: list[str] = []
    for key, words in (("best_val_iou", "val IoU {} at each one's best step"),
                       ("val_iou", "{} at the last step"), ("loss", "loss {} at the last step")):
        values = [end[key] for end in ends.values() if key in end]
        if values:
            summary["mean"][key] = statistics.fmean(values)
            summary["std"][key] = statistics.stdev(values)
            if key != "loss" or not said:
                said.append(words.format(spread(values)))
    write_json(out / "summary.json", summary)
    return f"{'; '.join(said)} (mean +- standard deviation of {len(ends)})"


class Run(NamedTuple):
    """A run folder: of one training, or of one for each fold and seed."""

    name: str
    flags: dict  # all in args.json
    shown: list[str]  # names of those that the table shows where runs differ
    logs: list[list[dict]]  # of each training that got as far as a line of its log
    ends: list[dict]  # what `runs.find_end` found of each
    finished: bool
    started: str
    seconds: str

    def values(self, key: str) -> list[float]:
        return [end[key] for end in self.ends if key in end]


def open_run(folder: Path) -> Run:
    """Read what a run left. Raises BadInput for a folder that is none, or is damaged."""
    facts = read_json(folder / "args.json")
    places = [folder, *sorted(file.parent for file in folder.glob("*/log.jsonl"))]
    logs = [rows for rows in map(runs.read_log, places) if rows]
    ends = [runs.find_end(log) for log in logs]
    try:
        flags = {**facts["args"], **facts["recipe"]}
        shown = [*ARGS, *facts["recipe"]]
        seconds = f"{facts['seconds']:.1f}" if "seconds" in facts else "-"
        wanted = (flags.get("folds") or 1) * (flags.get("seeds") or 1)  # trainings
        last = flags["steps"] - 1
        finished = len(ends) == wanted and all(end["step"] == last for end in ends)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise BadInput(f"{folder}: is not what train.py writes ({error})") from error
    return Run(folder.name, flags, shown, logs, ends, finished, cell(facts.get("started")), seconds)


def find_runs(folder: Path) -> list[Run]:
    """Return the runs of a folder, the best first; what is none is named on standard error."""
    found = []
    for place in sorted(folder.iterdir() if folder.is_dir() else []):
        if place.is_dir() and not place.name.startswith("."):
            try:
                found.append(open_run(place))
            except BadInput as error:
                cli.complain(f"skipped: {error}")
    if not found:
        raise BadInput(f"{folder}: holds no run of train.py; name a folder of run folders")

    def rank(run: Run) -> float:
        values = run.values("best_val_iou")
        return -statistics.fmean(values) if values else 1
    return sorted(found, key=rank)


def cell(value) -> str:
    """Return a flag's value as it stands in the table."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "-" if value is None else str(value)


def list_cells(found: list[Run]) -> list[list[str]]:
    """Return the rows of the table, headings first: flags only where they differ between runs."""
    differ = [name for name in dict.fromkeys(name for run in found for name in run.shown)
              if len({cell(run.flags.get(name)) for run in found}) > 1]
    table = [["run", "decoder", "features", *differ, "best val IoU", "last val IoU", "seconds",
              "started"]]
    for run in found:
        flags = {name: cell(run.flags.get(name)) for name in ("decoder", "features", *differ)}
        for name in flags.keys() & {"features", "val_features"}:
            flags[name] = Path(flags[name]).name
        ious = []
        for key, step in (("best_val_iou", "best_step"), ("val_iou", "step")):
            values = run.values(key)
            where = f"of {len(values)}" if len(values) != 1 else f"@ {run.ends[0][step]}"
            ious.append(f"{spread(values)} {where}" if values else "-")
        if not run.finished:
            ious[1] += ", unfinished"
        table.append([run.name, *flags.values(), *ious, run.seconds, run.started])
    return table


def average(logs: list[list[dict]], key: str) -> list[tuple[int, float]]:
    """Return (step, mean of a value) at every step where all logs have it."""
    tables = [{row["step"]: row[key] for row in log if key in row} for log in logs]
    steps = set.intersection(*map(set, tables)) if tables else set()
    return [(step, statistics.fmean(table[step] for table in tables)) for step in sorted(steps)]


def draw_curves(found: list[Run]) -> str:
    """Return an SVG of the losses and validation IoUs of runs, a colour each, with a legend."""
    curves = {key: [average(run.logs, key) for run in found] for key in ("loss", "val_iou")}
    points = list(itertools.chain(*curves["loss"]))
    span = 0, max([step for step, _ in points], default=1)
    highest = max([loss for _, loss in points], default=1) or 1

    drawn = ""
    for key, words, high, top in (("loss", "Loss", highest, 40),
                                  ("val_iou", "Validation IoU", 1, 240)):
        box = 60, top, 640, 140
        drawn += f'<text x="60" y="{top - 14}">{words}</text>{chart([], span, high, box)}\n'
        for line, color in zip(curves[key], COLORS):
            drawn += curve(line, span, high, box, color) + "\n"
    for number, (run, color) in enumerate(zip(found, COLORS)):
        name = run.name if run.name.isprintable() else ascii(run.name)
        y = 430 + 20 * number
        drawn += f'<path d="M60 {y - 4}h20" stroke="{color}" stroke-width="4"/>'
        drawn += f'<text x="90" y="{y}">{escape(name)}</text>\n'
    return f"""{MARK}<svg xmlns="http://www.w3.org/2000/svg" role="img"
viewBox="0 0 720 {430 + 20 * len(found)}" aria-label="Loss and validation IoU of runs against steps"
fill="currentColor" font-size="13" font-family="sans-serif"
style="color-scheme: light dark; color: CanvasText">
{drawn}<text x="60" y="405">step 0</text>
<text x="700" y="405" text-anchor="end">step {span[1]}</text>
</svg>
"""


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER",
                        help="that holds run folders (default: runs)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()

    found, picture = find_runs(args.folder), args.folder / "curves.svg"
    if os.path.lexists(picture):
        with opened(picture) as file:
            if file.read(len(MARK)) != MARK.encode():
                raise BadInput(f"{picture}: is another picture than this command makes; move it")

    table = list_cells(found)
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        cells = [text.ljust(width) for text, width in zip(row, widths)]
        cli.say("  ".join(cells).rstrip())
    write_text(picture, draw_curves(found[:len(COLORS)]))
    cli.say(f"wrote {picture}: curves of {min(len(found), len(COLORS))} of {len(found)} runs")
