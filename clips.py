"""Clips on disk: finding frames and annotations in every layout people have, and decoding them.

`find_frames` turns a folder or a video into a list of `Frame`; `read_image` and `read_mask` decode one.
Parted from data.py, which knows only the feature folder, so that each can be read on its own.
"""
import contextlib
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar, cast

import imageio.v3 as iio
import numpy as np
from imageio.plugins.pillow import PillowPlugin

from files import BadInput, read_json
from views import show

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".gif", ".apng"}
KINDS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF", b"II*\0", b"MM\0*", b"GIF8")  # what such files start with
PIXELS_LIMIT = 64_000_000  # 8K video is 33 million; more than this is a decompression bomb, not a frame
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata, and of sizes that `checked_size` refuses
Item = TypeVar("Item")
Result = TypeVar("Result")


class Frame(NamedTuple):
    """One frame: its clip's name, its own name, and where its picture and annotation are."""

    clip: str
    name: str  # what its result is called, e.g. "00007"
    image: Path  # an image file, or the video file that `number` indexes
    annotation: Path | None  # a mask file; None when the clip is not annotated
    number: int | None = None  # position in a video file; None for an image file
    view: str = ""  # what is shown of it, see views.py; "" for the frame itself


# --- finding -----------------------------------------------------------------------------------


def find_frames(data: Path, split: str | None = None) -> list[Frame]:
    """Return the frames of `data` in order: clip by clip, each clip in time.

    `data` is a DAVIS root (with `split` one of its ImageSets), a contest artifact folder (with
    paths.json), a folder of clip folders of frames, a folder of frames, or one video file.
    Raises BadInput naming what is missing, and the splits there are for an unknown one.
    """
    data = Path(data)
    if data.is_file():
        frames = find_video(data)
    elif not data.is_dir():
        raise BadInput(f"{data}: no such folder or video; --data takes a DAVIS root, a folder with paths.json, "
                       "a folder of frames, or a video file")
    elif (data / "paths.json").is_file():
        frames = find_contest(data)
    elif (data / "JPEGImages").is_dir() or (data / "ImageSets").is_dir():
        frames = find_davis(data, split)
    else:
        frames = find_folders(data)
    if not frames:
        raise BadInput(f"{data}: holds no frames{f' in split {split!r}' if split else ''}; expected at least one")
    return frames


def find_davis(root: Path, split: str | None) -> list[Frame]:
    """Return the frames of one split of a DAVIS root, from 2016's lists (frames) or 2017's (clip names)."""
    lists = {}
    for file in sorted(root.glob("ImageSets/*/*.txt")):  # years sort before 480p, so 480p (2016) wins a name
        lists[file.stem] = file
    if split not in lists:
        raise BadInput(f"{root}: no split {split!r} in ImageSets; there are: {', '.join(sorted(lists)) or 'none'}")
    file = lists[split]
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: expected a text file of one frame or clip a line ({error})") from error
    if not lines:
        raise BadInput(f"{file}: the split is empty; expected one frame or clip a line")
    frames = []
    for parts in lines:
        if len(parts) == 1 and is_name(parts[0]) and not Path(parts[0]).suffix:  # 2017: a clip a line
            frames += find_davis_clip(root, parts[0], file)
        else:  # 2016: a frame and, but for test sets, its annotation
            image, *annotation = (inside(root, part.lstrip("/"), file) for part in parts[:2])
            frames.append(Frame(image.parent.name, image.stem, image, annotation[0] if annotation else None))
    return frames


def find_davis_clip(root: Path, clip: str, listed_in: Path) -> list[Frame]:
    """Return the frames of one clip of a DAVIS-2017 root; annotated when it has a folder of annotations."""
    folder = inside(root, f"JPEGImages/480p/{clip}", listed_in)
    annotations = inside(root, f"Annotations/480p/{clip}", listed_in)
    images = images_in(folder) if folder.is_dir() else []
    if not images:
        raise BadInput(f"{folder}: no frames of clip {clip!r}, which {listed_in} names")
    annotated = annotations.is_dir() and len(images_in(annotations)) > 1  # test-dev has the first frame's alone
    return [Frame(clip, image.stem, image, annotations / f"{image.stem}.png" if annotated else None)
            for image in images]


