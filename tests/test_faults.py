"""Whole or not at all, for every script: kills at writes, full disks, two at once, user's files."""
import resource
import shutil
import signal
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from forking import at_write, forked
from helpers import call, ok, tree, write_davis

from vos.inputs import read_json

OUT = {"vos.sample": "davis", "featurize": "features", "train": "run", "evaluate": "results",
       "package": "results.zip"}
NOT_THE_SAME = {"args.json", "curves.svg", "report.html", "last.pt"}  # hold the command or the time


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder in which every script has run once, and so what each should write."""
    root = tmp_path_factory.mktemp("whole")
    write_davis(root / "clips", clips=2, val_clips=1, frames=3, size=(64, 96))
    for name in OUT:
        ok(call(name, *flags_of(name, root, root)))
    return root


def flags_of(name: str, root: Path, out: Path) -> tuple:
    """Flags of a small run of each script that reads from `root` and writes to `out`."""
    alexnet = ("--featurizer", "alexnet", "--weights", "random", "--compute", "float32")
    both = ("--features", root / "features", "--val-features", root / "features")
    one = ("--threads", 1)
    return {
        "vos.sample": ("--clips", 1, "--val-clips", 1, "--frames", 2, "--size", "48x64"),
        "featurize": ("--data", root / "clips", "--split", "train", *alexnet, *one),
        "train": (*both, "--decoder", "linear", "--schedule", "onecycle", "--steps", 6,
                  "--log-every", 3, "--batch-size", 3, *one),
        "evaluate": ("--model", root / "run", "--features", root / "features", *one),
        "package": ("--results", root / "results"),
    }[name] + ("--out", out / OUT[name])


def again(name: str, whole: Path, out: Path):
    """Give the command that goes on after a stop."""
    if name == "train" and (out / "run/args.json").exists():
        return call("train", "--resume", out / "run")
    return call(name, *flags_of(name, whole, out))


def same(name: str, out: Path, whole: Path) -> None:
    """Assert that a script wrote what it wrote in `whole`, and left nothing else."""
    assert [path.name for path in out.iterdir()] == [OUT[name]], "something else was left"
    here, there = (path / OUT[name] for path in (out, whole))
    if here.is_file():
        assert here.read_bytes() == there.read_bytes()
    here, there = tree(here), tree(there)  # empty for a file
    assert here.keys() == there.keys()
    assert {path for path in here if here[path] != there[path]} <= NOT_THE_SAME
    if name == "train":  # the same state, but pickled from what was loaded
        assert len({str(torch.load(path / "run/last.pt")) for path in (out, whole)}) == 1


def check_whole(name: str, out: Path, whole: Path) -> None:
    """Assert that every file under a final name, of a run that was stopped, is whole."""
    place = out / OUT[name]
    if name == "package" and place.exists():
        assert place.read_bytes() == (whole / OUT[name]).read_bytes()
    elif name != "train" and place.exists():
        assert tree(place).keys() == tree(whole / OUT[name]).keys()
    elif name == "train":  # its folder fills as it goes on; the others' appear at once
        readers = {".pt": torch.load, ".json": read_json, ".png": iio.imread, ".jsonl": open,
                   ".svg": lambda file: file.read_text().index("</svg>")}
        for file in place.rglob("[!.]*.*"):
            readers[file.suffix](file)


@pytest.mark.parametrize("name", OUT)
def test_after_a_kill_at_any_write_the_next_run_ends_as_if_there_was_none(name, whole, tmp_path):
    kills, said = 0, ""
    step = {"train": 11, "evaluate": 7, "featurize": 9, "vos.sample": 5}.get(name, 1)
    for number in range(0, 1000, step):  # of the longer scripts not every write
        out = tmp_path / str(number)
        out.mkdir()
        prepare = at_write(out, number, signal.SIGKILL)
        result = forked(name, *flags_of(name, whole, out), prepare=prepare)
        check_whole(name, out, whole)
        if result.status == 0:  # it writes less often than this
            break
        assert result.status == -signal.SIGKILL, result
        kills += 1
        if not (out / OUT[name]).exists() or name == "train":
            said += ok(again(name, whole, out)).out
        for left in out.glob(".*"):  # a kill can leave an empty lock, or a process's own file
            assert left.name.endswith((".vos-lock", ".tmp")), left
            left.unlink()
        same(name, out, whole)
        shutil.rmtree(out)
    assert kills >= 3
    assert name != "featurize" or "going on from an earlier run: 1 of 2 parts are there" in said


@pytest.mark.parametrize("name", ["featurize", "evaluate"])
def test_a_kill_while_replacing_leaves_the_old_or_the_new(name, whole, tmp_path):
    states = set()
    for number in range(0, 200, 7):
        out = tmp_path / str(number)
        (out / OUT[name] / "outputs").mkdir(parents=True)
        for file in ("meta.json", "paths.json", "metadata.json"):
            (out / OUT[name] / file).write_text("old")
        before, new = (set(tree(path / OUT[name])) for path in (out, whole))
        flags = (*flags_of(name, whole, out), "--overwrite")
        result = forked(name, *flags, prepare=at_write(out, number, signal.SIGKILL))
        found = set(tree(out / OUT[name]))
        assert found in (set(), before, new), found  # gone only between two renames
        states.add("new" if found == new else "old")
        shutil.rmtree(out)
        if result.status == 0:
            break
    assert states == {"old", "new"}


def says_where(result, name: str, out: Path) -> None:
    """Assert that a script ended in one line that names its output and the way out."""
    assert result.status == 2 and result.err.count("\n") == 1 and str(out) in result.err, result
    assert result.err.startswith(f"{name.rpartition('.')[2]}.py: "), result
    assert "cannot be" in result.err and "free some space" in result.err, result


@pytest.mark.parametrize("name", OUT)
def test_a_full_disk_is_one_line_and_nothing_half_written(name, whole, tmp_path):
    files = [whole / OUT[name], *(whole / OUT[name]).rglob("*")]
    largest = max(path.stat().st_size for path in files if path.is_file())
    for size in (0, 100, largest // 2, largest - 1):
        def prepare(size=size) -> None:  # no file may grow beyond `size` bytes
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        out = tmp_path / str(size)
        out.mkdir()
        says_where(forked(name, *flags_of(name, whole, out), prepare=prepare), name, out)
        check_whole(name, out, whole)
        if name not in ("train", "featurize"):
            assert not list(out.iterdir())  # nothing is left, not even hidden
        ok(again(name, whole, out))
        same(name, out, whole)


@pytest.mark.parametrize("name", OUT)
def test_files_of_the_user_are_never_touched(name, whole, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "results").mkdir(parents=True)
    (home / "results/thesis.txt").write_text("mine")
    (home / "link").symlink_to("results")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    before = tree(home), tree(whole)
    places = [".", "..", "/", home, "results", "link", "results/thesis.txt", "/dev/null"]
    inputs = [flag for flag in flags_of(name, whole, whole)[:-1] if isinstance(flag, Path)]
    for place in [*places, *inputs, *(path.parent for path in inputs)]:
        result = call(name, *flags_of(name, whole, home), "--out", place, "--overwrite")
        assert result.status == 2 and result.err.count("\n") == 1, (place, result)
        assert (tree(home), tree(whole)) == before, place
