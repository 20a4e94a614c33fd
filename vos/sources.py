"""What is featurized, predicted and scored: frames found and checked, and their masks."""
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vos import cli, clips, cues, featurizers
from vos.folder import FeatureFolder
from vos.inputs import BadInput, inside
from vos.video import VIDEOS


class Source(NamedTuple):
    """Frames, and the masks to train on or score with."""

    frames: list[clips.Frame]
    sizes: list[tuple[int, int]]  # (H, W) of every frame
    meaning: clips.Meaning | None = None  # of the annotations, where masks are read from them
    masks: torch.Tensor | None = None  # packed, where they are a feature folder's

    @property
    def annotated(self) -> bool:
        return any(frame.annotation for frame in self.frames)

    def mask(self, index: int) -> np.ndarray | None:
        """Return a frame's mask at its own size, bool [H, W]; None without one."""
        frame = self.frames[index]
        if frame.annotation is None:
            return None
        if self.masks is None:
            return clips.read_mask(frame.annotation, self.meaning)
        packed = self.masks[index].cpu().numpy()
        return np.unpackbits(packed, axis=1, count=self.sizes[index][1]).astype(bool)


def open_frames(root: Path, split: str | None, masks: Path | None, threads: int,
                limit: int | None = None) -> Source:
    """Find and check the frames of a data set and what its masks mean. Raises BadInput."""
    frames = clips.find_frames(root, split, masks)[:limit]
    sizes = clips.check_frames(frames, threads)
    meaning = clips.decide_meaning([frame.annotation for frame in frames], threads)
    return Source(frames, sizes, meaning or None)


def open_folder(folder: FeatureFolder, root: Path | None, needs_frames: bool,
                masks: torch.Tensor | None, threads: int) -> Source:
    """Return a feature folder's frames, below `root` if they moved; resized ones as annotated."""
    meta, listed = folder.meta, folder.path / "paths.json"
    root = root or Path(meta["data"])
    is_video = root.suffix.lower() in VIDEOS
    raw, masked = folder.paths["raw"], folder.paths.get("annotation")
    frames = []
    for row in range(folder.frames):
        image = root if is_video else inside(root, raw[row], listed)
        labelled = masks is not None and masked and masked[row]
        annotation = inside(root, masked[row], listed) if labelled else None
        frames.append(clips.Frame(meta["clips"][row], meta["names"][row], image, annotation,
                                  row if is_video else None))

    sizes = [tuple(size) for size in meta["sizes"] or [folder.size] * len(frames)]
    if needs_frames or meta["sizes"]:
        try:
            plain = [frame._replace(annotation=None) for frame in frames]
            for frame, old, new in zip(frames, sizes, clips.check_frames(plain, threads)):
                if old != new:
                    raise BadInput(f"{frame.image}: is no longer of the size that was featurized")
        except BadInput as error:
            raise BadInput(f"{error}; pass --data with where the frames of {folder.path} are now, "
                           "or --no-pictures and --refine none") from error
    if not meta["sizes"]:
        return Source(frames, sizes, masks=masks)
    return Source(frames, sizes, clips.decide_meaning([f.annotation for f in frames], threads))


def clip_ranges(frames: list[clips.Frame]) -> list[tuple[int, int]]:
    """Return (first, stop) of every run of frames of one clip, in order."""
    runs = [list(run) for _, run in itertools.groupby(range(len(frames)), lambda i: frames[i].clip)]
    return [(run[0], run[-1] + 1) for run in runs]


def featurize_clips(featurizer: featurizers.Featurizer, frames: list[clips.Frame],
                    ranges: list[tuple[int, int]], size: tuple[int, int], dtype: str,
                    with_cues: bool, device: torch.device, threads: int) -> Iterator[list]:
    """Yield the levels of each range, [T, C, h, w] in host memory, then their cues, if wanted."""
    batch = 4 if device.type == "cpu" else 32
    chosen = [frames[row] for first, stop in ranges for row in range(first, stop)]
    shown = iter(cli.progress(clips.read_images(chosen, threads), "featurize", len(chosen)))
    for first, stop in ranges:
        parts = []
        for start in range(first, stop, batch):
            images = itertools.islice(shown, min(batch, stop - start))
            resized = np.stack([clips.resize(image, size) for image in images])  # [B, H, W, 3]
            waiting = [torch.from_numpy(resized).to(device).permute(0, 3, 1, 2)]  # channels last
            while waiting:
                pixels = waiting.pop(0)
                try:
                    with torch.inference_mode():
                        maps = featurizer(pixels)
                except torch.OutOfMemoryError:
                    if len(pixels) == 1:
                        raise
                    waiting[:0] = pixels.chunk(2)
                    continue
                parts.append([level.to("cpu", getattr(torch, dtype)) for level in maps])

        levels = [torch.cat(level) for level in zip(*parts)]
        if with_cues:
            levels += [cues.clip_cues(level.to(device)).half().cpu() for level in levels]
        yield levels


def find_predictions(folder: Path, frames: list[clips.Frame], threads: int) -> list[Path]:
    """Return each frame's PNG, <clip>/<frame>.png or one a frame in order, checked. BadInput."""
    folder = folder / "outputs" if (folder / "outputs").is_dir() else folder
    flat = clips.images_in(folder) if folder.is_dir() else []
    files = [path for path in flat if path.suffix.lower() == ".png"]
    if files and len(files) != len(frames):
        raise BadInput(f"{folder}: {len(files)} PNGs for {len(frames)} frames; expected one each")
    files = files or [folder / frame.clip / f"{frame.name}.png" for frame in frames]
    clips.check_frames([frame._replace(annotation=f) for frame, f in zip(frames, files)], threads)
    return files
