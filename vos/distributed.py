"""Several processes on one job, as torchrun starts them; without it, a group of one."""
import atexit
import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from vos.cli import choose_device


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

    def wrap(self, decoder: nn.Module) -> nn.Module:
        """Return a module whose gradients are averaged over the processes."""
        return nn.parallel.DistributedDataParallel(decoder) if self.size > 1 else decoder


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
    rank = int(os.environ["RANK"])
    return Group(rank, size, rank == 0), device
