"""Everything the scripts leave: one door for files and folders, written whole or not at all.

A file is written under a temporary name beside its final one, and renamed. So is a folder.
`check_output` first refuses what would cost a user's files, whatever the flags say.
"""
import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from vos.inputs import BadInput

# kind of output -> what it holds; of several sets, one
MARKS = {
    "features": [{"meta.json", "paths.json"}],
    "run": [{"args.json", "log.jsonl"}],
    "results": [{"metadata.json", "outputs"}, {"metadata.json", "scores.json"}],
    "sample": [{"sample.json", "ImageSets"}],
    "submission": [{"metadata.json", "paths.json"}],  # a zip
}


class CannotWrite(BadInput):
    """The disk would not take a file: it is full, or read-only."""


def check_output(out: Path, kind: str, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Raise BadInput unless `out`, of a kind in MARKS, may be made, or replaced if `overwrite`."""
    place, is_file = Path(os.path.realpath(out)), kind == "submission"
    home = Path(os.path.realpath(os.path.expanduser("~")))
    if out.is_symlink():
        raise BadInput(f"{out}: is a link to {os.readlink(out)}; name what it leads to instead")
    if place in (Path.cwd(), *Path.cwd().parents, home):
        raise BadInput(f"{out}: is the current folder, one above it, or your home; name a new one")
    for source in map(Path, map(os.path.realpath, inputs)):
        if source in (place, *place.parents) or place in source.parents:
            raise BadInput(f"{out}: holds what this command reads, or lies in it: {source}")

    if not place.exists():
        return
    if not (place.is_file() if is_file else place.is_dir()):
        raise BadInput(f"{out}: expected a place for {kind}, found something else; choose another")
    held = set() if is_file else set(os.listdir(place))
    if not held and not is_file:
        return
    if not overwrite:
        raise BadInput(f"{out}: is there already; pass --overwrite to replace it, or another --out")
    if is_file:
        with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(place) as archive:
            held = set(archive.namelist())
    if not any(mark <= held for mark in MARKS[kind]):
        raise BadInput(f"{out}: --overwrite replaces only {kind} that this project made, found "
                       f"{', '.join(sorted(held)[:3]) or 'another file'}; remove it yourself")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise CannotWrite in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"{path}: cannot be written ({error.strerror or error}); free some space "
                          "or choose another --out") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which becomes `path` on a clean exit. CannotWrite."""
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value) -> None:
    """Write `value` as JSON, whole or not at all. Raises ValueError for NaN, which JSON has not."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def beside(out: Path, what: str) -> Path:
    """Return the path beside `out` of its lock, or of what is not yet or no longer there."""
    place = Path(os.path.realpath(out))
    return place.with_name(f".{place.name[:200]}.vos-{what}")


@contextlib.contextmanager
def new_folder(out: Path, kind: str, overwrite: bool, inputs: Sequence[Path] = (),
               plan: str | None = None) -> Iterator[Path]:
    """Yield a folder beside `out`, renamed to it on a clean exit.

    plan: when stopped, the folder stays, and is yielded again to the next that has the same plan.
    What is in its folder `unfinished` then is left out at the end. Raises BadInput, CannotWrite.
    """
    check_output(out, kind, overwrite, inputs)
    temporary, old, keep = beside(out, "partial"), beside(out, "old"), plan is not None
    note = temporary / "unfinished/plan.json"
    with locked(out):
        try:
            if plan is None or not note.exists() or note.read_text() != plan:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                note.parent.mkdir()
                write_text(note, plan or "")
            yield temporary
            shutil.rmtree(note.parent)

            try:
                check_output(out, kind, overwrite, inputs)
            except BadInput as error:  # it appeared meanwhile
                keep = True
                raise CannotWrite(f"{error} (what was made is kept in {temporary})") from error
            shutil.rmtree(old, ignore_errors=True)  # left by a kill
            if out.exists():
                os.rename(out, old)
            os.rename(temporary, out)
            shutil.rmtree(old, ignore_errors=True)
        except BadInput as error:
            keep = keep and isinstance(error, CannotWrite)
            raise
        finally:
            if not keep:
                shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold `out`, whose parents are made, for this process. BadInput when another holds it."""
    path = beside(out, "lock")
    with writing(out):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as handle:  # which leaves a file as it is, that a link leads to
            try:
                import fcntl
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samefile(path, handle.fileno()):  # its last holder removed it
                    raise BlockingIOError
            except (BlockingIOError, FileNotFoundError) as error:
                raise BadInput(f"{out}: another process is writing it; wait, or choose another "
                               "--out") from error
            except (ImportError, OSError):  # Windows, or a file system without locks
                pass
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
