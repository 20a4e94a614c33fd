"""Clips on disk: frames and masks in every layout people have, checked, and read in order."""
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from vos.images import IMAGES, Meaning, image_size, read_image, read_mask
from vos.inputs import BadInput, inside, is_name, opened, read_paths
from vos.video import VIDEOS, read_video
from vos.views import show

Item = TypeVar("Item")
Result = TypeVar("Result")


class Frame(NamedTuple):
    """One frame: its clip's name, its own name, and where its picture and mask are."""

    clip: str
    name: str  # e.g. "00007"
    image: Path  # an image file, or the video that `number` indexes
    annotation: Path | None = None  # a mask file; None when the frame is unlabelled
    number: int | None = None  # position in a video; None for an image file
    view: str = ""  # what is shown of it, see `show`; "" for the frame itself


# --- finding -----------------------------------------------------------------------------------


def find_frames(data: Path, split: str | None = None, masks: Path | None = None) -> list[Frame]:
    """Return the frames of `data` in order: clip by clip, each clip in time.

    data: a DAVIS root (`split` names one of its ImageSets), a folder with paths.json, a folder of
    folders of frames, one of frames, or a video. masks: a folder of `<clip>/<frame>.png`, or of
    `<frame>.png` for one clip, which are then the only masks; a frame without one is unlabelled.
    Raises BadInput naming what is missing, is there twice, or fits nothing.
    """
    if data.is_file() and data.suffix.lower() in VIDEOS:
        count = sum(1 for _ in read_video(data))
        frames = [Frame(data.stem, f"{number:05d}", data, None, number) for number in range(count)]
    elif not data.is_dir():
        raise BadInput(f"{data}: expected a DAVIS root, a folder with paths.json, a folder of "
                       f"frames, or a video ({' '.join(sorted(VIDEOS))})")
    elif (data / "paths.json").is_file():
        frames = find_contest(data)
    elif (data / "JPEGImages").is_dir() or (data / "ImageSets").is_dir():
        frames = find_davis(data, split)
    else:
        folders = [path for path in listing(data) if path.is_dir() and images_in(path)]
        images = [image for folder in folders or [data] for image in images_in(folder)]
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
    lists = {}
    for file in sorted(root.glob("ImageSets/*/*.txt")):  # 480p (2016) comes last and wins a name
        lists[file.stem] = file
    if split not in lists:
        raise BadInput(f"{root}: no split {split!r} in ImageSets; there are: "
                       f"{', '.join(sorted(lists)) or 'none'}")
    file = lists[split]
    with opened(file, limit=1 << 28) as stream:
        lines = stream.read().decode("utf-8", "surrogateescape").splitlines()

    images: list[Path] = []
    annotations: list[Path | None] = []
    for line in lines:
        parts = [inside(root, part.lstrip("/"), file) for part in line.split()]
        if len(parts) > 2:
            raise BadInput(f"{file}: {line[:200]!r} is neither a clip nor a frame and its mask")
        if len(parts) == 1 and not parts[0].suffix:
            found = images_in(root / "JPEGImages/480p" / parts[0].name)
            if not found:
                raise BadInput(f"{file}: names clip {line.strip()!r}, which has no frames")
            folder = root / "Annotations/480p" / parts[0].name
            # test-dev has the first frame's mask alone, which is for other contests
            annotated = folder.is_dir() and len(images_in(folder)) > 1
            images += found
            annotations += [folder / f"{image.stem}.png" if annotated else None for image in found]
        elif parts:
            images.append(parts[0])
            annotations.append(parts[1] if len(parts) == 2 else None)
    return make_frames(root, images, annotations)


def find_contest(root: Path) -> list[Frame]:
    """Return the frames of a paths.json: columns `raw` and, but for test sets, `annotation`."""
    file = root / "paths.json"
    table = read_paths(file)
    if "raw" not in table:
        raise BadInput(f"{file}: expected a column 'raw', found {', '.join(table) or 'none'}")
    images = [inside(root, path, file) for path in table["raw"]]
    masks = [inside(root, path, file) for path in table.get("annotation", [])]
    if masks and len(masks) != len(images):
        raise BadInput(f"{file}: {len(images)} frames but {len(masks)} annotations; one is missing")
    return make_frames(root, images, masks or [None] * len(images))


def make_frames(root: Path, images: list[Path], annotations: Iterable[Path | None]) -> list[Frame]:
    """Return a Frame for each image; its clip is its folder's name.

    Where two folders share a name, clips are called by their paths under `root`, '/' as '-'.
    """
    folders = {image.parent for image in images}
    clips = {folder: os.path.basename(os.path.abspath(folder)) for folder in folders}
    if len(set(clips.values())) < len(clips):
        clips = {folder: "-".join(folder.relative_to(root).parts) for folder in folders}
    return [Frame(clips[image.parent], image.stem, image, annotation)
            for image, annotation in zip(images, annotations)]


