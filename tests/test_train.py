"""train.py through its command line: the notebook's losses, the same run twice, after a stop, and with clips held out."""
import json
import math
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from forking import end, start
from helpers import (
    call,
    change_json,
    cut,
    log_of,
    mean_iou,
    ok,
    refuses,
    script,
    sign,
    train_notebook,
    tree,
    write_features,
    write_json,
)
from test_featurizers import Harmful

import resident

CLIPS = {"ant": 5, "bee": 7, "cat": 4, "dog": 9, "elk": 6}
FLAGS = ("--threads", 1, "--no-pictures")
LINEAR = (*FLAGS, "--decoder", "linear", "--steps", 40, "--batch-size", 4)  # shuffles


@pytest.fixture
def features(tmp_path):
    """A feature folder of five clips."""
    write_features(tmp_path / "features", CLIPS)
    return tmp_path / "features"


def state_of(path) -> dict:
    return torch.load(path, weights_only=True)["state"]


def assert_same(run, other) -> None:
    """Assert that two run folders hold the same training, to the byte."""
    for name in ("model.pt", "log.jsonl"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    assert tree(run / "checkpoints") == tree(other / "checkpoints") != {}


# --- what it trains ----------------------------------------------------------------------------


@pytest.mark.parametrize("size, dtype", [((40, 60), "float32"), ((57, 93), "float16")])
def test_the_losses_are_the_notebooks(tmp_path, size, dtype):
    """A golden test that needs no data: 31 frames in batches of 4, so that the last of each epoch is short."""
    levels = {"s32": (6, 7, 9)}
    features, masks = write_features(tmp_path / "features", CLIPS, size=size, levels=levels, dtype=dtype)
    decoder, losses = train_notebook(features["s32"], masks, steps=20, batch=4, seed=5)
    ok(call("train", "--features", tmp_path / "features", "--out", tmp_path / "run", "--steps", 20, "--batch-size", 4, "--seed", 5,
            "--log-every", 1, *FLAGS))
    log = log_of(tmp_path / "run")
    assert [row["step"] for row in log] == list(range(20))
    np.testing.assert_allclose([row["loss"] for row in log], losses, rtol=1e-5)
    assert max(losses) - min(losses) > 0.01  # or the line above would say little
    state = state_of(tmp_path / "run/model.pt")
    torch.testing.assert_close(state["conv.weight"], decoder.conv.weight.detach(), rtol=1e-4, atol=1e-6)


def test_a_row_of_the_log_is_the_mean_since_the_last(features, tmp_path):
    for out, every in (("one", 1), ("three", 3)):
        ok(call("train", "--features", features, "--out", tmp_path / out, "--steps", 8, "--batch-size", 4, "--log-every", every, *FLAGS))
    losses = [row["loss"] for row in log_of(tmp_path / "one")]
    rows = [(row["step"], row["loss"]) for row in log_of(tmp_path / "three")]
    assert [step for step, _ in rows] == [0, 3, 6, 7]
    expected = [losses[0], np.mean(losses[1:4]), np.mean(losses[4:7]), losses[7]]
    np.testing.assert_allclose([loss for _, loss in rows], expected, rtol=1e-5)


def test_the_run_folder(features, tmp_path):
    result = ok(call("train", "--features", features, "--out", tmp_path / "run", "--steps", 7, "--log-every", 3, "--threads", 1))
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"model-{step:08d}.pt" for step in (0, 3, 6)]
    assert sorted(path.name for path in (run / "predictions").iterdir()) == [f"{step:08d}.png" for step in (0, 3, 6)]
    assert {path.name for path in run.iterdir()} == {"args.json", "log.jsonl", "times.jsonl", "model.pt", "last.pt", "checkpoints",
                                                     "predictions", "curves.svg"}
    args = json.loads((run / "args.json").read_text())
    assert args["args"]["steps"] == 7 and args["recipe"]["lr"] == 5e-4 and args["recipe"]["batch"] == 32
    assert (run / "model.pt").read_bytes() == (run / "checkpoints/model-00000006.pt").read_bytes()
    model = torch.load(run / "model.pt", weights_only=True)
    assert (model["decoder"], model["featurizer"], model["shapes"]) == ("simple", "made-up", {"s32": [6, 7, 9]})
    assert "1,055 parameters (55 in the decoder)" in result.out and f"next: python evaluate.py --model {run}" in result.out


