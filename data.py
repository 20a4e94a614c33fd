"""The feature folder: written once by featurize.py, then whole in device memory for training.

    features/<featurizer>-<split>/
        features.npy            [N, C, h, w], float16 or float32; several levels: features.<level>.npy
        masks.npy               [N, H, ceil(W / 8)] uint8, np.packbits along W; absent without annotations
        paths.json              {"raw": {"0": path, ...}, "annotation": {...}}, relative to meta's "data"
        meta.json               everything else: see META

N frames, C channels, h w feature grid, H W mask size. Levels are ordered coarse to fine.
"""
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from clips import Frame, inside, read_paths
from files import BadInput, read_json

FORMAT = 1
META = {  # key of meta.json: the type a reader expects
    "format": int,  # FORMAT
    "featurizer": str,
    "levels": dict,  # level: [C, h, w], coarse to fine
    "weights": str,  # digest of the featurizer's weights
    "preprocessing": dict,  # mean, std, compute dtype
    "size": list,  # [H, W] of the frames the featurizer saw, and of masks.npy
    "sizes": (list, type(None)),  # [H, W] of every frame, where they differ
    "clips": list,  # clip of every frame
    "names": list,  # name of every frame in its clip
    "parameters": int,  # of the featurizer, as far as the levels need it
    "flops_per_frame": int,
    "sha256": dict,  # file: digest
    "versions": dict,
    "data": str,  # the folder that paths.json's paths start from
    "split": (str, type(None)),
}
CHUNK = 64 << 20  # bytes read from disk at a time


class FeatureFolder(NamedTuple):
    """A checked feature folder: its meta.json, and its arrays still on disk."""

    path: Path
    meta: dict
    files: dict[str, Path]  # level: file of [N, C, h, w]
    masks: Path | None  # file of [N, H, ceil(W / 8)] uint8
    paths: dict[str, list[str]]  # "raw" and maybe "annotation"

    @property
    def frames(self) -> int:
        return len(self.meta["clips"])

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the masks."""
        return tuple(self.meta["size"])


# --- reading -----------------------------------------------------------------------------------


def open_features(path: Path) -> FeatureFolder:
    """Check a feature folder's meta.json, paths.json and array headers against one another, and return it.

    Nothing large is read. Raises BadInput naming the file, what was expected and what was found.
    """
    path = Path(path)
    if not path.is_dir():
        raise BadInput(f"{path}: no such feature folder; featurize.py makes one")
    meta = read_meta(path / "meta.json")
    frames, (height, width) = len(meta["clips"]), meta["size"]
    files = {level: path / level_file(level, meta["levels"]) for level in meta["levels"]}
    for level, file in files.items():
        check_array(file, (frames, *meta["levels"][level]), (np.float16, np.float32))
    masks = path / "masks.npy"
    if masks.exists():
        check_array(masks, (frames, height, -(-width // 8)), (np.uint8,))
    paths = read_paths(path / "paths.json")
    if "raw" not in paths:
        raise BadInput(f"{path / 'paths.json'}: expected a column 'raw', found {', '.join(paths) or 'none'}")
    for column, values in paths.items():
        if len(values) != frames:
            raise BadInput(f"{path / 'paths.json'}: {len(values)} paths in {column!r}, expected {frames} as in meta.json")
    return FeatureFolder(path, meta, files, masks if masks.exists() else None, paths)


def read_meta(file: Path) -> dict:
    """Read meta.json and check that every key is there with its type. Raises BadInput."""
    meta = read_json(file)
    if not isinstance(meta, dict):
        raise BadInput(f"{file}: expected an object of {', '.join(META)}")
    if meta.get("format") != FORMAT:
        raise BadInput(f"{file}: format {meta.get('format')!r}, expected {FORMAT}; make the folder anew with featurize.py")
    for key, kind in META.items():
        if key not in meta or not isinstance(meta[key], kind):
            raise BadInput(f"{file}: {key!r} is {'missing' if key not in meta else 'of another type'}; "
                           "make the folder anew with featurize.py")
    numbers = [meta["size"], *meta["levels"].values()]
    if not meta["levels"] or [len(shape) for shape in numbers if isinstance(shape, list)] != [2] + [3] * len(meta["levels"]) \
            or not all(isinstance(n, int) and 0 < n < 1 << 31 for shape in numbers for n in shape):
        raise BadInput(f"{file}: 'size' should be [H, W] and 'levels' {{name: [C, h, w]}}, whole numbers above 0")
    if any("/" in level or "\\" in level or ".." in level for level in meta["levels"]):
        raise BadInput(f"{file}: a level's name holds a path; expected names such as s16")
    if not meta["clips"] or len(meta["names"]) != len(meta["clips"]) or not all(
            isinstance(name, str) for name in meta["clips"] + meta["names"]):
        raise BadInput(f"{file}: 'clips' and 'names' should name every frame's clip and itself")
    sizes = meta["sizes"]
    if sizes is not None and (len(sizes) != len(meta["clips"]) or not all(
            isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size) for size in sizes)):
        raise BadInput(f"{file}: 'sizes' should hold [H, W] of every frame")
    return meta


def level_file(level: str, levels) -> str:
    """The file name of a level's array: features.npy when there is only one level."""
    return "features.npy" if len(levels) == 1 else f"features.{level}.npy"


