"""The run folder: what it remembers of its command, the state to resume from, its log, its pictures.

Parted from train.py, which is left with training itself.
"""
import argparse
import contextlib
import json
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import checkpoints
import clips
import inference
import metrics
import pictures
import tracking
from cli import Parser
from data import FeatureFolder, folder_frames
from distributed import Group
from files import BadInput, Stopped, cannot_write, empty, plain, read_json, sole_owner, whole_file, write_json, write_text
from models import Decoder, Recipe
from resident import Split, gather, without_views

Parts = dict[str, Any]  # what has state_dict and load_state_dict: the decoder, its optimiser and moving average
TIMES = "times.jsonl"  # beside log.jsonl, which holds nothing that differs between two runs of one command


# --- the folder --------------------------------------------------------------------------------


def prepare_folder(out: Path) -> None:
    """Make a run folder's folders."""
    for name in ("checkpoints", "predictions"):
        try:
            (out / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(out / name, error) from error


@contextlib.contextmanager
def own_folder(out: Path, fresh: bool, group: Group) -> Iterator[None]:
    """Hold the run folder for this job alone, emptied first when `fresh`. Raises BadInput when another job holds it."""
    if not group.main:
        group.wait()
        yield
        return
    with sole_owner(out, out):
        if fresh:
            empty(out)
        for file in out.rglob(".*.tmp"):  # what a kill left in the middle of a write
            file.unlink()
        prepare_folder(out)
        group.wait()
        yield


# --- its command -------------------------------------------------------------------------------


KEPT = ("resume", "args", "overwrite", "debug", "device")  # flags that are this command's own, not the earlier run's


def recall(args: argparse.Namespace, parser: Parser) -> argparse.Namespace:
    """Return the arguments of an earlier run, to resume it in place (--resume) or to repeat it elsewhere (--args).

    They are parsed anew, so that they are checked as on a command line. Raises BadInput when they are not
    train.py's, and when a flag given now contradicts them.
    """
    file = args.resume / "args.json" if args.resume else args.args
    saved = read_args(file)
    unknown = set(saved["args"]) - set(vars(args))
    if unknown:
        raise BadInput(f"{file}: unknown arguments {', '.join(sorted(unknown))}; was it written by another version?")
    parser.source = file
    old = parser.parse_args([flag for name, value in saved["args"].items() for flag in as_flag(name, value)])
    for name, value in vars(args).items():
        if name not in (*KEPT, "out") and value not in (parser.get_default(name), getattr(old, name)):
            raise BadInput(f"{file}: the run has --{name.replace('_', '-')} {getattr(old, name)}, which cannot be {value} here; "
                           "leave the flag out, or start another run")
    for name in KEPT:
        setattr(old, name, getattr(args, name))
    old.out = args.resume or args.out or old.out
    return old


def read_args(file: Path) -> dict:
    """Read the args.json of a run. Raises BadInput."""
    saved = read_json(file)
    if not isinstance(saved, dict) or not all(isinstance(saved.get(key), dict) for key in ("args", "features")):
        raise BadInput(f"{file}: expected the args.json that train.py writes")
    return saved


def as_flag(name: str, value) -> list[str]:
    """Return the command line flag of one argument; none for one that was not set."""
    flag = "--" + name.replace("_", "-")
    if value is None or (value is False and name != "shuffle") or name in KEPT:
        return []
    return ["--no-shuffle"] if value is False else [flag] if value is True else [f"{flag}={value}"]


def check_same_data(args: argparse.Namespace, folders: list[FeatureFolder]) -> None:
    """Raise BadInput when a run that is resumed or repeated had other features than `folders`, by their digests."""
    file = args.resume / "args.json" if args.resume else args.args
    before = list(read_args(file)["features"].values())
    for folder in folders:
        if folder.meta["sha256"] not in before:
            raise BadInput(f"{folder.path}: holds other features than the run of {file} had, by their SHA-256; "
                           "make them again as they were, or start another run")


def git_revision() -> str | None:
    """The commit these scripts are at, with "+changes" when files differ from it; None outside a git checkout."""
    def git(*flags: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *flags], capture_output=True, text=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "") or None
    except OSError:  # git is not installed
        return None


def write_args(args: argparse.Namespace, recipe: Recipe, folders: list[FeatureFolder], out: Path) -> None:
    """Write args.json: the command, its arguments, the recipe they make, and what they ran on."""
    write_json(out / "args.json", {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "args": plain(args), "recipe": recipe._asdict(),
        "features": {str(folder.path): folder.meta["sha256"] for folder in folders},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "git_revision": git_revision()})


# --- stopping and going on ---------------------------------------------------------------------


