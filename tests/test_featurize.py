"""featurize.py: what it writes, that it goes on after a stop, and what it refuses."""
import json
import os
import shutil
import signal

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from forking import at_write, forked
from helpers import call, listed, ok, refuses, tree, write_davis, write_json
from test_featurizers import make_alexnet, normalised

import data
from vos import clips, cues, motion
from vos.inputs import sha256

ALEXNET = ("--featurizer", "alexnet", "--weights", "random", "--compute", "float32", "--threads", 1)


@pytest.fixture(scope="module")
def clips_once(tmp_path_factory):
    return write_davis(tmp_path_factory.mktemp("clips") / "davis", clips=3, val_clips=1, frames=3)


@pytest.fixture
def davis(clips_once, tmp_path):
    """A DAVIS root of 9 train and 3 val frames, 128 x 96, for one test to break."""
    return shutil.copytree(clips_once, tmp_path / "davis")


def featurize(davis, out, *flags):
    return call("featurize", "--data", davis, "--split", "train", "--out", out, *ALEXNET, *flags)


def unpack(path) -> np.ndarray:
    return np.unpackbits(np.load(path / "masks.npy"), axis=2, count=128).astype(bool)


def write_pngs(folder, frames: list[np.ndarray]) -> None:
    folder.mkdir()
    for number, frame in enumerate(frames):
        iio.imwrite(folder / f"{number}.png", frame)


def test_the_folder_holds_the_networks_maps_and_the_masks(davis, tmp_path):
    whole, out = make_alexnet(), tmp_path / "features"
    torch.save(whole.features.state_dict(), tmp_path / "w.pth")
    result = ok(featurize(davis, out, "--weights", tmp_path / "w.pth", "--dtype", "float32"))
    command = f"next: python train.py --features {out} --decoder simple\n"
    assert result.out.endswith(command) and result.err == ""

    files = listed(davis)
    pixels = torch.from_numpy(np.stack([iio.imread(frame) for frame, _ in files]))
    expected = whole.features(normalised(pixels.permute(0, 3, 1, 2))).detach()
    np.testing.assert_allclose(np.load(out / "features.npy"), expected, rtol=1e-4, atol=1e-5)
    masks = np.stack([iio.imread(mask) > 127 for _, mask in files])
    np.testing.assert_array_equal(unpack(out), masks)
    assert f"foreground: {masks.mean():.2%} of all pixels" in result.out
    meta = json.loads((out / "meta.json").read_text())
    assert meta["levels"] == {"s32": [256, 2, 3]} and meta["parameters"] == 2_469_696
    assert meta["clips"] == [frame.parent.name for frame, _ in files]
    assert meta["sha256"] == {name: sha256(out / name) for name in ("features.npy", "masks.npy")}
    assert set(os.listdir(out)) == {*meta["sha256"], "meta.json", "paths.json"}


def test_levels_views_and_cues_by_default(davis, tmp_path):
    flags = ("--levels", "s16@.5,s16", "--views", "zoom2", "--dtype", "float32", "--limit", 6)
    said = ok(featurize(davis, tmp_path / "f", *flags)).out
    assert said.endswith(f"train.py --features {tmp_path / 'f'} --decoder temporal\n")
    opened = data.open_features(tmp_path / "f")
    assert list(opened.shapes) == ["s16@0.5", "s16"]  # coarse to fine, canonical
    assert (opened.frames, opened.meta["views"], len(opened.meta["clips"])) == (6, ["zoom2"], 9)
    masks = unpack(tmp_path / "f")
    zoomed = [clips.resize(clips.show(mask, "zoom2"), mask.shape) for mask in masks[:6:2]]
    np.testing.assert_array_equal(masks[6:], zoomed)
    frames = np.stack([iio.imread(frame) for frame, _ in listed(davis)[:6]])
    frames = np.concatenate([frames, [clips.resize(clips.show(frame, "zoom2"), masks.shape[1:])
                                      for frame in frames[::2]]])
    parts = [3, 6, 8]  # where a clip ends: a view's clip is its own, of every second frame
    shown = [motion.own_motion(motion.shrink(torch.from_numpy(part).permute(0, 3, 1, 2)))
             for part in np.split(frames, parts)]
    for level in opened.shapes:
        rows = np.load(tmp_path / f"f/features.{level}.npy")
        made = np.load(tmp_path / f"f/cues.{level}.npy")
        for clip, clip_made, moved in zip(np.split(rows, parts), np.split(made, parts), shown):
            expected = cues.clip_cues(torch.from_numpy(clip), moved).half()
            np.testing.assert_allclose(clip_made, expected, atol=1e-3)

    write_pngs(tmp_path / "turned", [clips.show(iio.imread(frame), "zoom2")
                                       for frame, _ in listed(davis)[:3:2]])
    said = ok(call("featurize", "--data", tmp_path / "turned", "--out", tmp_path / "g", *ALEXNET,
                   "--levels", "s16,s16@0.5", "--dtype", "float32", "--no-cues", "--size",
                   "{}x{}".format(*opened.size))).out
    assert said.endswith(f"wrote {tmp_path / 'g'}\n")  # nothing to train on
    assert not list((tmp_path / "g").glob("cues*"))
    for level in opened.shapes:
        pair = [np.load(tmp_path / name / f"features.{level}.npy") for name in "fg"]
        np.testing.assert_array_equal(pair[0][6:8], pair[1])


