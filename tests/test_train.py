"""train.py: the notebook's losses, fit() as the command, clips held out, what it refuses."""
import io
import json
import math
import shlex
import statistics
import sys

import numpy as np
import pytest
import torch
from helpers import call, log_of, mean_iou, ok, refuses, tree, write_features
from tqdm import tqdm

import data
import models
import train
from benchmarks import notebook
from models import Recipe
from vos import cli, runs
from vos.inputs import BadInput

CLIPS = {"ant": 5, "bee": 7, "cat": 4, "dog": 9, "elk": 6}
FLAGS = ("--threads", 1, "--no-pictures")
LINEAR = (*FLAGS, "--decoder", "linear", "--steps", 40, "--batch-size", 4)  # shuffles


@pytest.fixture
def features(tmp_path):
    write_features(tmp_path / "features", CLIPS)
    return tmp_path / "features"


def assert_same(run, other) -> None:
    """Assert that two run folders hold the same training, to the byte."""
    assert (run / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
    assert tree(run / "checkpoints") == tree(other / "checkpoints") != {}


def losses_of(run) -> list[float]:
    return [row["loss"] for row in log_of(run)]


def load(folder) -> data.Features:
    return data.load_features(data.open_features(folder))


@pytest.mark.parametrize("size, dtype", [((40, 60), "float32"), ((57, 93), "float16")])
def test_the_losses_are_the_notebooks(tmp_path, size, dtype):
    """31 frames in batches of 4, so that the last of each epoch is short."""
    features, masks = write_features(tmp_path / "features", CLIPS, size=size, dtype=dtype)
    torch.manual_seed(5)
    decoder = notebook.make_decoder(6, size)
    losses = notebook.train(decoder, torch.from_numpy(features["s32"]).float(),
                        torch.from_numpy(masks)[:, None].float(), steps=20, batch=4)
    ok(call("train", "--features", tmp_path / "features", "--out", tmp_path / "run", "--steps", 20,
            "--batch-size", 4, "--seed", 5, "--log-every", 1, *FLAGS))
    assert [row["step"] for row in log_of(tmp_path / "run")] == list(range(20))
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses, rtol=1e-5)
    assert max(losses) - min(losses) > 0.01  # or the line above would say little
    weight = models.load_model(tmp_path / "run")[0].conv.weight
    torch.testing.assert_close(weight, decoder[0].weight, rtol=1e-4, atol=1e-6)


def test_the_run_folder_and_its_log(features, tmp_path):
    flags = ("--features", features, "--batch-size", 4, "--steps", 5, "--threads", 1)
    run = tmp_path / "run"
    result = ok(call("train", *flags, "--out", run, "--log-every", 3))
    assert set(tree(run)) == {
        "args.json", "log.jsonl", "model.pt", "last.pt", "curves.svg", "checkpoints", "predictions",
        *(f"checkpoints/model-{step:08d}.pt" for step in (0, 3, 4)),
        *(f"predictions/{step:08d}.png" for step in (0, 3, 4))}
    model = models.load_model(run)[1]
    assert (model["decoder"], model["featurizer"], model["step"]) == ("simple", "made-up", 4)
    assert model["recipe"]["steps"] == 5 and model["clips"] == sorted(CLIPS)
    assert "1,055 parameters" in result.out
    for row in log_of(run):
        said = f"run, step {row['step']}: loss {row['loss']:.4f}, lr 0.0005, "
        assert said in result.out
    assert f"wrote {run}: model.pt, loss {losses_of(run)[-1]:.4f} at the last step" in result.out

    ok(call("train", *flags, "--out", tmp_path / "each", "--log-every", 1, "--no-pictures"))
    each = losses_of(tmp_path / "each")  # a row is the mean since the last
    assert losses_of(run) == pytest.approx([each[0], np.mean(each[1:4]), each[4]], rel=1e-5)


def test_the_best_by_validation_is_kept(features, tmp_path):
    valued, masks = write_features(tmp_path / "val", {"fox": 8})
    result = ok(call("train", "--features", features, "--val-features", tmp_path / "val", *FLAGS,
                     "--out", tmp_path / "run", "--steps", 12, "--log-every", 1, "--batch-size", 4,
                     "--lr", 0.4))  # so high that the last is not the best
    ious = [row["val_iou"] for row in log_of(tmp_path / "run")]
    best = int(np.argmax(ious))
    said = f"val IoU {ious[best]:.4f} at step {best}, its best; {ious[-1]:.4f} at the last step"
    assert best < 11 and ious[best] > ious[-1] and said in result.out
    kept = tmp_path / f"run/checkpoints/model-{best:08d}.pt"
    assert (tmp_path / "run/model.pt").read_bytes() == kept.read_bytes()

    decoder = notebook.make_decoder(6, masks.shape[1:])
    decoder[0].load_state_dict(models.load_model(kept)[0].conv.state_dict())
    with torch.no_grad():
        pixels = (decoder(torch.from_numpy(valued["s32"]))[:, 0] * 255).to(torch.uint8).numpy()
    assert mean_iou(list(pixels), list(masks))[0] == pytest.approx(ious[best], abs=1e-3)


