"""Decoders: small networks that turn feature maps into masks. And running them.

To add one, write a class like `Linear` below and name it in DECODERS: train.py, evaluate.py and package.py
then know it. A decoder predicts on a grid of its own, coarser than the frame. Its targets are the share
of foreground in each cell of that grid, counted once when the masks load, so that a step costs what the
decoder costs and not what the frame's pixels would.

B batch, C channels, h w feature grid, gh gw the decoder's grid, H W frame.
"""
import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from files import BadInput
from resident import Features

Shapes = dict[str, tuple[int, int, int]]  # level: (C, h, w), coarse to fine
LIMIT = 50_000_000  # the contest's: parameters of featurizer and decoder must be fewer


class Recipe(NamedTuple):
    """How a decoder is trained when no flag says otherwise."""

    steps: int = 101
    batch: int = 32
    lr: float = 5e-4
    optimizer: str = "adam"  # or "adamw"
    weight_decay: float = 0.0
    schedule: str = "constant"  # or "onecycle" (rises for a tenth of the steps, then falls along a cosine)
    shuffle: bool = False  # an order drawn for each epoch, instead of the frames' own
    ema: float = 0.0  # decay of the moving average of the weights that is kept, 0 for none


class Decoder(nn.Module):
    """What decoders share: a grid of logits, its loss against soft targets, its masks at frame size."""

    recipe = Recipe()

    def __init__(self, grid: tuple[int, int], size: tuple[int, int]):
        """grid: (gh, gw) of the output; size: (H, W) of the masks it stands for."""
        super().__init__()
        self.grid, self.size = grid, size

    def cells(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The grid row of every pixel row, int64 [H], and the grid column of every pixel column, int64 [W]."""
        return tuple(torch.arange(pixels) * cells // pixels for pixels, cells in zip(self.size, self.grid))

    def standardise(self, features: Features, index: torch.Tensor) -> None:
        """Look at the training features once, before the first step; for a decoder that wants their mean and spread."""

    def loss(self, output: torch.Tensor, target: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy of each frame, its mean over the frame's pixels.

        output: what `forward` gave, [B, gh, gw]; target: share of foreground in each cell, [B, gh, gw] in 0..1;
        area: share of the frame's pixels in each cell, [gh, gw], sums to 1. Returns [B].
        """
        return (F.binary_cross_entropy_with_logits(output, target, reduction="none") * area).sum((1, 2))

    def probabilities(self, output: torch.Tensor) -> torch.Tensor:
        """Turn what `forward` gave, [B, gh, gw], into probabilities at frame size, [B, H, W] in 0..1."""
        logits = F.interpolate(output[:, None], self.size, mode="bilinear", align_corners=False)
        return torch.sigmoid(logits)[:, 0]


class Simple(Decoder):
    """The contest notebook's decoder: a 3x3 convolution without padding, sigmoid, AdaptiveAvgPool2d to frame size.

    Pooling up makes every output pixel the mean of at most 2 x 2 cells, and neighbouring pixels often the mean of
    the same ones. Such pixels form a cell of the output grid here: predicting, pooling targets and weighing by
    area per cell gives the notebook's loss over all pixels exactly, from a few hundred times fewer numbers.
    """

    def __init__(self, shapes: Shapes, size: tuple[int, int]):
        (channels, height, width), = one_level(shapes, "simple")
        rows, columns = pooling(height - 2, size[0]), pooling(width - 2, size[1])
        super().__init__((len(rows[0]), len(columns[0])), size)
        self.conv = nn.Conv2d(channels, 1, kernel_size=3)
        self.register_buffer("mix_rows", rows[0], persistent=False)  # [gh, h - 2]: the mean of one or two rows
        self.register_buffer("mix_columns", columns[0], persistent=False)  # [gw, w - 2]
        self.groups = rows[1], columns[1]

    def cells(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.groups

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """levels: one [B, C, h, w]. Returns probabilities [B, gh, gw]."""
        probabilities = torch.sigmoid(self.conv(levels[0]))[:, 0]  # [B, h - 2, w - 2]
        return self.mix_rows @ probabilities @ self.mix_columns.T

    def loss(self, output: torch.Tensor, target: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
        """As Decoder.loss, but of probabilities."""
        return (F.binary_cross_entropy(output.float(), target, reduction="none") * area).sum((1, 2))

    def probabilities(self, output: torch.Tensor) -> torch.Tensor:
        rows, columns = (group.to(output.device) for group in self.groups)
        return output[:, rows][:, :, columns]


class Linear(Decoder):
    """One 1x1 convolution per level, summed on the finest grid: how little a decoder takes."""

    recipe = Recipe(lr=2e-3, steps=300, batch=16, shuffle=True)

    def __init__(self, shapes: Shapes, size: tuple[int, int]):
        super().__init__(finest(shapes), size)
        self.norms = nn.ModuleList(Standardise(channels) for channels, _, _ in shapes.values())
        self.convs = nn.ModuleList(nn.Conv2d(channels, 1, 1) for channels, _, _ in shapes.values())

    def standardise(self, features: Features, index: torch.Tensor) -> None:
        fit(self.norms, features, index)

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """levels: a [B, C, h, w] for each of `shapes`. Returns logits [B, gh, gw]."""
        logits = [conv(norm(level)) for norm, conv, level in zip(self.norms, self.convs, levels)]
        return sum(F.interpolate(one, self.grid, mode="bilinear", align_corners=False)[:, 0] for one in logits)


# name -> class(shapes, size); train.py trains it, model.pt remembers it by this name
DECODERS: dict[str, type[Decoder]] = {
    "simple": Simple,
    "linear": Linear,
}


class Standardise(nn.Module):
    """Subtract each channel's mean over the training frames and divide by its standard deviation, both set by `fit`."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, level: torch.Tensor) -> torch.Tensor:
        return (level - self.mean) / self.std


@torch.no_grad()
def fit(norms: nn.ModuleList, features: Features, index: torch.Tensor) -> None:
    """Set one Standardise per level from the frames of `index`, int64 [n]: at most 256, spread evenly."""
    chosen = index[:: -(-len(index) // 256)]
    chosen = chosen[features.group.holds(chosen)]
    sums = [torch.zeros(3, norm.mean.numel(), device=features.device) for norm in norms]  # counts, values, squares
    for part in chosen.split(16):
        for total, level in zip(sums, features.batch(part)):
            total += torch.stack([torch.full_like(total[0], level[:, 0].numel()), level.sum((0, 2, 3)), level.square().sum((0, 2, 3))])
    features.group.sum(*sums)
    for norm, (count, values, squares) in zip(norms, sums):
        mean = values / count
        norm.mean.copy_(mean[:, None, None])
        norm.std.copy_((squares / count - mean.square()).clamp_min(0).sqrt()[:, None, None] + 1e-3)


def one_level(shapes: Shapes, name: str) -> list[tuple[int, int, int]]:
    """Return the one shape. Raises BadInput when there are more levels than one."""
    if len(shapes) != 1:
        raise BadInput(f"--decoder {name}: takes one level, found {', '.join(shapes)}; name one with --levels")
    return list(shapes.values())


def finest(shapes: Shapes) -> tuple[int, int]:
    """The grid (h, w) of the level with the most cells."""
    return max((shape[1:] for shape in shapes.values()), key=lambda grid: grid[0] * grid[1])


def pooling(cells: int, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Adaptive average pooling of `cells` values up to `pixels`, along one axis, as torch.nn.AdaptiveAvgPool1d defines it.

    Pixel i is the mean of the cells from floor(i * cells / pixels) up to ceil((i + 1) * cells / pixels).
    Returns the distinct means as a matrix float32 [groups, cells], and the group of each pixel, int64 [pixels].
    """
    pixel = torch.arange(pixels)
    bounds = torch.stack([pixel * cells // pixels, -(-(pixel + 1) * cells // pixels)], 1)
    bounds, group = torch.unique_consecutive(bounds, dim=0, return_inverse=True)
    cell = torch.arange(cells)
    chosen = ((cell >= bounds[:, :1]) & (cell < bounds[:, 1:])).float()
    return chosen / chosen.sum(1, keepdim=True), group


# --- making, counting --------------------------------------------------------------------------


def make_decoder(name: str, shapes: Shapes, size: tuple[int, int]) -> Decoder:
    """Return a new decoder, its weights drawn from torch's generator. Raises BadInput for levels it cannot take."""
    if name not in DECODERS:
        raise BadInput(f"decoder {name!r}: unknown; there are {', '.join(DECODERS)}")
    return DECODERS[name](shapes, size)


def count_parameters(module: nn.Module) -> int:
    """Return the number of values in all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_all(decoder: nn.Module, description: dict) -> int:
    """Return the contest's `nparams`: the parameters of featurizer and decoder together."""
    return description["featurizer_parameters"] + count_parameters(decoder)


@torch.no_grad()
def count_flops(network: nn.Module, example) -> int:
    """Return the floating-point operations of network(example), a multiply-add as two.

    example: a meta tensor, or a list of them: shapes without values, so nothing is computed.
    """
    sketch = copy.deepcopy(network).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        sketch(example)
    return counter.get_total_flops()


def decoder_flops(decoder: Decoder, shapes: Shapes) -> int:
    """Return the decoder's floating-point operations per frame."""
    return count_flops(decoder, [torch.empty(1, *shape, device="meta") for shape in shapes.values()])


# --- running -----------------------------------------------------------------------------------


@torch.inference_mode()
def predict(decoder: Decoder, features: Features, index: torch.Tensor, batch: int = 32) -> Iterator[torch.Tensor]:
    """Yield masks for the frames of `index`, int64 [n], `batch` at a time: uint8 [B, H, W], floor(255 * probability)."""
    for part in index.split(batch):
        output = decoder(features.batch(part))
        yield (decoder.probabilities(output.float()) * 255).to(torch.uint8)
