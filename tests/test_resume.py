"""A run that is killed again and again ends as the run that was never stopped."""
import os
import random
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
from forking import Result, Running, end, start
from helpers import call, ok, script, tree, write_davis, write_features

import runs

KILLS = 10
FLAGS = ("--decoder", "linear", "--optimizer", "adamw", "--weight-decay", 0.1, "--schedule", "onecycle", "--ema", 0.9, "--shuffle",
         "--lr", 0.02, "--batch-size", 4, "--threads", 1, "--no-pictures")


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


def kill_when(running: Running, reached, moment: float) -> Result:
    """SIGKILL a fork `moment` seconds after `reached()`; return how it ended, by itself if that was before."""
    while not reached() and os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)
    time.sleep(moment)
    os.kill(running.pid, signal.SIGKILL)
    return end(running)


def test_ten_kills_at_random_moments_change_nothing(features, tmp_path):
    """Moments are tied to progress, so that a slow machine is killed as far into its work as a fast one.

    The run that is never stopped, and the one that ends the killed one, are processes of their own; the killed ones are forks.
    """
    flags = (*features, *FLAGS, "--steps", 400, "--log-every", 3)
    ok(script("train", *flags, "--out", tmp_path / "whole"))
    total = lines(tmp_path / "whole/log.jsonl")
    rng, run, reached = random.Random(7), tmp_path / "run", []
    for kill in range(KILLS):
        begun = (run / "args.json").exists()
        running = start("train", *(("--resume", run) if begun else (*flags, "--out", run, "--overwrite")))
        wanted = lines(run / "log.jsonl") + rng.randrange(total // KILLS)  # none new: while it starts
        if kill < 5:
            wanted = max(wanted, 1)
        result = kill_when(running, lambda wanted=wanted: lines(run / "log.jsonl") >= wanted, rng.uniform(0, 0.03))
        assert result.status == -signal.SIGKILL, result
        reached.append(lines(run / "log.jsonl"))
    assert reached[-1] < total and len(set(reached)) >= KILLS // 2, reached  # killed on its way, at many places
    ok(script("train", "--resume", run))
    same_run(run, tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_first_and_say_how_to_go_on(features, tmp_path, number):
    flags = (*features, *FLAGS, "--steps", 23, "--log-every", 4)
    ok(call("train", *flags, "--out", tmp_path / "whole"))
    run, log = tmp_path / "run", runs.append_line
    result = stopped_by(number, 2, log, "train", *flags, "--out", run)
    assert result.status == 128 + number, result
    assert result.err.count("\n") == 1 and f"python train.py --resume {run}" in result.err, result
    again = stopped_by(number, 2, log, "train", "--resume", run)
    assert again.status == 128 + number and (run / "last.pt").exists()
    ok(call("train", "--resume", run))
    same_run(run, tmp_path / "whole")


def stopped_by(number: int, calls: int, function, name: str, *flags) -> Result:
    """Run a script that gets a signal in its `calls`-th call of runs.append_line."""
    seen = []

    def interrupt(*arguments):
        seen.append(arguments)
        if len(seen) == calls:
            signal.raise_signal(number)
        function(*arguments)
    with mock.patch.object(runs, function.__name__, interrupt):
        return call(name, *flags)


def test_a_run_killed_after_its_patience_ran_out_trains_no_further(features, tmp_path):
    flags = (*features, *FLAGS, "--steps", 60, "--log-every", 1, "--patience", 2, "--lr", 1e-9)
    ok(call("train", *flags, "--out", tmp_path / "run"))
    before = tree(tmp_path / "run")
    assert lines(tmp_path / "run/log.jsonl") < 60
    ok(call("train", "--resume", tmp_path / "run"))
    assert tree(tmp_path / "run") == before


def test_a_run_is_not_resumed_on_other_features(features, tmp_path):
    ok(call("train", *features, *FLAGS, "--steps", 5, "--out", tmp_path / "run"))
    write_features(tmp_path / "other", {"ant": 5, "bee": 7, "cat": 9}, seed=1)
    (tmp_path / "train").rename(tmp_path / "before")
    (tmp_path / "other").rename(tmp_path / "train")
    result = call("train", "--resume", tmp_path / "run")
    assert result.status == 2 and "other features" in result.err and str(tmp_path / "train") in result.err


def test_resume_refuses_what_would_make_it_another_run(features, tmp_path):
    ok(call("train", *features, *FLAGS, "--steps", 5, "--out", tmp_path / "run"))
    for flags in (("--steps", 9), ("--lr", 0.5), ("--seed", 3), ("--decoder", "fpn"), ("--no-shuffle",)):
        result = call("train", "--resume", tmp_path / "run", *flags)
        assert result.status == 2 and flags[0].replace("no-", "") in result.err, (flags, result)
    ok(call("train", "--resume", tmp_path / "run", "--steps", 5, "--device", "cpu"))  # as it was


def test_featurizing_killed_at_random_moments_gives_the_same_bytes(tmp_path):
    write_davis(tmp_path / "clips", clips=2, val_clips=1, frames=12, size=(96, 128))
    flags = ("--data", tmp_path / "clips", "--split", "train", "--featurizer", "alexnet", "--weights", "random", "--compute", "float32",
             "--batch-size", 1, "--threads", 1)
    ok(call("featurize", *flags, "--out", tmp_path / "whole"))
    rng, progress, kills = random.Random(3), tmp_path / ".f.partial/progress-0.jsonl", 0
    for _ in range(5):
        running = start("featurize", *flags, "--out", tmp_path / "f")
        wanted = lines(progress) + rng.randrange(1, 4)
        kills += kill_when(running, lambda wanted=wanted: lines(progress) >= wanted, rng.uniform(0, 0.01)).status == -signal.SIGKILL
        assert not (tmp_path / "f").exists()
    assert kills == 5 and 5 <= lines(progress) < 24
    assert "going on from an earlier run" in ok(call("featurize", *flags, "--out", tmp_path / "f")).out
    assert tree(tmp_path / "f") == tree(tmp_path / "whole")
    assert not progress.parent.exists()
