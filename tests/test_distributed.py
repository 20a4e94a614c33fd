"""Two processes, as torchrun starts them, do what one does: on the CPU, over gloo."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forking import at_write, forked
from helpers import QUIET, ROOT, Result, call, log_of, ok, tree, write_davis, write_features

LINEAR = ("--decoder", "linear", "--threads", 1, "--no-pictures")


def run(name: str, *flags) -> Result:
    """Run a script in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(ROOT / f"{name}.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env={**os.environ, **QUIET})
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def features(tmp_path):
    """23 frames to train on, and one to validate on: fewer than there are processes."""
    write_features(tmp_path / "train", {"ant": 5, "bee": 7, "cat": 11})
    write_features(tmp_path / "val", {"dog": 1})
    return "--features", tmp_path / "train", "--val-features", tmp_path / "val"


def same_losses(run: Path, other: Path) -> None:
    rows, others = log_of(run), log_of(other)
    for key, tolerance in (("step", 0), ("loss", 1e-5), ("lr", 1e-9), ("val_iou", 1e-2)):
        np.testing.assert_allclose([row[key] for row in rows], [row[key] for row in others],
                                   rtol=tolerance)
    assert tree(run).keys() == tree(other).keys()  # one of them wrote


@pytest.mark.parametrize("batch", [5, 1])
def test_two_processes_have_the_losses_of_one(features, tmp_path, batch):
    """A batch of one frame leaves the other process without any."""
    flags = (*features, *LINEAR, "--steps", 14, "--log-every", 2, "--schedule", "onecycle",
             "--batch-size", batch)
    ok(call("train", *flags, "--out", tmp_path / "one"))
    done = ok(run("train", *flags, "--out", tmp_path / "two"))
    same_losses(tmp_path / "two", tmp_path / "one")
    assert done.out.count("wrote ") == 1 and done.out.count("steps of") == 1


def test_two_processes_go_on_with_what_was_stopped(features, tmp_path):
    flags = (*features, *LINEAR, "--steps", 14, "--log-every", 2)
    ok(call("train", *flags, "--out", tmp_path / "one"))
    stop = at_write(tmp_path / "run", 40, signal.SIGKILL)
    forked("train", *flags, "--out", tmp_path / "run", prepare=stop)
    assert 0 < len(log_of(tmp_path / "run")) < len(log_of(tmp_path / "one"))
    ok(run("train", "--resume", tmp_path / "run"))
    same_losses(tmp_path / "run", tmp_path / "one")


def test_featurizing_with_two_gives_the_bytes_of_one(tmp_path):
    write_davis(tmp_path / "clips", clips=3, val_clips=1, frames=3, size=(64, 96))
    flags = ("--data", tmp_path / "clips", "--split", "train", "--featurizer", "alexnet",
             "--weights", "random", "--compute", "float32", "--threads", 1, "--levels", "s16,s32")
    ok(call("featurize", *flags, "--out", tmp_path / "one"))
    done = ok(run("featurize", *flags, "--out", tmp_path / "two"))
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert done.out.count("wrote ") == 1 and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name, flags, words", [
    ("train", ("--features", "nowhere"), "nowhere: no such feature folder"),
    ("evaluate", ("--model", "run", "--features", "val"), "runs as one process")])
def test_what_is_refused_is_said_in_one_line_of_ours(tmp_path, name, flags, words):
    result = run(name, *flags, "--out", tmp_path / "out")
    ours = [line for line in result.err.splitlines() if line.startswith(f"{name}.py: ")]
    assert result.status != 0 and ours and words in ours[0], result.err
    assert f"/{name}.py\", line" not in result.err and not list(tmp_path.iterdir())
