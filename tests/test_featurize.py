"""featurize.py through its command line: what it writes, that it goes on after a stop, and what it refuses."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from unittest import mock

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from helpers import QUIET, ROOT, call, cut, listed, ok, refuses, script, tree, write_davis, write_frames, write_json
from test_featurizers import alexnet_weights, normalised

import data
import partial
from files import sole_owner

ALEXNET = ("--featurizer", "alexnet", "--weights", "random", "--compute", "float32", "--threads", 1)


@pytest.fixture(scope="module")
def clips_once(tmp_path_factory):
    return write_davis(tmp_path_factory.mktemp("clips") / "davis", clips=2, val_clips=1, frames=5)


@pytest.fixture
def davis(clips_once, tmp_path):
    """A DAVIS root of 10 train and 5 val frames, 128 x 96, for one test to break."""
    shutil.copytree(clips_once, tmp_path / "davis")
    return tmp_path / "davis"


def featurize(davis, out, *flags, run=call):
    return run("featurize", "--data", davis, "--split", "train", "--out", out, *ALEXNET, *flags)


# --- what it writes ----------------------------------------------------------------------------


@torch.no_grad()
def test_the_folder_holds_the_networks_maps_and_the_masks(davis, tmp_path):
    whole = alexnet_weights(tmp_path / "w.pth")
    out = tmp_path / "features"
    result = ok(featurize(davis, out, "--weights", tmp_path / "w.pth", "--dtype", "float32", "--batch-size", 3))
    assert f"wrote {out}" in result.out and f"next: python train.py --features {out}" in result.out and result.err == ""
    files = listed(davis, "train")
    pixels = torch.stack([torch.from_numpy(iio.imread(frame)).permute(2, 0, 1) for frame, _ in files])
    features = np.load(out / "features.npy")
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, whole.features(normalised(pixels)).numpy(), rtol=1e-4, atol=1e-6)
    masks = np.unpackbits(np.load(out / "masks.npy"), axis=2, count=128).astype(bool)
    np.testing.assert_array_equal(masks, [iio.imread(mask) > 127 for _, mask in files])
    paths = json.loads((out / "paths.json").read_text())
    assert paths == {column: {str(i): str(pair[j].relative_to(davis)) for i, pair in enumerate(files)}
                     for j, column in enumerate(("raw", "annotation"))}

    meta = json.loads((out / "meta.json").read_text())
    assert meta["featurizer"] == "alexnet" and meta["levels"] == {"s32": [256, 2, 3]} and meta["size"] == [96, 128]
    assert meta["clips"] == [frame.parent.name for frame, _ in files] and meta["names"] == [frame.stem for frame, _ in files]
    assert meta["parameters"] == 2_469_696 and meta["sizes"] is None and meta["data"] == str(davis)
    convolutions = [(64 * 3 * 121, 23 * 31), (192 * 64 * 25, 11 * 15),
                    (384 * 192 * 9, 5 * 7), (256 * 384 * 9, 5 * 7), (256 * 256 * 9, 5 * 7)]  # weights, places
    assert meta["flops_per_frame"] == sum(2 * weights * places for weights, places in convolutions)
    assert meta["sha256"] == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in ("features.npy", "masks.npy")}
    assert sorted(path.name for path in out.iterdir()) == ["features.npy", "masks.npy", "meta.json", "paths.json"]
    assert data.open_features(out).frames == 10
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_half_precision_is_the_default_and_close(davis, tmp_path):
    ok(featurize(davis, tmp_path / "full", "--dtype", "float32"))
    ok(featurize(davis, tmp_path / "half"))
    full, half = np.load(tmp_path / "full/features.npy"), np.load(tmp_path / "half/features.npy")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, full.astype(np.float16))


def test_several_levels_are_a_file_each(davis, tmp_path):
    ok(featurize(davis, tmp_path / "f", "--levels", "s8,s4,s8@0.5"))
    meta = json.loads((tmp_path / "f/meta.json").read_text())
    assert list(meta["levels"]) == ["s8@0.5", "s8", "s4"]
    for level, shape in meta["levels"].items():
        assert list(np.load(tmp_path / f"f/features.{level}.npy").shape) == [10, *shape]


def test_batches_and_threads_change_nothing(davis, tmp_path):
    for out, flags in (("a", ("--batch-size", 1)), ("b", ("--batch-size", 10)), ("c", ("--batch-size", 4, "--threads", 3))):
        ok(featurize(davis, tmp_path / out, "--dtype", "float32", *flags))
    one, ten, four = (np.load(tmp_path / out / "features.npy") for out in "abc")
    np.testing.assert_allclose(one, ten, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(one, four, rtol=1e-4, atol=1e-6)


def test_same_command_same_bytes(davis, tmp_path):
    ok(featurize(davis, tmp_path / "a"))
    ok(featurize(davis, tmp_path / "b"))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_limit_and_size(davis, tmp_path):
    ok(featurize(davis, tmp_path / "f", "--limit", 3, "--size", "64x80"))
    folder = data.open_features(tmp_path / "f")
    assert folder.frames == 3 and folder.size == (64, 80) and folder.meta["sizes"] == [[96, 128]] * 3
    masks = np.unpackbits(np.load(tmp_path / "f/masks.npy"), axis=2, count=80)
    shares = [iio.imread(mask).mean() / 255 for _, mask in listed(davis)[:3]]
    np.testing.assert_allclose(masks.mean((1, 2)), shares, atol=0.01)


def test_frames_of_other_sizes_are_resized_to_the_first(davis, tmp_path):
    frame, mask = listed(davis)[7]
    iio.imwrite(frame, np.full((50, 70, 3), 99, np.uint8))
    iio.imwrite(mask, np.pad(np.full((25, 70), 255, np.uint8), ((25, 0), (0, 0))))  # its lower half
    ok(featurize(davis, tmp_path / "f", "--dtype", "float32"))
    folder = data.open_features(tmp_path / "f")
    assert folder.size == (96, 128) and folder.meta["sizes"] == [[96, 128]] * 7 + [[50, 70]] + [[96, 128]] * 2
    masks = np.unpackbits(np.load(folder.masks), axis=2, count=128).astype(bool)
    np.testing.assert_array_equal(masks[7], np.arange(96)[:, None].repeat(128, 1) >= 48)
    iio.imwrite(frame, np.full((96, 128, 3), 99, np.uint8))
    iio.imwrite(mask, np.zeros((96, 128), np.uint8))
    ok(featurize(davis, tmp_path / "g", "--dtype", "float32"))
    np.testing.assert_allclose(np.load(tmp_path / "f/features.npy"), np.load(tmp_path / "g/features.npy"), atol=2e-3)


def test_clips_without_annotations_have_no_masks(tmp_path):
    write_frames(tmp_path / "clips/a", ["0.jpg", "1.jpg"], (64, 64))
    write_frames(tmp_path / "clips/b", ["0.jpg"], (64, 64))
    ok(call("featurize", "--data", tmp_path / "clips", "--out", tmp_path / "f", *ALEXNET))
    assert not (tmp_path / "f/masks.npy").exists()
    assert json.loads((tmp_path / "f/paths.json").read_text()) == {"raw": {"0": "a/0.jpg", "1": "a/1.jpg", "2": "b/0.jpg"}}


def test_a_contest_folder_gives_what_its_davis_root_gives(davis, tmp_path):
    pairs = [[str(path.relative_to(davis)) for path in pair] for pair in listed(davis)]
    order = sorted(range(10), key=str, reverse=True)
    shutil.copytree(davis, tmp_path / "contest")
    write_json(tmp_path / "contest/paths.json", {column: {str(i): pairs[i][j].replace("/", "\\") for i in order}
                                                 for j, column in enumerate(("raw", "annotation"))})
    ok(featurize(davis, tmp_path / "f"))
    ok(call("featurize", "--data", tmp_path / "contest", "--out", tmp_path / "g", *ALEXNET))
    for name in ("features.npy", "masks.npy", "paths.json"):
        assert (tmp_path / "f" / name).read_bytes() == (tmp_path / "g" / name).read_bytes()


def test_a_video_gives_what_its_frames_give(tmp_path):
    frames = [np.full((64, 64, 3), 25 * i, np.uint8) for i in range(5)]
    iio.imwrite(tmp_path / "walk.gif", frames)
    (tmp_path / "walk").mkdir()
    for number, frame in enumerate(frames):
        iio.imwrite(tmp_path / f"walk/{number}.png", frame)
    for source in ("walk.gif", "walk"):
        ok(call("featurize", "--data", tmp_path / source, "--out", tmp_path / f"f-{source}", "--batch-size", 2, *ALEXNET))
    assert (tmp_path / "f-walk/features.npy").read_bytes() == (tmp_path / "f-walk.gif/features.npy").read_bytes()


def test_default_out_is_named_after_featurizer_and_split(davis, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ok(call("featurize", "--data", davis, "--split", "val", "--limit", 1, *ALEXNET))
    assert (tmp_path / "features/alexnet-val/meta.json").is_file()


# --- going on after a stop ---------------------------------------------------------------------

KILLED = """
import os, runpy, signal, sys
import partial
note_rows = partial.PartialFolder.note_rows
def kill(self, first, arrays):
    if first == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    note_rows(self, first, arrays)
