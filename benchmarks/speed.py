"""Measure how fast a device works, on random frames, features, masks and weights.

    python benchmarks/speed.py --device auto --seconds 3

Prints a Markdown table in some minutes. Shares are of what a copy and a product of bfloat16
matrices reach in the same run, by the bytes that operators read and write and what they compute.
"""
import functools
import itertools
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import models
import train
from benchmarks import notebook, peer
from vos import cli, featurizers, sample

NINE = [f"s{stride}{scale}" for scale in ("", "@0.5", "@0.25") for stride in (8, 16, 32)]


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, as if every one went to memory."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        gathers = func is torch.ops.aten.index_select.default  # reads as much as it writes
        moved = [result, result] if gathers else [args, kwargs, result]
        if not func.is_view:
            self.total += sum(x.nbytes for x in tree_leaves(moved) if isinstance(x, torch.Tensor))
        return result


def rate(work: Callable, device: torch.device, seconds: float) -> float:
    """Return how many times a second work() is done, after a first time."""
    done, started = -1, 0.0
    while done < 1 or time.perf_counter() < started + seconds:
        work()
        torch.get_device_module(device).synchronize()
        done += 1
        started = started or time.perf_counter()
    return done / (time.perf_counter() - started)


def measure_device(device: torch.device, side: int, seconds: float) -> tuple[float, float]:
    """Return operations a second of a product of bfloat16 matrices, bytes a second of a copy."""
    matrix = torch.randn(side, side, device=device).bfloat16()
    block = torch.ones(64, side, 1024, device=device)
    other = torch.empty_like(block)
    products = rate(lambda: matrix @ matrix, device, seconds)
    copies = rate(lambda: other.copy_(block), device, seconds)
    return 2 * side**3 * products, 2 * block.nbytes * copies


def make_step(decoder: models.Decoder, features: data.Features) -> Callable:
    """Return a function that takes a training step as train.py does, with targets made here."""
    targets = data.pool_masks(features, decoder.cells)
    optimizer = train.make_optimizer(decoder, decoder.recipe)
    batches = itertools.cycle(features.index.split(decoder.recipe.batch_size))

    def step() -> None:
        rows = next(batches)
        loss = decoder.loss(decoder(features.batch(rows)), data.rows_of(targets, rows)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (auto)")
    parser.add_argument("--seconds", type=cli.number(0, 100), default=3.0, help="a figure (3)")
    parser.add_argument("--size", type=sample.parse_size, default=(480, 854), help="HxW (480x854)")
    args = parser.parse_args()
    device, size = cli.choose_device(args.device), args.size
    side, count, batch = (1024, 32, 4) if device.type == "cpu" else (8192, 256, 32)
    torch.manual_seed(0)

    product, bandwidth = measure_device(device, side, args.seconds)
    name = getattr(torch.get_device_module(device), "get_device_name", str)(device)
    print(f"{peer.describe_machine()}; on {name} a copy moves {bandwidth / 1e9:,.0f} GB/s, a "
          f"product of bfloat16 matrices does {product / 1e12:,.2f} TFLOP/s\n\n| what | a second | "
          "share of the copy's | share of the product's | peak, GB |\n|---|--:|--:|--:|--:|")

    def show(what: str, work: Callable, each: int = 1) -> None:
        """Print a row: how many a second work() does, if it does `each` of them."""
        counts = device.type not in ("cpu", "mps")  # or the memory is the process's, so far
        if counts:
            torch.accelerator.reset_peak_memory_stats(device)
        with FlopCounterMode(display=False) as flops, Traffic() as traffic:
            work()
        times = rate(work, device, args.seconds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if counts:
            peak = torch.accelerator.max_memory_allocated(device)
        print(f"| {what} | {times * each:,.4g} | {times * traffic.total / bandwidth:.1%} | "
              f"{times * flops.get_total_flops() / product:.1%} | {peak / 1e9:.2f} |", flush=True)

    # featurizing, from pixels on the device
    shapes, frames = {}, torch.randint(256, (batch, 3, *size), dtype=torch.uint8)
    frames = frames.to(device, memory_format=torch.channels_last)
    for name, levels in {"alexnet": None, "efficientnet_lite0": NINE}.items():
        featurizer = featurizers.build_featurizer(name, levels, "random", "auto", device)
        shapes[name] = {level: (c, h, w) for level, (c, h, w) in featurizer.shapes(size).items()}
        work = torch.inference_mode()(functools.partial(featurizer, frames))
        show(f"frames featurized by {name} in {str(featurizer.compute)[6:]}", work, batch)

    # training every decoder, and predicting and scoring as training validates
    masks = torch.randint(256, (count, size[0], -(-size[1] // 8)), dtype=torch.uint8).to(device)
    for name, kind in models.DECODERS.items():
        own = shapes["alexnet" if kind is models.Simple else "efficientnet_lite0"]
        grids = [*own.values(), *[(kind.cues, h, w) for _, h, w in own.values() if kind.cues]]
        maps = [torch.randn(count, *grid, device=device).half() for grid in grids]
        features = data.Features(list(own), maps, device, torch.arange(count), masks)
        decoder = models.make_decoder(name, own, size).to(device)
        show(f"steps of {name}", make_step(decoder.train(), features))
        work = functools.partial(train.validate, decoder, features)
        show(f"frames predicted and scored by {name}", work, count)

    # the notebook's loop, its tensors on the device
    channels, *grid = shapes["alexnet"]["s32"]
    targets = data.unpack(masks, size[1])[:, None].float()
    examples = TensorDataset(torch.randn(count, channels, *grid, device=device), targets)
    batches: DataLoader = DataLoader(examples, batch_size=32)
    theirs = notebook.make_decoder(channels, size).to(device)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=5e-4)
    show("steps of the notebook", lambda: notebook.train(theirs, optimizer, batches, 10), 10)


if __name__ == "__main__":
    sys.exit(cli.run(main))
