"""evaluate.py through its command line: what it writes and scores, at each frame's own size, and what it refuses."""
import csv
import json
import math
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from helpers import (
    NotebookDecoder,
    call,
    change_json,
    cut,
    listed,
    mean_iou,
    ok,
    refuses,
    script,
    sign,
    tree,
    write_davis,
    write_features,
    write_frames,
)
from PIL import Image
from test_featurizers import Harmful

TRAIN = ("--threads", 1, "--no-pictures", "--steps", 30, "--lr", 0.05)
PLAIN = ("--threads", 1, "--no-pictures")


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    write_features(root / "train", {"ant": 8, "bee": 8})
    write_features(root / "val", {"cat": 5, "dog": 3})
    ok(call("train", "--features", root / "train", "--out", root / "run", *TRAIN))
    return root


@pytest.fixture
def made(made_once, tmp_path):
    """A folder with feature folders train and val, and a run of the simple decoder, for one test to break."""
    shutil.copytree(made_once, tmp_path / "made")
    return tmp_path / "made"


def masks_of(folder, width: int = 60) -> np.ndarray:
    return np.unpackbits(np.load(folder / "masks.npy"), axis=2, count=width).astype(bool)


def rows_of(results) -> list[dict]:
    with open(results / "frames.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read(results, name: str):
    return json.loads((results / name).read_text())


# --- what it writes ----------------------------------------------------------------------------


def test_outputs_are_the_models_and_scores_the_contests(made, tmp_path):
    out = tmp_path / "results"
    masks = masks_of(made / "val")
    masks[4] = False  # an empty mask
    np.save(made / "val/masks.npy", np.packbits(masks, axis=2))
    sign(made / "val")
    result = ok(call("evaluate", "--model", made / "run", "--features", made / "val", "--out", out, *PLAIN))

    state = torch.load(made / "run/model.pt", weights_only=True)["state"]
    decoder = NotebookDecoder(6, (40, 60))
    decoder.load_state_dict(state)
    with torch.no_grad():
        exact = 255 * decoder(torch.from_numpy(np.load(made / "val/features.npy")))[:, 0].double().numpy()
    files = [out / f"outputs/{i:05d}.png" for i in range(8)]
    assert sorted((out / "outputs").iterdir()) == files
    pixels = [iio.imread(file) for file in files]
    for file, image, wanted in zip(files, pixels, exact):
        assert image.shape == (40, 60) and image.dtype == np.uint8
        assert file.read_bytes()[24:26] == b"\x08\x00"  # 8 bits, grey
        assert ((image <= wanted + 1e-3) & (image > wanted - 1 - 1e-3)).all()
    assert read(out, "paths.json") == {"output": {str(i): f"outputs/{i:05d}.png" for i in range(8)}}

    expected, ious = mean_iou(pixels, masks)
    assert 0.1 < expected < 0.9
    scores, rows = read(out, "scores.json"), rows_of(out)
    assert scores["mean_iou"] == pytest.approx(expected, abs=1e-12)
    assert [row["iou"] and float(row["iou"]) for row in rows] == pytest.approx([("" if iou is None else iou) for iou in ious], abs=1e-12)
    assert [(row["index"], row["clip"], row["frame"]) for row in rows] == [
        (str(i), clip, f"{n:05d}") for i, (clip, n) in enumerate([("cat", n) for n in range(5)] + [("dog", n) for n in range(3)])]
    assert scores["per_clip"]["dog"]["mean_iou"] == pytest.approx(mean_iou(pixels[5:], masks[5:])[0], abs=1e-12)
    assert scores["J_mean"] == pytest.approx(np.mean([clip["J_mean"] for clip in scores["per_clip"].values()]), abs=1e-12)
    assert scores["frames"] == 8 and scores["protocol"] == "all"
    metadata = read(out, "metadata.json")
    assert metadata["nparams"] == 1000 + 6 * 9 + 1 and metadata["frames"] == 8 and metadata["size"] == [40, 60]
    assert f"next: python package.py --results {out}" in result.out and f"{expected:.4f}" in result.out
    assert not (out / "report.html").exists() and not (out / "overlays").exists()


def test_batches_change_nothing(made, tmp_path):
    for out, batch in (("a", 1), ("b", 5), ("c", 64)):
        ok(call("evaluate", "--model", made / "run", "--features", made / "val", "--out", tmp_path / out, *PLAIN, "--batch-size", batch))
    pixels = [np.stack([iio.imread(file) for file in sorted((tmp_path / out / "outputs").iterdir())]).astype(int) for out in "abc"]
    assert max(np.abs(pixels[0] - other).max() for other in pixels[1:]) <= 1  # a probability may round otherwise in another batch


def test_model_file_and_davis2016_protocol(made, tmp_path):
    ok(call("evaluate", "--model", made / "run/checkpoints/model-00000000.pt", "--features", made / "val", "--out", tmp_path / "r", *PLAIN,
            "--protocol", "davis2016"))
    scores, rows = read(tmp_path / "r", "scores.json"), rows_of(tmp_path / "r")
    assert scores["protocol"] == "davis2016"
    inner = [float(row["J"]) for row in rows if row["clip"] == "cat"][1:-1]
    assert scores["per_clip"]["cat"]["J_mean"] == pytest.approx(np.mean(inner))


def test_without_annotations_it_writes_outputs_alone(made, tmp_path):
    write_features(made / "test", {"fox": 2}, annotated=False)
    ok(call("evaluate", "--model", made / "run", "--features", made / "test", "--out", tmp_path / "r", *PLAIN))
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"outputs", "paths.json", "metadata.json"}
    assert len(list((tmp_path / "r/outputs").iterdir())) == 2


