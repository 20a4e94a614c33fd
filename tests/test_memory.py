"""Too large for the memory: said before anything is allocated, or done in smaller parts."""
import json
import re
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import call, ok, tree, write_davis, write_features

import featurizers
import resident


@pytest.mark.parametrize("place, instead", [("device", "--resident host"), ("host", "--resident disk")])
def test_too_large_is_said_with_both_numbers_before_anything_is_allocated(tmp_path, place, instead):
    write_features(tmp_path / "features", {"ant": 9}, levels={"s32": (64, 20, 30)})
    size = (tmp_path / "features/features.npy").stat().st_size + (tmp_path / "features/masks.npy").stat().st_size
    with mock.patch.object(resident, "free_memory", lambda device: 1_000_000), \
            mock.patch.object(resident, "load_rows", side_effect=AssertionError("allocated")):
        result = call("train", "--features", tmp_path / "features", "--resident", place, "--out", tmp_path / "run")
    assert result.status == 2 and result.err.count("\n") == 1, result
    assert f"{size / 1e9:.2f} GB" in result.err and "of the 0.00 GB free" in result.err and instead in result.err
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_goes_to_disk_unasked(tmp_path):
    write_features(tmp_path / "features", {"ant": 9})
    with mock.patch.object(resident, "free_memory", lambda device: 1000):
        done = ok(call("train", "--features", tmp_path / "features", "--steps", 3, "--threads", 1, "--out", tmp_path / "run"))
    assert "disk (read as needed)" in done.out


def test_a_batch_that_does_not_fit_is_halved_and_said_and_the_same(tmp_path):
    write_davis(tmp_path / "clips", clips=1, val_clips=1, frames=7, size=(64, 96))
    flags = ("--data", tmp_path / "clips", "--split", "train", "--featurizer", "alexnet", "--weights", "random", "--compute", "float32",
             "--threads", 1, "--batch-size", 5)
    ok(call("featurize", *flags, "--out", tmp_path / "whole"))
    forward, sizes = featurizers.Featurizer.forward, []

    def small(self, frames):
        if frames.device.type != "meta":
            sizes.append(len(frames))
            if len(frames) > 2:
                raise torch.OutOfMemoryError("out of memory")
        return forward(self, frames)
    with mock.patch.object(featurizers.Featurizer, "forward", small), mock.patch.object(torch.accelerator, "empty_cache", lambda: None):
        done = ok(call("featurize", *flags, "--out", tmp_path / "halved"))
    assert sizes == [5, 2, 3, 1, 2, 2]
    assert "5 frames do not fit the memory of cpu together, running 2 and 3; --batch-size 2 avoids the retry" in done.out
    whole, halved = (np.load(tmp_path / name / "features.npy") for name in ("whole", "halved"))
    np.testing.assert_allclose(halved, whole, rtol=2e-3, atol=1e-4)


def test_one_frame_that_does_not_fit_is_refused(tmp_path):
    write_davis(tmp_path / "clips", clips=1, val_clips=1, frames=3, size=(64, 96))

    def never(self, frames):
        if frames.device.type != "meta":
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, frames)
    forward, before = featurizers.Featurizer.forward, tree(tmp_path)
    with mock.patch.object(featurizers.Featurizer, "forward", never), mock.patch.object(torch.accelerator, "empty_cache", lambda: None):
        result = call("featurize", "--data", tmp_path / "clips", "--split", "train", "--featurizer", "alexnet", "--weights", "random",
                      "--threads", 1, "--out", tmp_path / "f")
    assert result.status == 2 and "one frame of 96 x 64 does not fit" in result.err and "--size" in result.err
    assert tree(tmp_path) == before


def test_training_that_does_not_fit_says_what_to_pass(tmp_path):
    write_features(tmp_path / "features", {"ant": 9})
    with mock.patch("optimizer.Adam.step", side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):
        result = call("train", "--features", tmp_path / "features", "--steps", 3, "--threads", 1, "--out", tmp_path / "run")
    assert result.status == 2 and result.err == "train.py: CUDA out of memory. Tried to allocate 2 GiB; pass a smaller --batch-size\n"


def test_deterministic_is_the_same_run_and_args_json_says_what_it_was(tmp_path):
    write_features(tmp_path / "features", {"ant": 9, "bee": 4})
    flags = ("--features", tmp_path / "features", "--decoder", "linear", "--steps", 12, "--threads", 1, "--no-pictures")
    ok(call("train", *flags, "--out", tmp_path / "plain"))
    try:
        ok(call("train", *flags, "--deterministic", "--out", tmp_path / "run"))
        assert torch.are_deterministic_algorithms_enabled()
        ok(call("train", "--args", tmp_path / "run/args.json", "--out", tmp_path / "again"))
    finally:
        torch.use_deterministic_algorithms(False)
    said, meta = (json.loads((tmp_path / name).read_text()) for name in ("run/args.json", "features/meta.json"))
    assert said["command"] == ["train.py", *map(str, flags), "--deterministic", "--out", str(tmp_path / "run")]
    assert said["features"] == {str(tmp_path / "features"): meta["sha256"]} and said["versions"]["torch"] == torch.__version__
    assert said["args"]["deterministic"] is True and said["recipe"]["steps"] == 12
    assert said["git_revision"] is None or re.fullmatch("[0-9a-f]{40}([+]changes)?", said["git_revision"])
    assert len({(tmp_path / name / "model.pt").read_bytes() for name in ("plain", "run", "again")}) == 1
