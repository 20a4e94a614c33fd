"""Everything the scripts leave: one door for files and folders, written whole or not at all.

A file is written under a temporary name beside its final one, flushed to the disk, and renamed. So is a
folder. `check_output` first refuses what would cost a user's files, whatever the flags say.
"""
import contextlib
import errno
import json
import os
import shutil
import stat
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
    """The disk would not take a file: it is full, or read-only. What was written before is whole."""


class Stopped(Exception):
    """A signal ended the work after its state was saved; the message says how to go on."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


# --- what may be written -----------------------------------------------------------------------


def check_output(out: Path, kind: str, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Raise BadInput unless `out` may be made, or replaced when `overwrite`.

    kind: a key of MARKS. inputs: what the command reads. Nothing is replaced but what this project made
    of the same kind, and no folder that holds an input, or lies in one, or holds the user's work.
    """
    place = resolve(out)
    if out.is_symlink():
        raise BadInput(f"{out}: is a link to {os.readlink(out)}; name what it leads to instead")
    if place in (Path.cwd(), *Path.cwd().parents, Path(os.path.expanduser("~"))):
        raise BadInput(f"{out}: is the current folder, one above it, or your home; name a new folder")
    for source in inputs:
        read = resolve(source)
        if place == read or place in read.parents or (read in place.parents and read.is_dir()):
            raise BadInput(f"{out}: holds what this command reads, or lies in it ({source}); choose "
                           "another --out")

    if not place.exists():
        return
    state, is_file = os.lstat(place), kind == "submission"
    if not (stat.S_ISREG if is_file else stat.S_ISDIR)(state.st_mode):
        raise BadInput(f"{out}: expected a {'file' if is_file else 'folder'} to write, found something "
                       "else; choose another --out")
    if hasattr(os, "geteuid") and state.st_uid != os.geteuid():
        raise BadInput(f"{out}: belongs to another user; choose another --out")
    held = list_contents(place)
    if not held and not is_file:
        return
    if not overwrite:
        raise BadInput(f"{out}: is there already; pass --overwrite to replace it, or another --out")
    if not any(mark <= held for mark in MARKS[kind]):
        raise BadInput(f"{out}: --overwrite replaces only {kind} that this project made, found "
                       f"{', '.join(sorted(held)[:3]) or 'another file'}; remove it yourself")


def resolve(path: Path) -> Path:
    """Return the absolute path without links. Raises BadInput where links go round in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"{path}: is no path that can be followed ({error})") from error


def list_contents(place: Path) -> set[str]:
    """Return the names in a folder, or in a zip; none for another file."""
    if place.is_dir():
        return set(os.listdir(place))
    try:
        with zipfile.ZipFile(place) as archive:
            return set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return set()


# --- writing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which becomes `path` on a clean exit. Raises CannotWrite."""
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value) -> None:
    """Write `value` as indented JSON, whole or not at all. Raises ValueError for NaN: it is no JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def partial_folder(out: Path) -> Path:
    """Return where the folder `out` is while it is made."""
    place = resolve(out)
    return place.with_name(f".{place.name[:200]}.vos-partial")


@contextlib.contextmanager
def new_folder(out: Path, kind: str, overwrite: bool, inputs: Sequence[Path] = (),
               keep: bool = False) -> Iterator[Path]:
    """Yield a folder beside `out`, held by this process alone; on a clean exit rename it to `out`.

    What was there stays until then. keep: leave the folder there when the work ends early, and start with
    what an earlier run left. Raises BadInput as `check_output` does, before any work, and CannotWrite.
    """
    temporary = partial_folder(out)
    old = temporary.with_suffix(".vos-old")
    check_output(out, kind, overwrite, inputs)
    with locked(out):
        check_output(out, kind, overwrite, inputs)  # another process may have made it just before
        try:
            if not keep:
                remove(temporary)
            temporary.mkdir(exist_ok=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    flush(file)

            try:
                check_output(out, kind, overwrite, inputs)
            except BadInput as error:  # it appeared meanwhile
                keep = True
                raise BadInput(f"{error} (what was made is kept in {temporary})") from error
            remove(old)  # left by a kill
            if out.exists():
                os.rename(resolve(out), old)
            os.rename(temporary, resolve(out))
            remove(old)
        except OSError as error:
            raise cannot_write(out, error) from error
        finally:
            if not keep:
                shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(out: Path, kind: str, overwrite: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """As `new_folder`, for a file."""
    with locked(out):
        check_output(out, kind, overwrite, inputs)
        with whole_file(resolve(out)) as temporary:
            yield temporary
            check_output(out, kind, overwrite, inputs)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold `out` for this process, by a lock of the system's on a file beside it; its parents are made.

    Raises BadInput when another process holds it.
    """
    path = resolve(out)
    path = path.with_name(f".{path.name[:200]}.vos-lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError as error:
        raise cannot_write(out, error) from error
    try:
        free = take_lock(handle) and path.exists()  # or its last holder removed it just now
        if not free or not os.path.samestat(os.fstat(handle), os.stat(path)):
            raise BadInput(f"{out}: another process is writing it; wait for it, or choose another "
                           "--out")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def take_lock(handle: int) -> bool:
    """Lock an open file, until its process ends; say whether it was free."""
    try:
        import fcntl
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: there, do not run the same command twice at once
        return True
    except OSError as error:
        return error.errno in (errno.ENOLCK, errno.EOPNOTSUPP)  # a file system without locks
    return True


def flush(file: Path) -> None:
    """Have the system write a file to the disk."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with everything in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """Return the error that says why the disk would not take `path`."""
    return CannotWrite(f"{path}: cannot be written ({error.strerror or error}); free some space or "
                       "choose another --out")
