"""Files written whole or not at all, and the one kind of error a user can mend.

Every file or folder a script leaves is first written under a temporary name beside its
final one, flushed to the disk, and renamed. A reader sees the whole of it or nothing.
"""
import argparse
import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


class BadInput(Exception):
    """Something the user gave cannot be used: the message names it, what was expected, and the way out."""


class CannotWrite(BadInput):
    """The disk would not take a file: it is full, or read-only. What was written before is worth keeping."""


class Stopped(Exception):
    """A signal ended the work after its state was saved; the message says how to go on. signal: its number."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


@contextlib.contextmanager
def whole_file(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit flush it to disk and rename it to `path`.

    On an exception the temporary file is removed and `path` is left as it was.
    Raises CannotWrite when the file cannot be written (disk full, no permission), naming `path`, and BadInput
    when it is there already and `overwrite` is false.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            place_new(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """Return the error that says why the disk would not take `path`."""
    return CannotWrite(f"{path}: cannot be written ({error.strerror or error}); free some space or choose another --out")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path):
    """Return what the JSON file `path` holds. Raises BadInput when it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: expected a JSON file, found something else ({error})") from error


@contextlib.contextmanager
def whole_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a new empty folder beside `path`; on a clean exit rename it to `path`.

    On an exception the new folder is removed and `path` is left as it was. A `path` that exists is replaced
    only when `overwrite` is true. Raises BadInput otherwise, and when another process is writing `path`, before any work.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    temporary = path.with_name(f".{path.name}.tmp")
    with sole_owner(temporary, path):
        try:
            refuse_existing(path, overwrite)  # another process may have made it just before we held it
            empty(temporary)  # of what a killed process left
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            publish(temporary, path, overwrite)
        except OSError as error:
            raise cannot_write(path, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def publish(folder: Path, path: Path, overwrite: bool) -> None:
    """Rename a whole folder to its final name. What was there is moved aside first, so that it is never seen half removed."""
    refuse_existing(path, overwrite)  # another process may have made it meanwhile
    old = path.with_name(f".{path.name}.old.tmp")
    remove(old)  # left by a kill
    if path.exists():
        os.rename(path, old)
    os.rename(folder, path)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with everything in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def empty(folder: Path) -> None:
    """Remove everything in a folder."""
    for path in folder.iterdir():
        remove(path)


@contextlib.contextmanager
def sole_owner(folder: Path, out: Path) -> Iterator[None]:
    """Make `folder`, and hold it for this process alone until the block or the process ends, however it ends.

    The lock is the system's, on the folder itself, so that none is left behind. Raises BadInput, which speaks of
    `out`, when another process holds it, and CannotWrite when it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"{out}: cannot be made ({error.strerror}); choose another --out") from error
    if os.name == "nt":  # Windows opens no folders: there, do not run the same command twice at once
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(handle) or not folder.exists() or not os.path.samestat(os.fstat(handle), os.stat(folder)):  # renamed just now
            raise BadInput(f"{out}: another process is writing it; wait for it, or choose another --out")
        yield
    finally:
        os.close(handle)


def place_new(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`. Raises BadInput when a file is there, however lately another process made it."""
    try:
        os.link(temporary, path)  # unlike a rename, it replaces nothing
    except OSError as error:
        if path.exists():
            raise BadInput(f"{path}: is there already; pass --overwrite to replace it, or another --out") from error
        os.replace(temporary, path)  # a file system without hard links


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise BadInput when `path` is there and may not be replaced, or is something other than a folder."""
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path}: expected a folder to write, found a file; choose another --out")
    if path.exists() and not overwrite and any(path.iterdir()):
        raise BadInput(f"{path}: is there already; pass --overwrite to replace it, or another --out")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal, read in pieces so memory stays flat."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(args: argparse.Namespace) -> dict:
    """Return parsed arguments as JSON can hold them: paths as text."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def try_lock(file) -> bool:
    """Take the exclusive lock of an open file, which the system drops when its process ends; false when it is taken."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return error.errno in (errno.ENOLCK, errno.EOPNOTSUPP)  # nor have some file systems
