"""The contest notebook's pipeline, written from its description in plain, untuned PyTorch.

    python benchmarks/notebook.py --data DAVIS --weights ALEXNET

AlexNet's features of all frames in one tensor on the host, a decoder of one convolution trained
101 steps, a PNG a frame, read again and scored. Prints JSON: the seconds to featurize, to train,
and to predict, write and score; the mean IoU of the contest; every loss.
B batch, C channels, h w feature grid, H W frame.
"""
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vos import cli, featurizers, images, sources
from vos.inputs import BadInput


def make_decoder(channels: int, size: tuple[int, int]) -> nn.Sequential:
    """Return the notebook's decoder: features [B, C, h, w] to probabilities [B, 1, H, W]."""
    return nn.Sequential(nn.Conv2d(channels, 1, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(size))


def featurize(network: nn.Module, files: list[Path], mean, std) -> torch.Tensor:
    """Return the features of all frames in one tensor on the host, [N, C, h, w]."""
    parts = []
    for start in range(0, len(files), 32):
        frames = [torch.from_numpy(images.read_image(f)) for f in files[start:start + 32]]
        frames = [(x.permute(2, 0, 1).contiguous() / 255 - mean) / std for x in frames]
        parts.append(network(torch.stack(frames)))
    return torch.cat(parts)


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


def run_notebook(root: Path, weights: str | None) -> dict:
    """Run the pipeline on the splits train and val of a DAVIS root; return what main prints."""
    training, validation = (sources.open_frames(root, split, None) for split in ("train", "val"))
    featurizer = featurizers.build_featurizer("alexnet", None, weights)
    alexnet = nn.Sequential(*featurizer.network).to(memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(n)[:, None, None] for n in (featurizer.mean, featurizer.std))
    torch.manual_seed(0)  # as train.py's default
    decoder = make_decoder(256, training.sizes[0])
    times = [time.perf_counter()]

    # featurize
    features, val_features = (
        featurize(alexnet, [frame.image for frame in source.frames], mean, std)
        for source in (training, validation))
    times.append(time.perf_counter())

    # train
    masks = [training.mask(index) for index in range(len(features))]
    losses = train(decoder, features, [torch.from_numpy(mask).float()[None] for mask in masks])
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
    return {"seconds": np.diff(times).tolist(), "mean_iou": float(np.mean(ious)), "losses": losses}


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="DAVIS root: splits train and val")
    parser.add_argument("--weights", help="AlexNet's (default: torchvision's)")
    args = parser.parse_args()
    print(json.dumps(run_notebook(args.data, args.weights)))


if __name__ == "__main__":
    try:
        main()  # not by cli.run, which tunes how memory is kept
    except (BadInput, OSError) as error:
        cli.complain(f"notebook.py: {error}")
        sys.exit(2)