def check_array(file: Path, shape: tuple[int, ...], dtypes: tuple) -> tuple[int, np.dtype]:
    """Check an .npy file's header and length; return where its data starts (bytes) and its dtype. Raises BadInput."""
    try:
        with open(file, "rb") as handle:
            version = np.lib.format.read_magic(handle)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            found, fortran, dtype = read(handle)
            start = handle.tell()
    except FileNotFoundError:
        raise BadInput(f"{file}: no such file, though meta.json speaks of it; make the folder anew with featurize.py") from None
    except Exception as error:  # numpy parses the header as Python source: anything can come of damaged bytes
        raise BadInput(f"{file}: expected a .npy array, found something else ({error})") from error
    if found != tuple(shape) or fortran or dtype not in dtypes:
        raise BadInput(f"{file}: holds {dtype} {list(found)}, but meta.json says {'/'.join(np.dtype(d).name for d in dtypes)} "
                       f"{list(shape)}; make the folder anew with featurize.py")
    expected = start + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if file.stat().st_size != expected:
        raise BadInput(f"{file}: is {file.stat().st_size:,} bytes, expected {expected:,}; it was cut or added to")
    return start, dtype


def folder_frames(folder: FeatureFolder, root: Path | None = None) -> list[Frame]:
    """Return where the frames and annotations of a feature folder are, below `root` (None: where they were featurized)."""
    meta, root = folder.meta, Path(root or folder.meta["data"])
    listed_in = folder.path / "paths.json"
    columns = folder.paths["raw"], folder.paths.get("annotation", [None] * folder.frames)
    return [Frame(clip, name, inside(root, raw, listed_in), annotation and inside(root, annotation, listed_in))
            for clip, name, raw, annotation in zip(meta["clips"], meta["names"], *columns)]


# --- in memory ---------------------------------------------------------------------------------


