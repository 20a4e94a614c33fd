"""Faithful to the contest's notebook, on real clips: its losses, its score, and every frame's IoU, J and F.

Needs ../shared (DAVIS clips, AlexNet's weights, what the notebook gave). Featurizing the 1629 frames takes minutes,
so that it is done once: the features are kept in the user's cache folder by the digest of the weights, and each run
featurizes some of the frames again, to hold the kept ones to the code as it is now.
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

import clips
import data
from featurizers import build_featurizer, run_featurizer

DAVIS, WEIGHTS, REFERENCE = SHARED / "davis", SHARED / "weights/alexnet-features.pth", SHARED / "reference"
pytestmark = pytest.mark.skipif(not (DAVIS.is_dir() and WEIGHTS.is_file() and REFERENCE.is_dir()),
                                reason=f"the reference clips, weights and results are not in {SHARED}")


@pytest.fixture(scope="module")
def notebook() -> dict:
    """What the notebook gave."""
    return json.loads((REFERENCE / "notebook-val.json").read_text())


@pytest.fixture(scope="module")
def features() -> dict[str, Path]:
    """Feature folders of AlexNet in float32, split -> folder: made once, then kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "video-masks-from-features-tests"
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:16]
    folders = {split: cache / f"alexnet-float32-{digest}-{split}" for split in ("train", "val")}
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes of tests one makes them, and the others wait
        for split, folder in folders.items():
            if not folder.is_dir():
                ok(script("featurize", "--data", DAVIS, "--split", split, "--featurizer", "alexnet", "--weights", WEIGHTS,
                          "--dtype", "float32", "--compute", "float32", "--out", folder, "--device", "cpu",
                          "--threads", os.cpu_count() or 2, timeout=900))
    return folders


def test_kept_features_are_those_of_the_code_as_it_is(features):
    featurizer = build_featurizer("alexnet", weights=str(WEIGHTS))
    for split, path in features.items():
        folder, frames = data.open_features(path), clips.find_frames(DAVIS, split)
        assert [(frame.clip, frame.name) for frame in frames] == list(zip(folder.meta["clips"], folder.meta["names"]))
        assert len(frames) == {"train": 1209, "val": 420}[split]
        array, masks = (np.load(file, mmap_mode="r") for file in (folder.files["s32"], folder.masks))
        for index in range(11, len(frames), 200):
            image = clips.read_image(frames[index].image)
            level, = run_featurizer(featurizer, [image], (480, 854), torch.device("cpu"))
            np.testing.assert_allclose(array[index], level[0].numpy(), rtol=1e-3, atol=1e-4)
            np.testing.assert_array_equal(masks[index], np.packbits(clips.read_mask(frames[index].annotation), axis=1))


@pytest.fixture(scope="module")
def trained(features, tmp_path_factory) -> Path:
    """The notebook's training: its decoder, seed 0, frames in order, 101 steps of 32."""
    out = tmp_path_factory.mktemp("reference") / "simple"
    ok(call("train", "--features", features["train"], "--decoder", "simple", "--seed", 0, "--log-every", 1, "--no-pictures", "--out", out,
            "--device", "cpu"))
    return out


def test_losses_are_the_notebooks(trained, notebook):
    log = log_of(trained)
    assert [row["step"] for row in log] == list(range(101))
    np.testing.assert_allclose([row["loss"] for row in log], notebook["losses"], rtol=1e-3)


def rows_of(results: Path) -> list[dict]:
    with open(results / "frames.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_score_is_the_notebooks(trained, features, notebook, tmp_path):
    ok(call("evaluate", "--model", trained, "--features", features["val"], "--no-pictures", "--device", "cpu",
            "--out", tmp_path / "results"))
    scores = json.loads((tmp_path / "results/scores.json").read_text())
    assert scores["frames"] == 420 and scores["mean_iou"] == pytest.approx(0.1836, abs=0.002)
    assert scores["mean_iou"] == pytest.approx(notebook["contest_mean_iou"], abs=1e-3)
    for row, theirs in zip(rows_of(tmp_path / "results"), notebook["frames"], strict=True):
        assert (int(row["index"]), row["clip"]) == (theirs["index"], theirs["clip"])
        assert float(row["iou"]) == pytest.approx(theirs["contest_iou"], abs=5e-3)
    assert json.loads((tmp_path / "results/metadata.json").read_text())["nparams"] == 2_469_696 + 256 * 9 + 1


def test_the_notebooks_own_masks_have_its_scores(notebook, tmp_path):
    ok(call("evaluate", "--predictions", REFERENCE / "notebook-val", "--data", DAVIS, "--split", "val", "--no-pictures",
            "--out", tmp_path / "results"))
    scores = json.loads((tmp_path / "results/scores.json").read_text())
    assert scores["mean_iou"] == pytest.approx(notebook["contest_mean_iou"], abs=1e-9)
    for row, theirs in zip(rows_of(tmp_path / "results"), notebook["frames"], strict=True):
        assert (int(row["index"]), row["clip"], f"Annotations/480p/{row['clip']}/{row['frame']}.png") == (
            theirs["index"], theirs["clip"], theirs["annotation"])
        for ours, name in (("iou", "contest_iou"), ("J", "J"), ("F", "F")):
            assert float(row[ours]) == pytest.approx(theirs[name], abs=1e-9), (row, theirs)
