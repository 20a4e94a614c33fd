"""The run folder: its command, its log, the state to resume from, its pictures."""
import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from vos.checkpoints import code_revision, load_checkpoint, save_checkpoint
from vos.distributed import Group
from vos.folder import FeatureFolder
from vos.images import image_size, read_image, write_image
from vos.inputs import BadInput, inside, opened, read_json
from vos.outputs import cannot_write, locked, new_folder, whole_file, write_json, write_text
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
        for file in out.rglob(".*.tmp"):  # what a kill left in the middle of a write
            file.unlink()
        group.wait()
        yield


def describe_command(args: argparse.Namespace, recipe: dict, folders: list[FeatureFolder],
                     used: list[str]) -> dict:
    """Return what args.json holds: the command, the recipe, and what they ran on.

    used: full names of the artifacts that the flags named, which a resumed run goes on with.
    """
    plain = {name: str(value) if isinstance(value, Path) else value
             for name, value in vars(args).items()}
    names = iter(used)
    for key in ("features", "val_features"):
        if str(plain[key]).startswith("wandb:"):
            plain[key] = f"wandb:{next(names)}"
    return {"command": sys.argv, "args": plain, "recipe": recipe, "code": code_revision(),
            "features": {str(folder.path): folder.meta["sha256"] for folder in folders},
            "versions": {"python": sys.version, "torch": torch.__version__}}


def recall(run: Path, parser: argparse.ArgumentParser, given: argparse.Namespace,
           may_change: Sequence[str]) -> argparse.Namespace:
    """Return the arguments and recipe of the run that is resumed, parsed anew and so checked.

    Of the flags `given` now those of `may_change` count; another that differs raises BadInput.
    """
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
            raise BadInput(f"{file}: the run has --{name.replace('_', '-')} {getattr(args, name)}, "
                           f"not {value}; leave the flag out, or start another run")
    if saved.get("code") != code_revision():
        print(f"note: {run} was started by another revision of the code: {saved.get('code')}")
    return args


def check_same_features(run: Path, folders: list[FeatureFolder]) -> None:
    """Raise BadInput when a resumed run had other features than `folders`, by their digests."""
    before = read_json(run / "args.json").get("features") or {}
    for folder in folders:
        if folder.meta["sha256"] not in before.values():
            raise BadInput(f"{folder.path}: holds other features than {run} was trained on; make "
                           "them again as they were, or start another run")


def append_log(out: Path, row: dict) -> None:
    """Append a line to log.jsonl. Raises CannotWrite."""
    try:
        with open(out / "log.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps(row, allow_nan=False) + "\n")
    except OSError as error:
        raise cannot_write(out / "log.jsonl", error) from error


def read_log(out: Path) -> list[dict]:
    """Return the rows of log.jsonl, a dict with "step" for each step logged. Raises BadInput."""
    file = out / "log.jsonl"
    if not file.exists():
        return []
    with opened(file, 1 << 30) as handle:
        lines = handle.read().split(b"\n")[:-1]  # the last: cut short by a kill
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        rows = [json.loads(line) for line in lines]
        if all(type(row["step"]) is int for row in rows):
            return rows
    raise BadInput(f"{file}: expected JSON with a step in each line; remove the damaged lines")


def load_state(out: Path, parts: dict, state: dict, write: bool) -> dict:
    """Put `parts` back as last.pt has them; return its counters, without last.pt `state`.

    write: drop the lines of the log past that state.
    """
    if (out / "last.pt").exists():
        saved = load_checkpoint(out / "last.pt", {*parts, "run"})
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            state = {name: type(value)(saved["run"][name]) for name, value in state.items()}
        except Exception as error:  # a damaged state can break what loads it in any way
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadInput(f"{out / 'last.pt'}: does not fit this run ({reason}); remove it to go "
                           "on from the start") from error
    if write:
        rows = [row for row in read_log(out) if row["step"] < state["step"]]
        write_text(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return state


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
    """Write a row's frame with prediction and mask, bool [H, W], over it; return the frame.

    It is black where the frame is gone, is in a video, or was resized.
    """
    frame = np.zeros((*mask.shape, 3), np.uint8)
    with contextlib.suppress(BadInput):
        image = inside(Path(folder.meta["data"]), folder.paths["raw"][row], folder.path)
        if image_size(image) == mask.shape:
            frame = read_image(image)
    file.parent.mkdir(exist_ok=True)
    with whole_file(file) as temporary:
        write_image(temporary, overlay(frame, prediction, mask), format="PNG")
    return frame
