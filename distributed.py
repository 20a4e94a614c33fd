"""Several processes on one job, as torchrun starts them; without it, a group of one that costs nothing.

    torchrun --nproc-per-node 2 train.py --features features/alexnet-train

Gradients and counts are summed over the processes by PyTorch's own distributed package: nccl on CUDA devices,
gloo elsewhere. A process that dies makes torchrun stop the others; one that hangs is given up after TIMEOUT.
"""
import atexit
import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from files import BadInput

TIMEOUT = datetime.timedelta(minutes=10)  # a wait may be long where one process has more to do: it writes for all


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A context for what all processes do at once. Raises BadInput when one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][-200:]
        raise BadInput(f"another process of this job ended, or did not answer for {TIMEOUT} ({reason}); what it said tells why. "
                       "Nothing half-written is left: give the command again to featurize on, or train.py --resume RUN") from error


def refuse_several(script: str) -> None:
    """Raise BadInput when torchrun started this script in several processes, which it is not made for."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput(f"runs as one process; start it with: python {script}, without torchrun")


class Group(NamedTuple):
    """This process's place among those of the job."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def holds(self, index: torch.Tensor) -> torch.Tensor:
        """Return which frames of `index` (int64, any shape) are this process's share: every size-th."""
        return index % self.size == self.rank

    def sum(self, *values: torch.Tensor) -> None:
        """Replace each tensor by its sum over the processes, in place."""
        if self.size > 1:
            with together():
                for value in values:
                    dist.all_reduce(value)

    def sum_gradients(self, module: nn.Module) -> None:
        """Replace every gradient by its sum over the processes; a missing one (no frames here) counts as zero."""
        if self.size == 1:
            return
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message instead of many
        with together():
            dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([parameter.numel() for parameter in parameters])):
            parameter.grad = part.view_as(parameter)

    def interleave(self, rows: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        """Return frames first .. stop, [stop - first, ...], from every process's share of them, `rows` [n, ...]."""
        if self.size == 1:
            return rows
        most = -(-(stop - first) // self.size) + 1
        padded = torch.zeros((most, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        padded[:len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with together():
            dist.all_gather(parts, padded)
        whole = torch.empty((stop - first, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        for rank, part in enumerate(parts):
            skip = (rank - first) % self.size
            target = whole[skip::self.size]
            target.copy_(part[:len(target)])
        return whole

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            with together():
                dist.barrier()


def join(device: torch.device) -> tuple[Group, torch.device]:
    """Join the group that torchrun's environment names, or be one alone. Returns it and this process's device.

    On CUDA each process takes the device of its local rank. Raises BadInput when there are fewer devices.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Group(device=device), device
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise BadInput(f"process {local} of this machine has no CUDA device, there are {torch.cuda.device_count()}; "
                           "start fewer with --nproc-per-node, or pass --device cpu")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    with together():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)
    return Group(rank, size, device), device
