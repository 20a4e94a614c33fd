"""A run that was stopped ends as the run that was never stopped; test_faults.py kills it."""
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forking import forked
from helpers import call, change_json, cut, ok, refuses, tree, write_features

import data
import models
from vos import outputs

FLAGS = ("--decoder", "linear", "--optimizer", "adamw", "--weight-decay", 0.1, "--lr", 0.02,
         "--schedule", "onecycle", "--batch-size", 4, "--threads", 1, "--no-pictures")


@pytest.fixture
def features(tmp_path):
    write_features(tmp_path / "train", {"ant": 5, "bee": 7, "cat": 9})
    write_features(tmp_path / "val", {"dog": 4, "elk": 3})
    return "--features", tmp_path / "train", "--val-features", tmp_path / "val"


def same_run(run: Path, other: Path) -> None:
    for name in ("model.pt", "log.jsonl"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    assert tree(run / "checkpoints") == tree(other / "checkpoints") != {}
    assert {path.name for path in run.iterdir()} == {path.name for path in other.iterdir()}


def signal_in(step: int, number: int) -> Callable[[], None]:
    """Return what to prepare a fork with, so that it gets a signal in the middle of a step."""
    def prepare() -> None:
        draw = data.batch_order

        def batch_order(*given):
            if given[-1] == step:
                os.kill(os.getpid(), number)
            return draw(*given)
        data.batch_order = batch_order
    return prepare


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_it_and_it_goes_on(features, tmp_path, number):
    run, flags = tmp_path / "run", (*features, *FLAGS, "--steps", 60, "--log-every", 5)
    ok(call("train", *flags, "--out", tmp_path / "whole"))
    result = forked("train", *flags, "--out", run, prepare=signal_in(27, number))
    if number == signal.SIGINT:
        assert result.status == 130 and result.err.count("\n") == 1, result
        assert f"stopped; go on with: python train.py --resume {run}" in result.err
    with outputs.locked(run):
        refuses("train", "--resume", run, names=[run, "another process"], untouched=run)
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
    "damaged args": (lambda run: cut(run / "args.json"), "args.json: expected a JSON object"),
    "unknown args": (lambda run: change_json(run / "args.json", args={"colour": 1}), "args.json"),
    "damaged state": (lambda run: cut(run / "last.pt"), "last.pt: cannot be read"),
    "a step before the first": (
        lambda run: torch.save(torch.load(run / "last.pt") | {"run": {"step": -1, "best": -1.0}},
                               run / "last.pt"), "last.pt: does not fit this run"),
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
    monkeypatch.setattr(models.Linear, "recipe", models.Recipe(lr=0.5, batch_size=2))
    ok(call("train", "--resume", tmp_path / "run"))
    assert (tmp_path / "run/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()
