"""The feature folder on disk: written by featurize.py, checked by whoever reads it.

    features.npy      [N, C, h, w], float16 or float32; several levels: features.<level>.npy
    cues.<level>.npy  [N, 5, h, w], float16: what the whole clip tells about each position
    masks.npy         [N, H, ceil(W / 8)] uint8, np.packbits along W; absent without annotations
    paths.json, meta.json: see docs/formats.md

N rows: all frames, then every second one again for each view; C channels, h w grid, H W mask.
"""
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vos.inputs import BadInput, is_name, is_shape, opened, read_json, read_paths

FORMAT = 2
CUES = 3  # version of what vos/cues.py finds
AGAIN = "make the folder anew with featurize.py"


class FeatureFolder(NamedTuple):
    """A checked feature folder: its meta.json and paths.json; its arrays are still on disk."""

    path: Path
    meta: dict
    paths: dict[str, list[str]]  # "raw" and maybe "annotation"
    shapes: dict[str, tuple[int, int, int]]  # (C, h, w) of each level, coarse to fine
    size: tuple[int, int]  # (H, W) of the masks
    frames: int  # how many rows are frames themselves: the first ones
    clips: np.ndarray  # the clip that each row shows, itself or in a view, [N]

    def check_levels(self, levels: Sequence[str], cues: bool) -> None:
        """Raise BadInput when one of `levels` is missing, or the cues that a decoder wants."""
        for level in levels:
            if level not in self.shapes:
                raise BadInput(f"{self.path}: has no level {level!r}, only {', '.join(self.shapes)}"
                               f"; featurize with --levels {','.join(levels)}")
        if cues and self.meta["cues"] is None:
            raise BadInput(f"{self.path}: has no cues for this decoder; featurize with --cues")

    def describe(self, levels: Sequence[str]) -> dict:
        """Return what a model must remember of the features it was trained on."""
        meta = self.meta
        return {"featurizer": meta["featurizer"], "weights": meta["weights"], "size": meta["size"],
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
    rows, levels, (height, width) = len(meta["clips"]), meta["levels"], meta["size"]
    arrays = {array_name(level, levels): (rows, *shape) for level, shape in levels.items()}
    if meta["cues"] is not None:
        arrays |= {f"cues.{level}.npy": (rows, 5, *shape[1:]) for level, shape in levels.items()}
    if masks:
        arrays["masks.npy"] = (rows, height, -(-width // 8))
    return arrays


def open_features(path: str | Path) -> FeatureFolder:
    """Check a feature folder's files against one another, reading no array. Raises BadInput."""
    path = Path(path)
    if not path.is_dir():
        raise BadInput(f"{path}: no such feature folder; featurize.py makes one")
    meta, paths = read_meta(path / "meta.json"), read_paths(path / "paths.json")
    wanted = {"m": ["uint8"], "c": ["float16"], "f": ["float16", "float32"]}  # by the first letter
    for name, shape in list_arrays(meta, "masks.npy" in meta["sha256"]).items():
        file, dtypes = path / name, wanted[name[0]]
        with opened(file):
            try:
                array = np.lib.format.open_memmap(file, "r")
            except Exception as error:  # numpy parses the header as Python, damaged or not
                reason = (str(error) or "damaged").splitlines()[0]
                raise BadInput(f"{file}: is no whole .npy array ({reason}); {AGAIN}") from error
        if array.shape != shape or array.dtype not in dtypes or not array.flags.c_contiguous:
            raise BadInput(f"{file}: holds {array.dtype} {list(array.shape)}, but meta.json says "
                           f"{'/'.join(dtypes)} {list(shape)}; {AGAIN}")

    rows = len(meta["clips"])
    if "raw" not in paths or any(len(column) != rows for column in paths.values()):
        raise BadInput(f"{path / 'paths.json'}: expected {rows} paths in each column; {AGAIN}")

    shapes = {level: (c, h, w) for level, (c, h, w) in meta["levels"].items()}
    frames = meta["frames"]
    clips = meta["clips"][:frames] + [clip.rpartition("@")[0] for clip in meta["clips"][frames:]]
    return FeatureFolder(path, meta, paths, shapes, tuple(meta["size"]), frames, np.array(clips))


def read_meta(file: Path) -> dict:
    """Read meta.json, and check what could do harm if it were wrong. Raises BadInput."""
    meta = read_json(file)
    try:
        if meta["format"] != FORMAT:
            raise BadInput(f"{file}: format {meta['format']!r}, expected {FORMAT}; {AGAIN}")
        rows, levels = len(meta["clips"]), meta["levels"].values()
        frames = meta.setdefault("frames", rows // (1 + len(meta["views"])))  # as it was before
        lists = ("clips", "names", "views")
        flags, sizes = meta["labelled"] or [True] * rows, meta["sizes"] or [meta["size"]] * rows
        names = [*meta["levels"], *(name for key in lists for name in meta[key])]
        sound = {
            "levels": len(levels) > 0 and all(is_shape(shape, 3) for shape in levels),
            "size": is_shape(meta["size"], 2) and math.prod(meta["size"]) <= 1 << 26,
            "sizes": len(sizes) == rows and all(is_shape(size, 2) for size in sizes),
            "labelled": len(flags) == rows and set(map(type, flags)) == {bool},
            "clips": all(map(is_name, names)) and all(type(meta[key]) is list for key in lists),
            "names": len(meta["names"]) == rows > 0,
            "frames": type(frames) is int and 0 < frames <= rows,
            "views": all("@" in clip for clip in meta["clips"][frames:]),
            "cues": meta["cues"] in (None, CUES),
            "parameters": 0 <= meta["parameters"] + meta["flops_per_frame"] < 1 << 63,
            "sha256": list_arrays(meta, masks=False).keys() <= meta["sha256"].keys(),
            "data": all(isinstance(meta[key], str) for key in ("featurizer", "weights", "data")),
        }
        wrong = [key for key, fine in sound.items() if not fine]
        if wrong:
            raise KeyError(wrong[0])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{file}: {error} is missing, or not as featurize.py writes it; "
                       f"{AGAIN}") from error
    return meta
