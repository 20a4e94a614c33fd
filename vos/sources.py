"""What evaluate.py predicts and scores: frames, their masks, predictions from elsewhere.

H W frame.
"""
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vos import clips, images
from vos.folder import FeatureFolder
from vos.inputs import BadInput, inside
from vos.video import VIDEOS


class Source(NamedTuple):
    """Frames, and the masks to score them with."""

    frames: list[clips.Frame]
    sizes: list[tuple[int, int]]  # (H, W) of every frame
    masks: torch.Tensor | None = None  # packed, of a feature folder
    meaning: dict[str, str] | None = None  # of the annotations, where masks are read from them

    @property
    def annotated(self) -> bool:
        return any(frame.annotation for frame in self.frames)

    def mask(self, index: int) -> np.ndarray | None:
        """Return a frame's mask at its own size, packed uint8 [H, ceil(W / 8)]; None without one."""
        frame = self.frames[index]
        if frame.annotation is None:
            return None
        if self.masks is not None:
            return self.masks[index].cpu().numpy()
        return np.packbits(images.read_mask(frame.annotation, self.meaning), axis=1)


def open_frames(root: Path, split: str | None, masks: Path | None, threads: int) -> Source:
    """Find and check the frames of a data set and what its masks mean. Raises BadInput."""
    frames = clips.find_frames(root, split, masks)
    sizes = clips.check_frames(frames, threads)
    annotations = [frame.annotation for frame in frames if frame.annotation]
    meaning = images.decide_meaning(annotations, threads) if annotations else None
    return Source(frames, sizes, meaning=meaning)


def open_folder(folder: FeatureFolder, root: Path | None, needs_frames: bool,
                masks: torch.Tensor | None, threads: int) -> Source:
    """Return the frames of a feature folder, below `root` (None: where they were featurized).

    Masks come from the folder, unless frames differ in size and were resized for it. Raises BadInput when
    frames are needed and are gone, or are no longer those that were featurized.
    """
    meta, listed = folder.meta, folder.path / "paths.json"
    root = root or Path(meta["data"])
    is_video = root.suffix.lower() in VIDEOS
    raw, annotation = folder.paths["raw"], folder.paths.get("annotation")
    frames = []
    for row in range(folder.frames):
        labelled = annotation and annotation[row] not in ("", ".")
        frames.append(clips.Frame(
            meta["clips"][row], meta["names"][row],
            root if is_video else inside(root, raw[row], listed),
            inside(root, annotation[row], listed) if labelled else None, row if is_video else None))

    sizes = [tuple(size) for size in (meta["sizes"] or [folder.size] * folder.frames)[:folder.frames]]
    if needs_frames or meta["sizes"]:
        gone = [frame.image for frame in frames if not frame.image.is_file()]
        if gone:
            raise BadInput(f"{gone[0]}: no such file, though {folder.path} was made from it; pass "
                           "--data with the folder that its frames are in now, or --no-pictures and "
                           "--refine none")
        found = clips.check_frames([frame._replace(annotation=None) for frame in frames], threads)
        changed = [row for row in range(folder.frames) if found[row] != sizes[row]]
        if changed:
            raise BadInput(f"{frames[changed[0]].image}: is no longer of the size that {folder.path} "
                           "was made from; featurize again")
    if not meta["sizes"]:
        return Source(frames, sizes, masks)
    annotations = [frame.annotation for frame in frames if frame.annotation]
    return Source(frames, sizes, meaning=images.decide_meaning(annotations, threads))


def clip_ranges(frames: list[clips.Frame]) -> list[tuple[int, int]]:
    """Return (first, stop) of every run of frames of one clip, in order."""
    runs = [list(run) for _, run in itertools.groupby(range(len(frames)), lambda i: frames[i].clip)]
    return [(run[0], run[-1] + 1) for run in runs]


def find_predictions(folder: Path, frames: list[clips.Frame]) -> list[Path]:
    """Return the PNG of each frame: <clip>/<frame>.png, or as many PNGs as frames, in order.

    Raises BadInput naming the first that is missing, or both counts.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder of masks")
    folder = folder / "outputs" if (folder / "outputs").is_dir() else folder
    flat = [path for path in clips.images_in(folder) if path.suffix.lower() == ".png"]
    if flat and len(flat) != len(frames):
        raise BadInput(f"{folder}: {len(flat)} PNGs for {len(frames)} frames; expected one a frame")
    files = flat or [folder / frame.clip / f"{frame.name}.png" for frame in frames]
    for file in files:
        if not file.is_file():
            raise BadInput(f"{file}: no such file; expected <clip>/<frame>.png, or one PNG a frame")
    return files


def read_prediction(file: Path, size: tuple[int, int], meaning: dict[str, str]) -> np.ndarray:
    """Decode a prediction to uint8 [H, W], 0 or 255. Raises BadInput unless it has `size` = (H, W)."""
    mask = images.read_mask(file, meaning)
    if mask.shape != size:
        raise BadInput(f"{file}: is {mask.shape[1]} x {mask.shape[0]}, its frame {size[1]} x "
                       f"{size[0]}; expected the same size")
    return mask * np.uint8(255)
