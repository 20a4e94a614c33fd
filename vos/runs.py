"""The run folder: its command, its log, its checkpoints; going on with one that was stopped."""
import argparse
import contextlib
import io
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from vos.cli import Group
from vos.folder import FeatureFolder
from vos.images import read_image, write_image
from vos.inputs import BadInput, inside, opened, read_json
from vos.outputs import locked, new_folder, whole_file, write_json, write_text, writing
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
        except KeyboardInterrupt as stop:
            stop.args = f"stopped; go on with: python train.py --resume {shlex.quote(str(out))}",
            raise


def describe_command(args: argparse.Namespace, recipe: dict, folders: list[FeatureFolder],
                     used: list[str]) -> dict:
    """Return what args.json holds, with the full names of artifacts, `used`, to go on with."""
    plain = {name: str(value) if isinstance(value, Path) else value
             for name, value in vars(args).items()}
    names = iter(used)
    for key in ("features", "val_features"):
        if str(plain[key]).startswith("wandb:"):
            plain[key] = f"wandb:{next(names)}"
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    code = ""  # where git is not installed
    with contextlib.suppress(OSError):
        code = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True,
                              text=True).stdout.strip()
    return {"command": sys.argv, "args": plain, "recipe": recipe, "code": code,
            "features": {str(folder.path): folder.meta["sha256"] for folder in folders},
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "versions": {"python": sys.version, "torch": torch.__version__}}


def recall(run: Path, parser: argparse.ArgumentParser, given: argparse.Namespace,
           may_change: Sequence[str]) -> argparse.Namespace:
    """Return a run's arguments parsed anew, with those of `may_change` as `given`. BadInput."""
    file, flags = run / "args.json", []
    saved = read_json(file)
    try:
        for name, value in {**saved["args"], **saved["recipe"], "out": run}.items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                flags.append(flag)
            elif value is not None and value is not False:
                flags.append(f"{flag}={','.join(value) if isinstance(value, list) else value}")
        args = parser.parse_args(flags)
    except (BadInput, TypeError, KeyError) as error:
        raise BadInput(f"{file}: is not what train.py writes ({error})") from error

    for name, value in vars(given).items():
        if name in may_change:
            setattr(args, name, value)
        elif value not in (parser.get_default(name), getattr(args, name)):
            raise BadInput(f"--{name.replace('_', '-')} {value}: {file} has {getattr(args, name)}; "
                           "leave the flag out, or start another run")
    return args


def append_log(out: Path, row: dict) -> None:
    """Append a line to log.jsonl. Raises CannotWrite."""
    file = out / "log.jsonl"
    with writing(file), open(file, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(row, allow_nan=False) + "\n")


def read_log(out: Path) -> list[dict]:
    """Return the rows of log.jsonl: step, loss and maybe val_iou of each log point. BadInput."""
    file = out / "log.jsonl"
    with opened(file, 1 << 30) as handle:
        lines = handle.read().split(b"\n")[:-1]  # the last: cut short by a kill
    with contextlib.suppress(ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        rows = [json.loads(line) for line in lines]
        if all(math.isfinite(row["step"] + row["loss"] + row.get("val_iou", 0)) for row in rows):
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


def spread(ends: Sequence[dict], key: str) -> str:
    """Return the mean of a value, and of several its sample standard deviation; "-" of none."""
    values = [end[key] for end in ends if key in end]
    text = f"{statistics.fmean(values):.4f}" if values else "-"
    return f"{text} +- {statistics.stdev(values):.4f}" if len(values) > 1 else text


def say_end(*ends: dict) -> str:
    """Say in words what `find_end` found of a training, or of several."""
    if "val_iou" not in ends[0]:
        return f"loss {spread(ends, 'loss')} at the last step"
    best = "each one's best step" if len(ends) > 1 else f"step {ends[0]['best_step']}, its best"
    return (f"val IoU {spread(ends, 'best_val_iou')} at {best}; {spread(ends, 'val_iou')} at the "
            "last step")


def save_checkpoint(path: Path, value: dict) -> None:
    """Write a dict of tensors and plain values. The same values give the same bytes."""
    buffer = io.BytesIO()  # written to a file, the archive would hold the file's temporary name
    torch.save(value, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path, keys: set[str]) -> dict:
    """Read a dict with at least `keys`. Raises BadInput for another, or one that is damaged."""
    with opened(path) as file, warnings.catch_warnings(action="ignore"):
        try:
            with zipfile.ZipFile(file) as archive:  # torch packs nothing: packed, it is a bomb
                size = sum(entry.file_size for entry in archive.infolist())
                if size > path.stat().st_size or archive.testzip():
                    raise ValueError("its checksums or sizes are wrong")
            file.seek(0)
            value = torch.load(file, map_location="cpu", weights_only=True)
            if keys - value.keys():
                raise ValueError(f"it lacks {', '.join(sorted(keys - value.keys()))}")
        except Exception as error:  # damaged bytes raise every kind
            raise BadInput(f"{path}: cannot be read as a checkpoint ({error!r:.200})") from error
    return value


def save_state(out: Path, parts: dict, state: dict) -> None:
    """Write last.pt, from which a run goes on: the state dicts of `parts`, and counters."""
    saved = {name: part.state_dict() for name, part in parts.items()}
    save_checkpoint(out / "last.pt", {**saved, "run": state})


def load_state(out: Path, parts: dict, state: dict, write: bool) -> dict:
    """Put `parts` back as last.pt has them; return its counters. write: cut the log to them."""
    if (out / "last.pt").exists():
        saved = load_checkpoint(out / "last.pt", {*parts, "run"})
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            state = {name: type(value)(saved["run"][name]) for name, value in state.items()}
            if state["step"] < 0:
                raise ValueError(f"its step is {state['step']}")
        except Exception as error:  # a damaged state can break what loads it in any way
            raise BadInput(f"{out / 'last.pt'}: does not fit this run ({error!r:.200}); remove it "
                           "to go on from the start") from error
    if write:
        rows = read_log(out) if state["step"] else []
        kept = (json.dumps(row) + "\n" for row in rows if row["step"] < state["step"])
        write_text(out / "log.jsonl", "".join(kept))
    return state


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
