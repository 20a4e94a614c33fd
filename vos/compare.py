"""List the runs of a folder, the best first, and draw their curves into its curves.svg.

    python -m vos.runs runs

A run of several folds or seeds is one row: the mean and the standard deviation of its trainings.
Values of val IoU compare where runs validated on the same clips. Settings that all runs share are
left out.
"""
from pathlib import Path

from vos import cli, runs
from vos.inputs import BadInput, read_json
from vos.pictures import COLORS, write_curves

FLAGS = ("decoder", "features", "val_features", "holdout", "folds", "seeds", "seed", "levels")


def open_run(folder: Path) -> tuple[dict, dict[str, str], list[list[dict]]]:
    """Return a run's settings, what it reached in words, each training's log. Raises BadInput."""
    facts = read_json(folder / "args.json")
    places = [folder, *sorted(file.parent for file in folder.glob("*/log.jsonl"))]
    logs = [rows for rows in map(runs.read_log, places) if rows]
    ends = [runs.find_end(log) for log in logs]
    try:
        settings = {name: facts["args"].get(name) for name in FLAGS} | facts["recipe"]
        steps = settings["steps"] * (settings["folds"] or 1) * (settings["seeds"] or 1)
        done = sum(end["step"] + 1 for end in ends)
        reached = {"best val IoU": runs.spread(ends, "best_val_iou"),
                   "last val IoU": runs.spread(ends, "val_iou"), "steps": f"{done} of {steps}",
                   "seconds": str(facts.get("seconds", "-")), "started": str(facts["started"])}
    except (AttributeError, KeyError, TypeError) as error:
        raise BadInput(f"{folder}: is not what train.py writes ({error})") from error
    return settings, {"run": folder.name, **reached}, logs


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER",
                        help="that holds run folders (default: runs)")
    folder = parser.parse_args().folder

    found = []
    for place in sorted(folder.glob("[!.]*/")):
        try:
            found.append(open_run(place))
        except BadInput as error:
            cli.complain(f"skipped: {error}")
    if not found:
        raise BadInput(f"{folder}: holds no run of train.py; name a folder of run folders")
    picture = folder / "curves.svg"
    if picture.is_file() and b"Loss and validation IoU" not in picture.read_bytes():
        raise BadInput(f"{picture}: is another picture than this command makes; move it")

    found.sort(key=lambda run: run[1]["best val IoU"], reverse=True)  # "-", of none, is the last
    differ = [name for name in found[0][0] if len({str(run[0].get(name)) for run in found}) > 1]
    table = [[*found[0][1], *differ]]
    for settings, reached, _ in found:
        table.append([*reached.values(), *(str(settings.get(name)) for name in differ)])
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        cells = [text.ljust(width) for text, width in zip(row, widths)]
        cli.say("  ".join(cells).rstrip())

    shown = [(log, reached["run"]) for _, reached, logs in found[:len(COLORS)] for log in logs]
    write_curves(picture, *(log for log, _ in shown), names=[name for _, name in shown])
    cli.say(f"wrote {picture}: curves of {min(len(found), len(COLORS))} of {len(found)} runs")
