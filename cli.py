"""What every script's command line shares: its flags, its device, and how it fails.

A script's last lines are

    if __name__ == "__main__":
        sys.exit(run(main))

so that bad input ends in one line on standard error and exit status 2, without a traceback.
"""
import argparse
import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from files import BadInput, Stopped


class Parser(argparse.ArgumentParser):
    """An argument parser whose help keeps the line breaks of the docstring; flags cannot be abbreviated."""

    source: Path | None = None  # the file the arguments come from, when it is not the command line

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        if self.source:
            raise BadInput(f"{self.source}: {message}")
        super().error(message)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every script has: --device, --threads, --seed, --overwrite, --debug."""
    group = parser.add_argument_group("run")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto, the best there is)")
    group.add_argument("--threads", type=positive_int, default=None, help="CPU threads (default: PyTorch's choice)")
    group.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    group.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1 (argparse type)."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text}")
    return value


def choose_device(name: str) -> torch.device:
    """Return the device named by --device. Raises BadInput for one this machine does not have."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None and accelerator.type in ("cuda", "mps") else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {name}: not on this machine ({reason}); pass --device auto or --device cpu") from error
    return device


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next allocation instead of handing it back to the system.

    PyTorch on the CPU frees and takes large blocks in every layer, each time paying for fresh pages: a tenth of AlexNet's
    time and a quarter of EfficientNet-Lite0's. Only glibc knows these settings; elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is trimmed


def progress(items: Iterable, what: str, total: int | None = None) -> Iterator:
    """Wrap `items` in a progress bar on standard error; silent when that is not a terminal."""
    return tqdm(items, desc=what, total=total, disable=not sys.stderr.isatty(), dynamic_ncols=True, leave=False)


def run(main: Callable[[], int | None]) -> int:
    """Call `main` and return the exit status: its own, or 2 with one line on standard error for bad input."""
    debug = "--debug" in sys.argv
    script = os.path.basename(sys.argv[0])
    keep_freed_memory()
    try:
        return main() or 0
    except (BadInput, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output (head, less) went away
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        if debug:
            raise
        if int(os.environ.get("RANK", 0)):  # one of several processes: the first says what all would say, and torchrun ends the rest
            time.sleep(2)
        hint = "; pass a smaller --batch-size" if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"{script}: {one_line(str(error))}{hint}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"{script}: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        return 130


def one_line(text: str) -> str:
    """Return text that may come from a damaged or hostile file as one line that a terminal shows and does not obey."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
