"""Faithful to the contest's notebook, on real clips: its losses, its score, every frame's scores.

Needs ../shared (DAVIS clips, AlexNet's weights, what the notebook gave). Featurizing takes minutes
and is done once: features are kept in the user's cache folder, and each run featurizes some frames
again, to hold the kept ones to the code as it is now.
"""
import csv
import fcntl
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED, call, log_of, ok, script

import data
from vos import clips, featurizers, images

DAVIS, REFERENCE = SHARED / "davis", SHARED / "reference"
WEIGHTS = SHARED / "weights/alexnet-features.pth"
pytestmark = pytest.mark.skipif(
    not (DAVIS.is_dir() and WEIGHTS.is_file() and REFERENCE.is_dir()),
    reason=f"the reference clips, weights and results are not in {SHARED}")


@pytest.fixture(scope="module")
def notebook() -> dict:
    """What the notebook gave."""
    return json.loads((REFERENCE / "notebook-val.json").read_text())


@pytest.fixture(scope="module")
def features() -> dict[str, Path]:
    """Feature folders of AlexNet in float32, split -> folder: made once, then kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(home) / "video-masks-from-features-tests"
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:16]
    folders = {split: cache / f"alexnet-format2-{digest}-{split}" for split in ("train", "val")}
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of tests makes them, the others wait
        for split, folder in folders.items():
            if not folder.is_dir():
                ok(script("featurize", "--data", DAVIS, "--split", split, "--featurizer", "alexnet",
                          "--weights", WEIGHTS, "--dtype", "float32", "--compute", "float32",
                          "--device", "cpu", "--out", folder, timeout=900))
    return folders


def test_kept_features_are_those_of_the_code_as_it_is(features):
    featurizer = featurizers.build_featurizer("alexnet", None, str(WEIGHTS))
    for split, path in features.items():
        folder, frames = data.open_features(path), clips.find_frames(DAVIS, split, None)
        rows = list(zip(folder.meta["clips"], folder.meta["names"]))
        assert [(frame.clip, frame.name) for frame in frames] == rows
        assert len(frames) == {"train": 1209, "val": 420}[split]
        array = np.load(path / "features.npy", mmap_mode="r")
        masks = np.load(path / "masks.npy", mmap_mode="r")
        meaning = clips.decide_meaning([frame.annotation for frame in frames[11::200]])
        for index in range(11, len(frames), 200):
            image = images.read_image(frames[index].image)
            level, = featurizer(torch.from_numpy(image).permute(2, 0, 1)[None])
            np.testing.assert_allclose(array[index], level[0].numpy(), rtol=1e-3, atol=1e-4)
            packed = clips.read_packed_masks([frames[index]], meaning, (480, 854))
            np.testing.assert_array_equal(masks[index], next(iter(packed)))


@pytest.fixture(scope="module")
def trained(features, tmp_path_factory) -> Path:
    """The notebook's training: its decoder, seed 0, frames in order, 101 steps of 32."""
    out = tmp_path_factory.mktemp("reference") / "simple"
    ok(call("train", "--features", features["train"], "--decoder", "simple", "--log-every", 1,
            "--no-pictures", "--device", "cpu", "--out", out))
    return out


def test_losses_are_the_notebooks(trained, notebook):
    losses = [row["loss"] for row in log_of(trained)]
    assert len(losses) == 101
    np.testing.assert_allclose(losses, notebook["losses"], rtol=1e-3)


def rows_of(results: Path) -> list[dict]:
    with open(results / "frames.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_score_is_the_notebooks(trained, features, notebook, tmp_path):
    ok(call("evaluate", "--model", trained, "--features", features["val"], "--no-pictures",
            "--device", "cpu", "--out", tmp_path / "results"))
    scores = json.loads((tmp_path / "results/scores.json").read_text())
    assert scores["frames"] == 420 and scores["mean_iou"] == pytest.approx(0.1836, abs=0.002)
    for row, theirs in zip(rows_of(tmp_path / "results"), notebook["frames"], strict=True):
        assert (int(row["index"]), row["clip"]) == (theirs["index"], theirs["clip"])
        assert float(row["iou"]) == pytest.approx(theirs["contest_iou"], abs=5e-3)
    metadata = json.loads((tmp_path / "results/metadata.json").read_text())
    assert metadata["nparams"] == 2_469_696 + 256 * 9 + 1


def test_the_notebooks_own_masks_have_its_scores(notebook, tmp_path):
    ok(call("evaluate", "--predictions", REFERENCE / "notebook-val", "--data", DAVIS, "--split",
            "val", "--no-pictures", "--out", tmp_path / "results"))
    for row, theirs in zip(rows_of(tmp_path / "results"), notebook["frames"], strict=True):
        assert f"{row['clip']}/{row['frame']}.png" in theirs["annotation"]
        for ours, name in (("iou", "contest_iou"), ("J", "J"), ("F", "F")):
            assert float(row[ours]) == pytest.approx(theirs[name], abs=1e-9), (row, theirs)
