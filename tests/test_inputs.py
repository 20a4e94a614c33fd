"""vos/inputs.py, the one opener of what is read: regular files, JSON, paths that stay inside."""
import hashlib
import json
import os
from pathlib import Path

import pytest

from vos import inputs
from vos.inputs import BadInput


def refuses(words: str, function, *arguments) -> None:
    """Assert that a call is refused in one line that holds `words`."""
    with pytest.raises(BadInput) as error:
        function(*arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def read(path: Path, limit: int | None = None) -> bytes:
    with inputs.opened(path, limit) as file:
        return file.read()


def test_only_regular_files_of_a_fitting_size_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"12345")
    assert read(tmp_path / "file") == read(tmp_path / "file", 5) == b"12345"
    refuses("file: has 5 bytes; expected at most 4", read, tmp_path / "file", 4)
    refuses("pipe: is no regular file", read, tmp_path / "pipe")  # nor waited for
    refuses("is no regular file", read, Path("/dev/zero"))
    refuses("is no regular file", read, tmp_path)
    refuses("none: no such file", read, tmp_path / "none")
    refuses("cannot be opened", read, tmp_path / "a\0b")
    refuses("cannot be opened", read, tmp_path / "file/below")
    assert inputs.sha256(tmp_path / "file") == hashlib.sha256(b"12345").hexdigest()


@pytest.mark.parametrize("content", [
    b"", b"{", b'{"a": NaN}', b'{"a": Infinity}', b"[]", b'{"a": 1} b', b"\xff\xfe", b"[" * 100_000,
    b"1" * 10_000])
def test_what_is_no_json_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    refuses("x.json: expected a JSON object", inputs.read_json, tmp_path / "x.json")


@pytest.mark.parametrize("table", [
    {"raw": ["a"]}, {"raw": {"1": "a"}}, {"raw": {"0": "a", "2": "b"}}, {"raw": {"0": 1}},
    {"raw": {"0": "a", "01": "b"}}, {"raw": {"0": "a", "x": "b"}}, {"raw": None}])
def test_a_paths_json_of_another_form_is_refused(tmp_path, table):
    file = tmp_path / "paths.json"
    file.write_text(json.dumps(table))
    refuses('paths.json: expected {"column"', inputs.read_paths, file)


def test_paths_are_sorted_by_number(tmp_path):
    file = tmp_path / "paths.json"
    file.write_text(json.dumps({"raw": {str(i): f"{i}.jpg" for i in sorted(range(12), key=str)}}))
    assert inputs.read_paths(file) == {"raw": [f"{i}.jpg" for i in range(12)]}


@pytest.mark.parametrize("path", [
    "", ".", "..", "/etc/hosts", "a/../../b", "..\\b", "C:\\b", "C:b", "a\nb", "\x1b[2Jb", "a\0b",
    "x" * 201, "\u00e9" * 101, "\ud800", "a/" * 1001])
def test_a_path_that_leaves_or_hides_something_is_refused(path):
    refuses("list.txt: ", inputs.inside, Path("root"), path, Path("list.txt"))


def test_a_path_inside_is_found_with_slashes_of_both_kinds():
    for path in ("a/b c.png", "a\\b c.png", "./a//b c.png"):
        assert inputs.inside(Path("root"), path, Path("list.txt")) == Path("root/a/b c.png")