partial.PartialFolder.note_rows = kill
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_half_way_and_run_again_gives_the_same_bytes(davis, tmp_path):
    ok(featurize(davis, tmp_path / "whole", "--batch-size", 2))
    flags = ["--data", davis, "--split", "train", "--out", tmp_path / "f", *ALEXNET, "--batch-size", 2]
    killed = subprocess.run([sys.executable, "-c", KILLED, ROOT / "featurize.py", *map(str, flags)], cwd=ROOT,
                            env={**os.environ, **QUIET}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "f").exists()
    again = ok(call("featurize", *flags))
    assert "going on from an earlier run: 3 of 5 batches are there" in again.out
    assert tree(tmp_path / "f") == tree(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"davis", "whole", "f"}


def stop_before(first: int):
    """A context in which featurizing is interrupted before the batch that starts at frame `first` is noted."""
    note_rows = partial.PartialFolder.note_rows

    def stop(self, number, arrays):
        if number == first:
            raise KeyboardInterrupt
        note_rows(self, number, arrays)
    return mock.patch.object(partial.PartialFolder, "note_rows", stop)


@pytest.fixture
def stopped(davis, tmp_path):
    """A featurizing of 5 batches of 2 that was interrupted after 4: its folder in the making."""
    with stop_before(8):
        result = featurize(davis, tmp_path / "f", "--batch-size", 2)
    assert result.status == 130 and result.err == "featurize.py: interrupted\n"
    ok(featurize(davis, tmp_path / "whole", "--batch-size", 2))
    return tmp_path / ".f.partial"