def test_a_decoder_learns(features, tmp_path):
    write_features(tmp_path / "val", {"fox": 8, "gnu": 6})
    ok(call("train", "--features", features, "--val-features", tmp_path / "val", "--out", tmp_path / "run", *LINEAR, "--lr", 0.02,
            "--steps", 400))
    log = log_of(tmp_path / "run")
    assert log[-1]["loss"] < 0.5 * log[0]["loss"] and log[-1]["val_iou"] > 0.5 > log[0]["val_iou"]


def test_the_best_by_validation_is_kept(features, tmp_path):
    _, masks = write_features(tmp_path / "val", {"fox": 8})
    result = ok(call("train", "--features", features, "--val-features", tmp_path / "val", "--out", tmp_path / "run", "--steps", 12,
                     "--log-every", 1, "--lr", 0.4, "--batch-size", 4, *FLAGS))  # a rate so high that the last is not the best
    ious = [row["val_iou"] for row in log_of(tmp_path / "run")]
    best = int(np.argmax(ious))
    assert best < 11 and ious[best] > ious[-1]
    assert (tmp_path / "run/model.pt").read_bytes() == (tmp_path / f"run/checkpoints/model-{best:08d}.pt").read_bytes()
    assert f"val IoU {ious[best]:.4f}" in result.out

    state = state_of(tmp_path / "run/model.pt")
    decoder = train_notebook(np.zeros((1, 6, 7, 9)), masks[:1], steps=0, batch=1)[0]
    decoder.load_state_dict({key: state[key] for key in ("conv.weight", "conv.bias")})
    with torch.no_grad():
        pixels = (decoder(torch.from_numpy(np.load(tmp_path / "val/features.npy")))[:, 0] * 255).to(torch.uint8).numpy()
    assert mean_iou(list(pixels), list(masks))[0] == pytest.approx(ious[best], abs=1e-3)


def test_patience_stops_a_run_that_gets_no_better(features, tmp_path):
    write_features(tmp_path / "val", {"fox": 8})
    ok(call("train", "--features", features, "--val-features", tmp_path / "val", "--out", tmp_path / "run", "--steps", 500,
            "--log-every", 1, "--lr", 3, "--patience", 5, *FLAGS))
    ious = [row["val_iou"] for row in log_of(tmp_path / "run")]
    assert len(ious) < 500 and int(np.argmax(ious)) == len(ious) - 6


# --- the same run ------------------------------------------------------------------------------


