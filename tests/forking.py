"""Running a script in a fork of this process, to be killed or starved at a chosen moment.

A fork has everything imported, so that hundreds of runs cost what a few processes would.
"""
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import Result, call

SECONDS = 180  # that a run may take on a busy machine
# what Python tells an audit hook
WRITES = ("open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def forked(name: str, *flags, prepare: Callable[[], None] = lambda: None) -> Result:
    """Run a script in a fork, where `prepare` is called first; its status is -9 after SIGKILL."""
    torch.set_num_threads(1)  # threads do not survive a fork
    pipes = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            signal.alarm(SECONDS)
            prepare()
            result = call(name, *flags)
            status = result.status
            os.write(pipes[0][1], result.out.encode()[-30_000:])
            os.write(pipes[1][1], result.err.encode()[-30_000:])
        finally:
            os._exit(status)

    _, status = os.waitpid(pid, 0)
    texts = []
    for read_end, write_end in pipes:
        os.close(write_end)
        with os.fdopen(read_end, "rb") as file:
            texts.append(file.read().decode())
    return Result(os.waitstatus_to_exitcode(status), *texts)


def at_write(root: Path, number: int, then: int) -> Callable[[], None]:
    """Return what to prepare a fork with, so that it sends itself the signal `then` at a write.

    The signal comes just before its write `number` below `root`.
    Writes count from 0: opening a file to write, renaming, linking, removing and making folders.
    """
    def prepare() -> None:
        seen = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event in WRITES and is_write(event, arguments) and below(arguments[0], root):
                if seen == number:
                    os.kill(os.getpid(), then)
                seen += 1
        sys.addaudithook(hook)
    return prepare


def is_write(event: str, arguments: tuple) -> bool:
    changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    return event != "open" or bool((arguments[2] or 0) & changes)


def below(path, root: Path) -> bool:
    """Whether a path of an audit event, not a file descriptor, is in `root`."""
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    return os.path.abspath(os.fsdecode(path)).startswith(str(root))
