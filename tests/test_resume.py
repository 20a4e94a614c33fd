"""A run that was stopped ends as the run that was never stopped; test_faults.py kills it."""
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from forking import Running, end, start
from helpers import call, change_json, cut, ok, refuses, tree, write_features

import models

FLAGS = ("--decoder", "linear", "--optimizer", "adamw", "--weight-decay", 0.1, "--lr", 0.02,
         "--schedule", "onecycle", "--batch-size", 4, "--threads", 1, "--no-pictures")


@pytest.fixture
def features(tmp_path):
    write_features(tmp_path / "train", {"ant": 5, "bee": 7, "cat": 9})
    write_features(tmp_path / "val", {"dog": 4, "elk": 3})
    return "--features", tmp_path / "train", "--val-features", tmp_path / "val"


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def same_run(run: Path, other: Path) -> None:
    for name in ("model.pt", "log.jsonl"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    assert tree(run / "checkpoints") == tree(other / "checkpoints") != {}
    assert {path.name for path in run.iterdir()} == {path.name for path in other.iterdir()}


def wait_for(running: Running, reached) -> None:
    """Wait until `reached()`, or until a fork has ended."""
    state = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while not reached() and os.waitid(os.P_PID, running.pid, state) is None:
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_first_and_says_how_to_go_on(features, tmp_path, number):
    run, flags = tmp_path / "run", (*features, *FLAGS, "--steps", 600, "--log-every", 50)
    ok(call("train", *flags, "--out", tmp_path / "whole"))
    running = start("train", *flags, "--out", run)
    wait_for(running, lambda: lines(run / "log.jsonl") >= 3)
    os.kill(running.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, running.pid, os.WSTOPPED | os.WNOWAIT)  # not before it stands still
    refuses("train", "--resume", run, names=[run, "another process"], untouched=run)
    os.kill(running.pid, number)
    os.kill(running.pid, signal.SIGCONT)
    result = end(running)
    assert result.status == 128 + number and result.err.count("\n") == 1, result
    assert f"python train.py --resume {run}" in result.err and lines(run / "log.jsonl") < 13
    ok(call("train", "--resume", run))
    same_run(run, tmp_path / "whole")
    before = tree(run)
    ok(call("train", "--resume", run, "--device", "cpu", "--threads", 2))
    assert tree(run) == before  # finished: nothing changes


def change_features(run: Path) -> None:
    (run.parent / "train").rename(run.parent / "before")
    write_features(run.parent / "train", {"ant": 5, "bee": 7, "cat": 9}, seed=1)


BAD = {
    "no args": (lambda run: (run / "args.json").unlink(), "args.json: no such file"),
    "damaged args": (lambda run: cut(run / "args.json"), "args.json: expected a JSON file"),
    "unknown args": (lambda run: change_json(run / "args.json", args={"colour": 1}), "args.json"),
    "damaged state": (lambda run: cut(run / "last.pt"), "last.pt: cannot be read"),
    "another state": (lambda run: torch.save({}, run / "last.pt"), "last.pt: "),
    "other features": (change_features, "other features"),
}


def test_a_run_is_not_resumed_as_another(features, tmp_path):
    ok(call("train", *features, *FLAGS, "--steps", 5, "--out", tmp_path / "run"))
    for flags in (("--steps", 9), ("--lr", 0.5), ("--seed", 3), ("--decoder", "fpn")):
        refuses("train", "--resume", tmp_path / "run", *flags, names=[flags[0]], untouched=tmp_path)


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_run_is_refused(features, tmp_path, case):
    ok(call("train", *features, *FLAGS, "--steps", 5, "--out", tmp_path / "run"))
    harm, words = BAD[case]
    harm(tmp_path / "run")
    refuses("train", "--resume", tmp_path / "run", names=[words], untouched=tmp_path)


def test_a_resumed_run_keeps_its_recipe_whatever_the_code_says_now(features, tmp_path, monkeypatch):
    flags = (*features, "--decoder", "linear", "--steps", 9, "--threads", 1, "--no-pictures")
    for name in ("whole", "run"):
        ok(call("train", *flags, "--out", tmp_path / name))
    (tmp_path / "run/last.pt").unlink()  # so that it starts anew
    change_json(tmp_path / "run/args.json", code="another")
    monkeypatch.setattr(models.Linear, "recipe", models.Recipe(lr=0.5, batch_size=2))
    said = ok(call("train", "--resume", tmp_path / "run")).out
    assert "another revision" in said
    assert (tmp_path / "run/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()
