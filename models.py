"""Decoders: small networks that turn feature maps into masks, and the files they are kept in.

To add one, write a class like `Linear` below and name it in DECODERS: train.py, evaluate.py and
package.py then know it. A decoder predicts on a grid of its own, coarser than the frame. Its
targets are the share of foreground in each cell of that grid, counted once, so that a step costs
what the decoder costs and not what the frame's pixels would.

B batch, C channels, h w feature grid, gh gw the decoder's grid, H W frame.
"""
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import FeatureFolder, Features
from vos.cli import count, level_stride, number
from vos.inputs import BadInput, is_shape
from vos.layers import Block, Standardise, pooling
from vos.runs import load_checkpoint, save_checkpoint

Shapes = dict[str, tuple[int, int, int]]  # level: (C, h, w), coarse to fine
FORMAT = 2  # of model.pt


def knob(default, help: str, **flag):
    """A field of a recipe, which is a flag of train.py too, with what argparse needs."""
    return dataclasses.field(default=default, metadata={"help": help, **flag})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a decoder is trained when no flag says otherwise."""

    steps: int = knob(101, "optimiser steps", type=count(10**9))
    batch_size: int = knob(32, "frames a step", type=count(10**6))
    lr: float = knob(5e-4, "learning rate, the highest of a schedule", type=number(0, 1e6))
    optimizer: str = knob("adam", "see make_optimizer in train.py", choices=["adam", "adamw"])
    weight_decay: float = knob(0.0, "of the optimizer", type=number(0, 1e6))
    schedule: str = knob("constant", "onecycle rises for a tenth of the steps, then falls",
                         choices=["constant", "onecycle"])
    order: str = knob("given", "of frames: as given, drawn each epoch, or balanced over the clips",
                      choices=["given", "shuffled", "balanced"])
    clip_gradient: float = knob(0.0, "largest norm of the gradients, 0 for no limit",
                                type=number(0, 1e6))


class Decoder(nn.Module):
    """What decoders share: a grid of logits, its loss against soft targets, its masks."""

    recipe = Recipe()
    returns = "logits"  # what `forward` gives: logits or probabilities
    cues = 0  # channels that the clip's cues add beside each level; 0 to see frames one by one
    guided = True  # whether evaluate.py upsamples the logits along the frame's edges
    adapt_steps = 0  # steps that evaluate.py trains it on each clip's own sure predictions
    drawn_steps = 200  # or on the masks drawn of the clip, if there are any
    area: torch.Tensor

    def __init__(self, grid: tuple[int, int], size: tuple[int, int], cells=None):
        """grid: (gh, gw) of the output; size: (H, W) of the masks it stands for.

        cells: the grid row of every pixel row, int64 [H], and the grid column of every pixel
        column, int64 [W]; by default cells of about equal size.
        """
        super().__init__()
        self.grid, self.size = grid, size
        even = [torch.arange(pixels) * cells // pixels for pixels, cells in zip(size, grid)]
        self.cells = cells or tuple(even)
        rows, columns = map(torch.bincount, self.cells)
        area = rows[:, None] * columns / (size[0] * size[1])  # share of the frame in each cell
        self.register_buffer("area", area, persistent=False)  # [gh, gw], sums to 1

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy of each frame, its mean over the frame's pixels.

        output: what `forward` gave; target: share of foreground in each cell, both [B, gh, gw].
        """
        loss = F.binary_cross_entropy_with_logits(output, target, reduction="none")
        return (loss * self.area).sum((1, 2))

    def pixels(self, output: torch.Tensor) -> torch.Tensor:
        """Turn what `forward` gave, [B, gh, gw], into uint8 [B, H, W]: floor(255 * probability)."""
        logits = F.interpolate(output[:, None], self.size, mode="bilinear", align_corners=False)
        return (torch.sigmoid(logits)[:, 0] * 255).to(torch.uint8)