def test_same_seed_same_bytes_other_seed_others(features, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        ok(call("train", "--features", features, "--out", tmp_path / out, *LINEAR, "--seed", seed, "--ema", 0.9))
    assert_same(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a/model.pt").read_bytes() != (tmp_path / "c/model.pt").read_bytes()


@pytest.mark.parametrize("place", ["host", "disk"])
def test_where_features_are_kept_changes_nothing(features, tmp_path, place):
    ok(call("train", "--features", features, "--out", tmp_path / "a", *LINEAR))
    ok(call("train", "--features", features, "--out", tmp_path / "b", *LINEAR, "--resident", place))
    assert [row["loss"] for row in log_of(tmp_path / "a")] == pytest.approx([row["loss"] for row in log_of(tmp_path / "b")], rel=1e-6)


def test_shuffle_draws_an_order_and_its_absence_does_not(features, tmp_path):
    flags = ("--features", features, *FLAGS, "--steps", 16, "--batch-size", 4, "--log-every", 1)  # two epochs
    for out, shuffle in (("order", "--no-shuffle"), ("default", None), ("shuffled", "--shuffle")):
        ok(call("train", *flags, "--out", tmp_path / out, *([shuffle] if shuffle else [])))
    losses = {out: [row["loss"] for row in log_of(tmp_path / out)] for out in ("order", "default", "shuffled")}
    assert losses["order"] == losses["default"] != losses["shuffled"]
    assert losses["order"][0] != losses["shuffled"][0]  # from the first batch on


def test_args_repeats_a_run_elsewhere(features, tmp_path):
    ok(call("train", "--features", features, "--out", tmp_path / "a", *LINEAR, "--seed", 3))
    ok(call("train", "--args", tmp_path / "a/args.json", "--out", tmp_path / "b"))
    assert_same(tmp_path / "a", tmp_path / "b")


# --- going on after a stop ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """The flags of a run of 24 rows of log, and the run."""
    root = tmp_path_factory.mktemp("whole")
    write_features(root / "features", CLIPS)
    flags = ("--features", root / "features", *FLAGS, "--decoder", "linear", "--steps", 600, "--batch-size", 4, "--log-every", 25,
             "--ema", 0.9, "--holdout", 0.4, "--schedule", "onecycle", "--lr", 0.01)
    ok(call("train", *flags, "--out", root / "run"))
    return flags, root / "run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(never_stopped, tmp_path, number):
    flags, whole = never_stopped
    run = tmp_path / "run"
    running = start("train", *flags, "--out", run)
    while not ((run / "last.pt").exists() and len(log_of(run)) >= 5):
        assert os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, end(running)
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGSTOP)
    for again in (("--resume", run), (*flags, "--out", run, "--overwrite")):  # a run folder is one job's
        refuses("train", *again, names=[run, "another process"], untouched=run)
    os.kill(running.pid, number)
    os.kill(running.pid, signal.SIGCONT)
    status, _, err = end(running)
    assert status == (128 + number if number == signal.SIGTERM else -number), err
    if number == signal.SIGTERM:
        assert "train.py: stopped" in err and f"python train.py --resume {run}" in err and err.count("\n") == 1
    assert len(log_of(run)) < 24
    ok(call("train", "--resume", run))
    assert_same(run, whole)


def test_resuming_a_finished_run_changes_nothing(features, tmp_path):
    ok(call("train", "--features", features, "--out", tmp_path / "run", *LINEAR))
    before = tree(tmp_path / "run")
    ok(call("train", "--resume", tmp_path / "run"))
    assert tree(tmp_path / "run") == before


# --- clips held out ----------------------------------------------------------------------------


def clips_of(indices) -> dict[str, int]:
    names = [clip for clip, frames in CLIPS.items() for _ in range(frames)]
    return {clip: CLIPS[clip] for clip in CLIPS if clip in {names[i] for i in indices}}


def train_apart(tmp_path, kept, held) -> list[dict]:
    """Train on a folder of the kept clips alone, validating on one of the held-out clips alone; return the log."""
    out = tmp_path / "-".join(clips_of(held))
    write_features(out / "train", clips_of(kept))
    write_features(out / "val", clips_of(held))
    ok(call("train", "--features", out / "train", "--val-features", out / "val", "--out", out / "run", *LINEAR))
    return log_of(out / "run")


def test_holdout_is_as_if_those_clips_were_in_another_folder(features, tmp_path):
    ok(call("train", "--features", features, "--out", tmp_path / "run", *LINEAR, "--holdout", 0.4))
    names = [clip for clip, frames in CLIPS.items() for _ in range(frames)]
    kept, held = resident.split_clips(names, 0.4, seed=0)
    assert len(clips_of(held)) == 2
    for ours, apart in zip(log_of(tmp_path / "run"), train_apart(tmp_path, kept, held), strict=True):
        assert ours == pytest.approx(apart, rel=1e-5)


def test_folds_hold_out_every_clip_once(features, tmp_path):
    result = ok(call("train", "--features", features, "--out", tmp_path / "run", *LINEAR, "--folds", 2))
    names = [clip for clip, frames in CLIPS.items() for _ in range(frames)]
    groups = resident.fold_clips(names, 2, seed=0)
    folds = json.loads((tmp_path / "run/folds.json").read_text())
    for number, held in enumerate(groups):
        log = log_of(tmp_path / f"run/fold-{number}")
        apart = train_apart(tmp_path, np.setdiff1d(np.arange(len(names)), held), held)
        assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in apart], rel=1e-5)
        assert [row["val_iou"] for row in log] == pytest.approx([row["val_iou"] for row in apart], rel=1e-4)
        assert folds["val_iou"][number] == pytest.approx(log[-1]["val_iou"], rel=1e-6)
    assert folds["mean"] == pytest.approx(sum(folds["val_iou"]) / 2)
    assert f"mean IoU of 2 folds {folds['mean']:.4f}" in result.out


