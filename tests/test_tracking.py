"""Tracking with the real wandb client: offline runs read back from their file, online ones against a local server."""
import argparse
import base64
import hashlib
import io
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

import files
import tracking

wandb = pytest.importorskip("wandb", reason="needs the wandb client: pip install wandb")
from tests.wandb_server import ENTITY, KEY, WandbServer  # noqa: E402

ROOT = Path(tracking.__file__).parent


@pytest.fixture(autouse=True)
def own_world(tmp_path, monkeypatch):
    """Everything the client keeps goes under tmp_path, nothing of the user's is read, and no other host is tried."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("DIR", "CACHE_DIR", "DATA_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
        folder = tmp_path / "wandb-home" / name.lower()
        folder.mkdir(parents=True)
        monkeypatch.setenv(f"WANDB_{name}", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")  # refuses, unless a test has a server
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # the client reads the environment once, in a process of its own
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch):
    """A running server, which the client finds in the environment with its key."""
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


def account(mode, **other):
    return tracking.Account(mode, **{"project": "davis", "entity": None, "name": None, **other})


def flags(*argv):
    parser = argparse.ArgumentParser()
    tracking.add_tracking_flags(parser)
    return parser.parse_args(argv)


def records(folder):
    """Return the records of an offline run's .wandb file: LevelDB's log format, one protobuf message each."""
    from wandb.proto import wandb_internal_pb2
    data, found, whole, at = next(Path(folder).glob("*.wandb")).read_bytes(), [], b"", 7  # seven bytes of header
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the tail of a block is padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at:at + 7])
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the only or the last piece of a record
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


def history(folder):
    """Return the logged rows of an offline run, those of a step merged."""
    rows = {}
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.setdefault(row["_step"], {}).update(row)
    return rows


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# The local log, which needs no client.


def test_local_log_has_a_line_a_step(tmp_path):
    log = tmp_path / "log.jsonl"
    with tracking.start(account("disabled"), "train", {}, log=log) as tracker:
        tracker.log(0, {"loss": 0.5, "clip": "bear"})
        assert lines(log) == [{"step": 0, "loss": 0.5, "clip": "bear"}]  # there before the run ends
        tracker.log(1, {"loss": float("nan"), "val_iou": float("inf")})
    assert lines(log)[1] == {"step": 1, "loss": None, "val_iou": None}


def test_local_log_is_started_afresh_or_appended_to(tmp_path):
    log = tmp_path / "log.jsonl"
    for append, expected in ((False, [0]), (True, [0, 1]), (False, [2])):
        with tracking.start(account("disabled"), "train", {}, log=log, append=append) as tracker:
            tracker.log(len(lines(log)) if append else expected[0], {"loss": 1.0})
        assert [line["step"] for line in lines(log)] == expected


def test_local_log_that_cannot_be_written_is_bad_input(tmp_path):
    with pytest.raises(files.BadInput, match="absent.*cannot be written"):
        tracking.start(account("disabled"), "train", {}, log=tmp_path / "absent" / "log.jsonl")


def test_disabled_calls_do_nothing_anywhere(tmp_path):
    with tracking.start(account("disabled"), "train", {}) as tracker:
        tracker.image(0, None, None)
        tracker.use("a/b/c:v0")
        tracker.summary({"x": 1})
        tracking.log_model(tracker, "linear", tmp_path / "absent", [], {})
        tracking.log_scores(tracker, "linear", "val", [("absent", "absent", 1.0)], {"mean_iou": 1.0})
    assert list((tmp_path / "wandb-home" / "dir").iterdir()) == []


# Flags and environment.


def test_mode_comes_from_the_flag_then_the_environment(monkeypatch):
    assert tracking.from_flags(flags()) == ("disabled", "davis", None, None)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    assert tracking.from_flags(flags()).mode == "online" and tracking.sweep_run_id() == "r1"
    for found, mode in (("offline", "offline"), ("dryrun", "offline"), ("DISABLED", "disabled"), ("online", "online")):
        monkeypatch.setenv("WANDB_MODE", found)
        assert tracking.from_flags(flags()).mode == mode
    assert tracking.from_flags(flags("--wandb", "disabled", "--entity", "e", "--project", "p", "--run-name", "n")) == ("disabled", "p", "e", "n")
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(files.BadInput, match="WANDB_MODE=sometimes: expected one of disabled, offline, online"):
        tracking.from_flags(flags())


def test_without_wandb_installed():
    """A process in which `import wandb` fails logs locally, and is told what to install when it asks for more."""
    script = """
import argparse, sys
sys.modules["wandb"] = None  # what an import of a package that is not installed comes to
import tracking
from files import BadInput
parser = argparse.ArgumentParser()
tracking.add_tracking_flags(parser)
with tracking.start(tracking.from_flags(parser.parse_args([])), "train", {}, log="log.jsonl") as tracker:
    tracker.log(0, {"loss": 1.0})
    tracking.log_model(tracker, "linear", "m", [], {})
for act in (lambda: tracking.from_flags(parser.parse_args(["--wandb", "offline"])),
            lambda: tracking.fetch("wandb:e/p/n:latest", tracking.from_flags(parser.parse_args([])))):
    try:
        act()
    except BadInput as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("--wandb offline: needs the package wandb") and "pip install wandb" in first
    assert "needs the package wandb" in second
    assert lines(Path("log.jsonl")) == [{"step": 0, "loss": 1.0}]


def test_redact_takes_out_keys_and_passwords(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    given = {"out": Path("a/b"), "note": f"key {KEY}!", "url": ["https://me:secret@host/x"], "lr": 1e-3, "flag": None}
    assert tracking.redact(given) == {"out": str(Path("a/b")), "note": "key ***!", "url": ["https://***@host/x"], "lr": 1e-3, "flag": None}
