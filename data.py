"""The feature folder: its files, written by featurize.py and checked by whoever reads them.

    features/<featurizer>-<split>/
        features.npy            [N, C, h, w], float16 or float32; several levels: features.<level>.npy
        masks.npy               [N, H, ceil(W / 8)] uint8, np.packbits along W; absent without annotations
        paths.json              {"raw": {"0": path, ...}, "annotation": {...}}, relative to meta's "data"
        meta.json               everything else: see META

N frames, C channels, h w feature grid, H W mask size. Levels are ordered coarse to fine.
"""
import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clips import Frame, checked_size, inside, is_name, read_paths
from files import BadInput, read_json, whole_file
from views import is_view

FORMAT = 1
META: dict[str, type | tuple[type, ...]] = {  # key of meta.json: the type a reader expects
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
}  # and "views", a list, where there are any: the rows are all frames, then all frames in each view


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

    @property
    def originals(self) -> int:
        """How many of the rows are frames themselves: the first ones. The others are views of them, in the same order, view by view."""
        return self.frames // (1 + len(self.meta.get("views", [])))

    @property
    def sources(self) -> list[str]:
        """The clip of every row, or the clip that it is a view of."""
        return self.meta["clips"][:self.originals] * (self.frames // self.originals)


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
    for file in [*files.values(), *([masks] if masks.exists() else [])]:
        if not isinstance(meta["sha256"].get(file.name), str):
            raise BadInput(f"{path / 'meta.json'}: 'sha256' lacks the digest of {file.name}; make the folder anew with featurize.py")
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
    if not all(map(is_name, meta["levels"])):
        raise BadInput(f"{file}: a level's name holds a path; expected names such as s16")
    if not all(0 <= meta[key] < 1 << 63 for key in ("parameters", "flops_per_frame")):
        raise BadInput(f"{file}: 'parameters' and 'flops_per_frame' should be counts")
    if not meta["clips"] or len(meta["names"]) != len(meta["clips"]) or not all(
            is_name(name) for name in meta["clips"] + meta["names"]):
        raise BadInput(f"{file}: 'clips' and 'names' should name every frame's clip and itself, and hold no paths")
    views = meta.get("views", [])
    if not isinstance(views, list) or not all(map(is_view, views)) or len(meta["clips"]) % (1 + len(views)):
        raise BadInput(f"{file}: 'views' should be a list such as ['mirror', 'zoom1.5'], of which each shows every frame once")
    sizes = meta["sizes"]
    if sizes is not None and (len(sizes) != len(meta["clips"]) or not all(
            isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size) for size in sizes)):
        raise BadInput(f"{file}: 'sizes' should hold [H, W] of every frame")
    for size in [meta["size"], *(sizes or [])]:
        checked_size(size, file)
    return meta


def level_file(level: str, levels) -> str:
    """The file name of a level's array: features.npy when there is only one level."""
    return "features.npy" if len(levels) == 1 else f"features.{level}.npy"


def check_array(file: Path, shape: tuple[int, ...], dtypes: tuple) -> tuple[int, np.dtype]:
    """Check an .npy file's header and length; return where its data starts (bytes) and its dtype. Raises BadInput."""
    try:
        with open(file, "rb") as handle, warnings.catch_warnings(action="ignore"):  # of odd Python in the header
            version = np.lib.format.read_magic(handle)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            found, fortran, dtype = read(handle)
            start = handle.tell()
    except FileNotFoundError:
        raise BadInput(f"{file}: no such file, though meta.json speaks of it; make the folder anew with featurize.py") from None
    except Exception as error:  # numpy parses the header as Python source: anything can come of damaged bytes
        raise BadInput(f"{file}: expected a .npy array, found something else ({(str(error) or 'damaged').splitlines()[0]})") from error
    if found != tuple(shape) or fortran or dtype not in dtypes:
        raise BadInput(f"{file}: holds {dtype} {list(found)}, but meta.json says {'/'.join(np.dtype(d).name for d in dtypes)} "
                       f"{list(shape)}; make the folder anew with featurize.py")
    expected = start + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if file.stat().st_size != expected:
        raise BadInput(f"{file}: is {file.stat().st_size:,} bytes, expected {expected:,}; it was cut or added to")
    return start, dtype


def folder_frames(folder: FeatureFolder, root: Path | None = None) -> list[Frame]:
    """Return where a feature folder's frames (views left out) and annotations are, below `root` (None: where they were featurized)."""
    meta, root = folder.meta, Path(root or folder.meta["data"])
    listed_in = folder.path / "paths.json"
    if os.path.isfile(root):  # a video
        return [Frame(clip, name, root, None, number) for number, (clip, name) in enumerate(zip(meta["clips"], meta["names"]))]
    columns = folder.paths["raw"], folder.paths.get("annotation", [""] * folder.frames)
    rows = itertools.islice(zip(meta["clips"], meta["names"], *columns), folder.originals)
    return [Frame(clip, name, inside(root, raw, listed_in), inside(root, annotation, listed_in) if annotation else None)
            for clip, name, raw, annotation in rows]


def check_levels(folder: FeatureFolder, levels: list[str]) -> None:
    """Raise BadInput when the folder lacks one of `levels`."""
    for level in levels:
        if level not in folder.files:
            raise BadInput(f"{folder.path}: has no level {level!r}, only {', '.join(folder.files)}; "
                           f"featurize with --levels {','.join(levels)}")


# --- writing -----------------------------------------------------------------------------------


class ArrayWriter:
    """An .npy file of known shape, written a few rows at a time, in any order.

    Plain writes, not a memory map: memory stays flat, and a full disk is an error rather than a crash.
    """

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: np.typing.DTypeLike):
        """Open `file`, made at its full length when it is not there yet."""
        self.dtype, self.row = np.dtype(dtype), int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": tuple(shape)}
        if not file.exists():
            with whole_file(file) as temporary, open(temporary, "wb") as made:
                np.lib.format.write_array_header_1_0(made, header)
                made.truncate(made.tell() + shape[0] * self.row)
        self.file = open(file, "r+b")  # noqa: SIM115  until `close`
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