@pytest.fixture(scope="module")
def real_once(tmp_path_factory):
    """A DAVIS root whose second val clip is of another size, its features, and a decoder trained on them."""
    root = tmp_path_factory.mktemp("real")
    davis = write_davis(root / "davis", clips=2, val_clips=2, frames=3)
    for frame, mask in listed(davis, "val")[3:]:
        iio.imwrite(frame, iio.imread(frame)[:70, :110])
        iio.imwrite(mask, iio.imread(mask)[:70, :110])
    for split in ("train", "val"):
        ok(call("featurize", "--data", davis, "--split", split, "--weights", "random", "--threads", 1, "--out", root / split))
    ok(call("train", "--features", root / "train", "--decoder", "linear", "--out", root / "run", *TRAIN))
    return root


@pytest.fixture
def real(real_once, tmp_path):
    shutil.copytree(real_once, tmp_path / "real")
    for split in ("train", "val"):
        change_json(tmp_path / "real" / split / "meta.json", data=str(tmp_path / "real/davis"))
    return tmp_path / "real"


def test_frames_of_other_sizes_are_written_and_scored_at_their_own(real, tmp_path):
    out = tmp_path / "results"
    ok(call("evaluate", "--model", real / "run", "--features", real / "val", "--out", out, *PLAIN))
    pixels = [iio.imread(out / f"outputs/{i:05d}.png") for i in range(6)]
    assert [image.shape for image in pixels] == [(96, 128)] * 3 + [(70, 110)] * 3
    masks = [iio.imread(mask) > 127 for _, mask in listed(real / "davis", "val")]
    assert read(out, "scores.json")["mean_iou"] == pytest.approx(mean_iou(pixels, masks)[0], abs=1e-12)
    assert read(out, "metadata.json")["sizes"] == [[96, 128]] * 3 + [[70, 110]] * 3
    ok(call("package", "--results", out))


@pytest.mark.parametrize("video", ["gif", "none"])
def test_pictures_of_frames_of_other_sizes(real, tmp_path, video):
    out = tmp_path / "results"
    result = ok(call("evaluate", "--model", real / "run", "--features", real / "val", "--out", out, "--threads", 1, "--video", video))
    assert (out / "report.html").stat().st_size > 1000 and f"open {out / 'report.html'}" in result.out
    overlays = sorted((out / "overlays").iterdir()) if video == "gif" else []
    assert [len(iio.imread(file)) for file in overlays] == ([3, 3] if video == "gif" else [])


def test_frames_featurized_on_the_fly_give_what_their_features_give(real, tmp_path):
    ok(call("evaluate", "--model", real / "run", "--features", real / "train", "--out", tmp_path / "a", *PLAIN))
    ok(call("evaluate", "--model", real / "run", "--data", real / "davis", "--split", "train", "--weights", "random",
            "--out", tmp_path / "b", *PLAIN))
    a, b = (np.stack([iio.imread(tmp_path / out / f"outputs/{i:05d}.png") for i in range(6)]).astype(int) for out in "ab")
    assert np.abs(a - b).max() <= 2
    assert read(tmp_path / "a", "scores.json")["mean_iou"] == pytest.approx(read(tmp_path / "b", "scores.json")["mean_iou"], abs=0.02)


def test_a_video_from_features_and_on_the_fly(real, tmp_path):
    iio.imwrite(tmp_path / "walk.gif", [iio.imread(frame) for frame, _ in listed(real / "davis", "train")[:3]])
    ok(call("featurize", "--data", tmp_path / "walk.gif", "--weights", "random", "--threads", 1, "--out", tmp_path / "f"))
    for out, source in (("a", ("--features", tmp_path / "f")), ("b", ("--data", tmp_path / "walk.gif", "--weights", "random"))):
        ok(call("evaluate", "--model", real / "run", *source, "--out", tmp_path / out, "--threads", 1))
        assert (tmp_path / out / "overlays/walk.gif").is_file() and not (tmp_path / out / "scores.json").exists()
    a, b = (np.stack([iio.imread(tmp_path / out / f"outputs/{i:05d}.png") for i in range(3)]).astype(int) for out in "ab")
    assert np.abs(a - b).max() <= 2


