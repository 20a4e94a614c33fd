"""Clips on disk: frames and masks in every layout people have, checked, and read in order."""
import itertools
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vos.images import IMAGES, image_size, read_image
from vos.inputs import BadInput, inside, is_name, opened, read_paths
from vos.masks import Meaning, mask_values, read_mask
from vos.video import VIDEOS, read_video
from vos.views import show


class Frame(NamedTuple):
    """One frame: its clip's name, its own name, and where its picture and mask are."""

    clip: str
    name: str  # e.g. "00007"
    image: Path  # an image file, or the video that `number` indexes
    annotation: Path | None = None  # a mask file; None when the frame is unlabelled
    number: int | None = None  # position in a video; None for an image file
    view: str = ""  # what is shown of it, see `show`; "" for the frame itself


def find_frames(data: Path, split: str | None = None, masks: Path | None = None) -> list[Frame]:
    """Return the frames of `data` in order: clip by clip, each clip in time.

    The layouts of `data` and of `masks`, a folder, are listed in docs/formats.md. Raises BadInput
    naming what is missing, is there twice, or fits nothing.
    """
    if data.is_file() and data.suffix.lower() in VIDEOS:
        frames = [Frame(data.stem, f"{number:05d}", data, None, number)
                  for number, _ in enumerate(read_video(data))]
    elif not data.is_dir():
        raise BadInput(f"{data}: expected a DAVIS root, a folder with paths.json, a folder of "
                       f"frames, or a video ({' '.join(sorted(VIDEOS))})")
    elif (data / "paths.json").is_file():
        frames = find_contest(data)
    elif (data / "JPEGImages").is_dir() or (data / "ImageSets").is_dir():
        frames = find_davis(data, split)
    else:
        folders = sorted(filter(Path.is_dir, data.iterdir()), key=natural)
        images = [image for folder in folders for image in images_in(folder)] or images_in(data)
        frames = make_frames(data, images, [None] * len(images))
    if not frames:
        raise BadInput(f"{data}: holds no frames; expected at least one")

    for key, count in Counter(frame[:2] for frame in frames).items():
        if count > 1 or not all(map(is_name, key)):
            raise BadInput(f"{data}: clip {key[0]!r}, frame {key[1]!r}, {count} times; expected "
                           "names once each, of at most 200 bytes of UTF-8, without ':' and '\\'")
    return frames if masks is None else pair_masks(frames, masks)


def find_davis(root: Path, split: str | None) -> list[Frame]:
    """Return one split of a DAVIS root, from 2016's lists (frames) or 2017's (clip names)."""
    lists = {file.stem: file for file in sorted(root.glob("ImageSets/*/*.txt"))}  # 480p is last
    if split not in lists:
        raise BadInput(f"{root}: no split {split!r}; there are: {', '.join(sorted(lists))}")
    file = lists[split]
    with opened(file, limit=1 << 28) as stream:
        lines = stream.read().decode("utf-8", "surrogateescape").splitlines()

    images: list[Path] = []
    annotations: list[Path | None] = []
    for line in filter(str.strip, lines):
        image, *masks = [inside(root, part.lstrip("/"), file) for part in line.split()]
        found = [image]
        if not masks and not image.suffix:
            found = images_in(root / "JPEGImages/480p" / image.name)
            folder = root / "Annotations/480p" / image.name
            # test-dev has the first frame's mask alone, which is for other contests
            if folder.is_dir() and len(images_in(folder)) > 1:
                masks = [folder / f"{frame.stem}.png" for frame in found]
        if not found or len(masks) > len(found):
            raise BadInput(f"{file}: {line[:200]!r} is no clip with frames, nor a frame and a mask")
        images += found
        annotations += masks or [None] * len(found)
    return make_frames(root, images, annotations)


def find_contest(root: Path) -> list[Frame]:
    """Return the frames of a paths.json: columns `raw` and, but for test sets, `annotation`."""
    file = root / "paths.json"
    table = read_paths(file)
    images = [inside(root, path, file) for path in table.get("raw", [])]
    masks = [inside(root, path, file) for path in table.get("annotation", [])]
    if not images or (masks and len(masks) != len(images)):
        raise BadInput(f"{file}: {len(images)} frames (raw) but {len(masks)} annotations; expected "
                       "one of each, or no annotations")
    return make_frames(root, images, masks or [None] * len(images))


