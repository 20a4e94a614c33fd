"""Checkpoints: plain dicts of tensors and values, written whole, read without running code from them."""
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
    """Read a dict that `save_checkpoint` wrote, with at least `keys`.

    Raises BadInput when it is something else, or damaged by the archive's checksums.
    """
    with opened(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:  # torch packs nothing; what is packed may be a bomb
                size = sum(entry.file_size for entry in archive.infolist())
                if size > os.fstat(file.fileno()).st_size or archive.testzip():
                    raise ValueError("its checksums are wrong, or its entries larger than itself")
            file.seek(0)
            with warnings.catch_warnings(action="ignore"):
                value = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes raise every kind
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise BadInput(f"{path}: cannot be read as a checkpoint of train.py ({reason})") from error
    missing = keys - (value.keys() if isinstance(value, dict) else set())
    if missing:
        raise BadInput(f"{path}: is no checkpoint of train.py: lacks {', '.join(sorted(missing))}")
    return value


def is_finite(value) -> bool:
    """Say whether `value` is a tensor without NaN and infinity."""
    return isinstance(value, torch.Tensor) and bool(value.isfinite().all())


def code_revision() -> str:
    """Return the commit these scripts are at, "+changes" when files differ from it; "" outside git."""
    def git(*flags: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *flags]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except OSError:  # git is not installed
        return ""