def test_frames_of_other_sizes_are_resized_to_the_first_or_as_asked(davis, tmp_path):
    frame, mask = listed(davis)[7]
    iio.imwrite(frame, np.full((50, 70, 3), 99, np.uint8))
    iio.imwrite(mask, np.pad(np.full((25, 70), 255, np.uint8), ((25, 0), (0, 0))))  # its lower half
    ok(featurize(davis, tmp_path / "f"))
    sizes = data.open_features(tmp_path / "f").meta["sizes"]
    assert sizes == [[96, 128]] * 7 + [[50, 70], [96, 128]]
    lower = np.arange(96)[:, None].repeat(128, 1) >= 48
    np.testing.assert_array_equal(unpack(tmp_path / "f")[7], lower)

    for _, mask in listed(davis)[:2]:
        iio.imwrite(mask, np.full((96, 128), 255, np.uint8))
    said = ok(featurize(davis, tmp_path / "g", "--limit", 2, "--size", "64x80")).out
    assert data.open_features(tmp_path / "g").size == (64, 80)
    assert "warning: " in said  # all is foreground


def test_folders_of_frames_and_masks_give_what_the_davis_root_gives(davis, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ok(call("featurize", "--data", davis, "--split", "train", *ALEXNET))
    whole = tmp_path / "features/alexnet-train"  # named after featurizer and split
    pairs = [[str(path.relative_to(davis)) for path in pair] for pair in listed(davis)]
    raw = json.loads((whole / "paths.json").read_text())["raw"]
    assert raw == {str(row): frame for row, (frame, _) in enumerate(pairs)}

    for frame, mask in listed(davis, "val"):
        frame.unlink()
        mask.unlink()
    listed(davis)[4][1].unlink()  # a frame without a mask is unlabelled
    ok(call("featurize", "--data", davis / "JPEGImages/480p", "--masks", davis / "Annotations/480p",
            "--out", tmp_path / "g", *ALEXNET))
    order = sorted(range(9), key=lambda row: pairs[row])  # clips by name
    meta = data.open_features(tmp_path / "g").meta
    assert meta["labelled"] == [row != 4 for row in order]
    features = [np.load(path / "features.npy") for path in (whole, tmp_path / "g")]
    np.testing.assert_array_equal(features[0][order], features[1])
    masks = unpack(whole)
    masks[4] = False
    np.testing.assert_array_equal(masks[order], unpack(tmp_path / "g"))


def test_another_command_does_not_go_on_with_a_stopped_one(davis, tmp_path):
    flags = ("--data", davis, "--split", "train", *ALEXNET, "--out", tmp_path / "f")
    stopped = forked("featurize", *flags, prepare=at_write(tmp_path, 24, signal.SIGINT))
    assert (stopped.status, stopped.err) == (130, "featurize.py: interrupted\n")
    assert (tmp_path / ".f.vos-partial/unfinished/0.txt").exists() and not (tmp_path / "f").exists()
    assert "going on" not in ok(call("featurize", *flags, "--limit", 8)).out
    outcome = tree(tmp_path / "f")
    ok(call("featurize", *flags, "--limit", 8, "--overwrite"))
    assert tree(tmp_path / "f") == outcome


def decodes_no_more(file) -> None:
    """Damage an image where only decoding can find it: header and end are whole."""
    content = file.read_bytes()
    start = content.index(b"IDAT") + 4
    file.write_bytes(content[:start] + bytes(len(content) - start - 12) + content[-12:])


def test_a_mask_found_damaged_on_the_way_leaves_what_was_there(davis, tmp_path):
    shutil.copytree(davis, tmp_path / "f/old")  # features of an earlier run
    for name in ("meta.json", "paths.json"):
        write_json(tmp_path / "f" / name, {})
    decodes_no_more(listed(davis)[3][1])
    refuses("featurize", "--data", davis, "--split", "train", "--out", tmp_path / "f", *ALEXNET,
            "--overwrite", names=["00000.png: cannot be decoded"], untouched=tmp_path)


@pytest.mark.parametrize("flags, names", [
    (("--featurizer", "resnet51"), ["resnet51", "alexnet"]),
    (("--levels", "s2"), ["s2", "s32"]), (("--levels", "s16@nan"), ["s16@nan"]),
    (("--weights", "missing.pth"), ["missing.pth: no such file"]),
    (("--device", "cuda:77"), ["--device cuda:77: not on this machine"]),
    (("--size", "8x8"), ["--size"]), (("--limit", "0"), ["--limit"]),
    (("--views", "upside"), ["--views"]), (("--size", "40x40"), ["40 x 40"]),
    (("--out", "."), ["current folder"]), (("--masks", "x"), ["x: expected"]),
])
def test_bad_flags_are_refused(davis, tmp_path, monkeypatch, flags, names):
    monkeypatch.chdir(davis)
    refuses("featurize", "--data", davis, "--split", "train", "--out", tmp_path / "f", *ALEXNET,
            *flags, names=names, untouched=tmp_path)


@pytest.mark.filterwarnings("error")  # a warning would be a second line
def test_features_that_are_no_numbers_are_refused(davis, tmp_path):
    state = make_alexnet().features.state_dict()
    state["10.bias"][5] = 1e9  # finite, but no float16
    torch.save(state, tmp_path / "w.pth")
    given = ("--data", davis, "--split", "train", "--out", tmp_path / "f", *ALEXNET)
    flags = (*given, "--weights", tmp_path / "w.pth")
    refuses("featurize", *flags, names=["--dtype float32"], untouched=tmp_path)


def test_what_comes_next_fits_what_was_written(davis, tmp_path):
    levels = ("--levels", "s16,s32", "--no-cues", "--limit", 3)
    said = ok(featurize(davis, tmp_path / "f", *levels)).out
    assert said.endswith(f"train.py --features {tmp_path / 'f'} --decoder fpn\n")
    said = ok(featurize(davis, tmp_path / "g", "--split", "val")).out
    assert said.endswith(f"wrote {tmp_path / 'g'}, to pass to train.py as --val-features\n")
