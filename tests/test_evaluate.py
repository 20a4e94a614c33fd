"""evaluate.py: what it writes and scores, at each frame's own size, and what it refuses."""
import csv
import json
import math
import os
import shutil

import helpers
import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import call, change_json, flip, listed, mean_iou, ok, refuses, sign, tree

TRAIN = ("--threads", 1, "--no-pictures", "--steps", 30, "--lr", 0.05)
PLAIN = ("--threads", 1, "--no-pictures")
LITE = ("--weights", "random", "--threads", 1)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    helpers.write_features(root / "train", {"ant": 8, "bee": 8})
    helpers.write_features(root / "val", {"cat": 5, "dog": 3})
    ok(call("train", "--features", root / "train", "--out", root / "run", *TRAIN))
    return root


@pytest.fixture
def made(made_once, tmp_path):
    """Feature folders train and val, and a run of the simple decoder, for one test to break."""
    return shutil.copytree(made_once, tmp_path / "made")


@pytest.fixture(scope="module")
def real_once(tmp_path_factory):
    """A DAVIS root whose second val clip is of another size, its features, a decoder of them."""
    root = tmp_path_factory.mktemp("real")
    davis = helpers.write_davis(root / "davis", clips=2, val_clips=2, frames=3)
    for frame, mask in listed(davis, "val")[3:]:
        iio.imwrite(frame, iio.imread(frame)[:70, :110])
        iio.imwrite(mask, iio.imread(mask)[:70, :110])
    for split in ("train", "val"):
        ok(call("featurize", "--data", davis, "--split", split, *LITE, "--out", root / split))
    given = ("--features", root / "train", "--decoder", "linear", "--out", root / "run")
    ok(call("train", *given, *TRAIN))
    return root


@pytest.fixture
def real(real_once, tmp_path):
    shutil.copytree(real_once, tmp_path / "real")
    for split in ("train", "val"):
        change_json(tmp_path / "real" / split / "meta.json", data=str(tmp_path / "real/davis"))
    return tmp_path / "real"


def evaluate(*flags):
    return ok(call("evaluate", *flags))


def outputs_of(results) -> list[np.ndarray]:
    return [iio.imread(file).astype(int) for file in sorted((results / "outputs").iterdir())]


def read(results, name: str):
    return json.loads((results / name).read_text())


def test_outputs_are_the_models_and_scores_the_contests(made, tmp_path):
    out = tmp_path / "results"
    masks = np.unpackbits(np.load(made / "val/masks.npy"), axis=2, count=60).astype(bool)
    masks[4] = False  # an empty mask
    np.save(made / "val/masks.npy", np.packbits(masks, axis=2))
    sign(made / "val")
    said = evaluate("--model", made / "run", "--features", made / "val", "--out", out, *PLAIN).out

    features = torch.from_numpy(np.load(made / "val/features.npy"))
    state = torch.load(made / "run/model.pt", weights_only=True)["state"]
    exact = torch.sigmoid(F.conv2d(features, state["conv.weight"], state["conv.bias"]))
    exact = 255 * F.adaptive_avg_pool2d(exact, (40, 60))[:, 0].double().numpy()
    pixels = outputs_of(out)
    for image, wanted in zip(pixels, exact):
        assert image.shape == (40, 60)
        assert ((image <= wanted + 1e-3) & (image > wanted - 1 - 1e-3)).all()

    expected, ious = mean_iou(pixels, masks)
    assert len(pixels) == 8 and 0.1 < expected < 0.9
    scores = read(out, "scores.json")
    rows = list(csv.DictReader((out / "frames.csv").read_text().splitlines()))
    assert scores["mean_iou"] == pytest.approx(expected, abs=1e-12)
    assert [float(row["iou"] or "nan") for row in rows] == pytest.approx(
        [math.nan if iou is None else iou for iou in ious], abs=1e-12, nan_ok=True)
    assert [row["clip"] for row in rows] == ["cat"] * 5 + ["dog"] * 3
    assert read(out, "metadata.json")["nparams"] == 1000 + 6 * 9 + 1
    assert f"next: python package.py --results {out}" in said and f"{expected:.4f}" in said


def test_without_annotations_frames_csv_still_names_every_output(made, tmp_path):
    helpers.write_features(made / "test", {"fox": 1, "=fox()": 1}, annotated=False)
    out = tmp_path / "r"
    evaluate("--model", made / "run", "--features", made / "test", "--out", out, *PLAIN)
    assert set(os.listdir(out)) == {"outputs", "paths.json", "metadata.json", "frames.csv"}
    rows = (out / "frames.csv").read_text().splitlines()[1:]
    assert rows == ["0,fox,00000,,,", "1,'=fox(),00000,,,"]


