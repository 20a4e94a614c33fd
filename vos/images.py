"""One image file: a frame decoded as a viewer shows it, a mask to what its values mean."""
import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from vos.inputs import BadInput, opened

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")  # told by the content, whatever the name
PIXELS_LIMIT = 64_000_000  # 8K video has 33 million; more than this is a decompression bomb
KINDS = {"1": "1-bit", "L": "grey", "LA": "grey", "P": "indexed", "PA": "indexed",
         "RGB": "colour", "RGBA": "colour"}
LABELS = 32  # grey masks of values up to this number the objects; brighter values are shades
RULES = {
    "any but 0": lambda values: values != 0,
    "above 127": lambda values: values > 127,
    "any but 0 and 255 (void)": lambda values: (values != 0) & (values != 255),
}
Meaning = dict[str, str]  # kind of mask -> the rule of RULES for all masks of that kind
warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata; sizes that are refused here


@contextlib.contextmanager
def image_file(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image file; BadInput names it if it is none, or decoding in the context raises."""
    try:
        with opened(path, limit=1 << 30) as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > PIXELS_LIMIT:
                raise BadInput(f"{path}: is {image.width} x {image.height}; expected a frame of at "
                               f"most {PIXELS_LIMIT:,} pixels")
            yield image
    except BadInput:
        raise
    except Exception as error:  # decoders raise every kind there is
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise BadInput(f"{path}: cannot be decoded ({reason}); expected a whole image") from error


def read_image(path: Path) -> np.ndarray:
    """Decode a frame to uint8 [H, W, 3], turned as its EXIF says, alpha dropped. Raises BadInput.

    16-bit colours become 8-bit; Pillow would clip 16-bit grey and float, which are refused.
    """
    with image_file(path) as image:
        if image.mode[0] in "IF":
            raise BadInput(f"{path}: has pixels of mode {image.mode}; expected 8 bits, or colour")
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def image_size(path: Path) -> tuple[int, int]:
    """Return (H, W) of a frame as it is shown."""
    height, width, _ = read_image(path).shape
    return height, width


def write_image(path: Path, pixels: np.ndarray, **options) -> None:
    """Write uint8 or bool pixels, with options of Pillow's `save`, such as the path's `format`."""
    memory = io.BytesIO()  # Pillow, given a file, does not notice a disk that takes only a part
    options.setdefault("format", Image.registered_extensions().get(path.suffix.lower()))
    Image.fromarray(pixels).save(memory, **options)
    path.write_bytes(memory.getvalue())


def decide_meaning(files: list[Path], threads: int = 4) -> Meaning:
    """Return which values are the object in these masks, for each kind by all its pixels together.

    The table is in docs/formats.md. Raises BadInput naming a mask that is outside it.
    """
    def survey(path: Path) -> tuple[str, list[int]]:
        kind, values = mask_values(path)
        return kind, np.flatnonzero(np.bincount(values.ravel())).tolist()

    holders: dict[str, dict[int, Path]] = {}  # kind -> value -> the first mask that holds it
    with ThreadPoolExecutor(threads) as pool:
        for path, (kind, values) in zip(files, pool.map(survey, files)):
            for value in values:
                holders.setdefault(kind, {}).setdefault(value, path)

    meaning = {}
    for kind, found in holders.items():
        if kind == "indexed" and 255 in found and any(0 < value < 255 for value in found):
            meaning[kind] = "any but 0 and 255 (void)"
        elif kind in ("1-bit", "indexed", "colour") or max(found) <= LABELS:
            meaning[kind] = "any but 0"
        elif kind == "grey RGB" and "colour" in holders:
            meaning[kind] = "any but 0"
        else:
            meaning[kind] = "above 127"
            check_shades(found)
    return meaning


def check_shades(holders: dict[int, Path]) -> None:
    """Raise BadInput unless grey masks of these values, each with one mask, have soft edges."""
    top = max(holders)
    label = min(value for value in holders if value)
    if top < 255 or (label <= LABELS and not any(LABELS < value < 255 for value in holders)):
        raise BadInput(f"{holders[label]}: a grey mask with the value {label}; the brightest is "
                       f"{top} ({holders[top]}); expected 0 and 255, or labels up to {LABELS}")


def read_mask(path: Path, meaning: Meaning) -> np.ndarray:
    """Decode a mask to bool [H, W], true on the object. Raises BadInput as `decide_meaning`."""
    kind, values = mask_values(path)
    return RULES[meaning[kind]](values)


def mask_values(path: Path) -> tuple[str, np.ndarray]:
    """Return a mask's kind and values, uint8 [H, W]; a colour's is its brightest channel."""
    with image_file(path) as image:
        kind = KINDS.get(image.mode)
        # Pillow spreads grey of 2 and 4 bits over 0..255, and a JPEG blurs colours
        spread = kind == "grey" and re.search("L;[24]", str(image.tile))
        if kind is None or spread or (kind == "colour" and image.format in ("JPEG", "MPO")):
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
