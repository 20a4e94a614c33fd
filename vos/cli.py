"""What the scripts share: flags, device, several processes as torchrun starts them, failing."""
import argparse
import atexit
import contextlib
import ctypes
import gc
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm

from vos.inputs import BadInput


class Parser(argparse.ArgumentParser):
    """A parser that keeps the docstring's line breaks and raises BadInput for bad flags."""

    def __init__(self, doc: str | None):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; --help lists the flags")


def add_run_flags(parser: argparse.ArgumentParser, computes: bool = True) -> None:
    """Add the flags that every script has; --device and --threads only where it `computes`."""
    group = parser.add_argument_group("run")
    default = "online" if os.environ.get("WANDB_SWEEP_ID") else "disabled"
    group.add_argument("--wandb", type=parse_mode, default=os.environ.get("WANDB_MODE") or default,
                       metavar="MODE", help="log to Weights & Biases too: online, offline or "
                       "disabled (default: WANDB_MODE, else disabled)")
    if computes:
        group.add_argument("--device", default="auto",
                           help="auto, cpu, cuda, cuda:N or mps (default: auto, the best there is)")
        group.add_argument("--threads", type=count(1024), help="CPU threads (default: PyTorch's)")
    group.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def number(low: float, high: float, kind: type = float) -> Callable:
    """Return an argparse type: a number of `kind` from `low` to `high`, both included."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:  # false for NaN
                return kind(text)
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"expected a {what} from {low} to {high}, found {text}")
    return parse


def count(most: int, least: int = 1) -> Callable:
    """Return an argparse type: a whole number from `least` to `most`."""
    return number(least, most, int)


def parse_mode(text: str) -> str:
    """Parse where to log (argparse type)."""
    if text.lower() not in ("disabled", "offline", "online"):
        raise argparse.ArgumentTypeError(f"expected disabled, offline or online, found {text}")
    return text.lower()


def parse_size(text: str) -> tuple[int, ...]:
    """Parse "480x854" as (H, W) (argparse type)."""
    return tuple(map(count(8000, least=32), text.partition("x")[::2]))


def parse_levels(text: str) -> list[str]:
    """Parse "s8,s16@.5" into canonical names of levels (argparse type)."""
    return list(dict.fromkeys(level_name(*parse_level(level)) for level in text.split(",")))


def parse_level(level: str) -> tuple[str, float]:
    """Part a level's name: "s16" -> ("s16", 1.0), "s16@0.5" -> ("s16", 0.5). Raises BadInput."""
    stride, at, scale = level.partition("@")
    with contextlib.suppress(ValueError):
        pixels, value = int(stride.removeprefix("s")), float(scale) if at else 1.0
        if stride[:1] == "s" and 0 < pixels <= 4096 and 0.1 <= value <= 4:
            return f"s{pixels}", value
    raise BadInput(f"level {level!r}: expected a stride such as s16, or s16@0.5 at half the size")


def level_name(stride: str, scale: float) -> str:
    """Return a level's canonical name; `parse_level` backwards."""
    return stride if scale == 1 else f"{stride}@{scale:.6g}"


def level_stride(level: str) -> float:
    """Return a level's stride in pixels of the frame at its own size: 32 for s16@0.5."""
    stride, scale = parse_level(level)
    return int(stride[1:]) / scale


def choose_device(name: str, threads: int | None = None) -> torch.device:
    """Return the device of --device, and let the CPU use --threads. BadInput if there is none."""
    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found and found.type in ("cuda", "mps") else torch.device("cpu")
    try:
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
            raise RuntimeError("expected cpu, cuda, cuda:N or mps")
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"--device {name}: not on this machine ({reason}); pass cpu") from error


class Group(NamedTuple):
    """This process's place among those of the job."""

    rank: int = 0
    size: int = 1
    main: bool = True  # whether this process writes and prints

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Replace a tensor by its sum over the processes, in place; return it."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


ALONE = Group()


def join(device: torch.device) -> tuple[Group, torch.device]:
    """Join torchrun's group, or be one alone; return it, and this process's device. BadInput."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return ALONE, device
    if device.type == "cuda":
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
    atexit.register(gc.collect)  # goes first: a wrapped decoder, in a cycle, still holds the group
    rank = int(os.environ["RANK"])
    return Group(rank, size, rank == 0), device


def progress(items: Iterable, what: str, total: int | None = None) -> tqdm:
    """Wrap `items` in a progress bar on standard error; silent when that is not a terminal."""
    hidden = None if sys.stderr else True  # None: where that is no terminal
    return tqdm(items, what, total, disable=hidden, dynamic_ncols=True, leave=False)


def say(text: str, **where) -> None:
    """Print a line in which control characters, of a file's name say, are spelled out."""
    shown = (letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    print("".join(shown), **where)


def complain(text: str) -> None:
    """As `say`, on standard error, if there is one."""
    with contextlib.suppress(OSError, ValueError):
        say(text, file=sys.stderr, flush=True)


def fetch(source: str | None, mode: str, used: list[str]) -> Path | None:
    """Return `source` as a path; of a "wandb:...", fetched, the full name is added to `used`."""
    if not str(source).startswith("wandb:"):
        return None if source is None else Path(source)
    from vos import tracking
    folder, name = tracking.fetch(source, mode)
    used.append(name)
    return folder


def tracked(mode: str, job: str, config: dict, used: list[str]):
    """Return a context manager of the run on Weights & Biases; of None when logging is disabled."""
    if mode == "disabled":
        return contextlib.nullcontext()
    from vos import tracking
    return tracking.start(mode, job, config, used)


def run(main: Callable[[], int | None], several: bool = False) -> int:
    """Call `main`, in one process or `several`; return its status, or 2 and a line on bad input."""
    with contextlib.suppress(OSError, AttributeError):  # glibc, told to keep freed memory, saves
        libc = ctypes.CDLL("libc.so.6")  # a tenth of AlexNet's time and a quarter of Lite0's
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is trimmed
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows only ASCII
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        if not several and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise BadInput("runs as one process; start it with python, without torchrun")
        return main() or 0
    except (BadInput, OSError, ValueError, ArithmeticError, MemoryError, torch.OutOfMemoryError,
            torch.linalg.LinAlgError) as error:
        if "--debug" in sys.argv:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            text = f"out of memory ({text}); pass smaller frames, fewer levels or --resident disk"
        status = 1 if isinstance(error, FloatingPointError) else 2  # a training that diverged
    except KeyboardInterrupt as stop:
        status, text = 130, str(stop) or "interrupted"
    complain(f"{os.path.basename(sys.argv[0])}: {text}")
    return status
