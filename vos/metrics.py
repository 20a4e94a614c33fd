"""Scores of binary masks: the contest's IoU, and the DAVIS benchmark's J and F.

Source: Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object
Segmentation", CVPR 2016, and its toolkit (`db_eval_iou`, `db_eval_boundary`, `db_statistics`).
"""
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

PROTOCOLS = ("all", "davis2016")
BOUND_TH = 0.008  # how far apart two boundaries may lie and still match, a share of the diagonal
Array = TypeVar("Array", np.ndarray, torch.Tensor)


class FrameScores(NamedTuple):
    """Scores of N frames, each float64 [N] in 0..1."""

    iou: np.ndarray  # the contest's, which leaves out (NaN) frames empty in prediction and mask
    J: np.ndarray    # the same, but 1 where both are empty
    F: np.ndarray


def foreground(pixels: Array) -> Array:
    """Return which uint8 pixels, of any shape, are foreground, as bool: pixel / 255 rounds to 1."""
    return pixels > 127


def pack(masks: np.ndarray) -> np.ndarray:
    """Pack bool masks [..., W] into uint8 [..., ceil(W / 8)], leftmost pixel in the highest bit."""
    return np.packbits(masks, axis=-1)


def contest_iou(predictions: Array, masks: Array) -> Array:
    """Return the contest's IoU of each frame, float64 [N]; NaN where both masks are empty.

    predictions, masks: of one shape, bool [N, H, W] arrays or tensors, or packed uint8 arrays.
    On a device the host does not wait for the result. It is float32 on mps, which has no float64.
    """
    intersection, union = _count(predictions & masks), _count(predictions | masks)
    if isinstance(union, torch.Tensor):
        return intersection.to(torch.float32 if union.is_mps else torch.float64) / union
    with np.errstate(invalid="ignore"):
        return intersection / union


