"""The run folder: what it remembers of its command, the state to resume from, its log, its pictures.

Parted from train.py, which is left with training itself.
"""
import argparse
import contextlib
import json
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch

import checkpoints
import clips
import metrics
import models
import pictures
import tracking
from data import FeatureFolder, folder_frames
from distributed import Group
from files import BadInput, Stopped, plain, read_json, try_lock, whole_file, write_json, write_text
from models import Decoder, Recipe
from resident import Split, gather

TIMES = "times.jsonl"  # beside log.jsonl, which holds nothing that differs between two runs of one command


# --- the folder --------------------------------------------------------------------------------


def prepare_folder(out: Path) -> None:
    """Make a run folder's folders."""
    for name in ("checkpoints", "predictions"):
        (out / name).mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def own_folder(out: Path, fresh: bool, group: Group) -> Iterator[None]:
    """Hold the run folder for this job alone, emptied first when `fresh`. Raises BadInput when another job holds it."""
    if not group.main:
        group.wait()
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a") as lock:
        if not try_lock(lock):
            raise BadInput(f"{out}: another process is training there; wait for it, or choose another --out")
        for path in out.iterdir() if fresh else ():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        prepare_folder(out)
        group.wait()
        yield
    with contextlib.suppress(OSError):
        (out / "lock").unlink()


# --- its command -------------------------------------------------------------------------------


def recall(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments of an earlier run, to resume it in place (--resume) or to repeat it elsewhere (--args)."""
    file = args.resume / "args.json" if args.resume else args.args
    saved = read_json(file)
    if not isinstance(saved, dict) or not isinstance(saved.get("args"), dict):
        raise BadInput(f"{file}: expected the args.json that train.py writes")
    unknown = set(saved["args"]) - set(vars(args))
    if unknown:
        raise BadInput(f"{file}: unknown arguments {', '.join(sorted(unknown))}; was it written by another version?")
    old = argparse.Namespace(**{**vars(args), **saved["args"]})
    old.out = args.resume or args.out or Path(old.out)
    old.resume, old.args, old.overwrite, old.debug, old.device = args.resume, args.args, args.overwrite, args.debug, args.device
    return old


def write_args(args: argparse.Namespace, recipe: Recipe, folders: list[FeatureFolder], out: Path) -> None:
    """Write args.json: the command, its arguments, the recipe they make, and what they ran on."""
    revision = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    write_json(out / "args.json", {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "args": plain(args), "recipe": recipe._asdict(),
        "features": {str(folder.path): folder.meta["sha256"] for folder in folders},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "git_revision": revision.stdout.strip() or None})


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


def stop_here(out: Path, parts: dict[str, object], state: dict, step: int, stop: StopSignal, group: Group) -> Stopped:
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


def save_state(out: Path, parts: dict[str, object], state: dict) -> None:
    """Write last.pt, from which a run goes on: the state of the decoder, optimiser and so on, and the counters."""
    checkpoints.save_plain(out / "last.pt", {**{name: part.state_dict() for name, part in parts.items()}, "run": state})


def load_state(out: Path, parts: dict[str, object], state: dict, group: Group) -> None:
    """Put `parts` and `state` back as last.pt has them, and drop log lines past it. Without last.pt: from the start."""
    if (out / "last.pt").exists():
        saved = checkpoints.load_plain(out / "last.pt", {*parts, "run"})
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        state.update(saved["run"] | {"total": saved["run"]["total"].to(state["total"].device)})
    for name in ("log.jsonl", TIMES) if group.main else ():
        lines = (out / name).read_text(encoding="utf-8").splitlines(keepends=True) if (out / name).exists() else []
        write_text(out / name, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] < state["step"]))


def append_line(file: Path, row: dict) -> None:
    """Append one JSON line."""
    with open(file, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(row) + "\n")


def read_log(out: Path) -> list[dict]:
    """Return the rows of log.jsonl with the seconds of times.jsonl, one per step logged."""
    logs, times = ([json.loads(line) for line in (out / name).read_text().splitlines()] for name in ("log.jsonl", TIMES))
    return [{**row, **{time["step"]: time for time in times}.get(row["step"], {})} for row in logs]


# --- pictures ----------------------------------------------------------------------------------


def write_overlay(out: Path, step: int, decoder: Decoder, split: Split, tracker: tracking.Tracker) -> None:
    """Write predictions/<step>.png: the middle frame of a split with prediction and truth; black where the frame is gone."""
    index = split.own()[len(split.own()) // 2:][:1]
    decoder.eval()
    prediction = metrics.foreground(next(models.predict(decoder, split.features, index))[0].cpu().numpy())
    decoder.train()
    folder, number = split.folder, int(index)
    mask = np.unpackbits(gather(split.masks, index, torch.device("cpu"), split.features.group)[0].numpy(), axis=1, count=folder.size[1]).astype(bool)
    frame = clips.read_image_or_black(folder_frames(folder)[number], folder.size)
    with whole_file(out / "predictions" / f"{step:08d}.png") as temporary:
        iio.imwrite(temporary, pictures.overlay(frame, prediction, mask), extension=".png")
    tracker.image(step, frame, prediction, mask, caption=f"{folder.meta['clips'][number]} {folder.meta['names'][number]}")