def test_frames_of_other_sizes_are_written_scored_and_shown_at_their_own(real, tmp_path):
    out = tmp_path / "results"
    flags = ("--model", real / "run", "--features", real / "val", "--threads", 1)
    said = evaluate(*flags, "--out", out).out
    pixels = outputs_of(out)
    masks = [iio.imread(mask) > 127 for _, mask in listed(real / "davis", "val")]
    assert [image.shape for image in pixels] == [mask.shape for mask in masks]
    expected = mean_iou(pixels, masks)[0]
    assert read(out, "scores.json")["mean_iou"] == pytest.approx(expected, abs=1e-12)
    ok(call("package", "--results", out))
    assert f"open {out / 'report.html'}" in said and (out / "report.html").stat().st_size > 1000
    overlays = sorted((out / "overlays").iterdir())
    assert [len(iio.imread(file, index=...)) for file in overlays] == [3, 3]

    frame = listed(real / "davis", "val")[4][0]
    iio.imwrite(frame, np.zeros((71, 110, 3), np.uint8))
    refuses("evaluate", *flags, "--out", tmp_path / "r", names=[frame], untouched=tmp_path)


def test_on_the_fly_gives_what_features_give_for_frames_and_videos(real, tmp_path):
    iio.imwrite(tmp_path / "walk.gif", [iio.imread(f) for f, _ in listed(real / "davis")[:3]])
    ok(call("featurize", "--data", tmp_path / "walk.gif", *LITE, "--out", tmp_path / "f"))
    sources = {"a": ("--features", real / "train"),
               "b": ("--data", real / "davis", "--split", "train", *LITE),
               "c": ("--features", tmp_path / "f"), "d": ("--data", tmp_path / "walk.gif", *LITE)}
    for out, flags in sources.items():
        evaluate("--model", real / "run", *flags, "--out", tmp_path / out, "--threads", 1)
    a, b, c, d = (np.stack(outputs_of(tmp_path / out)) for out in sources)
    assert np.abs(a - b).max() <= 2 and np.abs(c - d).max() <= 2
    assert (tmp_path / "d/overlays/walk.webp").is_file()
    assert not (tmp_path / "d/scores.json").exists()


def test_frames_that_moved_are_found_with_data(real, tmp_path):
    (real / "davis").rename(tmp_path / "moved")
    flags = ("--model", real / "run", "--features", real / "train", "--out", tmp_path / "r",
             "--threads", 1)
    refuses("evaluate", *flags, names=["00000.jpg: no such", "--data"], untouched=tmp_path)
    evaluate(*flags, "--data", tmp_path / "moved")
    evaluate(*flags, "--no-pictures", "--overwrite")  # the features and masks are enough


SHAPES = {"16x9": (144, 256), "4x3": (144, 192), "cinema": (136, 320), "square": (160, 160),
          "portrait": (256, 144), "qcif": (144, 176)}


def test_own_clips_of_any_shape_with_a_decoder_of_another(tmp_path):
    """`temporal`, whose nine levels' grids round differently at every shape."""
    davis = helpers.write_davis(tmp_path / "davis", clips=2, val_clips=1, frames=2, size=(240, 427))
    scales = ("", "@0.5", "@0.25")
    levels = ",".join(f"s{stride}{scale}" for stride in (8, 16, 32) for scale in scales)
    ok(call("featurize", "--data", davis, "--split", "train", "--levels", levels, *LITE,
            "--out", tmp_path / "f"))
    ok(call("train", "--features", tmp_path / "f", "--decoder", "temporal", "--steps", 2,
            "--batch-size", 2, "--out", tmp_path / "run", *PLAIN))
    rng = np.random.default_rng(0)
    for name, size in SHAPES.items():
        folder = tmp_path / name
        folder.mkdir()
        for number in range(1 if name == "square" else 2):  # of one frame alone too
            iio.imwrite(folder / f"{number}.png", rng.integers(0, 256, (*size, 3), np.uint8))
        evaluate("--model", tmp_path / "run", "--data", folder, *LITE, "--adapt", 1,
                 "--out", tmp_path / "r" / name, "--no-pictures")
        pixels = outputs_of(tmp_path / "r" / name)
        assert [image.shape for image in pixels] == [size] * len(os.listdir(folder))


