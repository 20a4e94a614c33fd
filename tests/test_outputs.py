"""vos/outputs.py, the one door for what is written: what it refuses, replaces, keeps and locks."""
import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, tree

from vos import outputs
from vos.inputs import BadInput

KINDS = {  # kind -> a few files that tell a folder of that kind
    "features": ["meta.json", "paths.json"], "run": ["args.json", "log.jsonl"],
    "results": ["metadata.json", "outputs/0.png"], "sample": ["sample.json", "ImageSets/train.txt"],
}
PLACES = {  # what --out names, in the folder `world`: words of the refusal
    "/": "one above", ".": "current folder", "..": "one above", "home": "your home",
    "data": "what this command reads", "shelf": "what this command reads",
    "data/new": "lies in it", "data/../shelf": "what this command reads",
    "link": "name what it leads to", "dangling": "name what it leads to", "circle/new": "cannot be",
    "pipe": "expected a", "/dev/null": "expected a", "file/new": "cannot be written",
}


def write_files(folder: Path, names: list[str]) -> Path:
    for file in (folder / name for name in names):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    return folder


def make(out: Path, kind: str = "run", overwrite: bool = True, inputs=(), plan=None) -> None:
    """Make a folder with one file in it through the door, or a file."""
    if kind == "submission":
        outputs.check_output(out, kind, overwrite, inputs)
        with outputs.locked(out), outputs.whole_file(out) as file:
            file.write_text("new")
        return
    with outputs.new_folder(out, kind, overwrite, inputs, plan) as folder:
        (folder / "new").write_text("new")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The current folder, with a user's things in it."""
    here = write_files(tmp_path / "above/here", ["home/x", "data/x", "shelf/in/put", "file"])
    (here / "empty").mkdir()
    for link in ("link empty", "dangling none", "circle circle", "~ home"):
        os.symlink(link.split()[1], here / link.split()[0])
    os.mkfifo(here / "pipe")
    monkeypatch.setenv("HOME", str(here / "~"))
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ascii(place)[:20])
def test_what_may_never_be_written_is_refused(world, place):
    before, inputs = tree(world), [Path("data"), Path("shelf/in/put")]
    for kind in ("run", "submission"):
        with pytest.raises(BadInput) as error:
            make(Path(place), kind, inputs=inputs)
        assert PLACES[place] in str(error.value) and "\n" not in str(error.value)
    assert tree(world) == before


@pytest.mark.parametrize("plan", [None, "features of this"])
@pytest.mark.parametrize("suffix", ["partial", "lock", "old"])
def test_a_link_at_a_temporary_name_is_never_followed(suffix, plan, tmp_path):
    home = write_files(tmp_path / "home", ["thesis"])
    link = tmp_path / f".run.vos-{suffix}"
    link.symlink_to("home/thesis" if suffix == "lock" else "home")
    with contextlib.suppress(BadInput):
        make(tmp_path / "run", plan=plan)
    assert (home / "thesis").read_text() == "mine" and set(tree(home)) == {"thesis"}


@pytest.mark.parametrize("kind", KINDS)
def test_overwrite_replaces_its_own_kind_alone(kind, tmp_path):
    for found, names in {**KINDS, "theirs": ["thesis"]}.items():
        out = write_files(tmp_path / found, names)
        before = tree(out)
        with pytest.raises(BadInput, match="is there already; pass --overwrite"):
            make(out, kind, overwrite=False)
        if found != kind:
            with pytest.raises(BadInput, match=f"{min(os.listdir(out))}.*remove it yourself"):
                make(out, kind)
            assert tree(out) == before
    make(tmp_path / kind, kind)
    assert set(tree(tmp_path / kind)) == {"new"}


def test_a_zip_is_replaced_by_a_zip_of_a_submission_alone(tmp_path):
    write_files(tmp_path, ["text"])
    write_files(tmp_path / "folder", ["paths.json", "metadata.json"])
    os.rename(shutil.make_archive(tmp_path / "x", "zip", tmp_path / "folder"), tmp_path / "own")
    with pytest.raises(BadInput, match="remove it yourself"):
        make(tmp_path / "text", "submission")
    make(tmp_path / "own", "submission")
    assert [(tmp_path / name).read_text() for name in ("text", "own")] == ["mine", "new"]


def test_what_is_replaced_stays_until_the_new_is_whole(tmp_path):
    out = write_files(tmp_path / "run", KINDS["run"])
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError), outputs.new_folder(out, "run", True) as folder:
        (folder / "new").write_text("half")
        raise ZeroDivisionError
    assert tree(tmp_path) == before


@pytest.mark.parametrize("plan", [None, "features of this"])
def test_what_was_made_is_kept_when_the_place_was_taken_meanwhile(tmp_path, plan):
    out = tmp_path / "features"
    with pytest.raises(BadInput) as error:
        with outputs.new_folder(out, "features", overwrite=True, plan=plan) as folder:
            (folder / "new").write_text("finished")
            write_files(out, ["thesis"])
    assert str(folder) in str(error.value)
    assert (folder / "new").read_text() == "finished" and (out / "thesis").read_text() == "mine"


def test_one_lock_for_one_output_which_a_kill_gives_back(tmp_path):
    hold = "import sys, vos.outputs as o\nwith o.locked(o.Path(sys.argv[1])): print(), input()"
    out, pipe = tmp_path / "new" / "run", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen([sys.executable, "-u", "-c", hold, out], cwd=ROOT, **pipe)
    assert holder.stdout.readline()
    for kind in ("run", "features", "submission"):  # whichever script holds it
        with pytest.raises(BadInput, match="another process is writing it"):
            make(out, kind)
    assert not out.exists()
    holder.kill()
    holder.communicate()
    make(out)
    assert set(tree(out.parent)) == {"run", "run/new"}


def test_a_file_is_whole_or_as_it_was(tmp_path):
    outputs.write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), outputs.whole_file(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(outputs.CannotWrite, match="none/x: cannot be written"):
        outputs.write_text(tmp_path / "none/x", "")
    assert (tmp_path / "a").read_text() == "old" and list(tmp_path.iterdir()) == [tmp_path / "a"]
