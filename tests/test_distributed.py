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

ALEXNET = ("--featurizer", "alexnet", "--weights", "random", "--compute", "float32", "--threads", 1)


def torchrun(name: str, *flags, processes: int = 2) -> list[str]:
    """The command line that runs a script in several processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            str(ROOT / f"{name}.py"), *map(str, flags)]


def run(name: str, *flags) -> Result:
    done = subprocess.run(torchrun(name, *flags), capture_output=True, text=True, env={**os.environ, **QUIET}, timeout=300)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def features(tmp_path):
    """23 frames to train on and 7 to validate on: odd numbers, and a last batch of an epoch that is short."""
    write_features(tmp_path / "train", {"ant": 5, "bee": 7, "cat": 11})
    write_features(tmp_path / "val", {"dog": 4, "elk": 3})
    return "--features", tmp_path / "train", "--val-features", tmp_path / "val"


@pytest.mark.parametrize("flags", [("--shuffle", "--schedule", "onecycle", "--ema", 0.9, "--batch-size", 5),
                                   ("--no-shuffle", "--batch-size", 1)],
                         ids=["shuffled", "in order, one frame a batch"])
def test_two_processes_have_the_losses_of_one(features, tmp_path, flags):
    """A batch of one frame leaves the other process without any."""
    flags = (*features, "--decoder", "linear", "--steps", 14, "--log-every", 1, "--threads", 1, *flags)
    ok(call("train", *flags, "--out", tmp_path / "one"))
    done = ok(run("train", *flags, "--out", tmp_path / "two"))
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [row["step"] for row in two] == list(range(14))
    for key, tolerance in (("loss", 1e-5), ("lr", 1e-9), ("val_iou", 1e-3)):  # a pixel at the threshold may fall to either side
        np.testing.assert_allclose([row[key] for row in two], [row[key] for row in one], rtol=tolerance)
    assert len({row["loss"] for row in one}) > 10  # or the line above would say little
    assert tree(tmp_path / "two").keys() == tree(tmp_path / "one").keys()  # one process wrote, and left nothing of its own
    assert done.out.count("wrote ") == 1 and done.out.count("steps of") == 1


def test_featurizing_with_two_gives_the_bytes_of_one(tmp_path):
    write_davis(tmp_path / "clips", clips=1, val_clips=1, frames=7, size=(64, 96))
    flags = ("--data", tmp_path / "clips", "--split", "train", "--batch-size", 2, *ALEXNET, "--levels", "s16,s32")
    ok(call("featurize", *flags, "--out", tmp_path / "one"))
    done = ok(run("featurize", *flags, "--out", tmp_path / "two"))
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert done.out.count("wrote ") == 1 and not list(tmp_path.glob(".*"))


def test_bad_input_is_said_in_one_line_of_ours(features, tmp_path):
    result = run("train", "--features", tmp_path / "nowhere", "--out", tmp_path / "run")
    ours = [line for line in result.err.splitlines() if "train.py: " in line and "nowhere" in line]
    assert result.status != 0 and len(ours) == 1, result.err
    assert "/train.py\", line" not in result.err and not (tmp_path / "run").exists()


def test_evaluating_is_for_one_process(features, tmp_path):
    ok(call("train", *features, "--decoder", "linear", "--steps", 2, "--threads", 1, "--out", tmp_path / "run"))
    result = run("evaluate", "--model", tmp_path / "run", "--features", tmp_path / "val", "--out", tmp_path / "results")
    assert result.status != 0 and "evaluate.py: runs as one process" in result.err, result.err
    assert not (tmp_path / "results").exists()


def workers(parent: int) -> list[int]:
    """The process ids of torchrun's workers, in the order of their ranks."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    ranks = {}
    for pid in map(int, children):
        match = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
        if match:
            ranks[int(match[1])] = pid
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finding torchrun's workers needs /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_job(features, tmp_path, rank):
    run, flags = tmp_path / "run", (*features, "--decoder", "linear", "--threads", 1, "--log-every", 5, "--no-pictures")
    with subprocess.Popen(torchrun("train", *flags, "--steps", 100_000, "--out", run), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env={**os.environ, **QUIET}) as job:
        deadline = time.monotonic() + 120
        while not (run / "last.pt").exists():
            assert job.poll() is None and time.monotonic() < deadline, job.stderr.read()
            time.sleep(0.05)
        os.kill(workers(job.pid)[rank], signal.SIGKILL)
        started = time.monotonic()
        _, said = job.communicate(timeout=100)
        assert time.monotonic() - started < 60
    assert job.returncode != 0
    assert "SIGKILL" in said or "Signal 9" in said, said  # torchrun's own, which names the process
    if rank == 1:  # the one that is left says so too, unless torchrun was faster in ending it
        assert "another process of this job ended" in said or "SIGTERM" in said, said
    assert not [path for path in run.rglob("*") if path.suffix == ".pt" and path.stat().st_size == 0]
    if rank == 0:  # going on is the same whoever died
        return
    before = log_of(run)[-1]["step"]
    with subprocess.Popen(torchrun("train", "--resume", run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, **QUIET}) as job:  # and it goes on with both
        while log_of(run)[-1]["step"] <= before + 5:
            assert job.poll() is None and time.monotonic() < deadline + 120, job.stderr.read()
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=60)
