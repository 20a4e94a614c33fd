"""One image file: a frame decoded as a viewer shows it, a mask to what its values mean."""
import contextlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from vos.inputs import BadInput, opened

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")  # told by the content, whatever the name
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
PIXELS_LIMIT = 64_000_000  # 8K video has 33 million; more than this is a decompression bomb
BYTES_LIMIT = 1 << 30
warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata; sizes that are refused here


@contextlib.contextmanager
def image_file(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image file of FORMATS and at most PIXELS_LIMIT; nothing is decoded yet.

    Raises BadInput naming the file for any other, and for what decoding raises in the context.
    """
    try:
        with opened(path, BYTES_LIMIT) as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > PIXELS_LIMIT:
                raise BadInput(f"{path}: is {image.width} x {image.height}; expected a frame of at "
                               f"most {PIXELS_LIMIT:,} pixels")
            yield image
    except BadInput:
        raise
    except Exception as error:  # decoders raise every kind there is
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise BadInput(f"{path}: cannot be decoded ({reason}); expected a whole image") from error


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, that is still to be applied, from the header alone.

    Pillow turns TIFF by itself. In a PNG, EXIF behind the pixels is not looked for.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def has_end(image: ImageFile.ImageFile) -> bool:
    """Say whether a JPEG, PNG or GIF has its end marker, which a cut one lacks; true for others."""
    file = image.fp
    assert file is not None
    place = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
    tail = file.read()
    file.seek(place)
    marker = ENDS.get(str(image.format), b"")
    return tail.endswith(marker) if image.format == "GIF" else marker in tail


def image_size(path: Path, turned: bool = True) -> tuple[int, int]:
    """Return (H, W) from a header; `turned`: as the frame is shown, else as stored, as masks are.

    Raises BadInput as `image_file` does, and for a file that is cut short.
    """
    with image_file(path) as image:
        width, height = image.size
        sideways = turned and orientation(image) >= 5
        if not has_end(image):
            image.load()  # raises if it is cut; some encoders leave bytes behind the end
    return (width, height) if sideways else (height, width)


def read_image(path: Path) -> np.ndarray:
    """Decode a frame to uint8 [H, W, 3], turned as its EXIF says, alpha dropped.

    16-bit grey and float in 0..1 are scaled to 0..255. Raises BadInput as `image_file` does.
    """
    with image_file(path) as file:
        image = ImageOps.exif_transpose(file) if orientation(file) != 1 else file
        if image.mode[0] not in "IF":
            return np.array(image.convert("RGB"))
        top = 1 if image.mode == "F" else 65535  # modes I;16, and I in older versions of Pillow
        grey = np.asarray(image) / np.float64(top)
        wide = image.mode == "I" and file.format != "PNG"  # 32 bits
        if wide or not 0 <= grey.min() <= grey.max() <= 1:
            raise BadInput(f"{path}: has pixels of mode {image.mode}, {grey.min() * top:.4g} to "
                           f"{grey.max() * top:.4g}; expected 8 or 16 bits, or float from 0 to 1")
        return np.repeat(np.rint(grey * 255).astype(np.uint8)[..., None], 3, axis=2)


def write_image(path: Path, pixels: np.ndarray, **options) -> None:
    """Write uint8 or bool pixels as an image, with options of Pillow's `save`.

    Its kind is `format`, such as "PNG"; without it, what the path ends with. The file is made in
    memory: Pillow, given a file to write to, does not notice a disk that takes only a part.
    """
    memory = io.BytesIO()
    options.setdefault("format", Image.registered_extensions().get(path.suffix.lower()))
    Image.fromarray(pixels).save(memory, **options)
    path.write_bytes(memory.getvalue())


# --- masks -------------------------------------------------------------------------------------

KINDS = {"1": "1-bit", "L": "grey", "LA": "grey", "P": "indexed", "PA": "indexed",
         "RGB": "colour", "RGBA": "colour"}
LABELS = 32  # grey masks of values up to this number the objects; brighter values are shades
RULES = {
    "any but 0": lambda values: values != 0,
    "above 127": lambda values: values > 127,
    "any but 0 and 255 (void)": lambda values: (values != 0) & (values != 255),
}


Meaning = dict[str, str]  # kind of mask -> the rule of RULES for all masks of that kind


def decide_meaning(files: Iterable[Path], threads: int = 4) -> Meaning:
    """Return which values are the object in these masks, for each kind by all its pixels together.

    | kind | values over all masks | the object |
    |---|---|---|
    | 1-bit | | set pixels |
    | grey | at most 32: labels | any but 0 |
    | | up to 255, some of 33..254 (soft edges) or none of 1..32 | above 127 |
    | | anything else, such as labels beside 255, or at most 254 | refused |
    | indexed | index 255 beside other labels | any index but 0 and 255, which is void |
    | | any other | any index but 0 |
    | | a palette that shows index 0 bright | refused |
    | | a palette of greys, each index its own | as grey |
    | colour | red, green and blue equal in all masks | as grey |
    | | any other | any channel above 0; refused in a JPEG |

    Alpha is ignored, and a mask that only alpha tells apart refused, as are 16-bit, CMYK and grey
    of 2 or 4 bits. Masks are not turned by EXIF. Raises BadInput naming a mask that is refused.
    """
    def survey(path: Path) -> tuple[Path, str, list[int], bool]:
        kind, values, tinted = mask_values(path)
        return path, kind, np.flatnonzero(np.bincount(values.ravel())).tolist(), tinted

    holders: dict[str, dict[int, Path]] = {}  # kind -> value -> the first mask that holds it
    tints = set()
    with ThreadPoolExecutor(threads) as pool:
        for path, kind, values, tinted in pool.map(survey, files):
            tints.add(tinted)
            for value in values:
                holders.setdefault(kind, {}).setdefault(value, path)

    meaning = {}
    for kind, found in holders.items():
        if kind == "indexed" and 255 in found and any(0 < value < 255 for value in found):
            meaning[kind] = "any but 0 and 255 (void)"
        elif kind in ("1-bit", "indexed") or (kind == "colour" and True in tints):
            meaning[kind] = "any but 0"
        else:
            meaning[kind] = grey_rule(found)
    return meaning


def grey_rule(holders: dict[int, Path]) -> str:
    """Return the rule for grey masks of these values, each with one mask that holds it."""
    top = max(holders)
    if top <= LABELS:
        return "any but 0"
    shades = any(LABELS < value < 255 for value in holders)
    label = min((value for value in holders if value), default=0)
    if top < 255 or (label <= LABELS and not shades):
        raise BadInput(f"{holders[label]}: a grey mask with the value {label}; the brightest is "
                       f"{top} ({holders[top]}); expected 0 and 255, or labels up to {LABELS}")
    return "above 127"


def read_mask(path: Path, meaning: Meaning) -> np.ndarray:
    """Decode a mask to bool [H, W], true on the object. Raises BadInput as `decide_meaning`."""
    kind, values, _ = mask_values(path)
    if kind not in meaning:
        raise BadInput(f"{path}: a mask of another kind ({kind}) than those looked at ({meaning})")
    return RULES[meaning[kind]](values)


def mask_values(path: Path) -> tuple[str, np.ndarray, bool]:
    """Decode a mask to its kind, its values uint8 [H, W], and whether it has colours but grey.

    The value of a colour is its brightest channel. Raises BadInput for what is no mask.
    """
    with image_file(path) as image:
        kind = KINDS.get(image.mode)
        raw = str(image.tile)  # Pillow spreads grey of 2 and 4 bits over 0..255: labels no more
        if kind is None or (kind == "grey" and ("L;2" in raw or "L;4" in raw)):
            raise BadInput(f"{path}: a mask of mode {image.mode}, {raw[:80]}; expected 1-bit, "
                           "8-bit grey, indexed or colour")
        palette = np.array(image.getpalette("RGB") if kind == "indexed" else []).reshape(-1, 3)
        pixels = np.array(image, np.uint8).reshape(image.height, image.width, -1)

    if image.mode.endswith("A"):
        pixels, alpha = pixels[..., :-1], pixels[..., -1]
        if np.ptp(alpha) and not np.ptp(pixels, axis=(0, 1)).any():
            raise BadInput(f"{path}: only its alpha tells the object; expected it in the values")
    if kind == "indexed" and (palette == np.arange(len(palette))[:, None]).all():
        kind = "grey"
    elif kind == "indexed" and palette[0].min() > 127:
        raise BadInput(f"{path}: its palette shows index 0 as {palette[0].tolist()}; expected "
                       "0 to be the background, and dark")
    tinted = bool((pixels != pixels[..., :1]).any())
    if tinted and image.format in ("JPEG", "MPO"):
        raise BadInput(f"{path}: a mask of colours in a JPEG, which blurs them; expected a PNG")
    return kind, pixels.max(axis=2), tinted
