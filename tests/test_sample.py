"""The synthetic clips: what they hold, that they are the same every time, and the layout on disk."""
import imageio.v3 as iio
import numpy as np
import pytest
from helpers import call, ok, refuses

import sample
from files import BadInput


def test_clip_has_one_moving_object_and_a_few_frames_without_it():
    frames, masks = sample.make_clip(seed=3, frames=20, height=96, width=171)
    assert frames.shape == (20, 96, 171, 3) and frames.dtype == np.uint8
    assert masks.shape == (20, 96, 171) and masks.dtype == bool
    empty = ~masks.any(axis=(1, 2))
    assert empty.sum() == 2 and not empty[0] and not empty[-1]
    areas = masks.mean(axis=(1, 2))[~empty]
    assert areas.min() > 0.02 and areas.max() < 0.3
    assert (masks[0] & masks[-1]).sum() < 0.9 * masks[0].sum()  # it moved


def test_object_changes_shape_not_only_place():
    outline = sample.Outline(np.random.default_rng(0), radius=30)
    y, x = np.mgrid[-60:60, -60:60].astype(np.float32)
    outline.spin = 0.0
    early, late = outline.at(0, y, x)[0] < 0, outline.at(15, y, x)[0] < 0
    assert (early ^ late).sum() > 0.1 * early.sum()


@pytest.mark.parametrize("seed", range(3))
def test_mask_is_where_the_texture_is(seed):
    """Inside the mask neighbouring pixels differ far more than outside it, for every pattern."""
    frames, masks = sample.make_clip(seed, frames=1, height=240, width=427)
    down, across = np.gradient(frames[0].astype(float).mean(axis=-1))
    steepness = np.hypot(down, across)
    assert steepness[masks[0]].mean() > 2 * steepness[~masks[0]].mean()


def test_same_seed_same_clip_another_seed_another():
    first, again, other = (sample.make_clip(seed, 3, 48, 65) for seed in (5, 5, 8))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_short_clips(frames):
    _, masks = sample.make_clip(0, frames, 32, 32)
    assert (~masks.any(axis=(1, 2))).sum() == (1 if frames == 4 else 0)


def test_command_writes_a_davis_root(tmp_path):
    out = tmp_path / "sample"
    flags = ("--out", out, "--clips", 2, "--val-clips", 1, "--frames", 3, "--size", "40x53")
    ok(call("sample", *flags))
    lists = {split: (out / "ImageSets" / "480p" / f"{split}.txt").read_text().splitlines() for split in ("train", "val")}
    assert [len(lines) for lines in lists.values()] == [6, 3]
    for line in lists["train"] + lists["val"]:
        image, mask = (iio.imread(out / path[1:]) for path in line.split())
        assert image.shape == (40, 53, 3) and mask.shape == (40, 53) and mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 255}
    refuses("sample", *flags, names=["--overwrite"], untouched=out)


def test_written_clip_is_the_one_made(tmp_path):
    sample.write_dataset(tmp_path / "sample", clips=1, val_clips=1, frames=2, height=32, width=41, seed=1)
    frames, masks = sample.make_clip(10_001, 2, 32, 41)
    (clip,) = {line.split("/")[3] for line in (tmp_path / "sample/ImageSets/480p/val.txt").read_text().splitlines()}
    assert np.array_equal(iio.imread(tmp_path / f"sample/Annotations/480p/{clip}/00001.png") > 127, masks[1])
    image = iio.imread(tmp_path / f"sample/JPEGImages/480p/{clip}/00001.jpg").astype(int)
    assert np.abs(image - frames[1]).mean() < 8  # JPEG


@pytest.mark.parametrize("bad", [{"height": 16}, {"seed": -1}])
def test_bad_values_are_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises(BadInput):
        sample.write_dataset(tmp_path / "sample", **bad)
    assert not list(tmp_path.iterdir())
