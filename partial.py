"""A feature folder in the making: kept when featurizing stops, verified and continued by the next run.

While it is made it lives beside its final place as .<name>.partial, with plan.json (what is being made)
and progress-<process>.jsonl (a line per batch written: first row and a SHA-256 of its rows). Only the whole
folder, with its meta.json, is renamed to its final name.
"""
import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from data import ArrayWriter, as_column
from distributed import Group
from files import BadInput, CannotWrite, empty, publish, read_json, sha256, sole_owner, write_json

ALONE = Group()


class PartialFolder:
    """The folder that `out` will be, held by one job at a time, whose processes share it. Use as a context manager.

    What an earlier run with the same plan wrote is kept; what one with another plan wrote is dropped.
    Raises BadInput when another process is writing the same folder, or the disk is full.
    """

    def __init__(self, out: Path, plan: dict, overwrite: bool, group: Group = ALONE):
        self.out, self.overwrite, self.group = out, overwrite, group
        self.plan = json.loads(json.dumps(plan))  # as it will be read back
        self.path = out.with_name(f".{out.name}.partial")

    def __enter__(self):
        self.progress = self.path / f"progress-{self.group.rank}.jsonl"
        self.held = contextlib.ExitStack()
        if self.group.main:
            self.held.enter_context(sole_owner(self.path, self.out))
            self.prepare()
        self.group.wait()
        self.notes = {}
        for file in sorted(self.path.glob("progress-*.jsonl")):
            self.notes |= read_notes(file)
        self.group.wait()  # before anyone adds to them
        return self

    def prepare(self) -> None:
        """Take over what an earlier run with the same plan left, or empty the folder."""
        for file in self.path.glob(".*.tmp"):  # what a kill left in the middle of a write
            file.unlink()
        plan_file = self.path / "plan.json"
        if not plan_file.exists() or read_json(plan_file) != self.plan:
            empty(self.path)
            write_json(plan_file, self.plan)

    def __exit__(self, kind, error, traceback):
        with self.held:
            if isinstance(error, CannotWrite | OSError):
                reason = error.strerror or error if isinstance(error, OSError) else error
                raise CannotWrite(f"{self.path}: cannot be written ({reason}); free some space and give the "
                                  "same command again: it goes on from what is there") from error
            if isinstance(error, BadInput) and self.group.main:  # the input is to blame: nothing worth keeping
                shutil.rmtree(self.path, ignore_errors=True)

    def has(self, name: str) -> bool:
        """Whether the file `name` was wholly written by an earlier run, and still holds the same bytes."""
        file = self.path / name
        return name in self.notes and file.exists() and self.notes[name] == sha256(file)

    def note(self, name: str) -> None:
        """Note that the file `name` is wholly written."""
        self.append({"key": name, "sha256": sha256(self.path / name)})

    def has_rows(self, first: int, count: int, writers: list[ArrayWriter]) -> bool:
        """Whether rows first .. first + count were written by an earlier run, and still hold the same bytes."""
        if str(first) not in self.notes:
            return False
        sha = hashlib.sha256()
        for writer in writers:
            sha.update(writer.read(first, count))
        return sha.hexdigest() == self.notes[str(first)]

    def note_rows(self, first: int, arrays: list[np.ndarray]) -> None:
        """Note that the rows from `first` on, one array per level, are written."""
        sha = hashlib.sha256()
        for array in arrays:
            sha.update(np.ascontiguousarray(array).data)
        self.append({"key": str(first), "sha256": sha.hexdigest()})

    def append(self, line: dict) -> None:
        with open(self.progress, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self, meta: dict, columns: dict[str, list[str]]) -> None:
        """Write paths.json and meta.json with the arrays' digests, and rename the folder to its final name."""
        write_json(self.path / "paths.json", {name: as_column(paths) for name, paths in columns.items()})
        digests = {file.name: sha256(file) for file in sorted(self.path.glob("*.npy"))}
        write_json(self.path / "meta.json", {**meta, "sha256": digests})
        for file in [self.path / "plan.json", *self.path.glob("progress-*.jsonl")]:
            file.unlink()
        publish(self.path, self.out, self.overwrite)


def read_notes(file: Path) -> dict[str, str]:
    """Read one progress file into {key: digest}; a line cut short by a kill is left out."""
    notes = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            note = json.loads(line)
            notes[note["key"]] = note["sha256"]
        except (ValueError, KeyError, TypeError):
            continue
    return notes
