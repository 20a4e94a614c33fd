"""Features whole on the device, what is learned from them, and the order in which frames are drawn.

    folder = data.open_features("features/alexnet-train")   # checks its files, see vos/folder.py
    training = data.load_features(folder, device="cpu")  # features and masks to train from

N rows of a feature folder (frames, and views of frames), C channels, h w feature grid, gh gw a
decoder's grid, H W mask size.
"""
import dataclasses
import math
import warnings
from pathlib import Path

import numpy as np
import torch

from vos.folder import AGAIN, FeatureFolder, array_name, open_features  # noqa: F401
from vos.inputs import BadInput, sha256

SPARE = 0.8  # share of the free memory that features and masks may take


@dataclasses.dataclass(frozen=True)
class Features:
    """Levels of features, with masks if there are any: what one trains on, or predicts."""

    names: list[str]  # of the levels
    levels: list[torch.Tensor]  # [N, C, h, w] each, then their cues; on the device or memory-mapped
    device: torch.device  # where batches go
    index: torch.Tensor  # int64 [n], the rows that count, in host memory
    masks: torch.Tensor | None = None  # uint8 [N, H, ceil(W / 8)], packed
    folder: FeatureFolder | None = None

    def batch(self, index: torch.Tensor) -> list[torch.Tensor]:
        """index: int64 [B], rows. Returns a float32 [B, C, h, w] on the device for each level."""
        return [rows_of(level, index).to(self.device).float() for level in self.levels]

    def select(self, chosen: np.ndarray) -> "Features":
        """The same features, of which only the rows where `chosen`, bool [N], is true count."""
        return dataclasses.replace(self, index=self.index[torch.from_numpy(chosen)[self.index]])

    def without_views(self) -> "Features":
        """The same features without the views of frames: what a decoder is validated on."""
        return self.select(np.arange(len(self.levels[0])) < self.folder.frames)

    def hold_out(self, clips: list[str]) -> tuple["Features", "Features"]:
        """Part by whole clips: rows to train on, and the frames of `clips` to validate on."""
        held = np.isin(self.folder.clips, clips)
        return self.select(~held), self.select(held).without_views()