@pytest.mark.parametrize("layout", ["{clip}/{name}.png", "{index}.png", "outputs/{index:05d}.png"])
def test_predictions_are_scored_wherever_they_come_from(real, tmp_path, layout):
    masks, pixels = [], []
    for index, (_, mask) in enumerate(listed(real / "davis", "val")):
        masks.append(iio.imread(mask) > 127)
        # a results folder holds probabilities, of which none may reach 1
        bright = 254 if "outputs" in layout else 255
        pixels.append(np.where(np.roll(masks[-1], 5, axis=1), bright, 100).astype(np.uint8))
        name = layout.format(clip=mask.parent.name, name=mask.stem, index=index)
        file = tmp_path / "theirs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(file, pixels[-1])
    if "outputs" in layout:
        names = {str(index): f"outputs/{index:05d}.png" for index in range(6)}
        helpers.write_json(tmp_path / "theirs/paths.json", {"output": names})
    before = tree(tmp_path / "theirs")
    flags = ("--data", real / "davis", "--split", "val", "--out", tmp_path / "r", *PLAIN)
    evaluate("--predictions", tmp_path / "theirs", *flags)
    scores = read(tmp_path / "r", "scores.json")
    assert scores["mean_iou"] == pytest.approx(mean_iou(pixels, masks)[0], abs=1e-12)
    assert tree(tmp_path / "theirs") == before
    flags = ("--predictions", tmp_path / "theirs", *flags)
    iio.imwrite(file, np.zeros((70, 109), np.uint8))
    refuses("evaluate", *flags, "--overwrite", names=[file, "109 x 70"], untouched=tmp_path)
    file.unlink()
    refuses("evaluate", *flags, "--overwrite", names=["theirs"], untouched=tmp_path)
    refuses("evaluate", *flags, "--out", tmp_path / "theirs", "--overwrite", untouched=tmp_path,
            names=["what this command reads"])


def rewrite(made, **changes) -> None:
    path = made / "run/model.pt"
    torch.save({**torch.load(path), **changes}, path)


def remake(made, **options) -> None:
    shutil.rmtree(made / "val")
    helpers.write_features(made / "val", {"cat": 5}, **options)


BAD = {  # what is done to the folder, and words of the refusal
    "a flipped bit": (lambda m: flip(m / "val/features.npy"), ["features.npy", "SHA-256"]),
    "no model": (lambda m: shutil.rmtree(m / "run"), ["run", "no such file"]),
    "another decoder": (lambda m: rewrite(m, decoder="linear"), ["run/model.pt: does not fit"]),
    "featurizer": (lambda m: remake(m, featurizer="alexnet"), ["alexnet", "made-up"]),
    "weights": (lambda m: remake(m, weights="ffff"), ["ffff", "0123456789abcdef"]),
    "level": (lambda m: remake(m, levels={"s16": (6, 7, 9)}), ["s32"]),
    "size": (lambda m: remake(m, size=(40, 61)), ["[40, 61]"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_what_is_there_stays(made, tmp_path, case):
    harm, names = BAD[case]
    flags = ("--model", made / "run", "--features", made / "val", "--out", tmp_path / "r", *PLAIN)
    shutil.copytree(made / "run", tmp_path / "r/outputs")  # results of an earlier evaluation
    (tmp_path / "r/metadata.json").write_text("{}")
    harm(made)
    refuses("evaluate", *flags, "--overwrite", names=names, untouched=tmp_path)


@pytest.mark.parametrize("flags, words", [
    ("--adapt 3", "--adapt"), ("--refine guided", "--refine"),
    ("--split val", "--split"), ("--masks x", "--masks"), ("--predictions x", "--predictions"),
    ("--out {}/val", "what this command reads"), ("--out {}/run/x", "lies in it"),
    ("--device toaster", "--device toaster"), ("--protocol davis2017", "--protocol"),
    ("--threads 0", "--threads"),
])
def test_flags_that_are_wrong_or_do_not_combine_are_refused(made, tmp_path, flags, words):
    given = ("--model", made / "run", "--features", made / "val", "--out", tmp_path / "r", *PLAIN)
    refuses("evaluate", *given, *flags.format(made).split(), names=[words], untouched=tmp_path)


def test_the_pretrained_decoder_by_name_is_a_model_like_others(made, tmp_path):
    model = helpers.ROOT / "pretrained/temporal.pt"
    refuses("evaluate", "--model", model, "--features", made / "val", "--out", tmp_path / "r",
            names=["val: has no level 's32@0.25'"], untouched=tmp_path)


def test_other_weights_on_the_fly_are_refused(real, tmp_path):
    rewrite(real, weights="ffff")
    refuses("evaluate", "--model", real / "run", "--data", real / "davis", "--split", "val", *LITE,
            "--out", tmp_path / "r", untouched=tmp_path, names=["other efficientnet_lite0 weights"])
