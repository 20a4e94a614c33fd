"""python -m vos.runs: what its table and its picture say of runs, whole, damaged and of others."""
import json
import re
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
    columns = ["run", "best val IoU", "last val IoU", "steps", "seconds", "started"]
    differ = ["val_features", "folds", "lr"]  # all other settings are those of every run
    assert re.split("  +", heading) == [*columns, *differ]
    assert [re.split("  +", row)[:4] for row in rows] == [
        ["early <best>", "0.7000", "0.6000", "3 of 3"],
        ["folds", "0.5000 +- 0.1414", "0.4000 +- 0.2828", "6 of 6"],
        ["rising", "0.3000", "0.3000", "3 of 3"], ["half", "0.1500", "0.1500", "2 of 3"],
        ["blind", "-", "-", "3 of 3"]]
    assert re.split("  +", rows[1])[4:] == ["1.25", "2030-01-02 03:04:05", "None", "2", "0.002"]

    skipped = result.err.splitlines()
    assert len(skipped) == 3 and all(line.startswith("skipped: ") for line in skipped)
    for line, name in zip(skipped, ("cut", "mine", "odd")):
        assert str(folder / name) in line
    assert wrote == f"wrote {folder / 'curves.svg'}: curves of 5 of 5 runs"
    assert {**before, "curves.svg": None} == {**tree(folder), "curves.svg": None}
    drawn = (folder / "curves.svg").read_text()
    assert drawn.count("<polyline") == 2 * 6 and "early &lt;best&gt;" in drawn
    ok(call("vos.runs", folder))  # replaces its own


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
def test_a_finished_run_ends_without_a_log_and_refuses_a_damaged_one(tmp_path, row):
    write_features(tmp_path / "train", {"ant": 5})
    flags = ("--features", tmp_path / "train", "--steps", 2, "--threads", 1, "--no-pictures")
    ok(call("train", *flags, "--out", tmp_path / "run"))
    (tmp_path / "run/log.jsonl").write_text("")
    assert "loss - at the last step" in ok(call("train", "--resume", tmp_path / "run")).out
    (tmp_path / "run/log.jsonl").write_text(row + "\n")
    words = "log.jsonl: expected JSON with a step and a loss"
    refuses("train", "--resume", tmp_path / "run", names=[words], untouched=tmp_path)
