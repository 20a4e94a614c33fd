"""What is featurized, predicted and scored: frames found and checked, and their masks."""
import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vos import cli, clips, cues, featurizers, motion
from vos.cli import ALONE, Group
from vos.folder import CUES, FORMAT, FeatureFolder, list_arrays, open_features
from vos.inputs import BadInput, inside, sha256
from vos.layers import count_flops
from vos.outputs import beside, new_folder, write_json

WINDOW = 128  # frames that are featurized, and whose cues are found, at a time


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


def open_frames(root: Path, split: str | None, masks: Path | None,
                limit: int | None = None) -> Source:
    """Find and check the frames of a data set and what its masks mean. Raises BadInput."""
    frames = clips.find_frames(root, split, masks)[:limit]
    sizes = clips.check_frames(frames)
    meaning = clips.decide_meaning([frame.annotation for frame in frames])
    return Source(frames, sizes, meaning or None)


def open_folder(folder: FeatureFolder, root: Path | None, needs_frames: bool) -> Source:
    """Return a feature folder's frames, below `root` if they moved; resized ones as annotated.

    Where frames were not resized, its `masks` are to be set to those of the folder.
    """
    meta, listed = folder.meta, folder.path / "paths.json"
    root = root or Path(meta["data"])
    is_video = root.suffix.lower() in clips.VIDEOS
    raw, masked = folder.paths["raw"], folder.paths.get("annotation")
    frames = []
    for row in range(folder.frames):
        image = root if is_video else inside(root, raw[row], listed)
        labelled = "masks.npy" in meta["sha256"] and masked and masked[row]
        annotation = inside(root, masked[row], listed) if labelled else None
        frames.append(clips.Frame(meta["clips"][row], meta["names"][row], image, annotation,
                                  row if is_video else None))

    sizes = [tuple(size) for size in meta["sizes"] or [folder.size] * len(frames)]
    if needs_frames or meta["sizes"]:
        try:
            plain = [frame._replace(annotation=None) for frame in frames]
            for frame, old, new in zip(frames, sizes, clips.check_frames(plain)):
                if old != new:
                    raise BadInput(f"{frame.image}: is no longer of the size that was featurized")
        except BadInput as error:
            raise BadInput(f"{error}; pass --data with where the frames of {folder.path} are now, "
                           "or --no-pictures and --refine none") from error
    if not meta["sizes"]:
        return Source(frames, sizes)
    return Source(frames, sizes, clips.decide_meaning([f.annotation for f in frames]))


def clip_ranges(frames: list[clips.Frame]) -> list[tuple[int, int]]:
    """Return (first, stop) of every run of frames of one clip, in order."""
    runs = [list(run) for _, run in itertools.groupby(range(len(frames)), lambda i: frames[i].clip)]
    return [(run[0], run[-1] + 1) for run in runs]


class Plan(NamedTuple):
    """A feature folder to be written: what it will hold, and of what."""

    rows: list[clips.Frame]  # frames, then their views
    meta: dict  # meta.json, but for the arrays' digests
    paths: dict  # paths.json
    meaning: clips.Meaning | None  # of the masks, if any


def plan_features(source: Source, root: Path, featurizer: featurizers.Featurizer,
                  size: tuple[int, int], with_cues: bool, dtype: str = "float16",
                  views: Sequence[str] = (), split: str | None = None,
                  masks: Path | None = None) -> Plan:
    """Say what featurizing will write; masks: where they are, if not below `root`."""
    rows = list(source.frames)
    for view in views:  # of every second frame: the others would add little but their time
        rows += [row._replace(clip=f"{row.clip}@{view}", view=view) for row in source.frames[::2]]
    sizes = source.sizes + source.sizes[::2] * len(views)
    labelled = [row.annotation is not None for row in rows]
    meta = {
        "format": FORMAT, "featurizer": featurizer.name, "levels": featurizer.shapes(size),
        "size": size, "dtype": dtype, "cues": CUES if with_cues else None, "views": views,
        "weights": featurizer.digest, "parameters": featurizer.parameters_count,
        "preprocessing": {"mean": featurizer.mean, "std": featurizer.std,
                          "compute": str(featurizer.compute)[6:]},
        "flops_per_frame": count_flops(featurizer.shapes, size),
        "versions": {"torch": torch.__version__},
        "clips": [row.clip for row in rows], "names": [row.name for row in rows],
        "frames": len(source.frames), "sizes": sizes if set(sizes) != {size} else None,
        "labelled": labelled if len(set(labelled)) > 1 else None,
        "data": str(root.resolve()), "split": split}
    paths = {"raw": list_paths([row.image for row in rows], root)}
    if source.annotated:
        paths["annotation"] = list_paths([row.annotation for row in rows], masks or root)
    return Plan(rows, meta, paths, source.meaning)


def list_paths(paths: list[Path | None], root: Path) -> dict[str, str]:
    """Return a column of paths.json: below the data root, with slashes; a video's own name."""
    def below(path: Path) -> str:
        return path.relative_to(root).as_posix() if root in path.parents else path.name
    return {str(index): below(path or Path()) for index, path in enumerate(paths)}


def is_fresh(place: Path, plan: Plan) -> bool:
    """Whether a folder has the features of a plan, written after its frames. Raises BadInput."""
    if not place.exists():
        return False
    meta, written = open_features(place).meta, (place / "meta.json").stat().st_mtime
    changed = max(row.image.stat().st_mtime for row in plan.rows)
    planned = json.loads(json.dumps(plan.meta))
    return written > changed and planned.items() <= meta.items()