def make_frames(root: Path, images: list[Path], annotations: Iterable[Path | None]) -> list[Frame]:
    """Return a Frame for each image; its clip is its folder, by its path where names are shared."""
    folders = {image.parent for image in images}
    clips = {folder: os.path.basename(os.path.abspath(folder)) for folder in folders}
    if len(set(clips.values())) < len(clips):
        clips = {folder: "-".join(folder.relative_to(root).parts) for folder in folders}
    return [Frame(clips[image.parent], image.stem, image, annotation)
            for image, annotation in zip(images, annotations)]


def pair_masks(frames: list[Frame], folder: Path) -> list[Frame]:
    """Return the frames with the masks in `folder`, by clip and frame name."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: expected a folder of masks")
    masks = find_frames(folder)
    if masks[0].image.parent == folder and len({frame.clip for frame in frames}) == 1:
        masks = [mask._replace(clip=frames[0].clip) for mask in masks]
    names = {frame[:2] for frame in frames}
    for mask in masks:
        if mask[:2] not in names:
            raise BadInput(f"{mask.image}: fits no frame; expected masks called "
                           f"<clip>/<frame>.png, such as {'/'.join(frames[0][:2])}.png")

    found = {mask[:2]: mask.image for mask in masks}
    return [frame._replace(annotation=found.get(frame[:2])) for frame in frames]


def images_in(folder: Path) -> list[Path]:
    """Return the image files of a folder, frame2 before frame10."""
    return [path for path in sorted(folder.iterdir(), key=natural)
            if path.suffix.lower() in IMAGES and not path.name.startswith(".")]


def natural(path: Path) -> list:
    """Return a key that sorts paths by name, numbers in numeric order."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def check_frames(frames: list[Frame], threads: int = 4) -> list[tuple[int, int]]:
    """Decode every frame and mask once, before long work; return each frame's (H, W).

    Raises BadInput for a missing or damaged file, and a mask of another size than its frame.
    """
    def check(frame: Frame) -> tuple[int, int]:
        size = video_size or image_size(frame.image)
        found = size if frame.annotation is None else mask_values(frame.annotation)[1].shape
        if found != size:
            raise BadInput(f"{frame.annotation}: is {found[1]} x {found[0]} but its frame "
                           f"{frame.image} is {size[1]} x {size[0]}; expected the same size")
        return size

    video_size = None
    if frames[0].number is not None:
        video_size = next(read_video(frames[0].image)).shape[:2]
    return list(in_threads(check, frames, threads))


def read_images(frames: list[Frame], threads: int = 2) -> Iterator[np.ndarray]:
    """Yield every frame, or its view, as uint8 [H, W, 3]; decodes a few frames early."""
    def read(frame: Frame) -> np.ndarray:
        return show(read_image(frame.image), frame.view)

    if frames and frames[0].number is not None:
        return read_video_frames(frames)
    return in_threads(read, frames, threads)


def read_video_frames(frames: list[Frame]) -> Iterator[np.ndarray]:
    """Yield frames of one video; each view of a clip has it decoded from the start."""
    position = 1 << 62  # of the frame that `images` yields next
    for frame in frames:
        number = frame.number or 0
        if number < position:
            images, position = read_video(frame.image), 0
        image = next(itertools.islice(images, number - position, None), None)
        if image is None:
            raise BadInput(f"{frame.image}: is shorter than it was; expected frame {number}")
        position = number + 1
        yield show(image, frame.view)


def read_packed_masks(frames: list[Frame], meaning: Meaning, size: tuple[int, int],
                      threads: int = 2) -> Iterator[np.ndarray]:
    """Yield masks, or their views, resized (nearest) to `size` = (H, W), as np.packbits along W."""
    def read(frame: Frame) -> np.ndarray:
        mask = np.zeros(size, bool)
        if frame.annotation is not None:
            mask = resize(show(read_mask(frame.annotation, meaning), frame.view), size)
        return np.packbits(mask, axis=1)

    return in_threads(read, frames, threads)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to `size` = (H, W): uint8 bilinear, bool to the nearest pixel."""
    if pixels.shape[:2] == tuple(size):
        return pixels
    method = Image.Resampling.NEAREST if pixels.dtype == bool else Image.Resampling.BILINEAR
    return np.array(Image.fromarray(pixels).resize(size[::-1], method))


def in_threads(work: Callable, items: Iterable, threads: int, ahead: int = 64) -> Iterator:
    """Yield work(item) for each item in order; threads run at most `ahead` items early."""
    waiting: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
