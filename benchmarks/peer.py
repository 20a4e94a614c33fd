"""Time this project's scripts beside the contest notebook's pipeline, in turns, on the CPU.

    python benchmarks/peer.py --data DAVIS --weights ALEXNET --turns 3

Prints a Markdown table: medians over the turns (lowest to highest), without starting and imports.
N frames, B batch, C channels, h w feature grid, H W frame.
"""
import itertools
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vos import cli, featurizers, images, sources
from vos.inputs import BadInput

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (  # the README's; the first two get --data and --weights
    "featurize.py --featurizer alexnet --split train",
    "featurize.py --featurizer alexnet --split val",
    "train.py --features features/alexnet-train --no-pictures --log-every 1000",
    "evaluate.py --model runs/simple --features features/alexnet-val --no-pictures",
)
ROWS = ("featurize, s", "101 steps, s", "predict, write, score, s", "peak memory, GB")


def make_decoder(channels: int, size: tuple[int, int]) -> nn.Sequential:
    """Return the notebook's decoder: features [B, C, h, w] to probabilities [B, 1, H, W]."""
    return nn.Sequential(nn.Conv2d(channels, 1, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(size))


def train(decoder: nn.Module, features, masks, steps: int = 101, batch: int = 32) -> list[float]:
    """Train as the notebook does on features [C, h, w] and masks [1, H, W]; return all losses."""
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-4)
    epoch: DataLoader = DataLoader(list(zip(features, masks)), batch)  # type: ignore[arg-type]
    batches = itertools.chain.from_iterable(itertools.repeat(epoch))
    losses = []
    for x, target in itertools.islice(batches, steps):
        loss = nn.functional.binary_cross_entropy(decoder(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())  # itself it keeps the memory of every pixel
    return torch.stack(losses).tolist()


def run_notebook(root: Path, weights: str | None) -> list[float]:
    """Run the notebook's pipeline in plain PyTorch, untuned; return ROWS and mean IoU."""
    training, validation = (sources.open_frames(root, split, None, 2) for split in ("train", "val"))
    featurizer = featurizers.build_featurizer("alexnet", None, weights)
    alexnet = nn.Sequential(*featurizer.network).to(memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(n)[:, None, None] for n in (featurizer.mean, featurizer.std))
    torch.manual_seed(0)  # as train.py's default
    decoder = make_decoder(256, training.sizes[0])
    times = [time.perf_counter()]

    # featurize
    files, parts = [frame.image for frame in training.frames + validation.frames], []
    for start in range(0, len(files), 32):
        frames = [torch.from_numpy(images.read_image(f)) for f in files[start:start + 32]]
        frames = [(x.permute(2, 0, 1).contiguous() / 255 - mean) / std for x in frames]
        parts.append(alexnet(torch.stack(frames)))
    features, val_features = torch.cat(parts).split([len(training.frames), len(validation.frames)])
    times.append(time.perf_counter())

    # train
    masks = [training.mask(index) for index in range(len(features))]
    train(decoder, features, [torch.from_numpy(mask).float()[None] for mask in masks])
    times.append(time.perf_counter())

    # write a PNG a frame, read it again, score it
    ious = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        outputs = [(decoder(x)[:, 0] * 255).to(torch.uint8) for x in val_features.split(32)]
        for index, pixels in enumerate(torch.cat(outputs).numpy()):
            iio.imwrite(f"{folder}/{index}.png", pixels)
            prediction = np.round(iio.imread(f"{folder}/{index}.png") / 255)
            mask = validation.mask(index).astype(float)
            union = (prediction + mask - prediction * mask).sum()
            if union:
                ious.append((prediction * mask).sum() / union)
    times.append(time.perf_counter())
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return [*np.diff(times), usage.ru_maxrss * 1024 / 1e9, np.mean(ious)]


def run_scripts(root: Path, weights: str | None) -> list[float]:
    """Run COMMANDS as processes; return ROWS, with seconds as they print them, and mean IoU."""
    inputs = ["--data", str(root)] + (["--weights", weights] if weights else [])
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for script, *flags in map(str.split, COMMANDS):
            flags += ["--device", "cpu", "--wandb", "disabled"]
            flags += inputs if script == "featurize.py" else []
            done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=folder, text=True,
                                  capture_output=True)
            if done.returncode:
                raise BadInput(f"status {done.returncode} of {done.stderr[-1000:]}")
            seconds.append(float(re.search(r"seconds: [^\d\n]*([\d.]+)", done.stdout)[1]))
        scores = json.loads(Path(folder, "results/simple/scores.json").read_text())
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return [sum(seconds[:2]), *seconds[2:], usage.ru_maxrss * 1024 / 1e9, scores["mean_iou"]]


def describe_machine() -> str:
    """Return the command and the machine that runs it, a line of Markdown."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return (f"`python {' '.join(sys.argv)}`: {found[1] if found else platform.machine()}, "
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, PyTorch {torch.__version__}")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="DAVIS root: splits train and val")
    parser.add_argument("--weights", type=os.path.abspath, help="AlexNet's (torchvision's)")
    parser.add_argument("--turns", type=cli.count(1000), default=3, help="runs of each (3)")
    args = parser.parse_args()
    machine, turns = describe_machine(), []  # its load before it is busy

    for _ in cli.progress(range(args.turns), "turns"):
        for pipeline in (run_scripts, run_notebook):  # the first checks its input
            with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:  # with a peak of its own
                turns.append(pool.submit(pipeline, args.data.resolve(), args.weights).result())

    print(f"{machine}\n\n| median of {args.turns} (range) | notebook | here | times |\n"
          "|---|--:|--:|--:|")
    for what, values in zip(ROWS, np.array(turns).T):
        ours, theirs = values[::2], values[1::2]
        cells = [f"{np.median(x):.3g} ({min(x):.3g} to {max(x):.3g})"
                 for x in (theirs, ours, theirs / ours)]
        print(f"| {what} | {' | '.join(cells)} |")
    print(f"\nmean IoU: notebook {turns[1][-1]:.4f}, here {turns[0][-1]:.4f}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