class Simple(Decoder):
    """The contest notebook's: a 3x3 convolution, sigmoid, AdaptiveAvgPool2d up to the frame's size.

    Pooling up makes neighbouring pixels the mean of the same cells, 2 x 2 at most. Such pixels are
    a cell of the output grid here: weighed by area, the cells give the notebook's loss over all
    pixels exactly, from a few hundred times fewer numbers, and a step 50 times as fast.
    """

    returns = "probabilities"
    guided = False
    mix_rows: torch.Tensor
    mix_columns: torch.Tensor

    def __init__(self, shapes: Shapes, size: tuple[int, int]):
        (channels, height, width), *more = shapes.values()
        if more or min(height, width) < 3:
            raise BadInput(f"decoder simple: takes one level of at least 3 x 3, found {shapes}; "
                           "name one with --levels, or choose another --decoder")
        mix_rows, rows = pooling(height - 2, size[0])
        mix_columns, columns = pooling(width - 2, size[1])
        super().__init__((len(mix_rows), len(mix_columns)), size, (rows, columns))
        self.conv = nn.Conv2d(channels, 1, kernel_size=3)
        self.register_buffer("mix_rows", mix_rows, persistent=False)  # [gh, h - 2]: means of rows
        self.register_buffer("mix_columns", mix_columns, persistent=False)  # [gw, w - 2]

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """levels: one [B, C, h, w]. Returns probabilities [B, gh, gw]."""
        batch, channels, height, width = levels[0].shape
        # self.conv(levels[0]) in a third of the time on the CPU: a matrix product gives each
        # position's share in the 9 outputs around it, which fold then sums
        taps = self.conv.weight.flip(2, 3).reshape(channels, 9).T.expand(batch, -1, -1)  # [B, 9, C]
        shares = torch.bmm(taps, levels[0].flatten(2))  # [B, 9, h * w]
        logits = F.fold(shares, (height - 2, width - 2), 3, padding=2) + self.conv.bias
        probabilities = torch.sigmoid(logits)[:, 0]  # [B, h - 2, w - 2]
        return self.mix_rows @ probabilities @ self.mix_columns.T

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = F.binary_cross_entropy(output.float(), target, reduction="none")
        return (loss * self.area).sum((1, 2))

    def pixels(self, output: torch.Tensor) -> torch.Tensor:
        values = (output * 255).to(torch.uint8)  # a byte a pixel to spread, not four
        rows, columns = (index.to(values.device) for index in self.cells)
        return values.index_select(2, columns).index_select(1, rows)  # whole rows last is faster


class Linear(Decoder):
    """One 1x1 convolution per level, summed on the finest grid: how little a decoder takes."""

    recipe = Recipe(lr=2e-3, steps=300, batch_size=16, order="shuffled")
    guided = False

    def __init__(self, shapes: Shapes, size: tuple[int, int]):
        super().__init__(finest(shapes), size)
        channels = [shape[0] for shape in shapes.values()]
        self.norms = nn.ModuleList(Standardise(c) for c in channels)
        self.convs = nn.ModuleList(nn.Conv2d(c, 1, 1) for c in channels)

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """levels: a [B, C, h, w] for each of `shapes`. Returns logits [B, gh, gw]."""
        maps = [F.interpolate(conv(norm(level)), self.grid, mode="bilinear")
                for norm, conv, level in zip(self.norms, self.convs, levels)]
        return torch.cat(maps, 1).sum(1)