def write_features(out: Path, plan: Plan, featurizer: featurizers.Featurizer, device: torch.device,
                   overwrite: bool, inputs: Sequence[Path], group: Group = ALONE) -> None:
    """Write a feature folder; stopped and called again with the same plan, it goes on."""
    making = (new_folder(out, "features", overwrite, inputs, json.dumps([plan.meta, plan.paths]))
              if group.main else contextlib.nullcontext(beside(out, "partial")))
    with making as place:
        group.wait()
        write_arrays(place, plan, featurizer, device, group)
        group.wait()
        if not group.main:
            return
        write_json(place / "paths.json", plan.paths)
        digests = {file.name: sha256(file) for file in sorted(place.glob("*.npy"))}
        write_json(place / "meta.json", plan.meta | {"sha256": digests})
        if plan.meaning:
            masks = np.load(place / "masks.npy", mmap_mode="r")  # without one, all background
            pixels = sum(np.bitwise_count(mask).sum(dtype=int) for mask in masks)
            frames = sum(row.annotation is not None for row in plan.rows)
            share = pixels / (frames * math.prod(plan.meta["size"]))
            print(f"foreground: {share:.2%} of all pixels")
            if not 0.001 <= share <= 0.9:
                print("warning: that is hardly an object; are these the right masks?")


def write_arrays(place: Path, plan: Plan, featurizer: featurizers.Featurizer, device: torch.device,
                 group: Group) -> None:
    """Write the arrays of this process's share of the clips, but for those finished earlier."""
    rows, meta, _, meaning = plan
    if group.main:
        for name, shape in list_arrays(meta, masks=bool(meaning)).items():
            dtype = {"m": "uint8", "c": "float16"}.get(name[0], meta["dtype"])
            if not (place / name).exists():
                array = np.lib.format.open_memmap(place / name, "w+", np.dtype(dtype), shape)
                if hasattr(os, "posix_fallocate"):  # a full disk is an error now, no crash later
                    with open(place / name, "r+b") as handle:
                        os.posix_fallocate(handle.fileno(), 0, array.offset + array.nbytes)
    group.wait()

    ranges = list(itertools.chain(*itertools.starmap(windows, clip_ranges(rows))))
    notes = place / "unfinished"
    done = {line for file in notes.glob("*.txt") for line in file.read_text().split()}
    todo = [run for run in ranges[group.rank::group.size] if str(run[0]) not in done]
    if done and group.main:
        print(f"going on from an earlier run: {len(done)} of {len(ranges)} parts are there")
    names = list(list_arrays(meta, masks=False))
    made = featurize_clips(featurizer, rows, todo, meta["size"], meta["dtype"],
                           meta["cues"] is not None, device)
    for (first, stop), levels in zip(todo, made):
        arrays = {name: level.numpy() for name, level in zip(names, levels)}
        if meaning:
            masks = clips.read_packed_masks(rows[first:stop], meaning, meta["size"])
            arrays["masks.npy"] = np.stack(list(masks))
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise BadInput(f"{rows[first].image}: {name} would not be finite here; pass "
                               "--dtype float32 --compute float32")
            mapped = np.load(place / name, mmap_mode="r+")
            mapped[first:stop] = array
            mapped.flush()
        with open(notes / f"{group.rank}.txt", "a", encoding="ascii") as file:
            file.write(f"{first}\n")


def windows(first: int, stop: int) -> list[tuple[int, int]]:
    """Part a run of frames evenly where it is long: memory then does not grow with a clip."""
    bounds = np.linspace(first, stop, 1 + -(-(stop - first) // WINDOW)).round().astype(int)
    return list(itertools.pairwise(bounds.tolist()))


def featurize_clips(featurizer: featurizers.Featurizer, frames: list[clips.Frame],
                    ranges: list[tuple[int, int]], size: tuple[int, int], dtype: str,
                    with_cues: bool, device: torch.device) -> Iterator[list]:
    """Yield the levels of each range, [T, C, h, w] in host memory, then their cues, if wanted."""
    most = 4 if device.type == "cpu" else 32  # frames at a time, fewer of large ones
    batch = max(1, min(most, most * 480 * 854 // math.prod(size)))
    chosen = [frames[row] for first, stop in ranges for row in range(first, stop)]
    shown = iter(cli.progress(clips.read_images(chosen), "featurize", len(chosen)))
    for first, stop in ranges:
        parts, small = [], []
        for start in range(first, stop, batch):
            images = itertools.islice(shown, min(batch, stop - start))
            resized = np.stack([clips.resize(image, size) for image in images])  # [B, H, W, 3]
            pixels = torch.from_numpy(resized).to(device).permute(0, 3, 1, 2)  # channels last
            with torch.inference_mode():
                maps = featurizer(pixels)
            parts.append([level.to("cpu", getattr(torch, dtype)) for level in maps])
            if with_cues:
                small.append(motion.shrink(pixels))

        levels = [torch.cat(level) for level in zip(*parts)]
        if with_cues:
            moved = motion.own_motion(torch.cat(small))
            levels += [cues.clip_cues(level.to(device), moved).half().cpu() for level in levels]
        yield levels


def find_predictions(folder: Path, frames: list[clips.Frame]) -> list[Path]:
    """Return each frame's PNG, <clip>/<frame>.png or one a frame in order, checked. BadInput."""
    folder = folder / "outputs" if (folder / "outputs").is_dir() else folder
    flat = clips.images_in(folder) if folder.is_dir() else []
    files = [path for path in flat if path.suffix.lower() == ".png"]
    if files and len(files) != len(frames):
        raise BadInput(f"{folder}: {len(files)} PNGs for {len(frames)} frames; expected one each")
    files = files or [folder / frame.clip / f"{frame.name}.png" for frame in frames]
    clips.check_frames([frame._replace(annotation=f) for frame, f in zip(frames, files)])
    return files