def damage(file, at: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 16
    file.write_bytes(content)


@pytest.mark.parametrize("harm, there", [
    (lambda folder: damage(folder / "features.npy", 0.3), 3),  # in the second batch
    (lambda folder: damage(folder / "masks.npy", 0.5), 4),
    (lambda folder: (folder / "masks.npy").unlink(), 4),
    (lambda folder: cut(folder / "features.npy", 0.5), 2),
    (lambda folder: [cut(file, 0.95) for file in folder.glob("progress*")], 3),  # the last line was being written
])
def test_damaged_rows_are_made_anew(davis, tmp_path, stopped, harm, there):
    harm(stopped)
    again = ok(featurize(davis, tmp_path / "f", "--batch-size", 2))
    assert f"going on from an earlier run: {there} of 5 batches are there" in again.out
    assert tree(tmp_path / "f") == tree(tmp_path / "whole")


def test_damaged_rows_of_a_video_are_made_anew(tmp_path):
    iio.imwrite(tmp_path / "walk.gif", [np.full((64, 64, 3), 25 * i, np.uint8) for i in range(10)])
    flags = ("--data", tmp_path / "walk.gif", "--batch-size", 2, *ALEXNET)
    with stop_before(8):
        call("featurize", "--out", tmp_path / "f", *flags)
    damage(tmp_path / ".f.partial/features.npy", 0.3)
    ok(call("featurize", "--out", tmp_path / "f", *flags))
    ok(call("featurize", "--out", tmp_path / "whole", *flags))
    assert tree(tmp_path / "f") == tree(tmp_path / "whole")


def test_another_command_does_not_go_on_with_it(davis, tmp_path, stopped):
    frame = listed(davis)[0][0]
    for flags in (("--seed", 1), ("--dtype", "float32"), ("--batch-size", 4), ("--levels", "s16"), ("--limit", 9)):
        with stop_before(8):
            assert "going on" not in featurize(davis, tmp_path / "f", "--batch-size", 2, *flags).out, flags
    assert frame.exists()
    ok(featurize(davis, tmp_path / "f", "--batch-size", 2))
    assert tree(tmp_path / "f") == tree(tmp_path / "whole")


def test_two_processes_do_not_write_one_folder(davis, tmp_path, stopped):
    with sole_owner(stopped, stopped):
        refuses("featurize", "--data", davis, "--split", "train", "--out", tmp_path / "f", *ALEXNET, "--batch-size", 2,
                names=[tmp_path / "f", "another process is writing it"], untouched=tmp_path)


# --- what it refuses ---------------------------------------------------------------------------


def first_pair(davis):
    return listed(davis)[3]


def without_mask_line(davis):
    file = davis / "ImageSets/480p/train.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1].split()[0], *lines[2:]]) + "\n")


BAD = {
    "missing folder": (lambda d: shutil.rmtree(d), ["davis: no such folder or video"]),
    "unknown split": (lambda d: (d / "ImageSets/480p/train.txt").rename(d / "ImageSets/480p/train2.txt"),
                      ["no split 'train'", "there are: train2, val"]),
    "empty split": (lambda d: (d / "ImageSets/480p/train.txt").write_text("\n"), ["train.txt: the split is empty"]),
    "truncated JPEG": (lambda d: cut(first_pair(d)[0]), ["00003.jpg: cannot be decoded"]),
    "empty JPEG": (lambda d: first_pair(d)[0].write_bytes(b""), ["00003.jpg: cannot be decoded"]),
    "missing JPEG": (lambda d: first_pair(d)[0].unlink(), ["00003.jpg: no such file"]),
    "truncated PNG": (lambda d: cut(first_pair(d)[1]), ["00003.png: cannot be decoded"]),
    "frame without its mask": (lambda d: first_pair(d)[1].unlink(), ["00003.png: no such file; it is the annotation of", "00003.jpg"]),
    "frame without a mask named": (without_mask_line, ["00001.jpg: has no annotation, though 9 other frames have"]),
    "mask of another size": (lambda d: iio.imwrite(first_pair(d)[1], np.zeros((96, 127), np.uint8)),
                             ["00003.png: is 127 x 96 but its frame", "00003.jpg is 128 x 96"]),
    "text for a frame": (lambda d: first_pair(d)[0].write_text("no picture"), ["00003.jpg: cannot be decoded"]),
    "path that leaves": (lambda d: write_json(d / "paths.json", {"raw": {"0": "../secret.jpg"}}), ["paths.json", "'../secret.jpg' leaves"]),
    "absolute path": (lambda d: write_json(d / "paths.json", {"raw": {"0": "/etc/hosts.jpg"}}), ["paths.json", "'/etc/hosts.jpg' leaves"]),
    "folder for a list": (lambda d: ((d / "ImageSets/480p/train.txt").unlink(), (d / "ImageSets/480p/train.txt").mkdir()), ["train.txt"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_clips_are_refused(davis, tmp_path, case):
    harm, names = BAD[case]
    harm(davis)
    refuses("featurize", "--data", davis, "--split", "train", "--out", tmp_path / "f", *ALEXNET, names=names, untouched=tmp_path)


def test_damage_that_only_decoding_finds_leaves_nothing(davis, tmp_path):
    mask = first_pair(davis)[1]
    content = mask.read_bytes()
    start = content.index(b"IDAT") + 4
    mask.write_bytes(content[:start] + bytes(len(content) - start - 12) + content[-12:])  # header and end are whole
    refuses("featurize", "--data", davis, "--split", "train", "--out", tmp_path / "f", *ALEXNET,
            names=[f"{mask}: cannot be decoded"], untouched=tmp_path)


@pytest.mark.parametrize("flags, names", [
    (("--featurizer", "resnet51"), ["--featurizer resnet51: unknown"]),
    (("--featurizer", "alexnet", "--levels", "s2"), ["--levels s2: alexnet has"]),
    (("--featurizer", "alexnet", "--weights", "missing.pth"), ["--weights missing.pth: no such file"]),
    (("--featurizer", "alexnet", "--weights", "random", "--device", "cuda:77"), ["--device cuda:77: not on this machine"]),
    (("--featurizer", "alexnet", "--weights", "random", "--device", "toaster"), ["--device toaster: not on this machine"]),
])
def test_bad_flags_are_refused(davis, tmp_path, flags, names):
    refuses("featurize", "--data", davis, "--split", "train", "--out", tmp_path / "f", *flags, names=names, untouched=tmp_path)


def test_features_that_are_no_numbers_are_refused(davis, tmp_path):
    state = alexnet_weights(tmp_path / "w.pth").features.state_dict()
    state["10.bias"][5] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    refuses("featurize", "--data", davis, "--split", "train", "--out", tmp_path / "f", *ALEXNET, "--weights", tmp_path / "w.pth",
            names=["00000.jpg: its features do not fit float16, or are not finite"], untouched=tmp_path)


def test_frames_too_small_for_the_network_are_refused(tmp_path):
    write_frames(tmp_path / "walk", ["0.png"], (40, 40))
    refuses("featurize", "--data", tmp_path / "walk", "--out", tmp_path / "f", *ALEXNET,
            names=["frames of 40 x 40 are too small for alexnet's levels s32", "--size"], untouched=tmp_path)


def test_what_is_there_stays_without_overwrite(davis, tmp_path):
    ok(featurize(davis, tmp_path / "f"))
    flags = ("--data", davis, "--split", "train", "--out", tmp_path / "f", *ALEXNET, "--limit", 2)
    refuses("featurize", *flags, names=[f"{tmp_path / 'f'}: is there already; pass --overwrite"], untouched=tmp_path)
    ok(call("featurize", *flags, "--overwrite"))
    assert data.open_features(tmp_path / "f").frames == 2
    (tmp_path / "file").write_text("mine")
    refuses("featurize", *flags, "--out", tmp_path / "file", "--overwrite", names=["file: expected a folder"], untouched=tmp_path)


def test_as_a_process_bad_input_is_one_line_and_debug_shows_where(davis, tmp_path):
    cut(first_pair(davis)[0])
    flags = ("--data", davis, "--split", "train", "--out", tmp_path / "f", *ALEXNET)
    refuses("featurize", *flags, names=["00003.jpg"], untouched=tmp_path, run=script)
    debug = script("featurize", *flags, "--debug")
    assert debug.status != 0 and "Traceback" in debug.err and "00003.jpg" in debug.err
    assert not (tmp_path / "f").exists()
