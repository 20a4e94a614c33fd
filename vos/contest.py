"""The contest's rules: what is foreground, the IoU of a frame, how large a model may be."""
import torch

LIMIT = 50_000_000  # parameters of featurizer and decoder must be fewer


def foreground(pixels):
    """Return as bool which uint8 pixels (array or tensor) are foreground: p / 255 rounds to 1."""
    return pixels > 127


def contest_iou(predictions: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return the contest's IoU, float32 [N], of bool [N, H, W]; NaN where both masks are empty."""
    return (predictions & masks).sum((1, 2)) / (predictions | masks).sum((1, 2))
