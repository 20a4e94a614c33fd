"""Checkpoints: dicts of tensors and values, written whole, read without running code from them."""
import io
import os
import subprocess
import warnings
import zipfile
from pathlib import Path

import torch

from vos.inputs import BadInput, opened
from vos.outputs import whole_file


def save_checkpoint(path: Path, value: dict) -> None:
    """Write a dict of tensors and plain values. The same values give the same bytes."""
    buffer = io.BytesIO()  # written to a file, the archive would hold the file's temporary name
    torch.save(value, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path, keys: set[str]) -> dict:
    """Read a dict with at least `keys`. Raises BadInput for another, or one that is damaged."""
    with opened(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:  # torch packs nothing: packed, it is a bomb
                size = sum(entry.file_size for entry in archive.infolist())
                if size > os.fstat(file.fileno()).st_size or archive.testzip():
                    raise ValueError("its checksums or sizes are wrong")
            file.seek(0)
            with warnings.catch_warnings(action="ignore"):
                value = torch.load(file, map_location="cpu", weights_only=True)
            if keys - value.keys():
                raise ValueError(f"it lacks {', '.join(sorted(keys - value.keys()))}")
        except Exception as error:  # damaged bytes raise every kind
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise BadInput(f"{path}: cannot be read as train.py's checkpoint ({reason})") from error
    return value


def is_finite(value) -> bool:
    """Say whether `value` is a tensor without NaN and infinity."""
    return isinstance(value, torch.Tensor) and bool(value.isfinite().all())


def code_revision() -> str:
    """Return the commit of these scripts, "+changes" when files differ from it; "" outside git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True,
                              text=True).stdout.strip()
    except OSError:  # git is not installed
        return ""
