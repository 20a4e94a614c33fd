"""python -m vos.runs: what its table and its picture say of runs, whole, damaged and of others."""
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from helpers import call, cut, ok, refuses, tree, write_features, write_json

FLAGS = {"decoder": "linear", "features": "features/made-up-train", "val_features": "val",
         "folds": None, "seeds": None, "seed": 0}


def write_run(run: Path, *logs: list[float | None], **flags) -> None:
    """Write a run folder: of one training, or of a fold for each log. logs: val IoU of steps."""
    (run / "checkpoints").mkdir(parents=True)
    recipe = {"steps": 3, "lr": 0.002} | {key: flags.pop(key) for key in {"lr"} & flags.keys()}
    write_json(run / "args.json", {"args": {**FLAGS, **flags}, "recipe": recipe, "seconds": 1.25,
                                   "started": "2030-01-02 03:04:05"})
    (run / "log.jsonl").touch()
    for number, ious in enumerate(logs):
        place = run / f"fold-{number}" if len(logs) > 1 else run
        place.mkdir(exist_ok=True)
        rows = [{"step": step, "loss": 2 - step} | ({} if iou is None else {"val_iou": iou})
                for step, iou in enumerate(ious)]
        (place / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """Runs of every kind, and what is no run."""
    folder = tmp_path / "runs"
    write_run(folder / "rising", [0.1, 0.2, 0.3])
    write_run(folder / "early <best>", [0.5, 0.7, 0.6], lr=0.01)
    write_run(folder / "folds", [0.1, 0.4, 0.2], [0.2, 0.5, 0.6], folds=2, val_features=None)
    write_run(folder / "half", [0.05, 0.15])
    write_run(folder / "blind", [None, None, None], val_features=None)
    write_run(folder / "cut", [0.9])
    cut(folder / "cut/args.json")
    write_run(folder / "odd", [0.9])
    (folder / "odd/log.jsonl").write_text('{"step": 0, "loss": 1, "val_iou": "high"}\n')
    (folder / "mine").mkdir()
    (folder / "mine/notes.txt").touch()
    (folder / ".rising.vos-partial").mkdir()
    return folder


def test_the_table_lists_runs_the_best_first(folder):
    before = tree(folder)
    result = ok(call("vos.runs", folder))
    heading, *rows, wrote = result.out.splitlines()
    assert heading.split("  ")[0] == "run" and " lr " in heading and " folds " in heading
    for same in ("steps", "seeds"):  # in all runs
        assert same not in heading
    assert [row.split("  ")[0] for row in rows] == ["early <best>", "folds", "rising", "half",
                                                    "blind"]
    wanted = ["0.7000 @ 1", "0.5000 +- 0.1414 of 2", "0.3000 @ 2", "0.1500 @ 1", "-"]
    last = ["0.6000 @ 2", "0.4000 +- 0.2828 of 2", "0.3000 @ 2", "0.1500 @ 1, unfinished", "-"]
    for row, *texts in zip(rows, wanted, last):
        cells = row.split()
        assert " ".join(cells).endswith(f"{texts[0]} {texts[1]} 1.2 2030-01-02 03:04:05")
        assert cells.count("made-up-train") == 1 and "linear" in cells

    skipped = result.err.splitlines()
    assert len(skipped) == 3 and all(line.startswith("skipped: ") for line in skipped)
    for line, name in zip(skipped, ("cut", "mine", "odd")):
        assert str(folder / name) in line
    assert wrote.startswith(f"wrote {folder / 'curves.svg'}: curves of 5 of 5 runs")
    assert {**before, "curves.svg": None} == {**tree(folder), "curves.svg": None}


def test_the_picture_has_a_curve_for_each_run(folder):
    for _ in range(2):  # the second replaces the first
        ok(call("vos.runs", folder))
    svg = "{http://www.w3.org/2000/svg}"
    picture = ElementTree.parse(folder / "curves.svg")
    texts = [text.text for text in picture.iter(f"{svg}text")]
    assert texts[-7:-2] == ["early <best>", "folds", "rising", "half", "blind"]
    assert texts[-2:] == ["step 0", "step 2"]
    drawn = [path.attrib["d"] for path in picture.iter(f"{svg}path")
             if path.get("stroke-linecap") and path.attrib["d"]]
    assert len(drawn) == 5 + 4  # losses, and IoUs of those that validated
    assert drawn[6] == "M60.0 359.0h0L380.0 317.0h0L700.0 324.0h0"  # the folds' mean


def test_nothing_is_replaced_but_a_picture_of_its_own(folder):
    (folder / "curves.svg").write_text("<svg/>")
    err = call("vos.runs", folder).err.splitlines()
    assert "curves.svg: is another picture" in err[-1]
    assert (folder / "curves.svg").read_text() == "<svg/>"


@pytest.mark.parametrize("inside", ["nothing", "a run", "no folder"])
def test_a_folder_without_runs_is_refused(tmp_path, inside):
    if inside != "no folder":
        (tmp_path / "runs").mkdir()
    if inside == "a run":
        write_json(tmp_path / "runs/args.json", {})
    refuses("vos.runs", tmp_path / "runs", names=["holds no run of train.py"], untouched=tmp_path)


@pytest.mark.parametrize("row", [
    '{"step": 0, "loss": "low"}', '{"step": 0}', '{"step": 0, "loss": NaN}',
    '{"step": 0, "loss": 1, "val_iou": null}'])
def test_a_finished_run_says_that_its_log_is_empty_and_refuses_a_damaged_one(tmp_path, row):
    write_features(tmp_path / "train", {"ant": 5})
    flags = ("--features", tmp_path / "train", "--steps", 2, "--threads", 1, "--no-pictures")
    ok(call("train", *flags, "--out", tmp_path / "run"))
    (tmp_path / "run/log.jsonl").write_text("")
    assert "its log has no lines" in ok(call("train", "--resume", tmp_path / "run")).out
    (tmp_path / "run/log.jsonl").write_text(row + "\n")
    words = "log.jsonl: expected JSON with a step and a loss"
    refuses("train", "--resume", tmp_path / "run", names=[words], untouched=tmp_path)
