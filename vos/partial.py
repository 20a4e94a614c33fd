"""A feature folder in the making: kept when featurizing stops, and gone on with by the next run."""
import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vos.distributed import Group
from vos.inputs import BadInput
from vos.outputs import CannotWrite, beside, new_folder, write_text


@contextlib.contextmanager
def unfinished_folder(out: Path, overwrite: bool, inputs: Sequence[Path], plan: dict,
                      group: Group) -> Iterator[Path]:
    """Yield the folder that becomes the feature folder `out`, held by this job alone.

    When the work is stopped it stays; the next run of the same `plan` goes on with it, another
    starts anew. Bad input leaves nothing.
    """
    if not group.main:
        group.wait()
        yield beside(out, "partial")
        return
    with new_folder(out, "features", overwrite, inputs, keep=True) as place:
        file, text = place / "plan.json", json.dumps(plan)
        if not file.exists() or file.read_text() != text:
            shutil.rmtree(place)
            place.mkdir()
            write_text(file, text)
        group.wait()
        try:
            yield place
        except BadInput as error:
            if not isinstance(error, CannotWrite):
                shutil.rmtree(place)
            raise
        for path in [file, *place.glob("finished-*.txt")]:
            path.unlink()


def make_array(file: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Make an .npy file of zeros at its full length, its place on the disk reserved. OSError."""
    np.lib.format.open_memmap(file, "w+", np.dtype(dtype), shape)
    if hasattr(os, "posix_fallocate"):  # so that a full disk is an error now, not a crash later
        with open(file, "r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)


def write_rows(file: Path, first: int, rows: np.ndarray) -> None:
    """Write rows first .. first + n of an .npy file, and have the system write them to the disk."""
    array = np.lib.format.open_memmap(file, "r+")
    array[first:first + len(rows)] = rows
    array.flush()