def test_temporal_learns(tmp_path):
    levels = {"s32": (6, 5, 7), "s16": (8, 10, 15)}
    write_features(tmp_path / "train", CLIPS, levels=levels, cued=True)
    write_features(tmp_path / "val", {"fox": 8, "gnu": 6}, levels=levels, cued=True)
    ok(call("train", "--features", tmp_path / "train", "--val-features", tmp_path / "val", *FLAGS,
            "--steps", 120, "--out", tmp_path / "run", "--decoder", "temporal"))
    log = log_of(tmp_path / "run")
    assert log[-1]["loss"] < 0.6 * log[0]["loss"] and log[-1]["val_iou"] > 0.5


def test_the_seed_decides_and_not_where_features_are_kept(features, tmp_path):
    flags = ("--features", features, *LINEAR, "--out")
    for out, *own in (("a",), ("b", "--resident", "disk"), ("c", "--seed", 2)):
        ok(call("train", *flags, tmp_path / out, *own))
    assert_same(tmp_path / "a", tmp_path / "b")
    assert losses_of(tmp_path / "a") != losses_of(tmp_path / "c")


def test_fit_is_the_command(features, tmp_path):
    """Nothing written, and the validation and weights of the command."""
    write_features(tmp_path / "val", {"fox": 8})
    ok(call("train", "--features", features, "--val-features", tmp_path / "val", "--seed", 3,
            "--out", tmp_path / "run", *LINEAR))
    before = tree(tmp_path)
    training, validation = load(features), load(tmp_path / "val")
    decoder = models.make_decoder("linear", training.folder.shapes, training.folder.size, 3)
    recipe = Recipe(lr=2e-3, steps=40, batch_size=4, order="shuffled")
    best = train.fit(decoder, training, validation, recipe, seed=3)
    assert best == max(row["val_iou"] for row in log_of(tmp_path / "run"))
    saved, _ = models.load_model(tmp_path / "run/checkpoints/model-00000039.pt")
    torch.testing.assert_close(decoder.state_dict(), saved.state_dict(), rtol=0, atol=0)
    assert not decoder.training and tree(tmp_path) == before


