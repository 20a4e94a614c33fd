"""The synthetic clips: what they hold, that they are the same every time, the layout on disk."""
import json

import numpy as np
from PIL import Image

from vos import sample


def test_clip_has_one_moving_object_and_a_few_frames_without_it():
    frames, masks = sample.make_clip(seed=3, frames=20, height=96, width=171)
    assert frames.shape == (20, 96, 171, 3) and frames.dtype == np.uint8
    assert masks.shape == (20, 96, 171) and masks.dtype == bool
    empty = ~masks.any(axis=(1, 2))
    assert empty.sum() == 2 and not empty[0] and not empty[-1]
    areas = masks.mean(axis=(1, 2))[~empty]
    assert areas.min() > 0.02 and areas.max() < 0.3
    assert (masks[0] & masks[-1]).sum() < 0.9 * masks[0].sum()  # it moved


def test_command_writes_a_davis_root(tmp_path, monkeypatch):
    out = tmp_path / "sample"
    flags = ["--clips", "2", "--val-clips", "1", "--frames", "3", "--size", "40x53", "--seed", "1"]
    monkeypatch.setattr("sys.argv", ["sample", "--out", str(out), *flags])
    sample.main()
    lists = [(out / f"ImageSets/480p/{name}.txt").read_text().split() for name in ("train", "val")]
    assert [len(paths) for paths in lists] == [12, 6]
    frames, masks = sample.make_clip(10_002, 3, 40, 53)
    image, mask = (np.asarray(Image.open(out / path[1:])) for path in lists[1][2:4])
    assert np.array_equal(mask, masks[1] * np.uint8(255))  # a seed's clip is always the same
    assert np.abs(image.astype(int) - frames[1]).mean() < 12  # JPEG
    made = json.loads((out / "sample.json").read_text())
    assert made == {"made_by": "vos.sample", "seed": 1}
