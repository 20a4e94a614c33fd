"""Everything the scripts read that people give them: one opener, and one line for what is wrong."""
import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

JSON_LIMIT = 1 << 29  # bytes: meta.json of a million frames


class BadInput(Exception):
    """What the user gave cannot be used: the message names it, what was expected, the way out."""


@contextlib.contextmanager
def opened(path: Path, limit: int | None = None) -> Iterator[IO[bytes]]:
    """Open a regular file of at most `limit` bytes. BadInput for another, a pipe say, at once."""
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):
            raise BadInput(f"{path}: is no regular file; expected a file, not a folder or a pipe")
        if limit is not None and state.st_size > limit:
            raise BadInput(f"{path}: has {state.st_size:,} bytes; expected at most {limit:,}")
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; expected a file that can be read") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise BadInput(f"{path}: cannot be opened ({error})") from error
    with file:
        yield file


def read_json(path: Path) -> dict:
    """Return the object that a JSON file holds. Raises BadInput."""
    with opened(path, JSON_LIMIT) as file:
        try:
            return {**json.loads(file.read().decode("utf-8"), parse_constant=int)}  # not NaN
        except (OSError, TypeError, ValueError, RecursionError) as error:
            raise BadInput(f"{path}: expected a JSON object, found {error}") from error


def read_paths(file: Path) -> dict[str, list[str]]:
    """Read {column: {"0": path, ...}} as {column: paths in order}. Raises BadInput."""
    table = read_json(file)
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        columns = {name: [column[str(index)] for index in range(len(column))]
                   for name, column in table.items()}
        if all(isinstance(path, str) for paths in columns.values() for path in paths):
            return columns
    raise BadInput(f'{file}: expected {{"column": {{"0": path, "1": path, ...}}}}, each key once')


def inside(root: Path, path: str, listed_in: Path) -> Path:
    """Return `root / path`, backslashes read as slashes. Raises BadInput when it leaves `root`."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if not parts or len(path) > 2000 or not all(map(is_name, parts)):
        raise BadInput(f"{listed_in}: {path[:200]!r} is no path in its folder; expected a relative "
                       "path without '..' and ':'")
    return root.joinpath(*parts)


def is_name(text) -> bool:
    """Say whether `text` can name a file everywhere: no path, nothing hidden, at most 200 bytes."""
    if not isinstance(text, str) or text in ("", ".", "..") or set(text) & set("/\\:"):
        return False
    return text.isprintable() and len(text.encode("utf-8", "replace")) <= 200


def is_shape(value, length: int) -> bool:
    """Say whether `value` is a list of so many whole numbers that an array can have."""
    return isinstance(value, list) and len(value) == length and all(
        type(n) is int and 0 < n <= 1 << 16 for n in value)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
