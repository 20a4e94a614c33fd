"""The scores of vos/metrics.py, slow and plain, from their definition: what it is held to.

Source: Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object
Segmentation", CVPR 2016, and the rules of its toolkit. Nothing here is packed, cropped or shared
with vos/metrics.py.
"""
import math
from fractions import Fraction

import numpy as np


def frame_scores(prediction: np.ndarray, mask: np.ndarray) -> tuple[float, float, float]:
    """Return contest IoU (NaN where both are empty), J and F of one frame of bool [H, W] masks."""
    intersection, union = int((prediction & mask).sum()), int((prediction | mask).sum())
    if union == 0:
        return math.nan, 1.0, f_measure(prediction, mask)
    return intersection / union, intersection / union, f_measure(prediction, mask)


def f_measure(prediction: np.ndarray, mask: np.ndarray) -> float:
    """Return F, the harmonic mean of the shares of each boundary that lie near the other."""
    radius = math.ceil(0.008 * np.linalg.norm(mask.shape))
    ours, theirs = boundary(prediction), boundary(mask)
    if not (ours.any() and theirs.any()):  # one has none: precision is 1 and recall 0, or the other
        return float(ours.any() == theirs.any())
    precision = (ours & dilate(theirs, radius)).sum() / ours.sum()
    recall = (theirs & dilate(ours, radius)).sum() / theirs.sum()
    return 0.0 if precision + recall == 0 else float(2 * precision * recall / (precision + recall))


def boundary(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of [H, W] that differ from their east, south or south-east neighbour.

    The frame's edge is repeated beyond it.
    """
    larger = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != larger[:-1, 1:]) | (mask != larger[1:, :-1]) | (mask != larger[1:, 1:])


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Return the pixels of [H, W] within `radius` of one that is set.

    One moved copy for each pixel of the disk.
    """
    height, width = mask.shape
    canvas = np.zeros((height + 2 * radius, width + 2 * radius), dtype=bool)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            if dy * dy + dx * dx <= radius * radius:
                top, left = radius + dy, radius + dx
                canvas[top:top + height, left:left + width] |= mask
    return canvas[radius:radius + height, radius:radius + width]


def clip_statistics(values: list[float]) -> tuple[float, float, float]:
    """Return mean, recall (share above 0.5) and decay of a clip's values, one or more, in order.

    Decay: the clip is cut at 5 edges, evenly spaced from its first frame to its last and rounded to
    the nearest (a half goes up); it is the mean of the first quarter minus that of the last, edge
    frames included.
    """
    last_frame = len(values) - 1
    edges = [math.floor(Fraction(i * last_frame, 4) + Fraction(1, 2)) for i in range(5)]
    first, last = values[edges[0]:edges[1] + 1], values[edges[3]:edges[4] + 1]
    recall = sum(value > 0.5 for value in values) / len(values)
    decay = math.fsum(first) / len(first) - math.fsum(last) / len(last)
    return math.fsum(values) / len(values), recall, decay
