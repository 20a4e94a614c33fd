"""The feature folder on disk: written by featurize.py, checked by whoever reads it.

    features/<featurizer>-<split>/
        features.npy     [N, C, h, w], float16 or float32; several levels: features.<level>.npy
        cues.<level>.npy [N, 4, h, w], float16: what the whole clip tells about each position
        masks.npy        [N, H, ceil(W / 8)] uint8, np.packbits along W; absent without annotations
        paths.json       {"raw": {"0": path, ...}, "annotation": {...}}, relative to meta's "data"
        meta.json        everything else

N rows: all frames, then all frames once more for each view; C channels, h w feature grid, H W mask.
meta.json holds: format; featurizer; levels, {level: [C, h, w]}, coarse to fine; dtype of features;
weights, a digest of the featurizer's; parameters of the featurizer, and flops_per_frame;
preprocessing; size, [H, W] of masks.npy and of what the featurizer saw; sizes, [H, W] of every
row's frame, or null: all the same; clips and names, of every row; labelled, whether each row has a
mask, or null: all or none; views; cues, their version or null; sha256, {file: digest}; data, the
folder that paths start from; split; versions.
"""
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vos.inputs import BadInput, is_name, is_shape, opened, read_json, read_paths

FORMAT = 2
AGAIN = "make the folder anew with featurize.py"


class FeatureFolder(NamedTuple):
    """A checked feature folder: its meta.json and paths.json; its arrays are still on disk."""

    path: Path
    meta: dict
    paths: dict[str, list[str]]  # "raw" and maybe "annotation"

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """(C, h, w) of each level, coarse to fine."""
        return {level: tuple(shape) for level, shape in self.meta["levels"].items()}

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the masks."""
        return tuple(self.meta["size"])

    @property
    def frames(self) -> int:
        """How many rows are frames themselves: the first ones."""
        return len(self.meta["clips"]) // (1 + len(self.meta["views"]))

    @property
    def clips(self) -> np.ndarray:
        """The clip that each row shows, itself or in a view, [N]."""
        return np.tile(self.meta["clips"][:self.frames], 1 + len(self.meta["views"]))

    @property
    def arrays(self) -> dict[str, tuple[int, ...]]:
        """File and shape of every array."""
        return list_arrays(self.meta, "masks.npy" in self.meta["sha256"])

    def check_levels(self, levels: Sequence[str], cues: bool) -> None:
        """Raise BadInput when one of `levels` is missing, or the cues that a decoder wants."""
        for level in levels:
            if level not in self.shapes:
                raise BadInput(f"{self.path}: has no level {level!r}, only "
                               f"{', '.join(self.shapes)}; featurize with --levels "
                               f"{','.join(levels)}")
        if cues and self.meta["cues"] is None:
            raise BadInput(f"{self.path}: has no cues for this decoder; featurize with --cues")

    def describe(self, levels: Sequence[str]) -> dict:
        """Return what a model must remember of the features it was trained on."""
        meta = self.meta
        return {"featurizer": meta["featurizer"], "weights": meta["weights"], "size": meta["size"],
                "featurizer_levels": list(meta["levels"]),
                "featurizer_flops": meta["flops_per_frame"],
                "featurizer_parameters": meta["parameters"],
                "shapes": {level: meta["levels"][level] for level in levels}}

    def check_fit(self, model: dict, source: str | Path, cues: bool) -> None:
        """Raise BadInput unless `model`, of `source`, was trained on such features."""
        self.check_levels(list(model["shapes"]), cues)
        own = self.describe(list(model["shapes"]))
        for what in ("featurizer", "weights", "size", "shapes"):
            if model[what] != own[what]:
                raise BadInput(f"{self.path}: {what} is {own[what]}, but {source} was trained on "
                               f"{model[what]}; featurize these clips as its training clips were")


def array_name(level: str, levels) -> str:
    """Return the file of a level's features: features.npy when it is the only level."""
    return "features.npy" if len(levels) == 1 else f"features.{level}.npy"