def pair_masks(frames: list[Frame], folder: Path) -> list[Frame]:
    """Return the frames with the masks in `folder`, by clip and frame name; see `find_frames`."""
    names = {frame[:2] for frame in frames}
    one_clip = len({frame.clip for frame in frames}) == 1
    found: dict[tuple[str, ...], Path] = {}
    for place in [folder, *filter(Path.is_dir, listing(folder))]:
        clip = frames[0].clip if one_clip and place == folder else place.name
        for file in images_in(place):
            key = (clip, file.stem)
            if key not in names or key in found:
                raise BadInput(f"{file}: fits no frame{' but one with a mask' * (key in found)}; "
                               "expected masks called <clip>/<frame>.png, such as "
                               f"{'/'.join(frames[0][:2])}.png")
            found[key] = file
    if not found:
        raise BadInput(f"{folder}: holds no masks; expected --masks to hold <clip>/<frame>.png")
    return [frame._replace(annotation=found.get(frame[:2])) for frame in frames]


def images_in(folder: Path) -> list[Path]:
    """Return the image files of a folder, frame2 before frame10."""
    return [path for path in listing(folder)
            if path.suffix.lower() in IMAGES and not path.name.startswith(".")]


def listing(folder: Path) -> list[Path]:
    """Return what a folder holds, numbers in the names in numeric order."""
    def natural(path: Path) -> list:
        parts = re.split(r"(\d+)", path.name)
        return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]

    try:
        return sorted(folder.iterdir(), key=natural)
    except OSError as error:
        raise BadInput(f"{folder}: expected a folder to read ({error.strerror})") from error


# --- checking and reading ----------------------------------------------------------------------


def check_frames(frames: list[Frame], threads: int = 4) -> list[tuple[int, int]]:
    """Check every frame and mask from its header, before long work; return each frame's (H, W).

    Raises BadInput for a missing or cut file, and a mask of another size than its frame.
    """
    def check(frame: Frame) -> tuple[int, int]:
        size = video_size or image_size(frame.image)
        found = size if frame.annotation is None else image_size(frame.annotation, turned=False)
        if found != size:
            raise BadInput(f"{frame.annotation}: is {found[1]} x {found[0]} but its frame "
                           f"{frame.image} is {size[1]} x {size[0]}; expected the same size")
        return size

    video_size = None
    if frames[0].number is not None:
        video_size = next(read_video(frames[0].image)).shape[:2]
    return list(in_threads(check, frames, threads, ahead=64))


def read_images(frames: list[Frame], threads: int = 2, ahead: int = 64) -> Iterator[np.ndarray]:
    """Yield every frame, or its view, as uint8 [H, W, 3], decoded at most `ahead` frames early."""
    if frames and frames[0].number is not None:
        yield from read_video_frames(frames)
    else:
        def read(frame: Frame) -> np.ndarray:
            return show(read_image(frame.image), frame.view)
        yield from in_threads(read, frames, threads, ahead)


def read_video_frames(frames: list[Frame]) -> Iterator[np.ndarray]:
    """Yield frames of one video, decoding forwards, and from the start where numbers fall."""
    images: Iterator[np.ndarray] = iter(())
    position, image = -1, None
    for frame in frames:
        number = frame.number or 0
        if image is None or number < position:
            images, position = read_video(frame.image), -1
        while position < number:
            image = next(images, None)
            position += 1
        if image is None:
            raise BadInput(f"{frame.image}: is shorter than it was; expected frame {number}")
        yield show(image, frame.view)


def read_packed_masks(frames: list[Frame], meaning: Meaning, size: tuple[int, int],
                      threads: int = 2) -> Iterator[np.ndarray]:
    """Yield every frame's mask, or its view, as np.packbits along W: uint8 [H, ceil(W / 8)].

    Masks are resized (nearest) to `size` = (H, W); an unlabelled frame gives zeros.
    """
    def read(frame: Frame) -> np.ndarray:
        mask = np.zeros(size, bool)
        if frame.annotation is not None:
            mask = resize(show(read_mask(frame.annotation, meaning), frame.view), size)
        return np.packbits(mask, axis=1)

    yield from in_threads(read, frames, threads, ahead=64)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to `size` = (H, W): uint8 [H, W, 3] bilinear, bool [H, W] to the nearest pixel."""
    if pixels.shape[:2] == tuple(size):
        return pixels
    method = Image.Resampling.NEAREST if pixels.dtype == bool else Image.Resampling.BILINEAR
    return np.array(Image.fromarray(pixels).resize(size[::-1], method))


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], threads: int,
               ahead: int) -> Iterator[Result]:
    """Yield work(item) for each item in order; threads run at most `ahead` items early."""
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(work, item) for item in itertools.islice(items, ahead)]
        try:
            while waiting:
                result = waiting.pop(0).result()
                waiting += [pool.submit(work, item) for item in itertools.islice(items, 1)]
                yield result
        finally:
            for future in waiting:
                future.cancel()
