"""A world of its own for the Weights & Biases client, and what it wrote there: shared by the tests that run it.

Nothing here imports wandb before a function is called.
"""
import argparse
import contextlib
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from wandb_server import KEY, WandbServer

import files
import tracking

ROOT = Path(tracking.__file__).parent


def isolate(home, monkeypatch):
    """Set the environment so that what the client keeps goes under `home`, and nothing of the user's is read."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("DIR", "CACHE_DIR", "DATA_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
        folder = home / "wandb-home" / name.lower()
        folder.mkdir(parents=True)
        monkeypatch.setenv(f"WANDB_{name}", str(folder))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")  # refuses, unless a test has a server


@contextlib.contextmanager
def served(monkeypatch):
    """Yield a running server, which the client finds in the environment with its key."""
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
    """Return the records of a finished run's .wandb file, which the client closes soon after `finish` returns."""
    for _ in range(100):
        found = read_records(next(Path(folder).glob("*.wandb")).read_bytes())
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{folder}: no exit record after ten seconds")


def read_records(data):
    """Return the records in a .wandb file's bytes: seven of header, then LevelDB's log format, one protobuf message each."""
    from wandb.proto import wandb_internal_pb2
    found, whole, at = [], b"", 7
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


def offline_artifacts(folder):
    """Return {name: artifact record} of an offline run."""
    return {record.artifact.name: record.artifact for record in records(folder) if record.WhichOneof("record_type") == "artifact"}


def entries(artifact):
    """Return {entry path: bytes} of an offline run's artifact record."""
    return {entry.path: Path(entry.local_path).read_bytes() for entry in artifact.manifest.contents}


def feature_folder(folder, seed=0):
    """Write what stands for a feature folder: tracking copies files and does not look inside."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    np.save(folder / "features.npy", random.standard_normal((2, 3, 4, 5)).astype("float16"))
    np.save(folder / "masks.npy", random.integers(0, 256, (2, 8, 2)).astype("uint8"))
    files.write_json(folder / "paths.json", {"raw": {"0": "bear\\0.jpg", "1": "bear\\1.jpg"}})
    files.write_json(folder / "meta.json", {"seed": seed})
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sync(*arguments):
    """Run `wandb sync` as a user would."""
    import wandb
    wandb.teardown()
    wandb_command("sync", *arguments)


def wandb_command(*arguments):
    """Run the client's command line to its end, with its own log under WANDB_DIR too; return what it printed."""
    own = Path(os.environ["WANDB_DIR"]).parent
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(own), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "wandb", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
