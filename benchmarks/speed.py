"""Measure how fast a device works, on random frames, features, masks and weights.

    python benchmarks/speed.py --device auto

Prints a Markdown table in ten minutes on 2 cores. Shares are of what a copy and a product of
matrices, of float32 or bfloat16, reach: by what there is to read, as kept, and to compute.
"""
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import models
import train
from benchmarks import notebook, peer
from vos import cli, featurizers

LEVELS = cli.parse_levels("s8,s16,s32,s8@0.5,s16@0.5,s32@0.5,s8@0.25,s16@0.25,s32@0.25")
FRAMES = 32


def measure(work: Callable, device: torch.device) -> tuple[float, float]:
    """Return how many times a second work() is done, and how many operations that takes."""
    with FlopCounterMode(display=False) as flops:
        work()
    wait = torch.get_device_module(device).synchronize
    timer = Timer("work(); wait()", globals={"work": work, "wait": wait},
                  num_threads=torch.get_num_threads())
    rate = 1 / timer.blocked_autorange().median
    return rate, rate * flops.get_total_flops()


def step(decoder: models.Decoder, optimizer, features: data.Features, targets) -> None:
    """Take a training step as train.py does, on random rows."""
    rows = torch.randint(FRAMES, (decoder.recipe.batch_size,))
    loss = decoder.loss(decoder(features.batch(rows)), data.rows_of(targets, rows)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (auto)")
    parser.add_argument("--size", type=cli.parse_size, default=(480, 854), help="HxW (480x854)")
    args = parser.parse_args()
    device, size = cli.choose_device(args.device), args.size

    # what the device can do
    side, batch = (1024, 4) if device.type == "cpu" else (8192, 32)
    matrix = torch.randn(side, side, device=device)
    product = max(measure(partial(torch.matmul, each, each), device)[1]
                  for each in (matrix, matrix.bfloat16()))  # not every CPU is fast with these
    block = torch.ones(64, side, 1024, device=device)
    copied = 2 * block.nbytes * measure(block.clone, device)[0]
    name = getattr(torch.get_device_module(device), "get_device_name", str)(device)
    print(f"{peer.describe_machine()}; {name} copies {copied / 1e9:,.0f} GB/s and multiplies "
          f"matrices with {product / 1e12:,.2f} TFLOP/s\n\n| what | a second | share of "
          "the copy | share of the product | peak so far, GB |\n|---|--:|--:|--:|--:|")

    def show(what: str, count: int, read: int, work: Callable) -> None:
        """Print a row: work() does `count` of what has `read` bytes to read."""
        rate, operations = measure(work, device)
        peak = peer.peak_memory(resource.getrusage(resource.RUSAGE_SELF))
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 1e9
        print(f"| {what} | {rate * count:,.4g} | {rate * count * read / copied:.1%} | "
              f"{operations / product:.1%} | {peak:.2f} |", flush=True)

    shapes, frames = {}, torch.randint(256, (batch, 3, *size), dtype=torch.uint8, device=device)
    for name, levels in {"alexnet": None, "efficientnet_lite0": LEVELS}.items():
        featurizer = featurizers.build_featurizer(name, levels, "random", "auto", device)
        shapes[name] = {level: (c, h, w) for level, (c, h, w) in featurizer.shapes(size).items()}
        show(f"frames of {name}", batch, frames[0].nbytes, partial(featurizer, frames))

    masks = torch.randint(256, (FRAMES, size[0], -(-size[1] // 8)), dtype=torch.uint8)
    for name, kind in models.DECODERS.items():
        own = shapes["alexnet" if kind is models.Simple else "efficientnet_lite0"]
        grids = [*own.values(), *[(kind.cues, h, w) for _, h, w in own.values() if kind.cues]]
        maps = [torch.randn(FRAMES, *grid, device=device).half() for grid in grids]
        features = data.Features(list(own), maps, device, torch.arange(FRAMES), masks)
        read = sum(each[0].nbytes for each in maps)
        decoder = models.make_decoder(name, own, size).to(device)
        targets = data.pool_masks(features, decoder.cells)
        optimizer = train.make_optimizer(decoder, kind.recipe)
        show(f"steps of {name}", 1, read * kind.recipe.batch_size,
             partial(step, decoder.train(), optimizer, features, targets))
        show(f"frames predicted and scored by {name}", FRAMES, read,
             partial(train.validate, decoder, features))

    inputs = torch.randn(FRAMES, *shapes["alexnet"]["s32"], device=device)
    targets = data.unpack(masks, size[1])[:, None].float().to(device)
    theirs = notebook.make_decoder(len(inputs[0]), size).to(device)
    steps = partial(notebook.train, theirs, inputs, targets)
    show("steps of the notebook", 101, inputs.nbytes, steps)


if __name__ == "__main__":
    sys.exit(cli.run(main))
