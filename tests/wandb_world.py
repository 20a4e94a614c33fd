"""A world of its own for the Weights & Biases client.

Nothing here imports wandb before a function is called.
"""
import contextlib
import os
import subprocess
import sys
from pathlib import Path

from wandb_server import KEY, WandbServer


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


def sync(*arguments):
    """Run `wandb sync` as a user would, with the client's own log under WANDB_DIR too."""
    import wandb
    wandb.teardown()
    own = Path(os.environ["WANDB_DIR"]).parent
    command = [sys.executable, "-m", "wandb", "sync", *map(str, arguments)]
    environment = {**os.environ, "TMPDIR": str(own)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
