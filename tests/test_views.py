"""Views of frames: what they show, that they are featurized as frames would be, and that nothing is scored or held out by them."""
import json

import imageio.v3 as iio
import numpy as np
import pytest
from helpers import call, change_json, listed, log_of, ok, refuses, tree, write_davis, write_features, write_frames, write_json

import resident
import views

ALEXNET = ("--featurizer", "alexnet", "--weights", "random", "--compute", "float32", "--threads", 1)
LINEAR = ("--threads", 1, "--no-pictures", "--decoder", "linear", "--steps", 20, "--batch-size", 4)
CLIPS = {"ant": 5, "bee": 7, "cat": 4, "dog": 9}


# --- what they show ----------------------------------------------------------------------------


def test_mirror_swaps_left_and_right():
    frame = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(views.show(frame, "mirror"), frame[:, ::-1])
    assert views.show(frame, "") is frame


@pytest.mark.parametrize("shape", [(6, 8), (7, 11), (1, 1)])
def test_zooming_in_shows_the_middle(shape):
    frame = np.arange(np.prod(shape)).reshape(shape)
    shown = views.show(frame, "zoom2")
    assert shown.shape == tuple(max(1, round(side / 2)) for side in shape)
    top, left = ((side - part) // 2 for side, part in zip(shape, shown.shape))
    np.testing.assert_array_equal(shown, frame[top:top + shown.shape[0], left:left + shown.shape[1]])


@pytest.mark.parametrize("zoom, before", [("zoom0.5", (3, 4)), ("zoom0.25", (9, 12))])
def test_zooming_out_shows_the_frame_amid_its_reflections(zoom, before):
    frame = np.random.default_rng(0).integers(0, 256, (6, 8, 3))
    padded = np.pad(frame, [(before[0],) * 2, (before[1],) * 2, (0, 0)], mode="symmetric")
    np.testing.assert_array_equal(views.show(frame, zoom), padded)


@pytest.mark.parametrize("text", ["", "mirror,", "zoom", "zoom1", "zoom0.2", "zoom5", "zoom-2", "zoomnan", "flip", "mirror,mirror"])
def test_other_views_are_refused(tmp_path, text):
    result = call("featurize", "--data", tmp_path, "--views", text, "--out", tmp_path / "out")
    assert result.status == 2 and "argument --views: expected" in result.err and not (tmp_path / "out").exists()


# --- featurized --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    return write_davis(tmp_path_factory.mktemp("clips") / "davis", clips=2, val_clips=1, frames=3)


def test_rows_are_what_the_viewed_frames_would_give(davis, tmp_path):
    """Features and masks of views, against those of image files that show the same."""
    shown = ["", "mirror", "zoom1.5", "zoom0.7"]
    for number, (frame, mask) in enumerate(listed(davis)):
        for view in shown:
            for kind, file in (("raw", frame), ("annotation", mask)):
                path = tmp_path / "shown" / kind / (view or "itself") / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                iio.imwrite(path, views.show(iio.imread(file), view))
    paths = {kind: [f"{kind}/{view or 'itself'}/{number}.png" for view in shown for number in range(6)] for kind in ("raw", "annotation")}
    write_json(tmp_path / "shown/paths.json", {kind: {str(i): path for i, path in enumerate(each)} for kind, each in paths.items()})
    ok(call("featurize", "--data", davis, "--split", "train", "--views", "mirror,zoom1.5,zoom0.7", "--out", tmp_path / "views", *ALEXNET))
    ok(call("featurize", "--data", tmp_path / "shown", "--out", tmp_path / "files", "--size", "96x128", *ALEXNET))
    for name in ("features.npy", "masks.npy"):
        np.testing.assert_array_equal(np.load(tmp_path / "views" / name), np.load(tmp_path / "files" / name))
    meta = json.loads((tmp_path / "views/meta.json").read_text())
    own = [frame.parent.name for frame, _ in listed(davis)]
    assert meta["clips"] == [clip + (f"@{view}" if view else "") for view in shown for clip in own]
    assert meta["views"] == shown[1:]


def test_clips_without_annotations_have_no_use_for_views(tmp_path):
    write_frames(tmp_path / "frames/clip", ["0.png", "1.png"])
    refuses("featurize", "--data", tmp_path / "frames", "--views", "mirror", *ALEXNET, "--out", tmp_path / "out",
            names=["no annotations", "--views"], untouched=tmp_path / "out")


# --- trained on --------------------------------------------------------------------------------


def with_mirror(clips: dict[str, int]) -> dict[str, int]:
    return {**clips, **{f"{clip}@mirror": frames for clip, frames in clips.items()}}


@pytest.fixture
def features(tmp_path):
    """A feature folder of four clips and their mirror images."""
    write_features(tmp_path / "features", with_mirror(CLIPS), views=["mirror"])
    return tmp_path / "features"


def train_apart(folder, held: set[str]) -> list[dict]:
    """Train on a folder of all but the held-out clips, with views, validating on those clips alone, without; return the log."""
    write_features(folder / "train", with_mirror({clip: n for clip, n in CLIPS.items() if clip not in held}), views=["mirror"])
    write_features(folder / "val", {clip: n for clip, n in CLIPS.items() if clip in held})
    ok(call("train", "--features", folder / "train", "--val-features", folder / "val", "--out", folder / "run", *LINEAR))
    return log_of(folder / "run")


def test_views_are_held_out_with_their_clip_and_not_validated_on(features, tmp_path):
    ok(call("train", "--features", features, "--out", tmp_path / "run", *LINEAR, "--holdout", 0.5))
    ok(call("train", "--features", features, "--out", tmp_path / "folds", *LINEAR, "--folds", 2))
    clips = [clip for clip, frames in CLIPS.items() for _ in range(frames)]
    parts = {"run": resident.split_clips(clips, 0.5, seed=0)[1]}
    parts |= {f"folds/fold-{number}": held for number, held in enumerate(resident.fold_clips(clips, 2, seed=0))}
    for run, held in parts.items():
        apart = train_apart(tmp_path / "apart" / run, {clips[i] for i in held})
        for ours, theirs in zip(log_of(tmp_path / run), apart, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_views_of_a_val_folder_count_for_nothing(features, tmp_path):
    write_features(tmp_path / "plain", CLIPS)
    for name in ("features", "plain"):
        ok(call("train", "--features", tmp_path / "plain", "--val-features", tmp_path / name, "--out", tmp_path / "run" / name, *LINEAR))
        ok(call("evaluate", "--model", tmp_path / "run" / name,
                "--features", tmp_path / name, "--out", tmp_path / "results" / name, "--no-pictures", "--threads", 1))
    assert log_of(tmp_path / "run/features") == log_of(tmp_path / "run/plain")
    scores = [json.loads((tmp_path / "results" / name / "scores.json").read_text()) for name in ("features", "plain")]
    assert scores[0] == scores[1] and scores[0]["frames"] == sum(CLIPS.values())
    assert tree(tmp_path / "results/features/outputs") == tree(tmp_path / "results/plain/outputs")


@pytest.mark.parametrize("value", ["mirror", ["mirror", "zoom2"], ["flip"], [3], {"mirror": 1}])
def test_a_folder_whose_views_do_not_add_up_is_refused(features, tmp_path, value):
    change_json(features / "meta.json", views=value)
    refuses("train", "--features", features, "--out", tmp_path / "run", *LINEAR, names=["meta.json", "views"], untouched=tmp_path / "run")
