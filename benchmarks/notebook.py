"""The contest notebook's pipeline in plain PyTorch, untuned: what this project is measured beside.

    python benchmarks/notebook.py --data DAVIS --weights ALEXNET

Works on the CPU. Prints a line of JSON: the seconds of each phase, the loss of each of 101 steps,
the mean IoU, and the peak memory in GB. B batch, C channels, h w feature grid, H W frame.
"""
import itertools
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vos import cli, featurizers, images, sources
from vos.inputs import BadInput


class Examples(Dataset):
    """Features [C, h, w] with their masks, float32 [1, H, W], each decoded once and then kept."""

    def __init__(self, features: torch.Tensor, source: sources.Source):
        self.features, self.source = features, source
        self.masks: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index not in self.masks:
            self.masks[index] = torch.from_numpy(self.source.mask(index)).float()[None]
        return self.features[index], self.masks[index]


@torch.no_grad()
def featurize(featurizer: featurizers.Featurizer, source: sources.Source) -> torch.Tensor:
    """Return AlexNet's features of all frames, [N, 256, h, w]."""
    alexnet = nn.Sequential(*featurizer.network).to(memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(n)[:, None, None] for n in (featurizer.mean, featurizer.std))
    features = []
    for start in range(0, len(source.frames), 32):
        files = [frame.image for frame in source.frames[start:start + 32]]
        pixels = [torch.from_numpy(images.read_image(file)).permute(2, 0, 1) for file in files]
        scaled = [(x.contiguous().float().div(255) - mean) / std for x in pixels]
        features.append(alexnet(torch.stack(scaled)))
    return torch.cat(features)


def make_decoder(channels: int, size: tuple[int, int]) -> nn.Sequential:
    """Return the notebook's decoder: features [B, C, h, w] to probabilities [B, 1, H, W]."""
    return nn.Sequential(nn.Conv2d(channels, 1, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(size))


def train(decoder: nn.Module, optimizer, batches: Iterable, steps: int) -> list[float]:
    """Train on (features, masks) batch by batch, again and again; return the loss of each step."""
    losses: list[torch.Tensor] = []
    while len(losses) < steps:
        for features, masks in itertools.islice(batches, steps - len(losses)):
            loss = nn.functional.binary_cross_entropy(decoder(features), masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().clone())  # itself it keeps the memory of every pixel
    return torch.stack(losses).tolist()


@torch.no_grad()
def predict_and_score(decoder: nn.Module, features: torch.Tensor, source: sources.Source) -> float:
    """Write a PNG a frame, 255 * probability, and read it again; return their mean IoU."""
    outputs = ((decoder(batch)[:, 0] * 255).to(torch.uint8).numpy() for batch in features.split(32))
    ious = []
    with tempfile.TemporaryDirectory() as folder:
        for index, pixels in enumerate(itertools.chain.from_iterable(outputs)):
            file = Path(folder) / f"{index:05d}.png"
            iio.imwrite(file, pixels)
            prediction, mask = np.round(iio.imread(file) / 255), source.mask(index).astype(float)
            union = (prediction + mask - prediction * mask).sum()
            if union:
                ious.append((prediction * mask).sum() / union)
    return float(np.mean(ious))


def open_inputs(root: Path, weights: str | None):
    """Return a data set's splits train and val, and AlexNet, all checked. Raises BadInput."""
    threads = os.cpu_count() or 2
    splits = [sources.open_frames(root, split, None, threads) for split in ("train", "val")]
    (size, *others) = {size for source in splits for size in source.sizes}
    if others or min(size) < 127 or not all(f.annotation for s in splits for f in s.frames):
        raise BadInput(f"{root}: has frames of {[size, *others]}; expected one size, 127 x 127 at "
                       "least, and a mask for every frame")
    return splits, featurizers.build_featurizer("alexnet", None, weights)


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="DAVIS root: splits train and val")
    parser.add_argument("--weights", help="AlexNet's, a state dict (default: torchvision's)")
    args = parser.parse_args()

    times = [time.perf_counter()]
    (training, validation), alexnet = open_inputs(args.data, args.weights)
    torch.manual_seed(0)  # as train.py's default
    decoder = make_decoder(256, training.sizes[0])
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-4)
    times.append(time.perf_counter())

    features = [featurize(alexnet, source) for source in (training, validation)]
    times.append(time.perf_counter())
    batches = DataLoader(Examples(features[0], training), batch_size=32)
    losses = train(decoder, optimizer, batches, steps=101)
    times.append(time.perf_counter())
    iou = predict_and_score(decoder, features[1], validation)
    times.append(time.perf_counter())

    phases = ("check", "featurize", "train", "predict, write, score")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"seconds": dict(zip(phases, np.diff(times))), "losses": losses,
                      "mean_iou": iou, "peak_gb": usage.ru_maxrss * 1024 / 1e9}))


if __name__ == "__main__":
    try:  # not cli.run, which tells glibc to keep freed memory: the notebook has it untuned
        main()
    except BadInput as error:
        cli.complain(f"notebook.py: {error}")
        sys.exit(2)
