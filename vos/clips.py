"""Clips on disk: frames and masks in every layout people have, checked, and read in order."""
import argparse
import itertools
import os
import re
import subprocess
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageSequence

from vos.images import IMAGES, PIXELS_LIMIT, image_file, read_image
from vos.inputs import BadInput, inside, is_name, opened, read_paths

VIDEOS = {".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".gif", ".apng"}
KINDS = {"1": "1-bit", "L": "grey", "LA": "grey", "P": "indexed", "PA": "indexed",
         "RGB": "colour", "RGBA": "colour"}
LABELS = 32  # grey masks of values up to this number the objects; brighter values are shades
RULES = {
    "any but 0": lambda values: values != 0,
    "above 127": lambda values: values > 127,
    "any but 0 and 255 (void)": lambda values: (values != 0) & (values != 255),
}
Meaning = dict[str, str]  # kind of mask -> the rule of RULES for all masks of that kind


class Frame(NamedTuple):
    """One frame: its clip's name, its own name, and where its picture and mask are."""

    clip: str
    name: str  # e.g. "00007"
    image: Path  # an image file, or the video that `number` indexes
    annotation: Path | None = None  # a mask file; None when the frame is unlabelled
    number: int | None = None  # position in a video; None for an image file
    view: str = ""  # what is shown of it, see `show`; "" for the frame itself


def find_frames(data: Path, split: str | None = None, masks: Path | None = None) -> list[Frame]:
    """Return the frames of `data` in order, in a layout of docs/formats.md. Raises BadInput."""
    if data.is_file() and data.suffix.lower() in VIDEOS:
        frames = [Frame(data.stem, f"{number:05d}", data, None, number)
                  for number, _ in enumerate(read_video(data))]
    elif not data.is_dir():
        raise BadInput(f"{data}: expected a DAVIS root, a folder with paths.json, a folder of "
                       f"frames, or a video ({' '.join(sorted(VIDEOS))})")
    elif (data / "paths.json").is_file():
        table, file = read_paths(data / "paths.json"), data / "paths.json"
        images, annotations = ([inside(data, path, file) for path in table.get(column, [])]
                               for column in ("raw", "annotation"))
        if not images or len(annotations) not in (0, len(images)):
            raise BadInput(f"{file}: {len(images)} frames (raw) but {len(annotations)} "
                           "annotations; expected one of each, or no annotations")
        frames = make_frames(images, annotations or [None] * len(images))
    elif (data / "JPEGImages").is_dir() or (data / "ImageSets").is_dir():
        frames = find_davis(data, split)
    else:
        folders = sorted(filter(Path.is_dir, data.iterdir()), key=natural)
        images = [image for folder in folders for image in images_in(folder)] or images_in(data)
        frames = make_frames(images, [None] * len(images))
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
            if len(images_in(folder)) >= min(2, len(found)):
                masks = [folder / f"{frame.stem}.png" for frame in found]
        if not found or len(masks) > len(found):
            raise BadInput(f"{file}: {line[:200]!r} is no clip with frames, nor a frame and a mask")
        images += found
        annotations += masks or [None] * len(found)
    return make_frames(images, annotations)


def make_frames(images: list[Path], annotations: Iterable[Path | None]) -> list[Frame]:
    """Return a Frame for each image; its clip is called as its folder."""
    return [Frame(os.path.basename(os.path.abspath(image.parent)), image.stem, image, annotation)
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
    """Return the image files of a folder, frame2 before frame10; none where it is no folder."""
    return [path for path in sorted(folder.glob("*"), key=natural)
            if path.suffix.lower() in IMAGES and not path.name.startswith(".")]


def natural(path: Path) -> list:
    """Return a key that sorts paths by name, numbers in numeric order."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def check_frames(frames: list[Frame]) -> list[tuple[int, int]]:
    """Decode every frame and mask once, before long work; return each (H, W). Raises BadInput."""
    def check(frame: Frame) -> tuple[int, int]:
        size = video_size or read_image(frame.image).shape[:2]
        found = size if frame.annotation is None else mask_values(frame.annotation)[1].shape
        if found != size:
            raise BadInput(f"{frame.annotation}: is {found[1]} x {found[0]} but its frame "
                           f"{frame.image} is {size[1]} x {size[0]}; expected the same size")
        return size

    is_video = frames[0].number is not None
    video_size = next(read_video(frames[0].image)).shape[:2] if is_video else None
    return list(in_threads(check, frames))


def parse_views(text: str) -> list[str]:
    """Parse "zoom1.5,zoom0.7" (argparse type): zoom and a factor of 0.25 to 4."""
    for view in text.split(","):
        zoom = re.fullmatch(r"zoom(\d(\.\d{1,6})?)", view)
        if not zoom or not 0.25 <= float(zoom[1]) <= 4:
            raise argparse.ArgumentTypeError("expected zoom and a factor from 0.25 to 4, such as "
                                             f"zoom1.5, found {view!r}")
    return list(dict.fromkeys(text.split(",")))


def show(pixels: np.ndarray, view: str) -> np.ndarray:
    """Return a view of a frame or mask [H, W, ...], which is itself when `view` is ""."""
    if not view:
        return pixels
    # zoom2 is the middle half of each side; zoom0.5 is twice the side, amid its own reflections
    zoom = float(view.removeprefix("zoom"))
    index = []
    for length in pixels.shape[:2]:
        shown = max(1, round(length / zoom))
        position = (np.arange(shown) + (length - shown) // 2) % (2 * length)
        index.append(np.minimum(position, 2 * length - 1 - position))
    return pixels[np.ix_(*index)]


def read_images(frames: list[Frame]) -> Iterator[np.ndarray]:
    """Yield every frame, or its view, as uint8 [H, W, 3]; decodes a few frames early."""
    def read(frame: Frame) -> np.ndarray:
        return show(read_image(frame.image), frame.view)

    if not frames or frames[0].number is None:
        yield from in_threads(read, frames)
        return
    position = 1 << 62  # of the frame that `images` yields next
    for frame in frames:
        if frame.number < position:  # a view of the clip has it decoded from the start
            images, position = read_video(frame.image), 0
        image = next(itertools.islice(images, frame.number - position, None), None)
        if image is None:
            raise BadInput(f"{frame.image}: is shorter than it was; expected frame {frame.number}")
        position = frame.number + 1
        yield show(image, frame.view)


def read_video(path: Path) -> Iterator[np.ndarray]:
    """Yield all frames of a video once, uint8 [H, W, 3], turned as it says. Raises BadInput."""
    if path.suffix.lower() in (".gif", ".apng"):
        with image_file(path) as animation, opened(path) as file:
            file.seek(-8, os.SEEK_END)
            if not file.read().endswith((b";", b"IEND\xaeB`\x82")):  # GIF's and PNG's last bytes
                raise BadInput(f"{path}: is cut short; expected a whole video")
            for image in ImageSequence.Iterator(animation):
                yield np.array(image.convert("RGB"))
        return

    try:
        import imageio_ffmpeg
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise BadInput(f"{path}: needs ffmpeg, found none; run `pip install imageio-ffmpeg`, "
                       "or use a GIF, or a folder of frames") from error
    # imageio-ffmpeg overlooks ffmpeg's exit status; ffmpeg, unless told, opens lists of other files
    source = ["-protocol_whitelist", "file", "-format_whitelist", "mov,matroska,avi",
              "-max_pixels", str(PIXELS_LIMIT), "-i", f"file:{path}", "-map", "0:V:0"]
    frames = ["-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24"]
    command = [ffmpeg, "-nostdin", "-v", "error", "-xerror", *source, *frames, "pipe:1"]
    with opened(path), tempfile.TemporaryFile() as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
            while process.stdout.readline() == b"P6\n":  # a PPM a frame: kind, size, 255, pixels
                width, height = map(int, process.stdout.readline().split())
                process.stdout.readline()
                pixels = process.stdout.read(height * width * 3)
                if len(pixels) == height * width * 3:
                    yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3).copy()
        log.seek(0)
        said = " ".join(log.read().decode("utf-8", "replace").split())[-300:]
    if process.returncode or "ended prematurely" in said:
        raise BadInput(f"{path}: cannot be decoded as a whole video ({said}); expected at most "
                       f"{PIXELS_LIMIT:,} pixels a frame; copy it anew, or pass a folder of frames")


def decide_meaning(files: Sequence[Path | None], predictions: bool = False) -> Meaning:
    """Return which values are the object, by the table of docs/formats.md. Raises BadInput."""
    paths = list(filter(None, files))
    holders: dict[str, dict[int, Path]] = {}  # kind -> value -> the first mask that holds it
    for path, (kind, values) in zip(paths, in_threads(mask_values, paths)):
        for value in np.flatnonzero(np.bincount(values.ravel())).tolist():
            holders.setdefault(kind, {}).setdefault(value, path)

    meaning = {}
    for kind, found in holders.items():
        top, label = max(found), min(found.keys() - {0}, default=0)
        shades = any(LABELS < value < 255 for value in found)
        coloured = kind == "grey RGB" and "colour" in holders
        if kind == "indexed" and 0 < label < top == 255:
            meaning[kind] = "any but 0 and 255 (void)"
        elif coloured or top <= LABELS or kind in ("1-bit", "indexed", "colour"):
            meaning[kind] = "any but 0"
        elif predictions or (top == 255 and (shades or label > LABELS)):
            meaning[kind] = "above 127"
        else:
            raise BadInput(f"{found[label]}: a grey mask with the value {label}; the brightest is "
                           f"{top} ({found[top]}); expected 0 and 255, or labels up to {LABELS}")
    return meaning


def read_mask(path: Path, meaning: Meaning) -> np.ndarray:
    """Decode a mask to bool [H, W], true on the object. Raises BadInput as `decide_meaning`."""
    kind, values = mask_values(path)
    return RULES[meaning[kind]](values)


def mask_values(path: Path) -> tuple[str, np.ndarray]:
    """Return a mask's kind and values, uint8 [H, W]; a colour's is its brightest channel."""
    with image_file(path) as image:
        kind = KINDS.get(image.mode)
        if kind is None or (kind == "colour" and image.format in ("JPEG", "MPO")):
            raise BadInput(f"{path}: a mask of mode {image.mode} in a {image.format}; expected "
                           "1-bit, 8-bit grey, indexed, or colour in a PNG")
        palette = image.getpalette("RGB") if kind == "indexed" else None
        pixels = np.array(image, np.uint8).reshape(image.height, image.width, -1)

    if image.mode.endswith("A"):
        pixels, alpha = pixels[..., :-1], pixels[..., -1]
        if np.ptp(alpha) and not np.ptp(pixels, axis=(0, 1)).any():
            raise BadInput(f"{path}: only its alpha tells the object; expected it in the values")
    if palette and min(palette[:3]) > 127:
        raise BadInput(f"{path}: its palette shows index 0 as {palette[:3]}; expected a dark one")
    if palette and palette == [level for level in range(len(palette) // 3) for _ in "RGB"]:
        kind = "grey"
    if kind == "colour" and (pixels == pixels[..., :1]).all():
        kind = "grey RGB"
    return kind, pixels.max(axis=2)


def read_packed_masks(frames: list[Frame], meaning: Meaning,
                      size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield masks, or their views, resized (nearest) to `size` = (H, W), as np.packbits along W."""
    def read(frame: Frame) -> np.ndarray:
        mask = np.zeros(size, bool)
        if frame.annotation is not None:
            mask = resize(show(read_mask(frame.annotation, meaning), frame.view), size)
        return np.packbits(mask, axis=1)

    return in_threads(read, frames)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to `size` = (H, W): uint8 bilinear, bool to the nearest pixel."""
    if pixels.shape[:2] == tuple(size):
        return pixels
    method = Image.Resampling.NEAREST if pixels.dtype == bool else Image.Resampling.BILINEAR
    return np.array(Image.fromarray(pixels).resize(size[::-1], method))


def in_threads(work: Callable, items: Iterable, ahead: int = 64) -> Iterator:
    """Yield work(item) for each item in order; as many threads as PyTorch has run `ahead`."""
    waiting: deque = deque()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
