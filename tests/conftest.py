"""Threads of a process of tests, and fixtures of the tests that run the Weights & Biases client."""
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several run side by side: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import wandb_world


@pytest.fixture
def own_world(tmp_path, monkeypatch):
    """The client keeps all under tmp_path, reads nothing of the user's, and tries no other host."""
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
