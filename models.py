"""Decoders: small networks that turn feature maps into masks.

To add one, write a class like `Linear` below and name it in DECODERS: train.py, evaluate.py and package.py
then know it. A decoder predicts on a grid of its own, coarser than the frame. Its targets are the share
of foreground in each cell of that grid, counted once when the masks load, so that a step costs what the
decoder costs and not what the frame's pixels would.

B batch, C channels, h w feature grid, gh gw the decoder's grid, H W frame.
"""
import copy
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from cues import CUES, with_cues
from data import FeatureFolder
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
    balanced: bool = False  # drawn so that a batch's frames come from as many clips as it can
    clip_gradient: float = 0.0  # largest norm of all gradients together, 0 for no limit
    ema: float = 0.0  # decay of the moving average of the weights that is kept, 0 for none


class Decoder(nn.Module):
    """What decoders share: a grid of logits, its loss against soft targets, its masks at frame size."""

    recipe = Recipe()
    adapt_steps = 0  # steps that evaluate.py trains it on each clip's own confident predictions, unless told otherwise
    views = 1  # views of a frame whose logits are averaged when predicting: 2 for the frame and its mirror image
    guided = False  # whether evaluate.py upsamples its logits along the frame's edges unless told otherwise
    cues = 0  # channels that cues.py adds beside each level; 0 for a decoder that sees frames one by one

    def __init__(self, grid: tuple[int, int], size: tuple[int, int]):
        """grid: (gh, gw) of the output; size: (H, W) of the masks it stands for."""
        super().__init__()
        self.grid, self.size = grid, size

    def cells(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The grid row of every pixel row, int64 [H], and the grid column of every pixel column, int64 [W]."""
        rows, columns = (torch.arange(pixels) * cells // pixels for pixels, cells in zip(self.size, self.grid))
        return rows, columns

    def standardise(self, features: Features, index: torch.Tensor) -> None:
        """Look at the training features once, before the first step; for a decoder that wants their mean and spread."""

    def loss(self, output: torch.Tensor, target: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy of each frame, its mean over the frame's pixels.

        output: what `forward` gave, [B, gh, gw]; target: share of foreground in each cell, [B, gh, gw] in 0..1;
        area: share of the frame's pixels in each cell, [gh, gw], sums to 1. Returns [B].
        """
        return (F.binary_cross_entropy_with_logits(output, target, reduction="none") * area).sum((1, 2))

    def pixels(self, output: torch.Tensor) -> torch.Tensor:
        """Turn what `forward` gave, [B, gh, gw], into pixels at frame size, uint8 [B, H, W]: floor(255 * probability)."""
        return (self.probabilities(output) * 255).to(torch.uint8)

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

    mix_rows: torch.Tensor
    mix_columns: torch.Tensor

    def __init__(self, shapes: Shapes, size: tuple[int, int]):
        (channels, height, width), = one_level(shapes, "simple")
        if min(height, width) < 3:
            raise BadInput(f"--decoder simple: expected features of at least 3 x 3 for its convolution, found {height} x {width}; "
                           "featurize larger frames, or at a finer level")
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
        (batch, channels, height, width), (weight, bias) = levels[0].shape, self.conv.parameters()
        # self.conv(levels[0]), in a third of the time on the CPU: one matrix product for its 9 taps, then fold sums them
        taps = weight.flip(2, 3).reshape(channels, 9).T.expand(batch, -1, -1)  # [B, 9, C]
        logits = F.fold(torch.bmm(taps, levels[0].flatten(2)), (height - 2, width - 2), 3, padding=2)
        probabilities = torch.sigmoid(logits + bias)[:, 0]  # [B, h - 2, w - 2]
        return self.mix_rows @ probabilities @ self.mix_columns.T

    def loss(self, output: torch.Tensor, target: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
        """As Decoder.loss, but of probabilities."""
        return (F.binary_cross_entropy(output.float(), target, reduction="none") * area).sum((1, 2))

    def pixels(self, output: torch.Tensor) -> torch.Tensor:
        return self.spread((output * 255).to(torch.uint8))  # a byte a pixel to spread, not four

    def probabilities(self, output: torch.Tensor) -> torch.Tensor:
        return self.spread(output)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Give every pixel its cell's value: [B, gh, gw] -> [B, H, W]."""
        rows, columns = (group.to(values.device) for group in self.groups)
        return values.index_select(2, columns).index_select(1, rows)  # whole rows are copied last: ten times faster


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
        return functools.reduce(torch.add, (F.interpolate(one, self.grid, mode="bilinear", align_corners=False)[:, 0] for one in logits))


class FPN(Decoder):
    """A small feature pyramid: levels reduced to principal components, dropped at random, summed from coarse to fine.

    Frames are mirrored at random in training, and both ways are averaged afterwards. Lin et al., "Feature Pyramid Networks
    for Object Detection", CVPR 2017, for the sum; Yu and Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions",
    ICLR 2016, for the blocks that see 15 cells each way.
    """

    recipe = Recipe(steps=500, batch=10, lr=3e-3, optimizer="adamw", weight_decay=1e-2, schedule="onecycle", shuffle=True,
                    balanced=True, clip_gradient=1.0)
    views = 2
    guided = True
    keep = 32  # principal components of each level
    drop = 0.3  # share of a level's components set to 0 in training
    lose = 0.0  # share of frames whose own features are set to 0 in training, which leaves the clip's cues
    hide = 0.25  # share of frames that one kind of cue is set to 0 in, on all levels, in training
    width, fine = 48, 32  # channels of all grids but the finest, and of that
    dilations = (1,), (1,), (1, 1), (1, 2, 4, 8), (1,)  # of each grid's blocks, coarse to fine; a coarser grid has one block

    def __init__(self, shapes: Shapes, size: tuple[int, int]):
        super().__init__(finest(shapes), size)
        grids = [(h, w) for _, h, w in shapes.values()] * (2 if self.cues else 1)  # of the levels, then of their cues
        norms = [Standardise(c, self.keep) for c, _, _ in shapes.values()]
        self.norms = nn.ModuleList(norms)
        channels = [norm.outputs for norm in norms] + [self.cues] * (len(grids) - len(shapes))
        stages = sorted(set(grids))  # coarse to fine
        widths = [self.width] * (len(stages) - 1) + [self.fine]
        dilations = (*[(1,)] * len(stages), *self.dilations)[-len(stages):]
        self.inputs = nn.ModuleList(nn.Conv2d(c, widths[stages.index(grid)], 1) for c, grid in zip(channels, grids))
        self.ups = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths))
        self.joins = nn.ModuleList(nn.GroupNorm(8, w) for w in widths)
        self.blocks = nn.ModuleList(nn.Sequential(*[Block(w, d) for d in grid]) for w, grid in zip(widths, dilations))
        self.output = nn.Conv2d(self.fine, 1, 1)
        self.grids, self.stages = grids, stages

    def standardise(self, features: Features, index: torch.Tensor) -> None:
        fit(self.norms, features, index)

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """levels: a [B, C, h, w] for each of `shapes`, then their cues, if any. Returns logits [B, gh, gw]."""
        own = [norm(level) for norm, level in zip(self.norms, levels)]
        if self.training:
            kept = (torch.rand(len(levels[0]), 1, 1, 1, device=levels[0].device) >= self.lose).float()
            own = [F.dropout2d(level, self.drop) * kept for level in own]
        cues = levels[len(own):]
        if self.training and cues:
            seen = (torch.rand(len(levels[0]), self.cues, 1, 1, device=levels[0].device) >= self.hide).float()
            cues = [cue * seen for cue in cues]
        levels = own + cues
        if not self.training and self.views == 2:
            return (self.pyramid(levels) + mirror(self.pyramid([mirror(level) for level in levels]))) / 2
        if self.training and torch.rand(()) < 0.5:  # drawn on the host: no waiting
            return mirror(self.pyramid([mirror(level) for level in levels]))
        return self.pyramid(levels)

    def pyramid(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """Sum the levels grid by grid, coarse to fine. Returns logits [B, gh, gw]."""
        x = None
        for stage, grid in enumerate(self.stages):
            here = sum(conv(level) for conv, level, at in zip(self.inputs, levels, self.grids) if at == grid)
            if x is not None:
                here = here + F.interpolate(self.ups[stage - 1](x), grid, mode="bilinear", align_corners=False)
            x = self.blocks[stage](F.relu(self.joins[stage](here)))
        return self.output(x)[:, 0]

    def loss(self, output: torch.Tensor, target: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
        """As Decoder.loss, plus 1 - Dice of each frame (Milletari et al., "V-Net", 3DV 2016), smoothed by one cell."""
        probability = torch.sigmoid(output.float())
        overlap = 2 * (probability * target).sum((1, 2)) + 1
        return super().loss(output.float(), target, area) + 1 - overlap / (probability.sum((1, 2)) + target.sum((1, 2)) + 1)


class Temporal(FPN):
    """FPN that also sees what the whole clip tells about each position: see cues.py."""

    recipe = FPN.recipe._replace(steps=1000)
    cues = CUES
    lose = 0.25
    adapt_steps = 25


# name -> class(shapes, size); train.py trains it, model.pt remembers it by this name
DECODERS: dict[str, type[Decoder]] = {
    "simple": Simple,
    "linear": Linear,
    "fpn": FPN,
    "temporal": Temporal,
}


# --- parts -------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + ReLU(GroupNorm(3x3 convolution of x)), [B, C, h, w] to the same. Dilation lets it see further at the same cost."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm = nn.GroupNorm(8, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.norm(self.conv(x)))


def mirror(x: torch.Tensor) -> torch.Tensor:
    """Swap left and right of [..., w]."""
    return x.flip(-1)


def look_at_clips(decoder_name: str, features: Features, clips: list[str], folder: FeatureFolder | None = None,
                  levels: list[str] | None = None) -> Features:
    """Append each level's cues to the features, for a decoder that wants them; see cues.with_cues."""
    return with_cues(features, clips, folder, levels) if DECODERS[decoder_name].cues else features


class Standardise(nn.Module):
    """Subtract each channel's mean over the training frames and divide by its standard deviation; both set by `fit`.

    keep: of the standardised channels, only the first so many principal components; 0 for the channels themselves.
    """

    mean: torch.Tensor
    std: torch.Tensor
    basis: torch.Tensor

    def __init__(self, channels: int, keep: int = 0):
        super().__init__()
        self.outputs = min(keep, channels) or channels
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        if keep:
            self.register_buffer("basis", torch.eye(channels)[:self.outputs])  # rows: directions, all of one length

    def forward(self, level: torch.Tensor) -> torch.Tensor:
        """level: [B, C, h, w]. Returns [B, outputs, h, w]."""
        level = (level - self.mean) / self.std
        return F.conv2d(level, self.basis[:, :, None, None]) if hasattr(self, "basis") else level


@torch.no_grad()
def fit(modules: nn.ModuleList, features: Features, index: torch.Tensor) -> None:
    """Set one Standardise per level from the frames of `index`, int64 [n]: at most 256, spread evenly."""
    norms = [module for module in modules if isinstance(module, Standardise)]
    chosen = index[:: -(-len(index) // 256)]
    chosen = chosen[features.group.holds(chosen)]
    totals = [[torch.zeros(shape, device=features.device) for shape in ((), len(norm.mean), (len(norm.mean),) * 2)] for norm in norms]
    for part in chosen.split(16):
        for (count, values, products), level in zip(totals, features.batch(part)):
            rows = level.permute(0, 2, 3, 1).reshape(-1, level.shape[1])  # [positions, C]
            count += len(rows)
            values += rows.sum(0)
            products += rows.T @ rows
    for norm, (count, values, products) in zip(norms, totals):
        features.group.sum(count, values, products)
        mean = values / count
        covariance = products / count - mean[:, None] * mean
        std = covariance.diagonal().clamp_min(0).sqrt() + 1e-3
        norm.mean.copy_(mean[:, None, None])
        norm.std.copy_(std[:, None, None])
        if hasattr(norm, "basis"):  # eigenvectors come by rising eigenvalue; their signs are fixed, or machines would differ
            variances, vectors = torch.linalg.eigh(covariance / (std[:, None] * std))
            variances, directions = variances.flip(0)[:norm.outputs], vectors.flip(1).T[:norm.outputs]
            norm.basis.copy_(directions * torch.sign(directions.sum(1, keepdim=True)) / variances.mean().sqrt())


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
    return cast(Callable[[Shapes, tuple[int, int]], Decoder], DECODERS[name])(shapes, size)


def count_parameters(module: nn.Module) -> int:
    """Return the number of values in all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_all(decoder: nn.Module, description: dict) -> int:
    """Return the contest's `nparams`: the parameters of featurizer and decoder together."""
    return description["featurizer_parameters"] + count_parameters(decoder)


class FlopCounter(torch.overrides.TorchFunctionMode):
    """Counts what convolutions, linear layers and matrix products cost while it is active, a multiply-add as two operations.

    (torch.utils.flop_counter says the same, after a second of imports.)
    """

    flops = 0
    products = torch.bmm, torch.mm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in (F.conv2d, F.linear):
            self.flops += 2 * output.numel() * args[1][0].numel()  # a weight for each value that goes into one output
        elif func in self.products:
            self.flops += 2 * output.numel() * args[0].shape[-1]
        return output


@torch.no_grad()
def count_flops(decoder: Decoder, shapes: Shapes) -> int:
    """Return the floating-point operations per frame of the decoder's convolutions and matrix products, from one frame of zeros."""
    cues = [(decoder.cues, *shape[1:]) for shape in shapes.values()] if decoder.cues else []
    with FlopCounter() as counter:
        copy.deepcopy(decoder).cpu().eval()([torch.zeros(1, *shape) for shape in [*shapes.values(), *cues]])
    return counter.flops