def find_contest(root: Path) -> list[Frame]:
    """Return the frames of a contest artifact: paths.json with columns `raw` and, but for the test set, `annotation`."""
    file = root / "paths.json"
    table = read_paths(file)
    if "raw" not in table:
        raise BadInput(f"{file}: expected a column 'raw', found {', '.join(table) or 'none'}")
    images = [inside(root, path, file) for path in table["raw"]]
    annotations: list[Path | None] = [inside(root, path, file) for path in table.get("annotation", [])]
    annotations = annotations or [None] * len(images)
    if len(annotations) != len(images):
        raise BadInput(f"{file}: {len(images)} frames but {len(annotations)} annotations; expected one each")
    return [Frame(image.parent.name, image.stem, image, annotation)
            for image, annotation in zip(images, annotations)]


def read_paths(file: Path) -> dict[str, list[str]]:
    """Read a paths.json: {column: {"0": path, ...}} -> {column: paths in the order of their integer keys}.

    Raises BadInput when a column is not such a table, or its keys are not 0, 1, 2 ... once each.
    """
    table = read_json(file)
    if not isinstance(table, dict) or not all(isinstance(column, dict) for column in table.values()):
        raise BadInput(f'{file}: expected {{"column": {{"0": path, ...}}}}, found something else')
    columns = {}
    for name, column in table.items():
        if sorted(column) != sorted(map(str, range(len(column)))):
            raise BadInput(f"{file}: column {name!r} should have the keys 0 to {len(column) - 1}, each once")
        columns[name] = [column[str(i)] for i in range(len(column))]
        if not all(isinstance(path, str) for path in columns[name]):
            raise BadInput(f"{file}: column {name!r} holds something other than paths")
    return columns


