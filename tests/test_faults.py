"""Whole or not at all: disks that fill, kills at any write, and two runs of one name at once, for every script."""
import errno
import os
import resource
import shutil
import signal
import subprocess
import zipfile
from pathlib import Path
from unittest import mock

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from forking import at_write, end, forked, stopped_at
from helpers import call, ok, tree, write_davis

from files import cannot_write, read_json, write_json

ALEXNET = ("--featurizer", "alexnet", "--weights", "random", "--compute", "float32", "--threads", 1)
OUT = {"sample": "davis", "featurize": "features", "train": "run", "evaluate": "results", "package": "results.zip"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder in which every script has run once, and so what each should write."""
    root = tmp_path_factory.mktemp("whole")
    write_davis(root / "clips", clips=1, val_clips=1, frames=5, size=(64, 96))
    for name in OUT:
        ok(call(name, *flags_of(name, root, root)))
    return root


def flags_of(name: str, root: Path, out: Path) -> tuple:
    """Flags of a small run of each script that reads from `root` and writes to `out`."""
    return {
        "sample": ("--clips", 1, "--val-clips", 1, "--frames", 2, "--size", "48x64"),
        "featurize": ("--data", root / "clips", "--split", "train", "--batch-size", 2, *ALEXNET),
        "train": ("--features", root / "features", "--val-features", root / "features", "--decoder", "linear", "--optimizer", "adamw",
                  "--schedule", "onecycle", "--ema", 0.9, "--steps", 9, "--log-every", 3, "--batch-size", 3, "--threads", 1),
        "evaluate": ("--model", root / "run", "--features", root / "features", "--threads", 1),
        "package": ("--results", root / "results"),
    }[name] + ("--out", out / OUT[name])


def same(name: str, out: Path, whole: Path) -> None:
    """Assert that a script wrote what it wrote in `whole`, and left nothing else."""
    assert [path.name for path in out.iterdir()] == [OUT[name]], "something else was left"
    here, there = ((path / OUT[name]) for path in (out, whole))
    if here.is_file():
        assert here.read_bytes() == there.read_bytes()
        return
    here, there = tree(here), tree(there)
    assert here.keys() == there.keys()
    differ = {path for path in here if here[path] != there[path]}
    hold_command_or_time = {"args.json", "times.jsonl", "curves.svg", "report.html"}
    assert differ <= {*hold_command_or_time, "last.pt"}, differ
    if "last.pt" in differ:  # the same state, but pickled from what was loaded
        assert str(torch.load(out / "run/last.pt")) == str(torch.load(whole / "run/last.pt"))


def check_whole(name: str, out: Path, whole: Path) -> None:
    """Assert that every file under a final name, of a run that was stopped, is whole."""
    place = out / OUT[name]
    if name != "train":  # its folder fills as it goes on; the others' appear at once
        if place.exists():
            same_name = [path for path in out.iterdir() if not path.name.startswith(".")]
            assert same_name == [place]
            assert (place.is_file() and place.read_bytes() == (whole / OUT[name]).read_bytes()) or \
                tree(place).keys() == tree(whole / OUT[name]).keys()
        return
    for file in place.rglob("*"):
        if file.name.startswith(".") or not file.is_file():
            continue
        match file.suffix:
            case ".pt":
                assert torch.load(file, weights_only=True)
            case ".json":
                assert read_json(file)
            case ".png":
                assert iio.imread(file).ndim == 3
            case ".svg":
                assert file.read_text().rstrip().endswith("</svg>")
            case _:
                assert file.suffix == ".jsonl", file


def again(name: str, whole: Path, out: Path):
    """Give the command that goes on after a stop."""
    if name == "train" and (out / "run/args.json").exists():
        return call("train", "--resume", out / "run")
    if name == "train":
        return call("train", *flags_of("train", whole, out), "--overwrite")
    return call(name, *flags_of(name, whole, out))


# --- a kill at any write -----------------------------------------------------------------------


@pytest.mark.parametrize("name", OUT)
def test_a_kill_at_any_write_leaves_whole_files_and_the_next_run_ends_as_if_there_was_none(name, whole, tmp_path):
    kills, step = 0, {"train": 5, "evaluate": 3, "featurize": 2, "sample": 2}.get(name, 1)  # of the longer scripts not every write
    for number in range(0, 1000, step):
        out = tmp_path / str(number)
        out.mkdir()
        result = forked(name, *flags_of(name, whole, out), prepare=at_write(out, number, signal.SIGKILL))
        check_whole(name, out, whole)
        if result.status == 0:  # it writes less often than this
            break
        assert result.status == -signal.SIGKILL, result
        kills += 1
        if not (out / OUT[name]).exists() or name == "train":
            ok(again(name, whole, out))
        if name != "package":  # its temporary file is named after the process that was killed
            for left in out.glob(".*.old.tmp"):
                shutil.rmtree(left)
            same(name, out, whole)
        shutil.rmtree(out)
    assert kills >= {"package": 2, "sample": 5}.get(name, 8)


@pytest.mark.parametrize("name", ["sample", "featurize", "evaluate"])
def test_a_kill_while_replacing_leaves_the_old_or_the_new(name, whole, tmp_path):
    states = set()
    for number in range(0, 200, 2):
        out = tmp_path / str(number)
        (out / OUT[name]).mkdir(parents=True)
        (out / OUT[name] / "old").write_text("old")
        (out / OUT[name] / "old2").write_text("old")
        result = forked(name, *flags_of(name, whole, out), "--overwrite", prepare=at_write(out, number, signal.SIGKILL))
        found = set(tree(out / OUT[name]))
        assert found in (set(), {"old", "old2"}, set(tree(whole / OUT[name]))), found  # gone only between two renames
        states.add(len(found) if found else 0)
        shutil.rmtree(out)
        if result.status == 0:
            break
    assert {2, len(tree(whole / OUT[name]))} <= states


def test_a_log_line_cut_short_by_a_kill_is_mended(whole, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    for name in ("log.jsonl", "times.jsonl"):
        with open(tmp_path / "run" / name, "a") as file:
            file.write('{"step": 9, "lo')
    ok(call("train", "--resume", tmp_path / "run"))
    assert (tmp_path / "run/log.jsonl").read_bytes() == (whole / "run/log.jsonl").read_bytes()


# --- a disk that fills -------------------------------------------------------------------------


def limit_files(size: int):
    """Return what to prepare a fork with so that no file can grow beyond `size` bytes, as on a disk that is full."""
    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return prepare


@pytest.mark.parametrize("name", OUT)
def test_a_full_disk_is_one_line_and_nothing_half_written(name, whole, tmp_path):
    largest = max(path.stat().st_size for path in [whole / OUT[name], *(whole / OUT[name]).rglob("*")] if path.is_file())
    refused = 0
    for size in sorted(size for size in (0, 60, 300, 1000, 3000, largest // 2, largest - 1) if size < largest):
        out = tmp_path / str(size)
        out.mkdir()
        result = forked(name, *flags_of(name, whole, out), prepare=limit_files(size))
        assert_says_where(result, name, out)
        check_whole(name, out, whole)
        refused += 1
        if name not in ("train", "featurize"):
            assert not list(out.iterdir())  # nothing is left, not even hidden
        ok(again(name, whole, out))
        same(name, out, whole)
    assert refused >= 4


def assert_says_where(result, name: str, out: Path) -> None:
    assert result.status == 2, result
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{name}.py: ") and str(out) in lines[0], result
    assert "cannot be" in lines[0] and ("free some space" in lines[0] or "choose another --out" in lines[0]), result


@pytest.fixture
def small_disk(tmp_path):
    """Mount a small disk; a function of its size in bytes."""
    mounted = []

    def mount(size: int) -> Path:
        place = tmp_path / f"disk-{size}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small disk can only be mounted by root where mounts are allowed: {done.stderr.strip()}")
        mounted.append(place)
        return place
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("a small disk can only be mounted by root")
    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("name", OUT)
def test_a_small_disk_that_fills(name, whole, tmp_path, small_disk):
    out = small_disk(8192)  # two pages
    if name == "package":  # writes less than that
        (out / "other").write_bytes(bytes(8192))
    result = forked(name, *flags_of(name, whole, out))
    assert_says_where(result, name, out)
    check_whole(name, out, whole)
    if name in ("featurize", "train"):
        subprocess.run(["mount", "-o", "remount,size=32m", out], check=True)
        done = ok(again(name, whole, out))
        same(name, out, whole)
        assert done.out


def test_a_disk_full_at_the_end_keeps_what_was_featurized(whole, tmp_path):
    def full(path, value):
        if path.name == "meta.json":
            raise cannot_write(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        write_json(path, value)
    with mock.patch("partial.write_json", full):
        assert_says_where(call("featurize", *flags_of("featurize", whole, tmp_path)), "featurize", tmp_path)
    assert "3 of 3 batches are there" in ok(again("featurize", whole, tmp_path)).out
    same("featurize", tmp_path, whole)


# --- two at once -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sample", "featurize", "train", "evaluate"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_the_second_of_two_runs_is_refused_and_the_first_untouched(name, flags, whole, tmp_path):
    with stopped_at(tmp_path, 6, name, *flags_of(name, whole, tmp_path)) as first:
        before = tree(tmp_path)
        second = call(name, *flags_of(name, whole, tmp_path), *flags)
        assert second.status == 2 and second.err.count("\n") == 1 and str(tmp_path / OUT[name]) in second.err, second
        assert "another process is writing it" in second.err or (name == "train" and "is there already" in second.err)
        assert tree(tmp_path) == before
    assert end(first).status == 0
    same(name, tmp_path, whole)


def test_a_run_that_is_being_trained_cannot_be_resumed(whole, tmp_path):
    with stopped_at(tmp_path, 20, "train", *flags_of("train", whole, tmp_path)) as first:
        second = call("train", "--resume", tmp_path / "run")
        assert second.status == 2 and "another process is writing it" in second.err, second
    assert end(first).status == 0
    same("train", tmp_path, whole)


def test_of_two_packagings_the_first_to_end_stays(whole, tmp_path):
    with stopped_at(tmp_path, 1, "package", *flags_of("package", whole, tmp_path)) as first:
        assert not (tmp_path / "results.zip").exists()
        (tmp_path / "results.zip").write_bytes(b"made meanwhile")
    result = end(first)
    assert result.status == 2 and "is there already" in result.err, result
    assert [path.name for path in tmp_path.iterdir()] == ["results.zip"]
    assert (tmp_path / "results.zip").read_bytes() == b"made meanwhile"


def test_a_zip_is_whole(whole):
    with zipfile.ZipFile(whole / "results.zip") as archive:
        assert archive.testzip() is None
    assert np.array(read_json(whole / "results/metadata.json")["nparams"]) > 0
