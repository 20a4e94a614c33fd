"""The feature folder on disk: its files, written by featurize.py and checked by whoever reads them.

    features/<featurizer>-<split>/
        features.npy     [N, C, h, w], float16 or float32; several levels: features.<level>.npy
        cues.<level>.npy [N, 4, h, w], float16: what the whole clip tells about each position
        masks.npy        [N, H, ceil(W / 8)] uint8, np.packbits along W; absent without annotations
        paths.json       {"raw": {"0": path, ...}, "annotation": {...}}, relative to meta's "data"
        meta.json        everything else, see META

N rows: all frames, then all frames once more for each view; C channels, h w feature grid, H W mask.
"""
import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vos.distributed import Group
from vos.inputs import BadInput, is_name, is_shape, opened, read_json, read_paths
from vos.outputs import CannotWrite, new_folder, partial_folder, remove, write_json

FORMAT = 2
META = {  # key of meta.json: the type that a reader expects
    "format": int,  # FORMAT
    "featurizer": str,
    "levels": dict,  # level: [C, h, w], coarse to fine
    "weights": str,  # digest of the featurizer's weights
    "preprocessing": dict,  # mean, std, compute dtype
    "size": list,  # [H, W] of the frames the featurizer saw, and of masks.npy
    "sizes": (list, type(None)),  # [H, W] of every row's frame, where they differ
    "clips": list,  # clip of every row
    "names": list,  # name of every row's frame in its clip
    "labelled": (list, type(None)),  # whether each row has a mask; None: all have, or none
    "views": list,
    "cues": (int, type(None)),  # version of the cues; None without them
    "parameters": int,  # of the featurizer, as far as the levels need it
    "flops_per_frame": int,
    "sha256": dict,  # file: digest
    "versions": dict,
    "data": str,  # the folder that the paths of paths.json start from
    "split": (str, type(None)),
}
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
        """Raise BadInput when the folder lacks one of `levels`, or the cues that a decoder wants."""
        for level in levels:
            if level not in self.shapes:
                raise BadInput(f"{self.path}: has no level {level!r}, only {', '.join(self.shapes)}; "
                               f"featurize with --levels {','.join(levels)}")
        if cues and self.meta["cues"] is None:
            raise BadInput(f"{self.path}: has no cues, which this decoder looks at; featurize with "
                           "--cues")

    def describe(self, levels: Sequence[str]) -> dict:
        """Return what a model must remember of the features it was trained on."""
        meta = self.meta
        return {"featurizer": meta["featurizer"], "weights": meta["weights"], "size": meta["size"],
                "featurizer_levels": list(meta["levels"]), "featurizer_flops": meta["flops_per_frame"],
                "featurizer_parameters": meta["parameters"],
                "shapes": {level: meta["levels"][level] for level in levels}}

    def check_fit(self, model: dict, source: str | Path, cues: bool) -> None:
        """Raise BadInput unless these are the features that `model`, of `source`, was trained on."""
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


# --- reading -----------------------------------------------------------------------------------


def open_features(path: str | Path) -> FeatureFolder:
    """Check a feature folder's meta.json, paths.json and array headers against one another.

    Nothing large is read. Raises BadInput naming the file, what was expected and what was found.
    """
    path = Path(path)
    if not path.is_dir():
        raise BadInput(f"{path}: no such feature folder; featurize.py makes one")
    meta = read_meta(path / "meta.json")
    folder = FeatureFolder(path, meta, read_paths(path / "paths.json"))
    for name, shape in folder.arrays.items():
        check_array(path / name, shape)
        if not isinstance(meta["sha256"].get(name), str):
            raise BadInput(f"{path / 'meta.json'}: lacks the SHA-256 of {name}; {AGAIN}")
    lengths = {name: len(paths) for name, paths in folder.paths.items()}
    if set(lengths.values()) != {len(meta["clips"])} or "raw" not in lengths:
        raise BadInput(f"{path / 'paths.json'}: has {lengths} paths, expected {len(meta['clips'])} in "
                       f"a column 'raw', as in meta.json; {AGAIN}")
    return folder


