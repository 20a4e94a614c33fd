"""Scores of binary masks: the contest's IoU, and J and F of the DAVIS benchmark with mean, recall and decay.

A frame's masks are packed: uint8 [H, ceil(W / 8)], `np.packbits` along W with zero padding bits, so that
counting, boundaries and dilation are bitwise operations on many pixels at once. What touches pixels is
written once, on rows of words, and runs on NumPy arrays (uint64 words, one frame at a time, cropped to the
box that holds both masks) and on PyTorch tensors of a device (uint8 words, many frames at a time, never
waiting for the device). Both count the same pixels and so give the same scores.

Source: Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation", CVPR
2016, and the rules of its toolkit (`db_eval_iou`, `db_eval_boundary`, `db_statistics`).
"""
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn.functional import pad

PROTOCOLS = ("all", "davis2016")
BOUND_TH = 0.008  # how far apart two boundaries may lie and still match, as a share of the frame's diagonal
TENSOR_CHUNK = 256  # frames scored at once on a device: bounds the temporary memory, about 1 MB a frame at 480p

Array = TypeVar("Array", np.ndarray, torch.Tensor)  # in and out alike


class FrameScores(NamedTuple):
    """Scores of N frames, each float64 [N] (float32 on mps, which has no float64) in 0..1."""

    iou: np.ndarray | torch.Tensor  # the contest's; NaN where prediction and mask are both empty: the contest leaves such frames out
    J: np.ndarray | torch.Tensor    # the same, but 1 where both are empty
    F: np.ndarray | torch.Tensor


def foreground(pixels: Array) -> Array:
    """Return which uint8 pixels (0..255, any shape) are foreground, bool: pixel / 255 rounds to 1."""
    return pixels > 127


