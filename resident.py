"""Features and masks in memory, ready to train from: whole on the device, in host memory, or read from disk.

`load_split` loads a feature folder, `batches` yields what a training step needs. On the device a batch is a
gather and nothing else; from host memory or disk a thread gathers the next batch while this one trains.
Parted from data.py, which knows the files.
"""
import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from clips import in_threads
from data import FeatureFolder, check_array, check_levels
from distributed import Group
from files import BadInput

RESIDENT = ("device", "host", "disk")
ALONE = Group()
CHUNK = 32 << 20  # bytes read from disk at a time
SPARE = 0.8  # share of the free memory that features and masks may take


# --- rows of an array, wherever they are --------------------------------------------------------


class DiskRows:
    """The rows of an .npy file, read when asked for.

    Read, not mapped: mapped pages count as this process's memory, which would grow with the file.
    """

    def __init__(self, file: Path, shape: tuple[int, ...], start: int, dtype: torch.dtype, group: Group):
        self.handle = open(file, "rb", buffering=0)  # noqa: SIM115  as long as the rows may be asked for
        self.shape, self.start, self.dtype, self.group = shape, start, dtype, group

    def index_select(self, dim: int, index: torch.Tensor) -> torch.Tensor:
        """As Tensor.index_select with dim 0: rows `index`, int64 [B], counted among this process's share, in host memory."""
        rows = torch.empty((len(index), *self.shape[1:]), dtype=self.dtype)
        for row, number in zip(rows, (index * self.group.size + self.group.rank).tolist()):
            view = bytes_of(row)
            if os.preadv(self.handle.fileno(), [view], self.start + number * len(view)) != len(view):
                raise BadInput(f"{self.handle.name}: ended early; it was changed while being read")
        return rows


Rows = torch.Tensor | DiskRows  # this process's share of an array's rows: row r of it is frame r * size + rank