def main(*flags) -> int:
    """Run train.py's main in the module that tests patch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        return cli.run(train.main)


def test_another_optimizer_is_one_line_and_a_stop_changes_nothing(features, tmp_path, monkeypatch):
    def with_momentum(decoder, recipe):
        return torch.optim.SGD(decoder.parameters(), recipe.lr, momentum=0.9)
    monkeypatch.setattr(train, "make_optimizer", with_momentum)
    flags = ("--features", features, *LINEAR, "--schedule", "onecycle", "--log-every", 3)
    assert main(*flags, "--out", tmp_path / "whole") == 0

    save, seen = runs.save_state, []

    def stop(out, parts, state):
        save(out, parts, state)
        seen.append(state)
        if len(seen) == 5:
            raise KeyboardInterrupt
    monkeypatch.setattr(runs, "save_state", stop)
    assert main(*flags, "--out", tmp_path / "run") == 130
    assert len(log_of(tmp_path / "run")) < len(log_of(tmp_path / "whole"))
    assert main("--resume", tmp_path / "run") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)["optimizer"]
    assert state["state"][0].keys() == {"momentum_buffer"}


class Bare:
    """An optimizer with param_groups, zero_grad and step, and nothing else: plain descent."""

    def __init__(self, decoder, recipe):
        self.param_groups = [{"params": list(decoder.parameters()), "lr": recipe.lr}]
        self.zero_grad = decoder.zero_grad

    @torch.no_grad()
    def step(self):
        for weight in self.param_groups[0]["params"]:
            weight -= self.param_groups[0]["lr"] * weight.grad


def test_an_optimizer_needs_three_things_only(features, tmp_path, monkeypatch):
    training, recipe, found = load(features), Recipe(lr=0.1, steps=9, batch_size=4), []
    for make in (Bare, lambda decoder, recipe: torch.optim.SGD(decoder.parameters(), recipe.lr)):
        monkeypatch.setattr(train, "make_optimizer", make)
        torch.manual_seed(0)
        found.append(models.Linear(training.folder.shapes, training.folder.size))
        out = tmp_path / str(len(found))
        train.fit(found[-1], training, recipe=recipe, out=out, draw=False)
        assert len(log_of(out)) == 9
    torch.testing.assert_close(*map(list, (decoder.parameters() for decoder in found)))


def test_a_decoder_of_another_shape_is_told_so_before_the_first_step(features, monkeypatch):
    class Transposed(models.Linear):
        def forward(self, levels):
            return super().forward(levels).mT
    monkeypatch.setattr(train, "make_optimizer", lambda *_: pytest.fail("too late"))
    training = load(features)
    decoder = Transposed(training.folder.shapes, training.folder.size)
    with pytest.raises(BadInput) as caught:
        train.fit(decoder, training)
    for words in ("Transposed", "[9, 7]", "[7, 9]"):
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
        features, tmp_path, monkeypatch, capfd):
    whole, calls = models.Linear.loss, []

    def loss(self, output, target):
        calls.append(1)
        return whole(self, output, target) * (math.nan if len(calls) == 8 else 1)
    monkeypatch.setattr(models.Linear, "loss", loss)
    flags = ("--features", features, "--out", tmp_path / "run", *LINEAR, "--log-every", 3)
    assert main(*flags) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "at step 7" in said, said
    assert [row["step"] for row in log_of(tmp_path / "run")] == [0, 3, 6]
    kept = models.load_model(tmp_path / "run")[1]
    assert kept["step"] == 6 and (tmp_path / "run/last.pt").exists()


def test_on_a_terminal_the_bar_tells_it(features, monkeypatch, capsys):
    training, screen = load(features), io.StringIO()
    monkeypatch.setattr(cli, "progress", lambda items, what: tqdm(items, what, file=screen))
    decoder = models.make_decoder("linear", training.folder.shapes, training.folder.size)
    best = train.fit(decoder, training, training, Recipe(steps=3, batch_size=4), log_every=2)
    assert "train: " in screen.getvalue() and f", val IoU {best:.4f}]" in screen.getvalue()
    assert capsys.readouterr().out == ""


def facts_of(run) -> tuple[list, list, int]:
    """Return the clips that a model was trained on and validated on, and its seed."""
    model = models.load_model(run)[1]
    return model["clips"], model["held_out"], model["seed"]


def test_every_fold_is_trained_with_every_seed(features, tmp_path):
    flags = ("--features", features, *LINEAR, "--folds", 2, "--seeds", 2, "--seed", 5)
    result = ok(call("train", *flags, "--out", tmp_path / "runs/many"))
    names = [f"fold-{fold}-seed-{seed}" for fold in (0, 1) for seed in (5, 6)]
    trained, held, seeds = zip(*(facts_of(tmp_path / "runs/many" / name) for name in names))
    assert held[0] == held[1] and held[2] == held[3] and seeds == (5, 6, 5, 6)
    assert sorted(held[0] + held[2]) == sorted(CLIPS)  # each clip is held out of one fold
    assert all(sorted(a + b) == sorted(CLIPS) for a, b in zip(trained, held))

    logs = [log_of(tmp_path / "runs/many" / name) for name in names]
    last = [log[-1]["val_iou"] for log in logs]
    best = [max(row["val_iou"] for row in log) for log in logs]
    assert len(set(last)) == 4
    told = [f"{np.mean(ious):.4f} +- {statistics.stdev(ious):.4f}" for ious in (best, last)]
    assert f"val IoU {told[0]} at each one's best step; {told[1]} at the last step" in result.out
    python, _, *words = shlex.split(result.out.splitlines()[-1].removeprefix("next: "))
    row = ok(call(words[0], *words[1:])).out.splitlines()[1]
    assert python == "python" and all(text in row for text in told)


def test_a_seed_among_several_is_that_seed_alone(features, tmp_path):
    flags = ("--features", features, *LINEAR)
    said = ok(call("train", *flags, "--seeds", 2, "--seed", 3, "--out", tmp_path / "seeds")).out
    ok(call("train", *flags, "--seed", 4, "--out", tmp_path / "alone"))
    assert_same(tmp_path / "seeds/seed-4", tmp_path / "alone")
    mean = np.mean([losses_of(tmp_path / f"seeds/seed-{seed}")[-1] for seed in (3, 4)])
    assert f"loss {mean:.4f} +- " in said  # nothing to validate on
    assert json.loads((tmp_path / "alone/args.json").read_text())["seconds"] > 0


def test_several_trainings_go_on_after_a_stop(features, tmp_path, monkeypatch, capfd):
    flags = ("--features", features, *LINEAR, "--folds", 2, "--log-every", 9)
    assert main(*flags, "--out", tmp_path / "whole") == 0
    save, run = runs.save_state, tmp_path / "my run"

    def stop(*state):
        save(*state)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_state", stop)
        assert main(*flags, "--out", run) == 130
    again = shlex.split(capfd.readouterr().err.partition("go on with: python train.py ")[2])
    assert again == ["--resume", str(run)] and not (run / "fold-1").exists()
    assert main(*again) == 0
    for name in ("fold-0", "fold-1"):
        assert_same(run / name, tmp_path / "whole" / name)


def test_a_model_knows_its_clips_and_the_next_command_runs(features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_features(tmp_path / "to validate", {"fox": 8})
    ok(call("train", "--features", features, "--holdout", 0.4, *LINEAR, "--out", "part"))
    trained, held, _ = facts_of(tmp_path / "part")
    assert len(held) == 2 and sorted(trained + held) == sorted(CLIPS)

    flags = ("--features", features, "--val-features", "to validate", *LINEAR, "--out", "my run")
    for more in ([], ["--overwrite"]):  # the second has results to replace
        said = ok(call("train", *flags, *more)).out
        assert facts_of(tmp_path / "my run")[:2] == (sorted(CLIPS), [])
        python, file, *words = shlex.split(said.splitlines()[-1].removeprefix("next: "))
        assert (python, file) == ("python", "evaluate.py") and "to validate" in words
        ok(call("evaluate", *words))  # the clips' frames are gone: without pictures
    assert json.loads((tmp_path / "results/my run/scores.json").read_text())["frames"] == 8


@pytest.mark.parametrize("flags, words", [
    (("--levels", "s8"), "has no level 's8', only s32"),
    (("--holdout", 0.5, "--val-features", "nowhere"), "--holdout"),
    (("--folds", 6), "5 labelled clips"), (("--seeds", 1), "--seeds"), (("--lr", "nan"), "--lr"),
    (("--device", "cuda:77"), "--device cuda:77"), (("--decoder", "temporal"), "--cues"),
    (("--ema", 0.9), "--ema"), (("--out", "."), "current folder")])
def test_bad_flags_are_refused_and_the_old_run_stays(features, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    ok(call("train", "--features", features, "--out", tmp_path / "run", *FLAGS, "--steps", 2))
    again = ("--features", features, "--out", tmp_path / "run", "--overwrite", *LINEAR)
    refuses("train", *again, *flags, names=[words], untouched=tmp_path)


@pytest.mark.parametrize("changes, words", [
    ({"featurizer": "alexnet"}, "val: featurizer is alexnet"), ({"weights": "ffff"}, "ffff"),
    ({"levels": {"s32": (6, 8, 9)}}, "[6, 8, 9]"), ({"levels": {"s16": (6, 7, 9)}}, "'s32'"),
    ({"size": (41, 60)}, "[41, 60]")])
def test_folders_that_do_not_belong_together_are_refused(features, tmp_path, changes, words):
    write_features(tmp_path / "val", {"fox": 3}, **changes)
    refuses("train", "--features", features, "--val-features", tmp_path / "val", *LINEAR,
            "--out", tmp_path / "run", names=[words], untouched=tmp_path)


def test_pictures_and_validation_do_not_change_the_training(features, tmp_path):
    """Both run the decoder as it predicts; a step after them drops and mirrors as before."""
    flags = ("--features", features, "--levels", "s32", "--decoder", "fpn", "--steps", 6,
             "--log-every", 2, "--threads", 1)
    for name, more in {"plain": ["--no-pictures"], "drawn": []}.items():
        ok(call("train", *flags, *more, "--out", tmp_path / name))
    losses = [[row["loss"] for row in log_of(tmp_path / name)] for name in ("plain", "drawn")]
    assert losses[0] == losses[1]
    decoder = models.make_decoder("fpn", data.open_features(features).shapes, (40, 60))
    training = data.load_features(data.open_features(features))
    steps = []
    decoder.register_forward_hook(lambda module, *_: steps.append(module.training))
    train.fit(decoder, training, training, models.Recipe(steps=5, batch_size=4), log_every=1)
    assert sum(steps) == 5  # every step trained, whatever was done between them