def pack(masks: Array) -> Array:
    """Pack bool masks [..., W] into uint8 [..., ceil(W / 8)], 8 pixels a byte, the leftmost in the highest bit."""
    if isinstance(masks, np.ndarray):
        return np.packbits(masks, axis=-1)
    masks = pad(masks, (0, -masks.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return functools.reduce(torch.add, (masks[..., i].to(torch.uint8) << (7 - i) for i in range(8)))


def contest_iou(predictions: Array, masks: Array) -> Array:
    """Return the contest's IoU of each frame, float64 [N]; NaN where prediction and mask are both empty.

    Both are arrays or both tensors, of one shape: packed uint8 [N, H, ceil(W / 8)] or bool [N, H, W].
    """
    _check_alike(predictions, masks)
    if isinstance(predictions, torch.Tensor) and _on_cpu(predictions):
        return torch.from_numpy(contest_iou(predictions.numpy(), masks.numpy()))
    if isinstance(predictions, torch.Tensor):
        return _iou(_count(predictions & masks), _count(predictions | masks))
    overlaps = [(_count(p & m), _count(p | m)) for p, m in zip(predictions, masks)]  # a frame fits the cache
    return _iou(*np.array(overlaps, dtype=np.int64).reshape(-1, 2).T)


def score_frames(predictions: Array, masks: Array, width: int, bound_th: float = BOUND_TH) -> FrameScores:
    """Return contest IoU, J and F of each frame.

    predictions, masks: N frames of one size, packed uint8 [N, H, ceil(width / 8)] or bool [N, H, width], both
    NumPy arrays or both tensors on one device. width: pixels a row. bound_th: see `boundary_radius`.
    From tensors the scores are tensors on the same device, and the host waits for nothing. Raises ValueError
    for shapes or types that do not fit together.
    """
    _check_alike(predictions, masks)
    if isinstance(predictions, torch.Tensor) and _on_cpu(predictions):
        return FrameScores(*map(torch.from_numpy, score_frames(predictions.numpy(), masks.numpy(), width, bound_th)))
    is_bool = predictions.dtype in (bool, torch.bool)
    columns = width if is_bool else _units(width, 8)
    if predictions.shape[2] != columns:
        raise ValueError(f"expected {columns} columns of {predictions.dtype} for a width of {width}, found {predictions.shape[2]}")
    if is_bool:
        predictions, masks = pack(predictions), pack(masks)
    radius = boundary_radius(predictions.shape[1], width, bound_th)
    count_pixels = _count_arrays if isinstance(predictions, np.ndarray) else _count_tensors
    intersection, union, *boundary = count_pixels(predictions, masks, width, radius)
    iou = _iou(intersection, union)
    empty = union == 0
    return FrameScores(iou=iou, J=_iou(intersection + empty, union + empty), F=_f_measure(*boundary))


def boundary_radius(height: int, width: int, bound_th: float = BOUND_TH) -> int:
    """Return how many pixels apart two boundaries may lie and still match.

    bound_th: a share of the frame's diagonal when below 1, rounded up; else a number of pixels.
    """
    if bound_th <= 0:
        raise ValueError(f"expected bound_th above 0, found {bound_th}")
    return int(bound_th) if bound_th >= 1 else math.ceil(bound_th * math.hypot(height, width))


def summarize(clips: Sequence[str], iou: np.ndarray, J: np.ndarray, F: np.ndarray, protocol: str = "all") -> dict:
    """Return what scores.json holds: the scores of all frames together and of each clip.

    clips: the clip of each frame, the frames of a clip in order. iou, J, F: [N], as `score_frames` returns them;
    a NaN is a frame left out. protocol: "all" frames, or "davis2016", which leaves out the first and last
    frame of every clip (there, the first is given to semi-supervised methods). `mean_iou` is the contest's,
    over frames; J and F of the whole set are means over clips. A number that no frame contributes to is None:
    under "davis2016" a clip of 1 or 2 frames keeps none, so its numbers are None and it is left out of the means.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"expected a protocol of {', '.join(PROTOCOLS)}, found {protocol}")
    iou, J, F = (np.asarray(values, dtype=np.float64) for values in (iou, J, F))
    if not len(clips) == len(iou) == len(J) == len(F):
        raise ValueError(f"expected as many scores as frames: {len(clips)} clips, {len(iou)} iou, {len(J)} J, {len(F)} F")
    frames: dict[str, list[int]] = {}
    for index, clip in enumerate(clips):
        frames.setdefault(clip, []).append(index)
    if protocol == "davis2016":
        frames = {clip: indices[1:-1] for clip, indices in frames.items()}

    per_clip = {}
    for clip, indices in frames.items():
        per_clip[clip] = {"frames": len(indices), "mean_iou": _mean(iou[indices])}
        per_clip[clip] |= _statistics("J", J[indices]) | _statistics("F", F[indices])
    kept = [index for indices in frames.values() for index in indices]
    scores = {"protocol": protocol, "frames": len(kept), "mean_iou": _mean(iou[kept])}
    for key in [f"{measure}_{statistic}" for measure in "JF" for statistic in ("mean", "recall", "decay")]:
        values = [clip_scores[key] for clip_scores in per_clip.values()]
        scores[key] = _mean(np.array(values, dtype=np.float64))  # None becomes NaN, which is left out
    return scores | {"per_clip": per_clip}


def decay(values: np.ndarray) -> float | None:
    """Return the mean of a clip's first quarter minus the mean of its last; NaNs are left out.

    values: [n], in order. The toolkit's quarters: they share their edge frames. It casts the edges to uint8,
    which wraps beyond 256 frames and then compares the wrong ones; here they are whole numbers of any size.
    """
    if len(values) == 0:
        return None
    edges = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    first, last = _mean(values[edges[0]:edges[1] + 1]), _mean(values[edges[3]:edges[4] + 1])
    return None if first is None or last is None else first - last


def _statistics(measure: str, values: np.ndarray) -> dict[str, float | None]:
    """Return mean, recall (share of frames above 0.5) and decay of a clip's values [n], keyed "J_mean" and so on."""
    scored = values[~np.isnan(values)]
    return {f"{measure}_mean": _mean(scored), f"{measure}_recall": _mean(scored > 0.5), f"{measure}_decay": decay(values)}


def _mean(values: np.ndarray) -> float | None:
    """Return the mean of what is not NaN; None (which JSON can hold) when that is nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def _on_cpu(masks: Array) -> bool:
    """Return whether these are tensors in host memory, which are scored as the arrays they share it with."""
    return isinstance(masks, torch.Tensor) and masks.device.type == "cpu"


def _check_alike(predictions: Array, masks: Array) -> None:
    """Raise ValueError unless both are [N, H, columns] of one shape and type, bool or uint8."""
    if predictions.ndim != 3 or predictions.shape != masks.shape:
        raise ValueError(f"expected two [N, H, columns] of one shape, found {tuple(predictions.shape)} and {tuple(masks.shape)}")
    if predictions.dtype != masks.dtype or predictions.dtype not in (bool, np.uint8, torch.bool, torch.uint8):
        raise ValueError(f"expected bool or packed uint8 masks, found {predictions.dtype} and {masks.dtype}")


# From counts of pixels to scores.

def _iou(intersection: Array, union: Array) -> Array:
    """Return intersection / union from counts [N]; NaN where union is 0."""
    with np.errstate(invalid="ignore"):
        return _floats(intersection) / _floats(union)


def _f_measure(prediction: Array, mask: Array, prediction_hits: Array, mask_hits: Array) -> Array:
    """Return F from counts [N]: boundary pixels of each, and those of them that lie near the other's boundary.

    The toolkit's rules: 2 P R / (P + R), 1 where neither has a boundary, 0 where only one has or none match.
    """
    precision = _floats(prediction_hits) / _floats(prediction + (prediction == 0))
    recall = _floats(mask_hits) / _floats(mask + (mask == 0))
    total = precision + recall
    return 2 * precision * recall / (total + (total == 0)) + ((prediction == 0) & (mask == 0))


def _floats(counts: Array) -> Array:
    """Return counts as float64, the precision of the toolkit, where the device has it."""
    if isinstance(counts, np.ndarray):
        return counts.astype(np.float64)
    return counts.to(torch.float32 if counts.device.type == "mps" else torch.float64)


# From masks to counts of pixels, six a frame: intersection, union, boundary pixels of prediction and of mask,
# and those of each that lie within `radius` of the other's.

def _count_arrays(predictions: np.ndarray, masks: np.ndarray, width: int, radius: int) -> np.ndarray:
    """Return the six counts of N frames, int64 [6, N], from packed arrays uint8 [N, H, ceil(width / 8)]."""
    counts = [_count_frame(p, m, width, radius) for p, m in zip(predictions, masks)]
    return np.array(counts, dtype=np.int64).reshape(-1, 6).T


def _count_tensors(predictions: torch.Tensor, masks: torch.Tensor, width: int, radius: int) -> torch.Tensor:
    """Return the six counts of N frames, int64 [6, N], from packed tensors uint8 [N, H, ceil(width / 8)]."""
    counts = []
    padding = _units(width + radius, 8) - predictions.shape[2]
    for prediction, mask in zip(predictions.split(TENSOR_CHUNK), masks.split(TENSOR_CHUNK)):
        boundaries = _boundaries(pad(torch.stack([prediction, mask]), (0, padding)), width)
        overlap = _count(prediction & mask), _count(prediction | mask)
        counts.append(torch.stack([*overlap, *_count(boundaries), *_hits(boundaries, radius)]))
    return torch.cat(counts, dim=1)


def _count_frame(prediction: np.ndarray, mask: np.ndarray, width: int, radius: int) -> tuple[int, ...]:
    """Return the six counts of one frame, from packed arrays uint8 [H, ceil(width / 8)]."""
    both = prediction | mask
    rows = np.flatnonzero(both.any(axis=1))
    if not len(rows):
        return (0,) * 6
    # Only the box that holds both matters. A boundary pixel lies up to one above and left of it, and one more
    # row below, where there is one, tells an object that ends there from one that the frame cuts off.
    top, bottom = max(rows[0] - 1, 0), rows[-1] + 2
    columns = np.flatnonzero(both[top:bottom].any(axis=0))
    left, right = max(int(columns[0]) - 1, 0), int(columns[-1]) + 1  # in bytes
    boxes = [packed[top:bottom, left:right] for packed in (prediction, mask)]
    pair = np.zeros((2, len(boxes[0]), _units(8 * (right - left) + radius, 64) * 8), dtype=np.uint8)
    pair[:, :, :right - left] = boxes
    pair = pair.view(">u8").astype(np.uint64)  # [2, rows, words]: the leftmost pixel in the highest bit

    boundaries = _boundaries(pair, width - 8 * left)
    lengths = _count(boundaries)
    hits = _hits(boundaries, radius) if lengths.all() else (0, 0)
    return _count(pair[0] & pair[1]), _count(pair[0] | pair[1]), *lengths, *hits


def _units(count: int, size: int) -> int:
    """Return how many units of `size` hold `count` bits: the quotient, rounded up."""
    return -(-count // size)


def _count(words: Array) -> Array:
    """Return how many pixels are set in each frame: [..., H, columns] packed words or bool -> integers [...]."""
    if isinstance(words, np.ndarray):
        return (words if words.dtype == bool else np.bitwise_count(words)).sum(axis=(-2, -1), dtype=np.uint32)
    if words.dtype == torch.uint8:  # PyTorch has no population count: add neighbouring bits, pairs, then nibbles
        words = words - ((words >> 1) & 0x55)
        words = (words & 0x33) + ((words >> 2) & 0x33)
        words = (words + (words >> 4)) & 0x0F
    return words.sum(dim=(-2, -1))


def _hits(boundaries: Array, radius: int) -> tuple[Array, Array]:
    """Return how many boundary pixels of each of the two [2, ..., H, words] lie within `radius` of the other's."""
    near = _dilate(boundaries, radius)
    return _count(boundaries[0] & near[1]), _count(boundaries[1] & near[0])


# Bitwise operations on rows of words, [..., H, words]: the first pixel of a row is the highest bit of its first
# word. Rows end in at least `radius` zero bits, so a shift that runs into the next row lands where no pixel is.

def _boundaries(masks: Array, width: int) -> Array:
    """Return the one-pixel boundaries: pixels that differ from their east, south or south-east neighbour.

    A neighbour outside the frame counts as equal. This is the toolkit's `seg2bmap`.
    """
    bits = 8 * masks.itemsize
    east = masks << 1
    east.reshape(-1)[:-1] |= masks.reshape(-1)[1:] >> (bits - 1)
    across = masks ^ east
    last_column = 1 << (bits - 1 - (width - 1) % bits)
    last_word = (width - 1) // bits  # beyond a crop that leaves it out, and then nothing is done
    across[..., last_word:last_word + 1] &= (1 << bits) - 1 - last_column
    across[..., -1] &= (1 << bits) - 2  # the last bit of a row saw the first of the next
    # Of four pixels, all are equal when the two above are, the two below, and the two on the left.
    down = (masks[..., :-1, :] ^ masks[..., 1:, :]) | across[..., 1:, :]
    across[..., :-1, :] |= down
    return across


def _dilate(masks: Array, radius: int) -> Array:
    """Return the masks grown by a disk: every pixel within `radius` (Euclidean, inclusive) of one that is set.

    The disk is a stack of horizontal runs, from the shortest at its top and bottom to the longest through its
    centre: widen the masks run by run, and add each, moved up and down by its distance from the centre.
    """
    height = masks.shape[-2]
    near = masks ^ masks
    wide, reach = masks, 0
    for dy in range(min(radius, height - 1), -1, -1):
        run = math.isqrt(radius * radius - dy * dy)
        while reach < run:
            step = min(2 * reach + 1, run - reach, 8 * masks.itemsize - 1)  # a longer one would leave gaps
            wide, reach = _widen(wide, step), reach + step
        below, above = near[..., dy:, :], near[..., :height - dy, :]  # `near[...] |= x` would also copy it to itself
        below |= wide[..., :height - dy, :]
        above |= wide[..., dy:, :]
    return near


def _widen(masks: Array, step: int) -> Array:
    """Return the masks with themselves moved `step` pixels left and right added; step < bits a word."""
    carry = 8 * masks.itemsize - step
    wide = masks << step
    wide |= masks
    wide |= masks >> step
    flat, source = wide.reshape(-1), masks.reshape(-1)
    to_left, to_right = flat[:-1], flat[1:]
    to_left |= source[1:] >> carry
    to_right |= source[:-1] << carry
    return wide
