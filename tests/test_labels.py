"""A video of one's own: no mask drawn, one, and then the frame that is proposed."""
import json
import re
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
from helpers import call, ok, refuses

import data
import models
from vos.sample import make_clip

LEVELS = ("--levels", "s4,s8,s16", "--cues", "--compute", "float32", "--threads", 1)
FRAMES = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Clips to train on, a decoder trained a little, and a video with its true masks."""
    root = tmp_path_factory.mktemp("labels")
    ok(call("vos.sample", "--out", root / "davis", "--size", "96x160", "--frames", 8))
    ok(call("featurize", "--data", root / "davis", "--split", "train", *LEVELS, "--out",
            root / "train"))
    ok(call("train", "--features", root / "train", "--decoder", "temporal", "--steps", 25,
            "--threads", 1, "--no-pictures", "--out", root / "run"))
    frames, masks = make_clip(7003, FRAMES, 96, 160)
    iio.imwrite(root / "walk.gif", list(frames))
    (root / "truth").mkdir()
    for index, mask in enumerate(masks):
        iio.imwrite(root / f"truth/{index:05d}.png", mask * np.uint8(255))
    return root


def test_each_mask_drawn_makes_the_others_better(world, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = ("--data", world / "walk.gif", "--model", world / "run", "--threads", 1)
    (tmp_path / "drawn").mkdir()
    said, scores, proposed = ok(call("evaluate", *model, "--out", "walk")).out, [], None
    for _ in range(3):
        ok(call("evaluate", "--predictions", "walk", "--data", world / "walk.gif", "--masks",
                world / "truth", "--no-pictures", "--out", "score", "--overwrite"))
        scores.append(json.loads((tmp_path / "score/scores.json").read_text())["mean_iou"])
        for drawn in (tmp_path / "drawn").iterdir():  # is kept as it was drawn
            kept = iio.imread(tmp_path / "walk/outputs" / drawn.name)
            assert np.array_equal(kept, iio.imread(world / "truth" / drawn.name))

        proposed = re.search(r"cp (walk/draw/(\d+)\.png) drawn", said)
        mask = iio.imread(tmp_path / proposed[1])
        assert set(np.unique(mask)) <= {0, 255} and mask.shape == (96, 160)
        assert iio.imread((tmp_path / proposed[1]).with_suffix(".jpg")).shape == (96, 160, 3)
        assert not (tmp_path / f"drawn/{proposed[2]}.png").exists()
        iio.imwrite(tmp_path / f"drawn/{proposed[2]}.png",
                    iio.imread(world / f"truth/{proposed[2]}.png"))
        again = re.search("then: python evaluate.py (.*)", said)[1].split()
        said = ok(call("evaluate", *again)).out
        assert "takes the features that are in walk-features" in said
    assert scores[0] < scores[1] < scores[2], scores


def test_annotations_given_as_drawn_are_not_scored(world, tmp_path):
    for row in json.loads((world / "train/paths.json").read_text())["annotation"].values():
        file = world / "davis" / row
        if file.stem in ("00000", "00007"):  # of eight
            (tmp_path / "drawn" / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "drawn" / file.parent.name)
    flags = ("--model", world / "run", "--features", world / "train", "--no-pictures", "--adapt", 2,
             "--threads", 1, "--refine", "none")
    ok(call("evaluate", *flags, "--masks", tmp_path / "drawn", "--out", tmp_path / "two"))
    scores = json.loads((tmp_path / "two/scores.json").read_text())
    assert {row["frames"] for row in scores["per_clip"].values()} == {6}
    rows = (tmp_path / "two/frames.csv").read_text().splitlines()[1:9]
    assert rows[0].endswith(",,,") and rows[7].endswith(",,,") and not rows[3].endswith(",,,")


def test_each_clip_is_predicted_by_the_folds_that_held_it_out_averaged(world, tmp_path):
    ok(call("train", "--features", world / "train", "--decoder", "linear", "--folds", 2, "--seeds",
            2, "--steps", 4, "--lr", 0.05, "--no-pictures", "--out", tmp_path / "f"))
    flags = ("--features", world / "train", "--no-pictures", "--threads", 1)
    ok(call("evaluate", "--model", tmp_path / "f", *flags, "--out", tmp_path / "all"))
    features = data.load_features(data.open_features(world / "train"))
    outputs = [iio.imread(file) for file in sorted((tmp_path / "all/outputs").iterdir())]
    for fold in (0, 1):
        lasts = [max(place.iterdir()) for place in tmp_path.glob(f"f/fold-{fold}-*/checkpoints")]
        decoders, facts = zip(*map(models.load_model, lasts))
        masks = models.predict(models.Mean(decoders), features, None, 16)
        for clip, output, mask in zip(features.folder.clips, outputs, masks):
            near = np.abs(output - mask.numpy().astype(int)).max() <= 1
            assert near == (clip in facts[0]["held_out"])
    said = ok(call("evaluate", "--model", lasts[0], *flags, "--out", tmp_path / "one")).out
    assert "note: trained on 4 of these 8 clips" in said and len(decoders) == 2


def test_masks_that_fit_no_frame_or_decoder_are_refused(world, tmp_path):
    (tmp_path / "drawn").mkdir()
    iio.imwrite(tmp_path / "drawn/00099.png", np.zeros((96, 160), np.uint8))
    flags = ("--model", world / "run", "--data", world / "walk.gif", "--masks", tmp_path / "drawn")
    refuses("evaluate", *flags, "--out", tmp_path / "r", names=["00099.png", "fits no frame"],
            untouched=tmp_path)