class StopSignal:
    """A context in which Ctrl-C and SIGTERM are noted in `signal`, so that the loop can save before it stops."""

    signal: int | None = None

    def asked(self, group: Group, together: bool) -> bool:
        """Whether to stop now. Several processes stop at the same step: where they are `together` anyway, to log."""
        if group.size == 1:
            return self.signal is not None
        flag = torch.tensor(float(self.signal is not None), device=group.device)
        if together:
            group.sum(flag)
        return together and bool(flag)

    def __enter__(self):
        def note(number, frame):
            self.signal = number
        self.before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def stop_here(out: Path, parts: Parts, state: dict, step: int, stop: StopSignal, group: Group) -> Stopped:
    """Save the run's state and return the exception that ends it."""
    if group.main:
        save_state(out, parts, state)
    return Stopped(stop.signal or signal.SIGTERM, f"stopped after step {step}; go on with: python train.py --resume {out}")


def save_checkpoint(out: Path, step: int, description: dict, decoder: Decoder, best: bool) -> None:
    """Write checkpoints/model-<step>.pt, and model.pt too when it is the best so far."""
    checkpoints.save_model(out / "checkpoints" / f"model-{step:08d}.pt", description, decoder)
    if best:
        checkpoints.save_model(out / "model.pt", description, decoder)


def open_tracker(account: tracking.Account, config: dict, out: Path, args: argparse.Namespace, group: Group) -> tracking.Tracker:
    """Open the run's log, added to when resuming; in the other processes of a group, one that logs nothing."""
    if not group.main:
        return tracking.start(account._replace(mode="disabled"), "train", config)
    return tracking.start(account, "train", config, out / "log.jsonl", append=bool(args.resume))


def save_state(out: Path, parts: Parts, state: dict) -> None:
    """Write last.pt, from which a run goes on: the state of the decoder, optimiser and so on, and the counters."""
    checkpoints.save_plain(out / "last.pt", {**{name: part.state_dict() for name, part in parts.items()}, "run": state})


def load_state(out: Path, parts: Parts, state: dict, group: Group) -> None:
    """Put `parts` and `state` back as last.pt has them, and drop log lines past it. Without last.pt: from the start."""
    if (out / "last.pt").exists():
        saved = checkpoints.load_plain(out / "last.pt", {*parts, "run"})
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            run = {name: type(value)(saved["run"][name]) for name, value in state.items() if name != "total"}
            state.update(run, total=saved["run"]["total"].to(state["total"]))
        except Exception as error:  # a damaged state can break what loads it in any way
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadInput(f"{out / 'last.pt'}: does not fit this run ({reason}); remove it to go on from the start") from error
    for name in ("log.jsonl", TIMES) if group.main else ():
        rows = read_rows(out / name)
        write_text(out / name, "".join(line + "\n" for line, row in rows if row["step"] < state["step"]))


def read_rows(file: Path) -> list[tuple[str, dict]]:
    """Return the lines of a log and the row that each holds; none when there is no log, and not a last line cut short by a kill."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
        rows = [(line, json.loads(line)) for line in lines]
        if not all(isinstance(row["step"], int) for _, row in rows):
            raise ValueError("a line without a step")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"{file}: expected a line of JSON for each step logged ({error}); remove the damaged lines") from error
    return rows


def append_line(file: Path, row: dict) -> None:
    """Append one JSON line. Raises CannotWrite."""
    try:
        with open(file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
    except OSError as error:
        raise cannot_write(file, error) from error


def read_log(out: Path) -> list[dict]:
    """Return the rows of log.jsonl with the seconds of times.jsonl, one per step logged."""
    times = {row["step"]: row for _, row in read_rows(out / TIMES)}
    return [{**row, **times.get(row["step"], {})} for _, row in read_rows(out / "log.jsonl")]


# --- pictures ----------------------------------------------------------------------------------


def write_overlay(out: Path, step: int, decoder: Decoder, split: Split, tracker: tracking.Tracker) -> None:
    """Write predictions/<step>.png: the middle frame of a split with prediction and truth; black where the frame is gone."""
    own = without_views(split).own()
    index = own[len(own) // 2:][:1]
    decoder.eval()
    prediction = metrics.foreground(next(inference.predict(decoder, split.features, index)).cpu().numpy())
    decoder.train()
    folder, number = split.folder, int(index)
    packed = gather(split.masks, index, torch.device("cpu"), split.features.group)[0].numpy()
    mask = np.unpackbits(packed, axis=1, count=folder.size[1]).astype(bool)
    frame = clips.read_image_or_black(folder_frames(folder)[number], folder.size)
    with whole_file(out / "predictions" / f"{step:08d}.png") as temporary:
        clips.write_image(temporary, pictures.overlay(frame, prediction, mask), ".png")
    tracker.image(step, frame, prediction, mask, caption=f"{folder.meta['clips'][number]} {folder.meta['names'][number]}")