def load_rows(file: Path, shape: tuple[int, ...], device: torch.device, resident: str, digest: str | None,
              group: Group = ALONE) -> Rows:
    """Read an .npy array once, checking it on the way, and keep this process's share of its rows where `resident` says.

    The array reaches the device in pieces through one small pinned buffer: no second copy in host memory.
    digest: the expected SHA-256 of the file, or None to skip that check. Raises BadInput when the digest
    differs or a value is not finite.
    """
    start, dtype = check_array(file, shape, (np.float16, np.float32, np.uint8))
    kind = getattr(torch, dtype.name)
    array = None
    if resident != "disk":
        where = device if resident == "device" else torch.device("cpu")
        array = torch.empty((len(range(group.rank, shape[0], group.size)), *shape[1:]), dtype=kind, device=where,
                            pin_memory=resident == "host" and device.type == "cuda")
    values = math.prod(shape[1:])
    buffer = torch.empty((max(1, CHUNK // (values * dtype.itemsize)), values), dtype=kind, pin_memory=device.type == "cuda")
    sha = hashlib.sha256()
    with open(file, "rb", buffering=0) as handle:
        sha.update(handle.read(start))
        for first in range(0, shape[0], len(buffer)):
            piece = buffer[:min(len(buffer), shape[0] - first)]
            read_into(handle, piece)
            if digest is not None:
                sha.update(bytes_of(piece))
            if not all(map(math.isfinite, piece.aminmax())):  # NaN is both; twenty times faster than looking at each
                refuse_not_finite(file, piece, first)
            if array is not None:
                skip = (group.rank - first) % group.size  # rows of this piece before the first that is ours
                ours = piece[skip::group.size].view(-1, *shape[1:])
                array[(first + skip) // group.size:][:len(ours)] = ours
    if digest is not None and sha.hexdigest() != digest:
        raise BadInput(f"{file}: its SHA-256 differs from meta.json's; the file was changed or damaged: make the folder "
                       "anew with featurize.py, or pass --no-verify")
    return DiskRows(file, shape, start, kind, group) if array is None else array


def bytes_of(piece: torch.Tensor) -> memoryview:
    """The memory of a host tensor, as bytes."""
    return piece.numpy().reshape(-1).view(np.uint8).data


def read_into(handle: FileIO, piece: torch.Tensor) -> None:
    """Fill a host tensor with the file's next bytes. A short read means the file was cut while we read it."""
    view = bytes_of(piece)
    done = 0
    while done < len(view):
        count = handle.readinto(view[done:])
        if not count:
            raise BadInput(f"{handle.name}: ended early; it was changed while being read")
        done += count


def refuse_not_finite(file: Path, rows: torch.Tensor, first: int) -> None:
    """Raise BadInput naming the first frame of `rows` [n, values] with NaN or infinity."""
    bad = (~torch.isfinite(rows)).any(1).nonzero()
    raise BadInput(f"{file}: NaN or infinity in the features of frame {first + int(bad[0])}; make the folder anew with featurize.py")


# --- features and masks ------------------------------------------------------------------------


class Features(NamedTuple):
    """Levels of features: `batch(index)` is a gather, nothing else."""

    levels: list[Rows]  # [N, C, h, w] each, float16 or float32
    device: torch.device  # where batches go
    group: Group = ALONE

    def batch(self, index: torch.Tensor) -> list[torch.Tensor]:
        """index: int64 [B], frames that this process holds. Returns a float32 [B, C, h, w] on the device for each level."""
        return [gather(level, index, self.device, self.group).float() for level in self.levels]


def gather(rows: Rows, index: torch.Tensor, device: torch.device, group: Group = ALONE) -> torch.Tensor:
    """Return the rows of frames `index`, int64 [B] on any device, on `device`."""
    where = rows.device if isinstance(rows, torch.Tensor) else torch.device("cpu")
    return rows.index_select(0, index.to(where) // group.size).to(device, non_blocking=True)  # half the time of rows[index]


def load_features(folder: FeatureFolder, levels: list[str], device: torch.device, resident: str = "device",
                  verify: bool = True, group: Group = ALONE) -> Features:
    """Load `levels` of a folder. Raises BadInput for a level it lacks, damaged or non-finite values."""
    check_levels(folder, levels)
    digests = folder.meta["sha256"] if verify else {}
    return Features([load_rows(folder.files[level], (folder.frames, *folder.meta["levels"][level]), device, resident,
                               digests.get(folder.files[level].name), group) for level in levels], device, group)


def load_masks(folder: FeatureFolder, device: torch.device, resident: str = "device", verify: bool = True,
               group: Group = ALONE) -> Rows:
    """Return the packed masks, uint8 [N, H, ceil(W / 8)]. Raises BadInput when there are none."""
    if folder.masks is None:
        raise BadInput(f"{folder.path}: has no masks.npy, and this step needs annotations; featurize annotated clips")
    digest = folder.meta["sha256"].get("masks.npy") if verify else None
    return load_rows(folder.masks, mask_shape(folder), device, resident, digest, group)


def mask_shape(folder: FeatureFolder) -> tuple[int, int, int]:
    """The shape of a folder's masks.npy: [N, H, ceil(W / 8)]."""
    height, width = folder.size
    return folder.frames, height, -(-width // 8)


def choose_resident(asked: str | None, folders: list[FeatureFolder], levels: list[str], device: torch.device,
                    group: Group = ALONE) -> str:
    """Return where features and masks go: where `asked`, else on the device, in host memory or on disk, the first that fits.

    Checked before anything is allocated. Raises BadInput naming both numbers when they do not fit where asked.
    """
    needed = sum(folder.files[level].stat().st_size for folder in folders for level in levels)
    needed += sum(math.prod(mask_shape(folder)) for folder in folders if folder.masks)
    needed //= group.size
    for place, free in (("device", free_memory(device)), ("host", free_memory(torch.device("cpu")))):
        fits = free is None or needed <= SPARE * free
        if asked == place and free is not None and not fits:
            raise BadInput(f"--resident {place}: the features and masks take {needed / 1e9:.2f} GB, but only {SPARE:.0%} of the "
                           f"{free / 1e9:.2f} GB free there may be used; pass --resident {'host' if place == 'device' else 'disk'}")
        if asked == place or (asked is None and fits):
            return place
    return "disk"


def free_memory(device: torch.device) -> int | None:
    """Return the bytes free on a device, or in host memory; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


class Split(NamedTuple):
    """Frames to train or to validate on: all or some of a feature folder."""

    folder: FeatureFolder
    features: Features
    masks: Rows  # uint8 [N, H, ceil(W / 8)]
    index: torch.Tensor  # type: ignore[assignment]  # int64 [n], the frames that count, in host memory; hides tuple.index

    def own(self) -> torch.Tensor:
        """The frames of `index` that this process holds."""
        return self.index[self.features.group.holds(self.index)]


def load_split(folder: FeatureFolder, levels: list[str], device: torch.device, resident: str, verify: bool, group: Group) -> Split:
    """Load this process's share of a feature folder and its masks to where `resident` says."""
    return Split(folder, load_features(folder, levels, device, resident, verify, group),
                 load_masks(folder, device, resident, verify, group), torch.arange(folder.frames))


def select(split: Split, index: np.ndarray) -> Split:
    """The same folder, but only the frames of `index`."""
    return split._replace(index=torch.from_numpy(index))


def without_views(split: Split) -> Split:
    """The same frames, but not the views of them: what a decoder is validated on."""
    return split._replace(index=split.index[split.index < split.folder.originals])


# --- batches -----------------------------------------------------------------------------------


Cells = tuple[torch.Tensor, torch.Tensor]  # the grid row of every pixel row, int64 [H], and column of every pixel column [W]


class Batch(NamedTuple):
    """What a training step needs, on the device: B frames, this process's share of `size`."""

    index: torch.Tensor  # type: ignore[assignment]  # int64 [B], which frames; hides tuple.index
    levels: list[torch.Tensor]  # float32 [B, C, h, w] each
    target: torch.Tensor  # float32 [B, gh, gw], share of foreground in each of the decoder's cells
    size: int  # frames in the batch over all processes


def batches(split: Split, orders: Iterable[np.ndarray], cells: Cells) -> Iterator[Batch]:
    """Yield a batch for each of `orders`, int64 [size], positions in split.index.

    On the device, targets are pooled once, for all frames; otherwise for each batch, in a thread that reads ahead.
    """
    features, frame_size, own = split.features, split.folder.size, split.own()
    device, group = features.device, features.group
    indices = (split.index[torch.from_numpy(order)] for order in orders)
    if isinstance(split.masks, torch.Tensor) and split.masks.device == device:
        targets = pool_masks(split.masks, own, frame_size, cells, group).to(device)
        position = torch.zeros(split.folder.frames, dtype=torch.int64)
        position[own] = torch.arange(len(own))
        for index in indices:
            ours = index[group.holds(index)]
            frames = ours.to(device, non_blocking=True)
            yield Batch(frames, features.batch(frames), targets[position[ours].to(device, non_blocking=True)], len(index))
    else:
        def read(index: torch.Tensor) -> Batch:
            ours = index[group.holds(index)]
            target = pool_masks(split.masks, ours, frame_size, cells, group).to(device)
            return Batch(ours.to(device), features.batch(ours), target, len(index))
        yield from in_threads(read, indices, threads=1, ahead=2)


def pool_masks(masks: Rows, index: torch.Tensor, size: tuple[int, int], cells: Cells, group: Group = ALONE) -> torch.Tensor:
    """Return the share of foreground in every cell of a grid, float32 [n, gh, gw] in 0..1, in host memory.

    masks: uint8 [N, H, ceil(W / 8)], packed along W; index: int64 [n], the frames wanted; size: (H, W);
    cells: each pixel row's grid row, never falling, and each pixel column's grid column. Counts are exact.
    """
    (_, width), (rows, columns) = size, cells
    starts = torch.searchsorted(rows, torch.arange(int(rows[-1]) + 2))  # first pixel row of each grid row, and H
    column_sums = torch.nn.functional.one_hot(columns).float()  # [W, gw]
    area = starts.diff()[:, None].float() * column_sums.sum(0)  # [gh, gw] pixels a cell
    bounds = list(zip(starts[:-1].tolist(), starts[1:].tolist()))
    few = max(stop - start for start, stop in bounds) < 256  # then a cell's column sums fit a byte: faster
    pooled = torch.empty(len(index), len(bounds), column_sums.shape[1])
    for target, part in zip(pooled.split(8), index.split(8)):  # 8 frames stay in the processor's cache
        bits = np.unpackbits(gather(masks, part, torch.device("cpu"), group).numpy(), axis=2, count=width)  # [n, H, W]
        sums = np.stack([np.add.reduce(bits[:, start:stop], axis=1, dtype=np.uint8 if few else np.uint32)
                         for start, stop in bounds], axis=1)  # [n, gh, W]
        target[:] = torch.from_numpy(sums.astype(np.float32)) @ column_sums / area
    return pooled


def batch_order(step: int, clips: np.ndarray, batch: int, seed: int | None, balanced: bool = False) -> np.ndarray:
    """Return the frame positions of one training batch, int64 [B] (the last of an epoch may be shorter).

    clips: the clip of each frame, [n]. An epoch passes over all frames once: in order when `seed` is None, else in an
    order drawn for that epoch. `balanced`: each frame drawn from another clip, clips in turn, so that a long clip
    counts no more than a short one. A function of its arguments alone, so that a resumed run sees the same batches.
    """
    frames = len(clips)
    if seed is not None and balanced:
        draw = np.random.default_rng((seed, step))
        names = np.unique(clips)
        turns = np.concatenate([draw.permutation(names) for _ in range(-(-batch // len(names)))])[:batch]
        return np.array([draw.choice(np.flatnonzero(clips == name)) for name in turns])
    epoch, position = divmod(step, -(-frames // batch))
    order = np.arange(frames) if seed is None else np.random.default_rng((seed, epoch)).permutation(frames)
    return order[position * batch:(position + 1) * batch]


def split_clips(clips: list[str], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Part frames by whole clips: returns (kept, held out) frame indices, int64. clips: the clip of every frame.

    share: of the clips held out, in 0..1, at least one clip and never all; chosen by `seed`. Raises BadInput
    when there is only one clip.
    """
    names = sorted(set(clips))
    if len(names) < 2:
        raise BadInput(f"--holdout {share:g}: expected at least two clips, found only {names[0]!r}")
    count = min(max(1, round(share * len(names))), len(names) - 1)
    held = set(np.random.default_rng(seed).permutation(names)[:count])
    out = np.array([clip in held for clip in clips])
    return np.flatnonzero(~out), np.flatnonzero(out)


def fold_clips(clips: list[str], folds: int, seed: int) -> list[np.ndarray]:
    """Part frames by whole clips into `folds` about equal groups of clips: returns each group's frame indices, int64.

    Raises BadInput when there are fewer clips than folds, or fewer than two folds.
    """
    names = sorted(set(clips))
    if not 2 <= folds <= len(names):
        raise BadInput(f"--folds {folds}: expected from 2 up to the number of clips, {len(names)}")
    groups = np.array_split(np.random.default_rng(seed).permutation(names), folds)
    return [np.flatnonzero(np.isin(clips, group)) for group in groups]
