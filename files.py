"""Files written whole or not at all, and the one kind of error a user can mend.

Every file or folder a script leaves is first written under a temporary name beside its
final one, flushed to the disk, and renamed. A reader sees the whole of it or nothing.
"""
import argparse
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


class BadInput(Exception):
    """Something the user gave cannot be used: the message names it, what was expected, and the way out."""


class Stopped(Exception):
    """A signal ended the work after its state was saved; the message says how to go on. signal: its number."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit flush it to disk and rename it to `path`.

    On an exception the temporary file is removed and `path` is left as it was.
    Raises BadInput when the file cannot be written (disk full, no permission), naming `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror or error}); free some space or choose another --out") from error
    finally:
        temporary.unlink(missing_ok=True)


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

    On an exception the new folder is removed and `path` is left as it was. A `path` that
    exists is replaced only when `overwrite` is true. Raises BadInput otherwise, before any work.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise BadInput(f"{path}: cannot be made ({error.strerror}); choose another --out") from error
    try:
        temporary.chmod(0o755)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        refuse_existing(path, overwrite)  # another process may have made it meanwhile
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror or error}); free some space or choose another --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    except ImportError:  # Windows has no such lock: there, do not run the same command twice at once
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
