"""A world of its own for the Weights & Biases client, and what the client wrote there.

Nothing here imports wandb before a function is called.
"""
import contextlib
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

from wandb_server import KEY, WandbServer

ROOT = Path(__file__).resolve().parent.parent


def isolate(home, monkeypatch):
    """Put what the client keeps under `home`, and let it read nothing of the user's."""
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
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")  # refuses


@contextlib.contextmanager
def served(monkeypatch):
    """Yield a running server, which the client finds in the environment with its key."""
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


def records(folder):
    """Return the records of a run's .wandb file, which the client closes soon after `finish`."""
    for _ in range(100):
        found = read_records(next(Path(folder).glob("*.wandb")).read_bytes())
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{folder}: no exit record after ten seconds")


def read_records(data):
    """Return the records in a .wandb file: a header of seven bytes, then LevelDB's log format."""
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


def offline_artifacts(folder):
    """Return the names of the artifacts in an offline run."""
    return {record.artifact.name for record in records(folder)
            if record.WhichOneof("record_type") == "artifact"}


def sync(*arguments):
    """Run `wandb sync` as a user would, with the client's own log under WANDB_DIR too."""
    import wandb
    wandb.teardown()
    own = Path(os.environ["WANDB_DIR"]).parent
    command = [sys.executable, "-m", "wandb", "sync", *map(str, arguments)]
    environment = {**os.environ, "TMPDIR": str(own)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
