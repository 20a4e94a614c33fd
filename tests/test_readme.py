"""README.md's commands do what it says: those of the four steps run in order, word for word; the others are ones that can be run."""
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import imageio.v3 as iio
import pytest
import torch
import torchvision
from helpers import ROOT, call, ok, write_davis, write_features

import benchmark
import evaluate
import featurize
import models
import package
import runs
import sample
import train
from files import read_json

README = (ROOT / "README.md").read_text(encoding="utf-8")
PARSE = {"featurize.py": featurize.parse_args, "train.py": train.parse_args, "evaluate.py": evaluate.parse_args,
         "package.py": package.parse_args, "sample.py": sample.parse, "benchmark.py": benchmark.parse}
SAY = "".join(f'{name}() {{ printf "%s\\n" {name} "$@" ""; }}\n' for name in ("python", "wandb", "make"))  # what each was given


def blocks(language: str = "") -> list[str]:
    """The README's blocks of code in a language; those in none, fenced or indented, are for the shell."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    fenced = [code for name, code in fence.findall(README) if name == language]
    return fenced + ([] if language else re.findall(r"(?<=\n\n)(?: {4}.+\n)+", fence.sub("", README)))


def inline() -> list[str]:
    """The commands in the README's sentences, what is optional left out."""
    found = re.findall(r"`((?:python \w+\.py|make|wandb) [^`]+)`", README)
    return [re.sub(r" \[[^]]*\]", "", text.replace("\n", " ")) for text in found]


def commands(text: str) -> list[list[str]]:
    """The words of each command, taken apart by the shell: comments, variables and continued lines are its business."""
    done = subprocess.run(["bash", "-euc", SAY + text], capture_output=True, text=True)
    assert done.returncode == 0, (text, done.stderr)
    return [words.split("\n") for words in done.stdout.strip("\n").split("\n\n")]


def parse(script: str, flags: list[str]) -> None:
    """Take a command line apart as its script does. Fails where the script would end with its usage."""
    with mock.patch.object(sys, "argv", [script, *flags]), mock.patch.object(runs, "recall"):  # which reads the run's args.json
        try:
            PARSE[script]()
        except SystemExit as stop:
            assert stop.code in (0, None), (script, flags)


@pytest.fixture
def weights_at_hand(tmp_path, monkeypatch):
    """Made-up weights of AlexNet where torchvision keeps what it downloaded, so that it has nothing to download."""
    torch.manual_seed(0)
    name = torchvision.models.get_model_weights("alexnet").DEFAULT.url.rpartition("/")[2]
    with torch.device("meta"):  # for the shapes alone
        network = torchvision.models.alexnet().features
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    state = {key: torch.randn(value.shape) / 50 for key, value in network.state_dict().items()}
    torch.save(state, tmp_path / "torch/hub/checkpoints" / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def test_the_four_steps_run_in_order_and_write_where_the_readme_says(tmp_path, monkeypatch, weights_at_hand):
    """Small synthetic clips stand for DAVIS; the words after `python` are the README's own."""
    pytest.importorskip("imageio_ffmpeg", reason="needs ffmpeg to make a video: pip install imageio-ffmpeg")
    monkeypatch.chdir(tmp_path)
    write_davis(tmp_path / "DAVIS", clips=2, val_clips=1, frames=3, size=(128, 192))
    shutil.copytree("DAVIS/Annotations/480p", "MASKS")
    iio.imwrite("holiday.mp4", sample.make_clip(5, 3, 128, 192)[0], fps=10)

    steps = [words for block in blocks() for words in commands(block) if words[0] == "python" and "wandb" not in block]
    assert len(steps) >= 11 and {script for _, script, *_ in steps} == {"featurize.py", "train.py", "evaluate.py", "package.py"}
    for _, script, *flags in steps:
        ok(call(script.removesuffix(".py"), *flags))

    written = {path for path in re.findall(r"(?:features|runs|results)/[\w./-]*\w", "\n".join(blocks())) if "test" not in path}
    assert len(written) >= 8
    assert {path for path in written if not Path(path).exists() and not path.endswith("-result.zip")} == set()
    assert read_json(Path("results/MASKS/scores.json"))["mean_iou"] == 1  # the annotations themselves


def test_every_command_is_one_its_script_takes(tmp_path):
    """The ones on Weights & Biases and those in sentences too; NAME stands for any decoder."""
    found = [words for text in [*blocks(), *inline()] for words in commands(text.replace("NAME", "simple")) if words[0] == "python"]
    assert len(found) >= 25 and {script for _, script, *_ in found} == PARSE.keys() - {"sample.py"}
    with mock.patch.dict(models.DECODERS, tiny=models.DECODERS["simple"]):
        for _, script, *flags in found:
            parse(script, flags)
    with pytest.raises(AssertionError):
        parse("train.py", ["--features", "f", "--no-such-flag"])


def test_every_flag_is_one_of_some_script():
    scripts = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("*.py"))
    there = set(re.findall(r'"(--[a-z-]+)"', scripts))
    ours = "\n".join(line for line in README.splitlines() if "wandb agent" not in line and "torchrun" not in line)
    opposites = re.findall(r'"--([a-z-]+)",[^)]*BooleanOptionalAction', scripts)
    assert set(re.findall(r"(?<!-)--[a-z][a-z-]*\w", ours)) <= {*there, *(f"--no-{name}" for name in opposites), "--help"}


def test_every_file_is_there_and_has_a_line():
    lines = re.search(r"^\| file \| holds \|\n(.*?)\n\n", README, re.MULTILINE | re.DOTALL)[1]
    named = set(re.findall(r"`([\w.]+)`", "\n".join(line.split("|")[1] for line in lines.splitlines())))
    assert {file.name for file in ROOT.glob("*.py")} <= named
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_make_has_the_targets():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for file in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE))
        assert named and named <= targets, file


def test_wandb_takes_the_commands_of_its_own():
    cli = pytest.importorskip("wandb.cli.cli", reason="needs the wandb client: pip install wandb").cli
    found = [words[1:] for block in blocks() for words in commands(block) if words[0] == "wandb"]
    assert {name for name, *_ in found} == {"login", "sweep", "agent"}
    for name, *words in found:
        cli.commands[name].make_context(name, words)  # takes them apart, and runs nothing
    assert (ROOT / "sweep.yaml").is_file() and ["sweep", "--project", "davis", "sweep.yaml"] in found


def test_the_readmes_decoder_is_all_it_takes(tmp_path):
    """Its class, entered into DECODERS, is trained by its recipe, scored and packed."""
    code, = blocks("python")
    code, _, entry = code.partition("\n\nDECODERS")
    assert '"tiny": Tiny' in entry
    names = dict(vars(models))
    exec(code, names)
    for folder, clips in (("train", {"ant": 5, "bee": 6}), ("val", {"cat": 4})):
        write_features(tmp_path / folder, clips, levels={"s16": (6, 8, 12), "s32": (4, 4, 6)})
    with mock.patch.dict(models.DECODERS, tiny=names["Tiny"]):
        said = ok(call("train", "--features", tmp_path / "train", "--decoder", "tiny", "--val-features", tmp_path / "val",
                       "--out", tmp_path / "run", "--threads", 1)).out
        ok(call("evaluate", "--model", tmp_path / "run", "--features", tmp_path / "val", "--out", tmp_path / "results", "--no-pictures",
                "--threads", 1))
        ok(call("package", "--results", tmp_path / "results"))
    assert "300 steps of 16 from 11 frames: adam, lr 0.002" in said
    assert read_json(tmp_path / "results/scores.json")["mean_iou"] > 0.5 and (tmp_path / "results.zip").is_file()