def read_meta(file: Path) -> dict:
    """Read meta.json and check every value. Raises BadInput."""
    meta = read_json(file)
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise BadInput(f"{file}: format {found!r}, expected {FORMAT}; {AGAIN}")
    wrong = [key for key, kind in META.items() if not isinstance(meta.get(key, ...), kind)]

    if not wrong:
        rows, flags = len(meta["clips"]), meta["labelled"] or []
        names = [*meta["levels"], *meta["clips"], *meta["names"], *meta["views"]]
        sound = {
            "levels": meta["levels"] and all(is_shape(s, 3) for s in meta["levels"].values()),
            "size": is_shape(meta["size"], 2) and math.prod(meta["size"]) <= 1 << 26,
            "sizes": all(is_shape(size, 2) for size in meta["sizes"] or []),
            "labelled": all(isinstance(flag, bool) for flag in flags),
            "clips": all(map(is_name, names)) and rows > 0 and rows % (1 + len(meta["views"])) == 0,
            "names": {rows, 0} >= {len(meta["sizes"] or []), len(flags)} and rows == len(meta["names"]),
            "parameters": 0 <= meta["parameters"] + meta["flops_per_frame"] < 1 << 63,
        }
        wrong = [key for key, fine in sound.items() if not fine]
    if wrong:
        raise BadInput(f"{file}: {wrong[0]!r} is missing, or not as featurize.py writes it; {AGAIN}")
    return meta


def check_array(file: Path, shape: tuple[int, ...]) -> None:
    """Raise BadInput unless an .npy file has that shape, a fitting dtype, and its whole length."""
    wanted = {"m": ["uint8"], "c": ["float16"], "f": ["float16", "float32"]}[file.name[0]]
    try:
        with opened(file):
            array = np.lib.format.open_memmap(file, "r")
    except BadInput:
        raise
    except Exception as error:  # numpy parses the header as Python: damaged, it raises anything
        reason = (str(error) or "damaged").splitlines()[0]
        raise BadInput(f"{file}: expected a whole .npy array, found something else ({reason})") from error
    if array.shape != shape or array.dtype not in wanted or not array.flags.c_contiguous:
        raise BadInput(f"{file}: holds {array.dtype} {list(array.shape)}, but meta.json says "
                       f"{'/'.join(wanted)} {list(shape)}; {AGAIN}")


# --- writing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def unfinished_folder(out: Path, overwrite: bool, inputs: Sequence[Path], plan: dict,
                      group: Group) -> Iterator[Path]:
    """Yield the folder that becomes the feature folder `out`, held by this job alone.

    When the work is stopped it stays; the next run of the same `plan` finds what was finished in it, one
    of another plan starts anew. Bad input leaves nothing.
    """
    if not group.main:
        group.wait()
        yield partial_folder(out)
        return
    with new_folder(out, "features", overwrite, inputs, keep=True) as place:
        file = place / "plan.json"
        plan = json.loads(json.dumps(plan))  # as it is read back
        if not file.exists() or read_json(file) != plan:
            for path in place.iterdir():
                remove(path)
            write_json(file, plan)
        group.wait()
        try:
            yield place
        except CannotWrite:
            raise
        except BadInput:
            remove(place)
            raise
        for path in [file, *place.glob("finished-*.txt")]:
            path.unlink()


def make_array(file: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Make an .npy file of zeros at its full length, with its place on the disk reserved. OSError."""
    np.lib.format.open_memmap(file, "w+", np.dtype(dtype), shape)
    if hasattr(os, "posix_fallocate"):  # so that a full disk is an error now, not a crash later
        with open(file, "r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)


def write_rows(file: Path, first: int, rows: np.ndarray) -> None:
    """Write rows first .. first + n of an .npy file, and have the system write them to the disk."""
    array = np.lib.format.open_memmap(file, "r+")
    array[first:first + len(rows)] = rows
    array.flush()