# --- what it refuses ---------------------------------------------------------------------------


def flip(file) -> None:
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def put(folder, value: float) -> None:
    array = np.load(folder / "features.npy")
    array[11, 2, 3, 4] = value
    np.save(folder / "features.npy", array)
    sign(folder)


BAD = {
    "missing folder": (lambda f: shutil.rmtree(f), ["features: no such feature folder"]),
    "no meta.json": (lambda f: (f / "meta.json").unlink(), ["meta.json: no such file"]),
    "array of another shape": (lambda f: np.save(f / "features.npy", np.zeros((31, 6, 9, 7), np.float32)),
                               ["features.npy: holds float32 [31, 6, 9, 7], but meta.json says", "[31, 6, 7, 9]"]),
    "array of another length": (lambda f: cut(f / "features.npy", 0.9), ["features.npy: is", "bytes, expected"]),
    "array of another dtype": (lambda f: np.save(f / "features.npy", np.zeros((31, 6, 7, 9))), ["features.npy: holds float64"]),
    "one flipped bit": (lambda f: flip(f / "features.npy"), ["features.npy: its SHA-256 differs from meta.json's"]),
    "one flipped bit of a mask": (lambda f: flip(f / "masks.npy"), ["masks.npy: its SHA-256 differs from meta.json's"]),
    "a NaN": (lambda f: put(f, math.nan), ["features.npy: NaN or infinity in the features of frame 11"]),
    "an infinity": (lambda f: put(f, -math.inf), ["features.npy: NaN or infinity in the features of frame 11"]),
    "no masks": (lambda f: (f / "masks.npy").unlink(), ["features: has no masks.npy, and this step needs annotations"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_features_are_refused(features, tmp_path, case):
    harm, names = BAD[case]
    harm(features)
    refuses("train", "--features", features, "--out", tmp_path / "run", *LINEAR, names=names, untouched=tmp_path)


@pytest.mark.parametrize("flags, names", [
    (("--levels", "s8"), ["features: has no level 's8', only s32"]),
    (("--holdout", 0.5, "--val-features", "nowhere"), ["nowhere: no such feature folder"]),
    (("--folds", 6), ["--folds 6: expected from 2 up to the number of clips, 5"]),
    (("--folds", 1), ["--folds 1: expected from 2"]),
    (("--device", "cuda:77"), ["--device cuda:77: not on this machine"]),
])
def test_bad_flags_are_refused(features, tmp_path, flags, names):
    refuses("train", "--features", features, "--out", tmp_path / "run", *LINEAR, *flags, names=names, untouched=tmp_path)


def test_holding_out_the_only_clip_is_refused(tmp_path):
    write_features(tmp_path / "features", {"cat": 6})
    refuses("train", "--features", tmp_path / "features", "--out", tmp_path / "run", *LINEAR, "--holdout", 0.2, names=["--holdout", "cat"],
            untouched=tmp_path)


def test_a_decoder_that_cannot_take_the_levels_is_refused(tmp_path):
    write_features(tmp_path / "features", {"cat": 6}, levels={"s32": (6, 3, 4), "s16": (4, 7, 9)})
    for flags in ((), ("--overwrite",)):
        refuses("train", "--features", tmp_path / "features", "--out", tmp_path / "run", "--decoder", "simple", *FLAGS, *flags,
                names=["--decoder simple: takes one level, found s32, s16; name one with --levels"], untouched=tmp_path)
    ok(call("train", "--features", tmp_path / "features", "--out", tmp_path / "run", "--levels", "s16", "--steps", 2, *FLAGS))
    refuses("train", "--features", tmp_path / "features", "--out", tmp_path / "run", "--decoder", "simple", *FLAGS, "--overwrite",
            names=["takes one level"], untouched=tmp_path)  # and what was there is there still


def test_features_too_small_for_the_decoder_are_refused(tmp_path):
    write_features(tmp_path / "features", {"cat": 6}, levels={"s32": (6, 2, 4)})
    refuses("train", "--features", tmp_path / "features", "--out", tmp_path / "run", *FLAGS, names=["--decoder simple", "2 x 4"],
            untouched=tmp_path)


@pytest.mark.parametrize("changes, names", [
    ({"featurizer": "alexnet"}, ["val: featurizer is alexnet", "made-up"]),
    ({"weights": "ffff"}, ["val: weights digest is ffff"]),
])
def test_folders_that_do_not_belong_together_are_refused(features, tmp_path, changes, names):
    write_features(tmp_path / "val", {"fox": 3}, **changes)
    refuses("train", "--features", features, "--val-features", tmp_path / "val", "--out", tmp_path / "run", *LINEAR, names=names,
            untouched=tmp_path)


def test_what_is_there_stays_without_overwrite(features, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("mine")
    flags = ("--features", features, "--out", tmp_path / "run", *LINEAR)
    refuses("train", *flags, names=[f"{tmp_path / 'run'}: is there already; pass --overwrite"], untouched=tmp_path)
    ok(call("train", *flags, "--overwrite"))
    assert not (tmp_path / "run/mine.txt").exists()


RESUMES = {
    "missing": (lambda run: shutil.rmtree(run), ["run/args.json: no such file"]),
    "damaged args": (lambda run: cut(run / "args.json"), ["run/args.json: expected a JSON file"]),
    "other args": (lambda run: write_json(run / "args.json", {"steps": 3}), ["run/args.json: expected the args.json that train.py writes"]),
    "unknown args": (lambda run: change_json(run / "args.json", args={"colour": 1}), ["run/args.json: unknown arguments colour"]),
    "damaged state": (lambda run: cut(run / "last.pt"), ["run/last.pt: cannot be read as a checkpoint"]),
    "state that would run code": (lambda run: torch.save({"decoder": Harmful(run / "harm")}, run / "last.pt"), ["run/last.pt: cannot"]),
    "state of another decoder": (lambda run: torch.save(
        {**torch.load(run / "last.pt", weights_only=True), "decoder": {"conv.weight": torch.zeros(1)}}, run / "last.pt"), ["run/last.pt"]),
}


@pytest.mark.parametrize("case", RESUMES)
def test_a_run_that_cannot_be_resumed_is_refused(features, tmp_path, case):
    ok(call("train", "--features", features, "--out", tmp_path / "run", *LINEAR))
    harm, names = RESUMES[case]
    harm(tmp_path / "run")
    refuses("train", "--resume", tmp_path / "run", names=names, untouched=tmp_path)


def test_as_a_process_bad_input_is_one_line_and_debug_shows_where(features, tmp_path):
    put(features, math.nan)
    flags = ("--features", features, "--out", tmp_path / "run", *LINEAR)
    refuses("train", *flags, names=["features.npy: NaN"], untouched=tmp_path, run=script)
    debug = script("train", *flags, "--debug")
    assert debug.status != 0 and "Traceback" in debug.err and "features.npy: NaN" in debug.err
    assert not (tmp_path / "run").exists()
