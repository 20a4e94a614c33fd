"""Too large for the memory: read from disk, or said in one line."""
import pytest
import torch
from helpers import call, log_of, ok, write_davis, write_features

import data
from vos import sources

ALEXNET = ("--split", "train", "--featurizer", "alexnet", "--weights", "random", "--compute",
           "float32", "--threads", 1)


def test_what_does_not_fit_is_read_from_disk_unasked_and_trains_the_same(tmp_path, monkeypatch):
    write_features(tmp_path / "features", {"ant": 9})
    flags = ("--features", tmp_path / "features", "--steps", 3, "--threads", 1)
    ok(call("train", *flags, "--out", tmp_path / "whole"))
    monkeypatch.setattr(data, "free_memory", lambda device: 1000)
    done = ok(call("train", *flags, "--out", tmp_path / "run"))
    assert "read from disk" in done.out
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("name", ["featurize", "train"])
def test_what_cannot_fit_is_said_in_one_line_with_the_way_out(tmp_path, monkeypatch, name):
    write_davis(tmp_path / "clips", clips=1, val_clips=1, frames=3, size=(64, 96))
    write_features(tmp_path / "features", {"ant": 9})
    flags = {"featurize": ("--data", tmp_path / "clips", *ALEXNET, "--cues"),
             "train": ("--features", tmp_path / "features", "--threads", 1)}[name]

    def starve(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch.optim.Adam, "step", starve)
    monkeypatch.setattr(sources.cues, "clip_cues", starve)
    result = call(name, *flags, "--out", tmp_path / "out")
    assert result.status == 2 and result.err.count("\n") == 1, result
    assert "out of memory" in result.err and "pass smaller frames" in result.err
    assert name == "train" or not (tmp_path / "out").exists()