def score_frames(predictions: np.ndarray, masks: np.ndarray, width: int) -> FrameScores:
    """Return contest IoU, J and F of each frame; raise ValueError for shapes that do not fit.

    predictions, masks: packed uint8 [N, H, ceil(width / 8)], as from `pack`. width: pixels a row.
    Takes about 0.3 ms a frame of 480x854 on one core, a thirtieth of what the plain computation
    on pixels takes (tests/reference_metrics.py, 9.6 ms).
    """
    shape = (*masks.shape[:2], -(-width // 8))
    for packed in (predictions, masks):
        if packed.shape != shape or packed.dtype != np.uint8:
            raise ValueError(f"expected uint8 {shape}, found {packed.dtype} {packed.shape}")
    iou = contest_iou(predictions, masks)
    F = [_f_measure(*pair, width) for pair in zip(predictions, masks)]
    return FrameScores(iou, np.nan_to_num(iou, nan=1.0), np.array(F, dtype=np.float64))


def _count(masks: Array) -> Array:
    """Return how many pixels are set in each frame, integers [N], of bool or packed [N, H, ...]."""
    if masks.dtype == np.uint8:
        return np.bitwise_count(masks).sum((1, 2), dtype=np.uint32)
    return masks.sum((1, 2))


def _f_measure(prediction: np.ndarray, mask: np.ndarray, width: int) -> float:
    """Return F of one frame, from packed uint8 [H, ceil(width / 8)].

    The toolkit's rules: 2 P R / (P + R), where P and R are the shares of the prediction's and the
    mask's boundary near the other's; 1 where neither has a boundary, 0 where only one has.
    """
    both = prediction | mask
    rows, columns = np.flatnonzero(both.any(axis=1)), np.flatnonzero(both.any(axis=0))
    if not len(rows):
        return 1.0
    # Only the box that holds both matters, one row and one byte wider on each side.
    top, bottom = max(rows[0] - 1, 0), rows[-1] + 2
    left, right = max(columns[0] - 1, 0), columns[-1] + 2
    box = np.stack([prediction[top:bottom, left:right], mask[top:bottom, left:right]])
    box = np.unpackbits(box, axis=-1)[:, :, :width - 8 * left]

    # Each boundary becomes one long integer, whose rows end in at least `radius` zero bits.
    radius = math.ceil(BOUND_TH * math.hypot(len(mask), width))
    stride = -(-(box.shape[2] + radius) // 8) * 8
    boundaries = np.pad(_boundaries(box), ((0, 0), (0, 0), (0, stride - box.shape[2])))
    ours, theirs = (int.from_bytes(np.packbits(each).tobytes()) for each in boundaries)
    if not (ours and theirs):
        return float(ours == theirs)

    precision = (ours & _dilate(theirs, stride, radius)).bit_count() / ours.bit_count()
    recall = (theirs & _dilate(ours, stride, radius)).bit_count() / theirs.bit_count()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundaries(masks: np.ndarray) -> np.ndarray:
    """Return the toolkit's `seg2bmap` of 0 or 1 [2, H, W]: the pixels that differ east or south."""
    differ = np.zeros_like(masks)
    height, width = masks.shape[1:]
    for down, right in ((0, 1), (1, 0), (1, 1)):
        here = differ[:, :height - down, :width - right]
        here |= masks[:, :height - down, :width - right] ^ masks[:, down:, right:]
    return differ


def _dilate(bits: int, stride: int, radius: int) -> int:
    """Return the set pixels of a mask grown by a disk: every pixel within `radius`, inclusive.

    bits: the mask's rows one after the other, `stride` bits each, the last `radius` or more zero.
    The disk is a stack of horizontal runs, the shortest at its top and bottom, the longest through
    its centre: widen the mask run by run, and add each moved up and down.
    """
    near, wide, reach = 0, bits, 0
    for dy in range(radius, -1, -1):
        run = math.isqrt(radius * radius - dy * dy)
        while reach < run:
            step = min(2 * reach + 1, run - reach)  # a longer one would leave gaps
            wide |= wide << step | wide >> step
            reach += step
        near |= wide << dy * stride | wide >> dy * stride
    return near


def summarize(clips: Sequence[str], iou: np.ndarray, J: np.ndarray, F: np.ndarray,
              protocol: str = "all") -> dict:
    """Return what scores.json holds: the scores of all frames together and of each clip.

    clips: the clip of each frame, a clip's frames in order. iou, J, F: [N] as from `score_frames`;
    a NaN is left out. protocol: "all" frames, or "davis2016", without every clip's first and last.
    `mean_iou` is over frames; J and F of the whole are means over clips. A number that no frame
    contributes to is None, and left out of the means. Raises ValueError for another protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"expected a protocol of {', '.join(PROTOCOLS)}, found {protocol}")
    frames: dict[str, list[int]] = {}
    for index, clip in enumerate(clips):
        frames.setdefault(clip, []).append(index)
    if protocol == "davis2016":
        frames = {clip: indices[1:-1] for clip, indices in frames.items()}

    per_clip: dict[str, dict] = {}
    for clip, indices in frames.items():
        per_clip[clip] = {"frames": len(indices), "mean_iou": _mean(iou[indices])}
        for name, values in (("J", J[indices]), ("F", F[indices])):
            recall = _mean(values[~np.isnan(values)] > 0.5)
            per_clip[clip] |= {f"{name}_mean": _mean(values), f"{name}_recall": recall,
                               f"{name}_decay": decay(values)}

    kept = [index for indices in frames.values() for index in indices]
    scores = {"protocol": protocol, "frames": len(kept), "mean_iou": _mean(iou[kept])}
    for key in ("J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay"):
        of_clips = [clip_scores[key] for clip_scores in per_clip.values()]
        scores[key] = _mean(np.array(of_clips, dtype=np.float64))  # None becomes NaN
    return scores | {"per_clip": per_clip}


def decay(values: np.ndarray) -> float | None:
    """Return the mean of a clip's first quarter minus that of its last, of [n]; NaNs are left out.

    The quarters share their edge frames, as the toolkit's, whose uint8 edges wrap at 256 frames.
    """
    edges = np.round(np.linspace(0, len(values) - 1, 5) + 1e-10).astype(int)
    first, last = _mean(values[edges[0]:edges[1] + 1]), _mean(values[edges[3]:edges[4] + 1])
    return None if first is None or last is None else first - last


def _mean(values: np.ndarray) -> float | None:
    """Return the mean of what is not NaN; None, which JSON can hold, when that is nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None