def inside(root: Path, path: str, listed_in: Path) -> Path:
    """Return `root / path`, backslashes read as slashes. Raises BadInput when that would leave `root`."""
    parts = PurePosixPath(path.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in path or "\0" in path or not parts.parts:
        raise BadInput(f"{listed_in}: {path[:200]!r} leaves its folder; expected a relative path without '..'")
    if len(path) > 2000 or not all(map(is_name, parts.parts)):
        raise BadInput(f"{listed_in}: {path[:200]!r} is no path; expected folders and a file name")
    return root / parts


def is_name(text) -> bool:
    """Say whether `text` can name one file or folder: no path, no name that leads elsewhere or that no disk takes."""
    try:
        return not {"/", "\\", "\0"} & set(text) and text not in (".", "..") and len(text.encode()) < 256
    except (AttributeError, TypeError, UnicodeEncodeError):  # not text; half a surrogate pair
        return False


def find_folders(root: Path) -> list[Frame]:
    """Return the frames of a folder of clip folders, or of one folder of frames; none annotated."""
    folders = sorted((path for path in root.iterdir() if path.is_dir() and images_in(path)), key=natural)
    return [Frame(folder.name, image.stem, image, None) for folder in folders or [root] for image in images_in(folder)]


def images_in(folder: Path) -> list[Path]:
    """Return the image files of a folder, numbers in their names in numeric order."""
    return sorted((path for path in folder.iterdir() if path.suffix.lower() in IMAGES
                   and not path.name.startswith(".")), key=natural)


def natural(path: Path) -> list:
    """A sort key under which frame2 comes before frame10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]


def find_video(path: Path) -> list[Frame]:
    """Return the frames of one video file, none annotated. Decodes it once to count them."""
    if path.suffix.lower() not in VIDEOS:
        raise BadInput(f"{path}: expected a folder or a video ({' '.join(sorted(VIDEOS))})")
    count = sum(1 for _ in read_video(path))
    return [Frame(path.stem, f"{number:05d}", path, None, number) for number in range(count)]


# --- decoding ----------------------------------------------------------------------------------


def read_image(path: Path) -> np.ndarray:
    """Decode an image file to uint8 [H, W, 3]. Raises BadInput when it is missing, truncated or not an image."""
    return decode(path, mode="RGB")


def read_mask(path: Path) -> np.ndarray:
    """Decode an annotation to bool [H, W], true on the foreground.

    The file is grey (L), grey with alpha (LA), indexed (P), colour (RGB, RGBA) or 1-bit. Foreground is
    non-zero in an indexed or 0/1 mask, and above 127 in a 0/255 one (in any colour channel).
    Raises BadInput as `read_image` does.
    """
    indexed = is_indexed(path)
    pixels = decode(path, mode="P" if indexed else None)
    if pixels.dtype == bool or indexed:
        return pixels != 0
    if pixels.dtype != np.uint8:
        raise BadInput(f"{path}: expected an 8-bit mask, found {pixels.dtype}")
    if pixels.ndim == 3:
        has_alpha = pixels.shape[2] in (2, 4)
        pixels = (pixels[..., :-1] if has_alpha else pixels).max(axis=2)
    return pixels > (127 if pixels.max(initial=0) > 1 else 0)


def read_image_or_black(frame: Frame, size: tuple[int, int]) -> np.ndarray:
    """Decode a frame for a picture, uint8 [H, W, 3]; black when it is gone, in a video, or not of `size` = (H, W)."""
    if frame.image.is_file() and frame.image.suffix.lower() in IMAGES:
        image = read_image(frame.image)
        if image.shape[:2] == tuple(size):
            return image
    return np.zeros((*size, 3), np.uint8)


def is_indexed(path: Path) -> bool:
    """Say whether a PNG's header names colour type 3, whose pixels are indices into a palette."""
    with readable(path), open(path, "rb") as file:
        head = file.read(26)
    return head[:8] == b"\x89PNG\r\n\x1a\n" and head[25:] == b"\x03"


def image_size(path: Path) -> tuple[int, int]:
    """Return (H, W) from an image file's header, without decoding it. Raises BadInput as `read_image` does."""
    with opened(path) as file:
        return checked_size(file.properties(index=0).shape, path)


def checked_size(shape: tuple[int, ...], path: Path) -> tuple[int, int]:
    """Return (H, W) of an image's shape. Raises BadInput for a decompression bomb, before it goes off."""
    height, width = shape[:2]
    if height * width > PIXELS_LIMIT:
        raise BadInput(f"{path}: is {width} x {height}; expected a frame of at most {PIXELS_LIMIT:,} pixels")
    return height, width


def decode(path: Path, mode: str | None) -> np.ndarray:
    """Decode an image file into an array of Pillow's `mode` (None: its own)."""
    with opened(path) as file:
        checked_size(file.properties(index=0).shape, path)
        return file.read(index=0, mode=cast(str, mode))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[PillowPlugin]:
    """Open an image file. Raises BadInput for one that is not of KINDS, whatever it is called, and as `readable` does.

    Pillow would go by the content too, and start Ghostscript for one kind; imageio would look into archives.
    """
    with readable(path), open(path, "rb") as handle:
        if not handle.read(16).startswith(KINDS):
            raise BadInput(f"{path}: cannot be decoded; expected the content of a {' '.join(sorted(IMAGES))} file")
        handle.seek(0)
        with iio.imopen(handle, "r", plugin="pillow") as file:
            yield cast(PillowPlugin, file)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """A context in which whatever a decoder raises becomes BadInput naming the file."""
    try:
        yield
    except BadInput:
        raise
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file") from error
    except Exception as error:  # decoders raise every kind there is
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise BadInput(f"{path}: cannot be decoded ({reason}); expected a whole image or video") from error


def write_image(path: Path, pixels: np.ndarray, kind: str | None = None, **options) -> None:
    """Write uint8 pixels as an image of `kind`, such as ".png" (None: as the path ends), with options of Pillow's.

    Made in memory: Pillow, given a file to write to, does not notice a disk that takes only a part.
    """
    path.write_bytes(iio.imwrite("<bytes>", pixels, extension=kind or path.suffix, plugin="pillow", **options))


def read_video(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video file as uint8 [H, W, 3], in order."""
    if path.suffix.lower() in (".gif", ".apng"):
        plugin, options = "pillow", {"mode": "RGB"}
    else:
        plugin, options = "FFMPEG", {}
        try:
            import imageio_ffmpeg  # noqa: F401  optional: only videos need it
        except ImportError:
            raise BadInput(f"{path}: reading a {path.suffix} video needs ffmpeg; run `pip install imageio-ffmpeg`, "
                           "or pass a folder of frames") from None
    if plugin == "pillow":
        image_size(path)  # raises for one that is no image, or too large
    with readable(path):
        for image in iio.imiter(path, plugin=plugin, **options):
            yield np.ascontiguousarray(image[..., :3])


def looks_whole(path: Path) -> bool:
    """Say whether a JPEG or PNG file has its end marker, which a truncated one lacks; true for other kinds."""
    ends = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND"}
    end = ends.get(path.suffix.lower())
    if end is None:
        return True
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return end in file.read()


# --- all frames at once ------------------------------------------------------------------------


def check_frames(frames: list[Frame], threads: int = 4) -> list[tuple[int, int]]:
    """Check every frame and annotation from its header, before any long work; return each frame's (H, W).

    Raises BadInput for a missing or truncated file, a frame without its annotation among annotated
    ones, and an annotation of another size than its frame. Takes about 0.2 ms a file.
    """
    bare = [frame for frame in frames if frame.annotation is None]
    if 0 < len(bare) < len(frames):
        raise BadInput(f"{bare[0].image}: has no annotation, though {len(frames) - len(bare)} other frames have; "
                       "expected all or none")
    if frames[0].number is not None:
        return [image.shape[:2] for image in read_video(frames[0].image)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(check_frame, frames))


def check_frame(frame: Frame) -> tuple[int, int]:
    """Check one frame's files and return its (H, W)."""
    height, width = image_size(frame.image)
    if not looks_whole(frame.image):
        read_image(frame.image)  # raises when it is truncated; some encoders only leave bytes behind the end
    if frame.annotation is not None:
        if not frame.annotation.is_file():
            raise BadInput(f"{frame.annotation}: no such file; it is the annotation of {frame.image}")
        size = image_size(frame.annotation)
        if size != (height, width):
            raise BadInput(f"{frame.annotation}: is {size[1]} x {size[0]} but its frame {frame.image} is "
                           f"{width} x {height}; expected the same size")
        if not looks_whole(frame.annotation):
            read_mask(frame.annotation)
    return height, width


def read_images(frames: list[Frame], threads: int = 2, ahead: int = 64) -> Iterator[np.ndarray]:
    """Yield every frame, or the view of it, as uint8 [H, W, 3], in order, decoded by `threads` threads at most `ahead` frames early."""
    if frames and frames[0].number is not None:  # a video only decodes forwards
        wanted = {frame.number or 0 for frame in frames}  # rising, maybe with gaps: what an earlier run did is left out
        images = itertools.islice(read_video(frames[0].image), max(wanted) + 1)
        yield from (image for number, image in enumerate(images) if number in wanted)
    else:
        yield from in_threads(lambda frame: show(read_image(frame.image), frame.view), frames, threads, ahead)


def read_packed_masks(frames: list[Frame], size: tuple[int, int], threads: int = 2) -> Iterator[np.ndarray]:
    """Yield every frame's (or view's) mask as np.packbits along W, uint8 [H, ceil(W / 8)], resized (nearest) to `size` = (H, W)."""
    def read(frame: Frame) -> np.ndarray:
        assert frame.annotation is not None  # `check_frames` has seen to that
        return np.packbits(resize_nearest(show(read_mask(frame.annotation), frame.view), size), axis=1)
    yield from in_threads(read, frames, threads, ahead=64)


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize [H, W] to `size` = (H, W) by taking the nearest pixel; itself when it has that size."""
    if mask.shape == tuple(size):
        return mask
    rows, columns = ((np.arange(new) * 2 + 1) * old // (2 * new) for new, old in zip(size, mask.shape))
    return mask[rows[:, None], columns]


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int) -> Iterator[Result]:
    """Yield work(item) for each item, in order, computed by threads that run at most `ahead` items early."""
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(partial(work, item)) for item in itertools.islice(items, ahead)]
        try:
            while waiting:
                result = waiting.pop(0).result()
                waiting += [pool.submit(partial(work, item)) for item in itertools.islice(items, 1)]
                yield result
        finally:
            for future in waiting:
                future.cancel()