def load_array(file: Path, shape: tuple[int, ...], device: torch.device, digest: str | None) -> torch.Tensor:
    """Read an .npy array onto `device` in pieces, through one small pinned buffer, checking it on the way.

    digest: the expected SHA-256 of the file, or None to skip that check. Returns the tensor [*shape] in
    the file's dtype. Raises BadInput when the digest differs or a value is not finite.
    """
    start, dtype = check_array(file, shape, (np.float16, np.float32, np.uint8))
    array = torch.empty(shape, dtype=getattr(torch, dtype.name), device=device)
    flat, row = array.view(shape[0], -1), int(np.prod(shape[1:])) * dtype.itemsize
    rows = max(1, CHUNK // row)
    on_host = device.type == "cpu"
    buffer = None if on_host else torch.empty((rows, flat.shape[1]), dtype=flat.dtype, pin_memory=device.type == "cuda")
    sha = hashlib.sha256()
    with open(file, "rb", buffering=0) as handle:
        sha.update(handle.read(start))
        for first in range(0, shape[0], rows):
            target = flat[first:first + rows]
            piece = target if on_host else buffer[:len(target)]
            read_into(handle, piece)
            if digest is not None:
                sha.update(memoryview(piece.numpy()).cast("B"))
            if not on_host:
                target.copy_(piece)  # blocks: the one buffer is free again when it returns
            if dtype != np.uint8 and not torch.isfinite(target.sum(dtype=torch.float32)):
                refuse_not_finite(file, target, first)
    if digest is not None and sha.hexdigest() != digest:
        raise BadInput(f"{file}: its SHA-256 differs from meta.json's; the file was changed or damaged: make the folder "
                       "anew with featurize.py, or pass --no-verify")
    return array


def read_into(handle: BinaryIO, piece: torch.Tensor) -> None:
    """Fill a host tensor with the file's next bytes. A short read means the file was cut while we read it."""
    view = memoryview(piece.numpy()).cast("B")
    done = 0
    while done < len(view):
        count = handle.readinto(view[done:])
        if not count:
            raise BadInput(f"{handle.name}: ended early; it was changed while being read")
        done += count


def refuse_not_finite(file: Path, rows: torch.Tensor, first: int) -> None:
    """Raise BadInput naming the first frame of `rows` [n, values] with NaN or infinity; none may be: sums overflow too."""
    bad = (~torch.isfinite(rows)).any(1).nonzero()
    if len(bad):
        raise BadInput(f"{file}: NaN or infinity in the features of frame {first + int(bad[0])}; make the folder anew with featurize.py")


class Features(NamedTuple):
    """Levels of features, whole on a device: `batch(index)` is a gather, nothing else."""

    levels: list[torch.Tensor]  # [N, C, h, w] each, float16 or float32

    def batch(self, index: torch.Tensor) -> list[torch.Tensor]:
        """index: int64 [B] on the features' device. Returns a float32 [B, C, h, w] for each level."""
        return [level[index].float() for level in self.levels]


def load_features(folder: FeatureFolder, levels: list[str], device: torch.device, verify: bool = True) -> Features:
    """Load `levels` of a folder onto `device`. Raises BadInput for a level it lacks, damaged or non-finite values."""
    check_levels(folder, levels)
    arrays = []
    for level in levels:
        file = folder.files[level]
        digest = folder.meta["sha256"].get(file.name) if verify else None
        arrays.append(load_array(file, (folder.frames, *folder.meta["levels"][level]), device, digest))
    return Features(arrays)


def check_levels(folder: FeatureFolder, levels: list[str]) -> None:
    """Raise BadInput when the folder lacks one of `levels`."""
    for level in levels:
        if level not in folder.files:
            raise BadInput(f"{folder.path}: has no level {level!r}, only {', '.join(folder.files)}; "
                           f"featurize with --levels {','.join(levels)}")


def load_masks(folder: FeatureFolder, device: torch.device, verify: bool = True) -> torch.Tensor:
    """Return the packed masks, uint8 [N, H, ceil(W / 8)], on `device`. Raises BadInput when there are none."""
    if folder.masks is None:
        raise BadInput(f"{folder.path}: has no masks.npy, and this step needs annotations; featurize annotated clips")
    height, width = folder.size
    digest = folder.meta["sha256"].get("masks.npy") if verify else None
    return load_array(folder.masks, (folder.frames, height, -(-width // 8)), device, digest)


def pool_masks(masks: torch.Tensor, index: torch.Tensor, size: tuple[int, int], rows: torch.Tensor,
               columns: torch.Tensor) -> torch.Tensor:
    """Return the share of foreground in every cell of a grid, float32 [n, gh, gw] in 0..1, on the masks' device.

    masks: uint8 [N, H, ceil(W / 8)], packed along W; index: int64 [n], the frames wanted; size: (H, W); rows: int64 [H], the grid row that each
    pixel row falls in, never falling; columns: int64 [W] likewise. Counts are exact.
    """
    height, width = size
    starts = torch.searchsorted(rows, torch.arange(int(rows[-1]) + 2))  # first pixel row of each grid row, and H
    column_sums = torch.nn.functional.one_hot(columns).float()  # [W, gw]
    area = starts.diff()[:, None].float() * column_sums.sum(0)  # [gh, gw] pixels a cell
    bounds = list(zip(starts[:-1].tolist(), starts[1:].tolist()))
    pooled = torch.empty(len(index), len(bounds), column_sums.shape[1], device=masks.device)
    for first, part in zip(range(0, len(index), 32), index.split(32)):
        bits = np.unpackbits(masks[part].cpu().numpy(), axis=2, count=width)  # [n, H, W]
        few = max(stop - start for start, stop in bounds) < 256  # then a cell's column sums fit a byte: faster
        sums = np.stack([np.add.reduce(bits[:, start:stop], axis=1, dtype=np.uint8 if few else np.uint32)
                         for start, stop in bounds], axis=1)  # [n, gh, W]
        pooled[first:first + 32] = torch.from_numpy(sums.astype(np.float32)) @ column_sums / area
    return pooled


class Split(NamedTuple):
    """Frames to validate on, or to train on: all or some of a feature folder, on the device."""

    folder: FeatureFolder
    features: Features
    masks: torch.Tensor  # uint8 [N, H, ceil(W / 8)] of the whole folder
    index: torch.Tensor  # int64 [n], the frames that count


def load_split(folder: FeatureFolder, levels: list[str], device: torch.device, verify: bool) -> Split:
    """Load a feature folder and its masks whole onto the device."""
    return Split(folder, load_features(folder, levels, device, verify), load_masks(folder, device, verify),
                 torch.arange(folder.frames, device=device))


def select(split: Split, index: np.ndarray) -> Split:
    """The same folder, but only the frames of `index`."""
    return split._replace(index=torch.from_numpy(index).to(split.index.device))


def batch_order(step: int, frames: int, batch: int, seed: int | None) -> np.ndarray:
    """Return the frame indices of one training batch, int64 [B] (the last of an epoch may be shorter).

    An epoch passes over all `frames` once: in order when `seed` is None, else in an order drawn for that
    epoch. A function of its arguments alone, so that a resumed run sees the same batches.
    """
    epoch, position = divmod(step, -(-frames // batch))
    order = np.arange(frames) if seed is None else np.random.default_rng((seed, epoch)).permutation(frames)
    return order[position * batch:(position + 1) * batch]


def split_clips(clips: list[str], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Part frames by whole clips: returns (kept, held out) frame indices, int64.

    share: of the clips held out, in 0..1, at least one clip and never all; chosen by `seed`.
    """
    names = sorted(set(clips))
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


# --- writing -----------------------------------------------------------------------------------


class ArrayWriter:
    """An .npy file of known shape, written a few rows at a time, in any order.

    Plain writes, not a memory map: memory stays flat, and a full disk is an error rather than a crash.
    """

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: np.dtype):
        """Open `file`, made at its full length when it is not there yet."""
        self.dtype, self.row = np.dtype(dtype), int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": tuple(shape)}
        new = not file.exists()
        self.file = open(file, "w+b" if new else "r+b")
        if new:
            np.lib.format.write_array_header_1_0(self.file, header)
            self.file.truncate(self.file.tell() + shape[0] * self.row)
        self.file.seek(0)
        np.lib.format.read_magic(self.file)
        np.lib.format.read_array_header_1_0(self.file)
        self.start = self.file.tell()

    def write(self, first: int, rows: np.ndarray) -> None:
        """Write `rows` [n, ...] as rows first .. first + n."""
        self.file.seek(self.start + first * self.row)
        self.file.write(np.ascontiguousarray(rows, self.dtype).data)

    def read(self, first: int, count: int) -> bytes:
        """Return the bytes of rows first .. first + count."""
        self.file.seek(self.start + first * self.row)
        return self.file.read(count * self.row)

    def close(self) -> None:
        """Flush to disk and close."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def as_column(paths: list[str]) -> dict[str, str]:
    """Return a column of paths.json: {"0": path, "1": path, ...}."""
    return {str(index): path for index, path in enumerate(paths)}


def clip_ranges(clips: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (clip, first, stop) for every run of frames of one clip, in order."""
    first = 0
    for index in range(1, len(clips) + 1):
        if index == len(clips) or clips[index] != clips[first]:
            yield clips[first], first, index
            first = index