def test_frames_that_moved_are_found_with_data(real, tmp_path):
    (real / "davis").rename(tmp_path / "moved")
    flags = ("--model", real / "run", "--features", real / "train", "--out", tmp_path / "r", "--threads", 1)
    refuses("evaluate", *flags, names=["00000.jpg: no such", "--data"], untouched=tmp_path)
    ok(call("evaluate", *flags, "--data", tmp_path / "moved"))
    ok(call("evaluate", *flags, "--no-pictures", "--overwrite"))  # the features and masks are enough


# --- masks from anywhere -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["by clip", "flat", "results folder"])
@pytest.mark.parametrize("kind", ["grey", "colour", "indexed"])
def test_predictions_are_scored_wherever_they_come_from(real, tmp_path, layout, kind):
    pairs, masks, pixels = listed(real / "davis", "val"), [], []
    for number, (_, mask) in enumerate(pairs):
        masks.append(iio.imread(mask) > 127)
        pixels.append(np.where(np.roll(masks[-1], 5, axis=1), 128, 127).astype(np.uint8))
        names = {"by clip": f"{mask.parent.name}/{mask.name}", "flat": f"{number}.png", "results folder": f"outputs/{number:05d}.png"}
        file = tmp_path / "theirs" / names[layout]
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "indexed":  # DAVIS 2017's palette, whose first colour is less than 128 once grey
            image = Image.fromarray((pixels[-1] > 127).astype(np.uint8), "P")
            image.putpalette([0, 0, 0, 128, 0, 0])
            image.save(file)
        else:
            iio.imwrite(file, np.repeat(pixels[-1][..., None], 3, axis=2) if kind == "colour" else pixels[-1])
    ok(call("evaluate", "--predictions", tmp_path / "theirs", "--data", real / "davis", "--split", "val", "--out", tmp_path / "r",
            "--threads", 1, "--video", "none"))
    assert read(tmp_path / "r", "scores.json")["mean_iou"] == pytest.approx(mean_iou(pixels, masks)[0], abs=1e-12)
    assert (tmp_path / "r/report.html").is_file()