def rows_of(array: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return rows `index`, int64 [B] in host memory, of an array wherever it is."""
    return array.index_select(0, index.to(array.device, non_blocking=True))


def load_features(folder: FeatureFolder, levels: list[str] | None = None, cues: bool = False,
                  device: str | torch.device = "cpu", resident: str | None = None,
                  labelled: bool = True) -> Features:
    """Load levels (None: all), then their cues if wanted, and the masks, if there are any.

    resident: "device", or "disk" to map the files and read rows as they are asked for; None for the
    first if it fits. labelled: let only rows with a mask count. Every array is checked against its
    SHA-256. Raises BadInput for damage, and where masks are wanted and there are none.
    """
    device = torch.device(device)
    levels = levels or list(folder.shapes)
    folder.check_levels(levels, cues)
    names = [array_name(level, folder.shapes) for level in levels]
    names += [f"cues.{level}.npy" for level in levels if cues]
    has_masks = "masks.npy" in folder.meta["sha256"]
    if labelled and not has_masks:
        raise BadInput(f"{folder.path}: has no masks, and this step needs annotations; featurize "
                       "annotated clips, or pass --masks to featurize.py")

    files = [folder.path / name for name in names + ["masks.npy"] * has_masks]
    needed, free = sum(file.stat().st_size for file in files), free_memory(device)
    if resident is None and needed > SPARE * free:
        print(f"{needed / 1e9:.1f} GB of features, {free / 1e9:.1f} GB free: read from disk")
        resident = "disk"
    digests = folder.meta["sha256"]
    loaded = [load_array(file, digests[file.name], device, resident) for file in files]
    masks = loaded.pop() if has_masks else None
    features = Features(levels, loaded, device, torch.arange(len(loaded[0])), masks, folder)
    flags = folder.meta["labelled"]
    return features.select(np.array(flags)) if labelled and flags else features


def free_memory(device: torch.device) -> float:
    """Return the bytes free on a device; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return math.inf


def load_array(file: Path, digest: str, device: torch.device, resident: str | None) -> torch.Tensor:
    """Check an .npy array's digest and values; return it on the device or memory-mapped.

    Memory never holds it twice. Raises BadInput when the SHA-256 differs or a value is not finite.
    """
    if sha256(file) != digest:
        raise BadInput(f"{file}: its SHA-256 is not meta.json's: it was changed; {AGAIN}")
    mapped = resident == "disk" or device.type != "cpu"
    with warnings.catch_warnings(action="ignore"):  # torch warns that it may not be written to
        array = torch.from_numpy(np.load(file, mmap_mode="r" if mapped else None))
    if not all(map(math.isfinite, array.aminmax())):  # NaN is both
        raise BadInput(f"{file}: holds NaN or infinity; {AGAIN}")
    return array if resident == "disk" else array.to(device)


def pool_masks(features: Features, cells: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the share of foreground in every cell of a grid, float32 [N, gh, gw] on the device.

    cells: the grid row of each pixel row, int64 [H], never falling, and the grid column of each
    pixel column, int64 [W]. Counts are exact. Rows of `features` that do not count stay 0.
    """
    rows, columns = cells
    starts = torch.searchsorted(rows, torch.arange(int(rows[-1]) + 2))  # of each grid row, and H
    bounds = list(zip(starts[:-1].tolist(), starts[1:].tolist()))
    column_sums = torch.nn.functional.one_hot(columns).float()  # [W, gw]
    area = starts.diff()[:, None] * column_sums.sum(0)  # [gh, gw], pixels a cell
    few = int(starts.diff().max()) < 256  # then sums of rows fit a byte: faster
    dtype = np.uint8 if few else np.uint32

    pooled = torch.zeros(len(features.masks), len(bounds), column_sums.shape[1])
    for part in features.index.split(8):  # 8 frames stay in the processor's cache
        packed = rows_of(features.masks, part).cpu().numpy()
        bits = np.unpackbits(packed, axis=2, count=len(columns))  # [n, H, W]
        counts = [np.add.reduce(bits[:, start:stop], axis=1, dtype=dtype) for start, stop in bounds]
        sums = torch.from_numpy(np.stack(counts, axis=1).astype(np.float32))  # [n, gh, W]
        pooled[part] = sums @ column_sums / area
    return pooled.to(features.device)


def unpack(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Unpack masks on the host, uint8 [..., ceil(W / 8)] -> bool [..., W] where they were."""
    bits = np.unpackbits(packed.cpu().numpy(), axis=-1, count=width)
    return torch.from_numpy(bits).view(torch.bool).to(packed.device)


def batch_order(clips: np.ndarray, batch: int, order: str, seed: int, step: int) -> np.ndarray:
    """Return the frames of one training step: positions in `clips`, int64 [B].

    clips: the clip of each frame, [n]. order: "given" or "shuffled" for epochs over all frames, in
    order or drawn for each epoch (the last batch of one may be shorter); "balanced" for clips in
    turn and a frame of each drawn, so that a long clip counts no more than a short one. A function
    of its arguments alone, so that a resumed run sees the same batches.
    """
    if order == "balanced":
        draw = np.random.default_rng((seed, step))
        names = np.unique(clips)
        rounds = -(-batch // len(names))
        turns = np.concatenate([draw.permutation(names) for _ in range(rounds)])[:batch]
        return np.array([draw.choice(np.flatnonzero(clips == name)) for name in turns])
    epoch, position = divmod(step, -(-len(clips) // batch))
    frames = np.arange(len(clips))
    if order == "shuffled":
        frames = np.random.default_rng((seed, epoch)).permutation(len(clips))
    return frames[position * batch:(position + 1) * batch]


def draw_clips(clips: np.ndarray, groups: int, seed: int) -> list[list[str]]:
    """Part the names of clips, drawn with `seed`, into `groups` about equal groups."""
    names = np.random.default_rng(seed).permutation(np.unique(clips))
    return [part.tolist() for part in np.array_split(names, groups)]
