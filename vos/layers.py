"""Parts of the decoders, and the contest's rules. B batch, C channels, h w feature grid."""
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

LIMIT = 50_000_000  # parameters of featurizer and decoder must be fewer


class Block(nn.Module):
    """x + ReLU(GroupNorm(3x3 convolution of x)), [B, C, h, w] to the same; dilation sees more."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding="same", dilation=dilation, bias=False)
        self.norm = nn.GroupNorm(8, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.norm(self.conv(x)))


class Standardise(nn.Module):
    """Standardise each channel; then take the first `keep` principal components (0: all as is)."""

    mean: torch.Tensor
    std: torch.Tensor
    basis: torch.Tensor

    def __init__(self, channels: int, keep: int = 0):
        super().__init__()
        self.outputs = min(keep, channels) or channels
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        if keep:  # rows are directions, all of one length
            self.register_buffer("basis", torch.eye(channels)[:self.outputs])

    def forward(self, level: torch.Tensor) -> torch.Tensor:
        """level: [B, C, h, w]. Returns [B, outputs, h, w]."""
        level = (level - self.mean) / self.std
        return F.conv2d(level, self.basis[:, :, None, None]) if hasattr(self, "basis") else level


@torch.no_grad()
def fit_standardise(decoder: nn.Module, features) -> None:
    """Set a decoder's `norms`, if any, one Standardise a level, from at most 256 rows, evenly."""
    chosen = features.index[:: -(-len(features.index) // 256)]
    for number, norm in enumerate(getattr(decoder, "norms", ())):
        level = features.levels[number][chosen].to(features.device).float()
        values = level.transpose(0, 1).flatten(1)  # [C, positions]
        mean = values.mean(1)
        values -= mean[:, None]
        covariance = values @ values.T / values.shape[1]
        std = covariance.diagonal().clamp_min(0).sqrt() + 1e-3
        norm.mean.copy_(mean[:, None, None])
        norm.std.copy_(std[:, None, None])
        if not hasattr(norm, "basis"):
            continue

        # the directions of most variance, scaled so that its mean becomes 1
        covariance /= std[:, None] * std
        covariance += 1e-6 * torch.eye(len(mean), device=mean.device)
        variances, vectors = torch.linalg.eigh(covariance)  # by rising variance
        variances, vectors = variances[-norm.outputs:].flip(0), vectors.T[-norm.outputs:].flip(0)
        signs = torch.sign(vectors.sum(1, keepdim=True))  # fixed, or machines would differ
        norm.basis.copy_(vectors * signs / variances.mean().sqrt())


def pooling(cells: int, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return AdaptiveAvgPool1d: its distinct means, [groups, cells], and each pixel's group."""
    means = F.adaptive_avg_pool1d(torch.eye(cells), pixels).T  # [pixels, cells]
    return torch.unique_consecutive(means, dim=0, return_inverse=True)


@torch.no_grad()
def count_flops(work: Callable, inputs: Sequence) -> int:
    """Return the floating-point operations of work(inputs), a multiply-add as two."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        work(inputs)
    return counter.get_total_flops()