def test_predictions_that_do_not_fit_are_refused(real, tmp_path):
    for _, mask in listed(real / "davis", "val"):
        (tmp_path / "theirs" / mask.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(mask, tmp_path / "theirs" / mask.parent.name)
    flags = ("--predictions", tmp_path / "theirs", "--data", real / "davis", "--split", "val", "--out", tmp_path / "r", *PLAIN)
    file = tmp_path / "theirs" / mask.parent.name / mask.name
    whole = file.read_bytes()
    iio.imwrite(file, np.zeros((70, 109), np.uint8))
    refuses("evaluate", *flags, names=[file, "109 x 70", "110 x 70"], untouched=tmp_path)
    file.write_bytes(whole[:-30])
    refuses("evaluate", *flags, names=[f"{file}: cannot be decoded"], untouched=tmp_path)
    file.unlink()
    refuses("evaluate", *flags, names=[f"{file}: no such file"], untouched=tmp_path)
    write_frames(tmp_path / "flat", ["0.png", "1.png"])
    refuses("evaluate", "--predictions", tmp_path / "flat", *flags[2:], names=["2 PNGs for 6 frames"], untouched=tmp_path)
    refuses("evaluate", "--predictions", tmp_path / "none", *flags[2:], names=["none: no such folder"], untouched=tmp_path)
    refuses("evaluate", *flags[:3], real / "davis/JPEGImages/480p", *flags[6:], names=["has no annotations"], untouched=tmp_path)


# --- what it refuses ---------------------------------------------------------------------------


def put(folder, value: float) -> None:
    array = np.load(folder / "features.npy")
    array[6, 2, 3, 4] = value
    np.save(folder / "features.npy", array)
    sign(folder)


def flip(file) -> None:
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def rewrite(made, **changes) -> None:
    path = made / "run/model.pt"
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def remake(made, **options) -> None:
    shutil.rmtree(made / "val")
    write_features(made / "val", {"cat": 5}, **options)


BAD = {
    "missing features": (lambda m: shutil.rmtree(m / "val"), ["val: no such feature folder"]),
    "features cut": (lambda m: cut(m / "val/features.npy", 0.9), ["features.npy: is", "bytes, expected"]),
    "another shape": (lambda m: np.save(m / "val/features.npy", np.zeros((8, 6, 9, 7), "f4")), ["features.npy: holds float32 [8, 6, 9"]),
    "another dtype": (lambda m: np.save(m / "val/features.npy", np.zeros((8, 6, 7, 9), int)), ["features.npy: holds int64"]),
    "one flipped bit": (lambda m: flip(m / "val/features.npy"), ["features.npy: its SHA-256 differs"]),
    "one flipped bit of a mask": (lambda m: flip(m / "val/masks.npy"), ["masks.npy: its SHA-256 differs"]),
    "a NaN": (lambda m: put(m / "val", math.nan), ["features.npy: NaN or infinity in the features of frame 6"]),
    "missing model": (lambda m: shutil.rmtree(m / "run"), ["run", "no such file"]),
    "damaged model": (lambda m: cut(m / "run/model.pt"), ["run/model.pt: cannot be read as a checkpoint"]),
    "model of another decoder": (lambda m: rewrite(m, decoder="linear"), ["run/model.pt: does not fit the decoder 'linear'"]),
    "model of an unknown decoder": (lambda m: rewrite(m, decoder="mine"), ["run/model.pt: decoder 'mine': unknown; there are simple"]),
    "model that would run code": (lambda m: torch.save({"decoder": Harmful(m / "harm")}, m / "run/model.pt"), ["model.pt: cannot be read"]),
    "other featurizer": (lambda m: remake(m, featurizer="alexnet"), ["val: featurizer is alexnet", "trained on made-up"]),
    "other weights": (lambda m: remake(m, weights="ffff"), ["val: weights digest is ffff", "trained on 0123456789abcdef"]),
    "other level": (lambda m: remake(m, levels={"s16": (6, 7, 9)}), ["val: level s32 is None"]),
    "other shape": (lambda m: remake(m, levels={"s32": (6, 7, 10)}), ["val: level s32 is [6, 7, 10]"]),
    "other frame size": (lambda m: remake(m, size=(40, 61)), ["val: frame size is [40, 61]"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(made, tmp_path, case):
    harm, names = BAD[case]
    harm(made)
    refuses("evaluate", "--model", made / "run", "--features", made / "val", "--out", tmp_path / "results", *PLAIN, names=names,
            untouched=tmp_path)


BAD_CLIPS = {
    "missing folder": (lambda d: shutil.rmtree(d), ["davis: no such folder or video"]),
    "unknown split": (lambda d: (d / "ImageSets/480p/val.txt").unlink(), ["no split 'val'", "there are: train"]),
    "empty split": (lambda d: (d / "ImageSets/480p/val.txt").write_text(""), ["val.txt: the split is empty"]),
    "truncated JPEG": (lambda d: cut(listed(d, "val")[4][0]), ["00001.jpg: cannot be decoded"]),
    "truncated PNG": (lambda d: cut(listed(d, "val")[4][1]), ["00001.png: cannot be decoded"]),
    "frame without its mask": (lambda d: listed(d, "val")[4][1].unlink(), ["00001.png: no such file; it is the annotation of"]),
}


@pytest.mark.parametrize("case", BAD_CLIPS)
def test_bad_clips_are_refused(real, tmp_path, case):
    harm, names = BAD_CLIPS[case]
    harm(real / "davis")
    refuses("evaluate", "--model", real / "run", "--data", real / "davis", "--split", "val", "--weights", "random",
            "--out", tmp_path / "results", *PLAIN, names=names, untouched=tmp_path)


def test_other_weights_on_the_fly_are_refused(real, tmp_path):
    refuses("evaluate", "--model", real / "run", "--data", real / "davis", "--split", "val", "--weights", "random", "--seed", 1,
            "--out", tmp_path / "results", *PLAIN, untouched=tmp_path,
            names=["run: was trained on features of other efficientnet_lite0 weights"])


def test_what_is_there_stays_without_overwrite(made, tmp_path):
    flags = ("--model", made / "run", "--features", made / "val", "--out", tmp_path / "results", *PLAIN)
    ok(call("evaluate", *flags))
    before = tree(tmp_path / "results")
    refuses("evaluate", *flags, names=[f"{tmp_path / 'results'}: is there already; pass --overwrite"], untouched=tmp_path)
    (tmp_path / "results/old.txt").write_text("old")
    ok(call("evaluate", *flags, "--overwrite"))
    assert tree(tmp_path / "results") == before


def test_as_a_process_bad_input_is_one_line_and_debug_shows_where(made, tmp_path):
    cut(made / "run/model.pt")
    flags = ("--model", made / "run", "--features", made / "val", "--out", tmp_path / "results", *PLAIN)
    refuses("evaluate", *flags, names=["model.pt: cannot be read"], untouched=tmp_path, run=script)
    debug = script("evaluate", *flags, "--debug")
    assert debug.status != 0 and "Traceback" in debug.err and "model.pt: cannot be read" in debug.err
    assert not (tmp_path / "results").exists()
