"""How many threads a process of the tests takes, and fixtures of the tests that run the Weights & Biases client."""
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several run side by side: one thread each, before PyTorch is imported and reads it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import wandb_world


@pytest.fixture
def own_world(tmp_path, monkeypatch):
    """Everything the client keeps goes under tmp_path, nothing of the user's is read, and no other host is tried."""
    wandb = pytest.importorskip("wandb", reason="needs the wandb client: pip install wandb")
    wandb_world.isolate(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # the client reads the environment once, in a process of its own
    yield
    wandb.teardown()


@pytest.fixture
def server(own_world, monkeypatch):
    """A running server, which the client finds in the environment with its key."""
    with wandb_world.served(monkeypatch) as server:
        yield server