def list_arrays(meta: dict, masks: bool) -> dict[str, tuple[int, ...]]:
    """Return {file: shape} of the arrays that belong to a meta.json."""
    rows, (height, width) = len(meta["clips"]), meta["size"]
    arrays = {}
    for level, shape in meta["levels"].items():
        arrays[array_name(level, meta["levels"])] = (rows, *shape)
        if meta["cues"] is not None:
            arrays[f"cues.{level}.npy"] = (rows, 4, *shape[1:])
    if masks:
        arrays["masks.npy"] = (rows, height, -(-width // 8))
    return arrays


def open_features(path: str | Path) -> FeatureFolder:
    """Check a feature folder's files against one another, reading no array. Raises BadInput."""
    path = Path(path)
    if not path.is_dir():
        raise BadInput(f"{path}: no such feature folder; featurize.py makes one")
    folder = FeatureFolder(path, read_meta(path / "meta.json"), read_paths(path / "paths.json"))
    for name, shape in folder.arrays.items():
        check_array(path / name, shape)
        if not isinstance(folder.meta["sha256"].get(name), str):
            raise BadInput(f"{path / 'meta.json'}: lacks the SHA-256 of {name}; {AGAIN}")
    found = {name: len(paths) for name, paths in folder.paths.items()}
    rows = len(folder.meta["clips"])
    if set(found.values()) != {rows} or "raw" not in found:
        raise BadInput(f"{path / 'paths.json'}: has {found}, not {rows} paths in 'raw'; {AGAIN}")
    return folder


def read_meta(file: Path) -> dict:
    """Read meta.json, and check what could do harm if it were wrong. Raises BadInput."""
    meta = read_json(file)
    try:
        if meta["format"] != FORMAT:
            raise BadInput(f"{file}: format {meta['format']!r}, expected {FORMAT}; {AGAIN}")
        rows, levels = len(meta["clips"]), meta["levels"].values()
        lists = ("clips", "names", "views")
        flags, sizes = meta["labelled"] or [True] * rows, meta["sizes"] or [meta["size"]] * rows
        names = [*meta["levels"], *(name for key in lists for name in meta[key])]
        sound = {
            "levels": len(levels) > 0 and all(is_shape(shape, 3) for shape in levels),
            "size": is_shape(meta["size"], 2) and math.prod(meta["size"]) <= 1 << 26,
            "sizes": len(sizes) == rows and all(is_shape(size, 2) for size in sizes),
            "labelled": len(flags) == rows and set(map(type, flags)) == {bool},
            "clips": all(map(is_name, names)) and all(type(meta[key]) is list for key in lists),
            "names": len(meta["names"]) == rows > 0 and rows % (1 + len(meta["views"])) == 0,
            "cues": meta["cues"] is None or type(meta["cues"]) is int,
            "parameters": 0 <= meta["parameters"] + meta["flops_per_frame"] < 1 << 63,
            "sha256": isinstance(meta["sha256"], dict),
            "data": all(isinstance(meta[key], str) for key in ("featurizer", "weights", "data")),
        }
        for key, fine in sound.items():
            if not fine:
                raise KeyError(key)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{file}: {error} is missing, or not as featurize.py writes it; "
                       f"{AGAIN}") from error
    return meta


def check_array(file: Path, shape: tuple[int, ...]) -> None:
    """Raise BadInput unless an .npy file has that shape, a fitting dtype, and its whole length."""
    wanted = {"m": ["uint8"], "c": ["float16"], "f": ["float16", "float32"]}[file.name[0]]
    with opened(file):
        try:
            array = np.lib.format.open_memmap(file, "r")
        except Exception as error:  # numpy parses the header as Python: damaged, it raises anything
            reason = (str(error) or "damaged").splitlines()[0]
            raise BadInput(f"{file}: is no whole .npy array ({reason}); {AGAIN}") from error
    if array.shape != shape or array.dtype not in wanted or not array.flags.c_contiguous:
        raise BadInput(f"{file}: holds {array.dtype} {list(array.shape)}, but meta.json says "
                       f"{'/'.join(wanted)} {list(shape)}; {AGAIN}")
