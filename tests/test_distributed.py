"""Two processes, as torchrun starts them, do what one does: on the CPU, over gloo."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import QUIET, ROOT, Result, call, log_of, ok, tree, write_davis, write_features

LINEAR = ("--decoder", "linear", "--threads", 1, "--no-pictures")


def launch(name: str, *flags) -> subprocess.Popen:
    """Start a script in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(ROOT / f"{name}.py"), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, **QUIET})


def run(name: str, *flags) -> Result:
    with launch(name, *flags) as job:
        out, err = job.communicate(timeout=300)
    return Result(job.returncode, out, err)


@pytest.fixture
def features(tmp_path):
    """23 frames to train on, and one to validate on: fewer than there are processes."""
    write_features(tmp_path / "train", {"ant": 5, "bee": 7, "cat": 11})
    write_features(tmp_path / "val", {"dog": 1})
    return "--features", tmp_path / "train", "--val-features", tmp_path / "val"


@pytest.mark.parametrize("batch", [5, 1])
def test_two_processes_have_the_losses_of_one(features, tmp_path, batch):
    """A batch of one frame leaves the other process without any."""
    flags = (*features, *LINEAR, "--steps", 14, "--log-every", 2, "--schedule", "onecycle",
             "--batch-size", batch)
    ok(call("train", *flags, "--out", tmp_path / "one"))
    done = ok(run("train", *flags, "--out", tmp_path / "two"))
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for key, tolerance in (("step", 0), ("loss", 1e-5), ("lr", 1e-9), ("val_iou", 1e-2)):
        np.testing.assert_allclose([row[key] for row in two], [row[key] for row in one],
                                   rtol=tolerance)
    assert tree(tmp_path / "two").keys() == tree(tmp_path / "one").keys()  # one of them wrote
    assert done.out.count("wrote ") == 1 and done.out.count("steps of") == 1


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


def find_worker(parent: int, rank: int) -> int:
    """Return the process id of torchrun's worker of a rank."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for pid in children:
        if re.search(rb"(^|\0)RANK=%d\0" % rank, Path(f"/proc/{pid}/environ").read_bytes()):
            return int(pid)
    raise AssertionError(children)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finding workers needs /proc")
def test_a_process_that_dies_ends_the_job_and_it_goes_on(features, tmp_path):
    run, deadline = tmp_path / "run", time.monotonic() + 120
    flags = (*features, *LINEAR, "--log-every", 5, "--steps", 100_000)
    with launch("train", *flags, "--out", run) as job:
        while not (run / "last.pt").exists():
            assert job.poll() is None and time.monotonic() < deadline, job.stderr.read()
            time.sleep(0.05)
        os.kill(find_worker(job.pid, 1), signal.SIGKILL)
        _, said = job.communicate(timeout=60)
    assert job.returncode != 0 and ("SIGKILL" in said or "Signal 9" in said), said
    before = log_of(run)[-1]["step"]
    with launch("train", "--resume", run) as job:
        while log_of(run)[-1]["step"] <= before + 5:
            assert job.poll() is None and time.monotonic() < deadline, job.stderr.read()
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=60)
