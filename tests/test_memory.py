"""Too large for the memory: read from disk, done in smaller parts, or said in one line."""
import numpy as np
import pytest
import torch
from helpers import call, log_of, ok, write_davis, write_features

import data
from vos import featurizers

ALEXNET = ("--split", "train", "--featurizer", "alexnet", "--weights", "random", "--compute",
           "float32", "--threads", 1)


def test_what_does_not_fit_is_read_from_disk_unasked_and_trains_the_same(tmp_path, monkeypatch):
    write_features(tmp_path / "features", {"ant": 9})
    flags = ("--features", tmp_path / "features", "--steps", 3, "--threads", 1)
    ok(call("train", *flags, "--out", tmp_path / "whole"))
    made = []
    monkeypatch.setattr(data, "free_memory", lambda device: 1000)
    monkeypatch.setattr(torch, "empty_like", lambda *_, **__: made.append(1))
    done = ok(call("train", *flags, "--out", tmp_path / "run"))
    assert "read from disk" in done.out and not made
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def limit(monkeypatch, most: int) -> list[int]:
    """Let featurizers run out of memory above `most` frames; return the numbers they are given."""
    forward, sizes = featurizers.Featurizer.forward, []

    def small(self, frames):
        if frames.device.type != "meta":
            sizes.append(len(frames))
            if len(frames) > most:
                raise torch.OutOfMemoryError("out of memory")
        return forward(self, frames)
    monkeypatch.setattr(featurizers.Featurizer, "forward", small)
    return sizes


def test_a_batch_that_does_not_fit_is_halved_and_the_same(tmp_path, monkeypatch):
    write_davis(tmp_path / "clips", clips=1, val_clips=1, frames=3, size=(64, 96))
    flags = ("--data", tmp_path / "clips", *ALEXNET)
    ok(call("featurize", *flags, "--out", tmp_path / "whole"))
    sizes = limit(monkeypatch, 1)
    ok(call("featurize", *flags, "--out", tmp_path / "halved"))
    assert max(sizes) == 3 and sizes.count(1) == 3
    whole, halved = (np.load(tmp_path / name / "features.npy") for name in ("whole", "halved"))
    np.testing.assert_allclose(halved, whole, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["featurize", "train"])
def test_what_cannot_fit_is_said_in_one_line_with_the_way_out(tmp_path, monkeypatch, name):
    write_davis(tmp_path / "clips", clips=1, val_clips=1, frames=3, size=(64, 96))
    write_features(tmp_path / "features", {"ant": 9})
    limit(monkeypatch, 0)
    flags = {"featurize": ("--data", tmp_path / "clips", *ALEXNET),
             "train": ("--features", tmp_path / "features", "--threads", 1)}[name]

    def starve(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch.optim.Adam, "step", starve)
    result = call(name, *flags, "--out", tmp_path / "out")
    assert result.status == 2 and result.err.count("\n") == 1, result
    assert "out of memory" in result.err and "pass smaller frames" in result.err
    assert name == "train" or not (tmp_path / "out").exists()