class FPN(Decoder):
    """A small feature pyramid: levels reduced to principal components, summed from coarse to fine.

    Components are dropped at random and frames mirrored at random in training; both ways are
    averaged when predicting. Lin et al., "Feature Pyramid Networks for Object Detection", CVPR
    2017, for the sum; Yu and Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions",
    ICLR 2016, for the blocks.
    """

    recipe = Recipe(steps=500, batch_size=10, lr=3e-3, optimizer="adamw", weight_decay=1e-2,
                    schedule="onecycle", order="balanced", clip_gradient=1.0)
    keep = 32  # principal components of each level
    drop = 0.3  # share of a level's components set to 0 in training
    lose = 0.0  # share of frames whose own features are set to 0 in training: the cues are left
    hide = 0.25  # share of frames in which one kind of cue is set to 0 in training
    width, fine = 48, 32  # channels of all stages but the finest, and of that
    dilations = (1,), (1,), (1, 1), (1, 2, 4, 8), (1,)  # of the blocks of the last stages

    def __init__(self, shapes: Shapes, size: tuple[int, int]):
        super().__init__(finest(shapes), size)
        strides = [level_stride(level) for level in shapes]
        stages = sorted(set(strides), reverse=True)  # coarse to fine
        at = [stages.index(stride) for stride in strides]
        self.grids = [finest(shapes, stride) for stride in stages]
        self.at = at * 2 if self.cues else at  # the stage of each level, then of its cues

        norms = [Standardise(c, self.keep) for c, _, _ in shapes.values()]
        self.norms = nn.ModuleList(norms)
        channels = [norm.outputs for norm in norms]
        channels += [self.cues] * (len(self.at) - len(at))
        widths = [self.width] * (len(stages) - 1) + [self.fine]
        dilations = (((1,),) * len(stages) + self.dilations)[-len(stages):]

        self.inputs = nn.ModuleList(nn.Conv2d(c, widths[s], 1) for c, s in zip(channels, self.at))
        self.ups = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths))
        self.joins = nn.ModuleList(nn.GroupNorm(8, width) for width in widths)
        self.blocks = nn.ModuleList(
            nn.Sequential(*[Block(width, dilation) for dilation in stage])
            for width, stage in zip(widths, dilations))
        self.output = nn.Conv2d(self.fine, 1, 1)

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """levels: a [B, C, h, w] for each of `shapes`, then their cues. Returns logits [B, gh,
        gw]."""
        own = [norm(level) for norm, level in zip(self.norms, levels)]
        cues = levels[len(own):]
        if not self.training:
            mirrored = self.pyramid([x.flip(-1) for x in own + cues]).flip(-1)
            return (self.pyramid(own + cues) + mirrored) / 2

        batch, device = len(levels[0]), levels[0].device
        kept = (torch.rand(batch, 1, 1, 1, device=device) >= self.lose).float()
        own = [F.dropout2d(level, self.drop) * kept for level in own]
        if cues:
            seen = (torch.rand(batch, self.cues, 1, 1, device=device) >= self.hide).float()
            cues = [cue * seen for cue in cues]
        if torch.rand(()) < 0.5:  # drawn on the host: no waiting for the device
            return self.pyramid([x.flip(-1) for x in own + cues]).flip(-1)
        return self.pyramid(own + cues)

    def pyramid(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """Sum the levels stage by stage, coarse to fine. Returns logits [B, gh, gw]."""
        x = None
        for stage, grid in enumerate(self.grids):
            here = [conv(level) for conv, level, at in zip(self.inputs, levels, self.at)
                    if at == stage]
            if x is not None:
                here.append(self.ups[stage - 1](x))
            total = sum(y if y.shape[2:] == grid else F.interpolate(y, grid, mode="bilinear")
                        for y in here)
            x = self.blocks[stage](F.relu(self.joins[stage](total)))
        return self.output(x)[:, 0]

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """As Decoder.loss, plus 1 - Dice of each frame (Milletari et al., "V-Net", 3DV 2016)."""
        probability = torch.sigmoid(output.float())
        overlap = 2 * (probability * target).sum((1, 2)) + 1  # smoothed by one cell
        total = probability.sum((1, 2)) + target.sum((1, 2)) + 1
        return super().loss(output.float(), target) + 1 - overlap / total


class Temporal(FPN):
    """FPN that also sees what the whole clip tells about each position: see vos/cues.py."""

    recipe = dataclasses.replace(FPN.recipe, steps=1000)
    cues = 5
    lose = 0.25
    adapt_steps = 15


class Mean(nn.ModuleList):
    """Decoders of one kind as one: the mean of what they give, [B, gh, gw]."""

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([decoder(levels) for decoder in self]).mean(0)

    def pixels(self, output: torch.Tensor) -> torch.Tensor:
        return self[0].pixels(output)  # type: ignore[operator]  # it holds decoders alone


# name -> class(shapes, size); train.py trains it, model.pt remembers it by this name
DECODERS: dict[str, type[Decoder]] = {
    "simple": Simple,
    "linear": Linear,
    "fpn": FPN,
    "temporal": Temporal,
}


def make_decoder(name: str, shapes: Shapes, size: tuple[int, int], seed: int = 0) -> Decoder:
    """Return a new decoder for features of `shapes` and frames of `size`. Raises BadInput."""
    if name not in DECODERS:
        raise BadInput(f"decoder {name!r}: unknown; there are {', '.join(DECODERS)}")
    torch.manual_seed(seed)
    return DECODERS[name](shapes, size)  # type: ignore[arg-type]  # its own constructor takes these


@torch.inference_mode()
def predict(decoder: Decoder | Mean, features: Features, index: torch.Tensor | None = None,
            batch_size: int = 32,
            images: Iterator[np.ndarray] | None = None) -> Iterator[torch.Tensor]:
    """Yield the mask of each row of `index` (None: all), uint8 [H, W]: floor(255 * probability).

    images: the frames themselves, uint8 [H, W, 3] each, in that order; logits are then upsampled
    along their edges to their size, see vos/refine.py. Without, they are upsampled plainly.
    """
    decoder.eval()
    index = features.index if index is None else index
    for part in index.split(batch_size):
        output = decoder(features.batch(part)).float()
        if images is None:
            yield from decoder.pixels(output)
            continue
        from vos.refine import guided_probabilities
        for logits in output:
            frame = torch.from_numpy(next(images)).to(output.device).permute(2, 0, 1)
            yield (guided_probabilities(logits, frame) * 255).to(torch.uint8)


def finest(shapes: Shapes, stride: float | None = None) -> tuple[int, int]:
    """Return the largest grid (h, w) at a stride: s16 and s8@0.5 may round apart."""
    stride = stride or min(map(level_stride, shapes))
    grids = [shape[1:] for level, shape in shapes.items() if level_stride(level) == stride]
    return max(grids, key=lambda grid: grid[0] * grid[1])


def describe(decoder: Decoder, folder: FeatureFolder, levels: list[str]) -> dict:
    """Return what a model must remember of its decoder and features to be run again."""
    name = next((key for key, kind in DECODERS.items() if kind is type(decoder)), "your own")
    return {"format": FORMAT, "decoder": name, "returns": decoder.returns,
            **folder.describe(levels)}


def save_model(path: Path, description: dict, decoder: Decoder) -> None:
    """Write model.pt: a plain dict of `description` and the state dict."""
    state = {key: value.cpu().contiguous() for key, value in decoder.state_dict().items()}
    save_checkpoint(path, {**description, "state": state})


def load_model(path: str | Path, size: tuple[int, int] | None = None,
               shapes: Shapes | None = None) -> tuple[Decoder, dict]:
    """Return the decoder of a model.pt, or of the run folder that holds it, and its description.

    size, shapes: of the frames and feature maps that it is to run on; None for those it was trained
    on. Raises BadInput when it is no checkpoint of train.py, damaged, or does not fit its decoder.
    """
    path = Path(path) / "model.pt" if Path(path).is_dir() else Path(path)
    model = load_checkpoint(path, {"format", "state"})
    if model["format"] != FORMAT:
        raise BadInput(f"{path}: format {model['format']!r}, expected {FORMAT}; train it anew")
    try:
        own = {level: tuple(shape) for level, shape in model["shapes"].items()}
        for shape in ([3, *model["size"]], *map(list, own.values())):
            if not is_shape(shape, 3) or math.prod(shape[1:]) > 1 << 26:
                raise ValueError(f"no frames or features have the shape {shape}")
        decoder = make_decoder(model["decoder"], shapes or own, size or tuple(model["size"]))
        if model["returns"] != decoder.returns:
            raise ValueError(f"it returned {model['returns']}, which now are {decoder.returns}")
        decoder.load_state_dict(model["state"])
        if not all(value.isfinite().all() for value in model.pop("state").values()):
            raise ValueError("its weights are not finite")
    except Exception as error:  # a damaged description can break a decoder in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"{path}: does not fit its decoder ({reason}); train it anew") from error
    return decoder.eval(), model
