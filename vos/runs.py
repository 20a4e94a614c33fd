"""The run folder: its command, its log, its checkpoints, its pictures."""
import argparse
import contextlib
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from vos.distributed import Group
from vos.folder import FeatureFolder
from vos.images import read_image, write_image
from vos.inputs import BadInput, inside, opened, read_json
from vos.outputs import Stopped, locked, new_folder, whole_file, write_json, write_text, writing
from vos.pictures import overlay


@contextlib.contextmanager
def open_run(out: Path, command: dict, overwrite: bool, inputs: Sequence[Path], resume: bool,
             group: Group) -> Iterator[None]:
    """Hold the run folder for this job, made anew with `command` as args.json unless resumed."""
    if not group.main:
        group.wait()
        yield
        return
    if not resume:
        with new_folder(out, "run", overwrite, inputs) as folder:
            write_json(folder / "args.json", command)
            write_text(folder / "log.jsonl", "")
    with locked(out):
        before = read_json(out / "args.json").get("features")
        if not isinstance(before, dict) or list(before.values()) != [*command["features"].values()]:
            raise BadInput(f"{', '.join(command['features'])}: other features than {out} was "
                           "trained on; make them again as they were, or start another run")
        for file in out.rglob(".*.tmp"):  # what a kill left in the middle of a write
            file.unlink()
        group.wait()
        try:
            yield
        except Stopped as stopped:
            number, text = stopped.args
            again = f"python train.py --resume {shlex.quote(str(out))}"
            raise Stopped(number, f"{text}; go on with: {again}") from None


def code_revision() -> str:
    """Return the commit of these scripts, "+changes" when files differ from it; "" outside git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True,
                              text=True).stdout.strip()
    except OSError:  # git is not installed
        return ""


def describe_command(args: argparse.Namespace, recipe: dict, folders: list[FeatureFolder],
                     used: list[str]) -> dict:
    """Return what args.json holds, with the full names of artifacts, `used`, to go on with."""
    plain = {name: str(value) if isinstance(value, Path) else value
             for name, value in vars(args).items()}
    names = iter(used)
    for key in ("features", "val_features"):
        if str(plain[key]).startswith("wandb:"):
            plain[key] = f"wandb:{next(names)}"
    return {"command": sys.argv, "args": plain, "recipe": recipe, "code": code_revision(),
            "features": {str(folder.path): folder.meta["sha256"] for folder in folders},
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "versions": {"python": sys.version, "torch": torch.__version__}}


def append_log(out: Path, row: dict) -> None:
    """Append a line to log.jsonl. Raises CannotWrite."""
    file = out / "log.jsonl"
    with writing(file), open(file, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(row, allow_nan=False) + "\n")


def read_log(out: Path) -> list[dict]:
    """Return the rows of log.jsonl: step, loss and maybe val_iou of each log point. BadInput."""
    file = out / "log.jsonl"
    if not file.exists():
        return []
    with opened(file, 1 << 30) as handle:
        lines = handle.read().split(b"\n")[:-1]  # the last: cut short by a kill
    with contextlib.suppress(ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        rows = [json.loads(line) for line in lines]
        finite = all(math.isfinite(row["loss"] + row.get("val_iou", 0)) for row in rows)
        if finite and all(type(row["step"]) is int for row in rows):
            return rows
    raise BadInput(f"{file}: expected JSON with a step and a loss in each line; remove the damaged "
                   "lines")


def find_end(rows: list[dict]) -> dict:
    """Return the last step of a log, its loss, and its val IoU, if it validated; {} of no rows.

    Then also the best IoU and its step, the first of equals: the step that model.pt is from.
    """
    last = rows[-1] if rows else {}
    end = {key: last[key] for key in ("step", "loss", "val_iou") if key in last}
    if "val_iou" in end:
        best = max(rows, key=lambda row: row.get("val_iou", -1))
        end |= {"best_step": best["step"], "best_val_iou": best["val_iou"]}
    return end


def say_end(end: dict) -> str:
    """Say in words what `find_end` found."""
    if not end:
        return "its log has no lines"
    if "val_iou" not in end:
        return f"loss {end['loss']:.4f} at the last step"
    return (f"val IoU {end['best_val_iou']:.4f} at step {end['best_step']}, its best; "
            f"{end['val_iou']:.4f} at the last step")


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


def save_state(out: Path, parts: dict, state: dict) -> None:
    """Write last.pt, from which a run goes on: the state dicts of `parts`, and counters."""
    saved = {name: part.state_dict() for name, part in parts.items()}
    save_checkpoint(out / "last.pt", {**saved, "run": state})


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that Ctrl-C, SIGTERM and SIGHUP are added to, so that a loop can save first."""
    noted: list[int] = []
    names = {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal))
    before = {name: signal.signal(getattr(signal, name), lambda number, _: noted.append(number))
              for name in names}
    try:
        yield noted
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def write_overlay(file: Path, folder: FeatureFolder, row: int, prediction: np.ndarray,
                  mask: np.ndarray) -> np.ndarray:
    """Write a row's frame with prediction and mask, bool [H, W], over it; return the frame."""
    frame = np.zeros((*mask.shape, 3), np.uint8)  # where it is gone, in a video, or was resized
    with contextlib.suppress(BadInput):
        image = read_image(inside(Path(folder.meta["data"]), folder.paths["raw"][row], folder.path))
        frame = image if image.shape == frame.shape else frame
    file.parent.mkdir(exist_ok=True)
    with whole_file(file) as temporary:
        write_image(temporary, overlay(frame, prediction, mask), format="PNG")
    return frame


if __name__ == "__main__":
    from vos import cli, compare  # which lists the runs of a folder
    sys.exit(cli.run(compare.main))
