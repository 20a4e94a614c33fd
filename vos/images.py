"""Image files: decoded as a viewer shows them, and written, moving ones too."""
import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from vos.inputs import BadInput, opened

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")  # told by the content, whatever the name
PIXELS_LIMIT = 64_000_000  # 8K video has 33 million; more than this is a decompression bomb
Image.MAX_IMAGE_PIXELS = PIXELS_LIMIT // 2  # Pillow refuses what has twice as many
warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata; sizes that are refused here


@contextlib.contextmanager
def image_file(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image file; BadInput names it if it is none, or decoding in the context raises."""
    try:
        with opened(path, limit=1 << 30) as file, Image.open(file, formats=FORMATS) as image:
            yield image
    except BadInput:
        raise
    except Exception as error:  # decoders raise every kind there is
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise BadInput(f"{path}: cannot be decoded ({reason}); expected a whole image") from error


def read_image(path: Path) -> np.ndarray:
    """Decode a frame to uint8 [H, W, 3], turned as its EXIF says, alpha left out."""
    with image_file(path) as image:
        if image.mode[0] in "IF":  # 16-bit grey and float, which Pillow would clip
            raise BadInput(f"{path}: has pixels of mode {image.mode}; expected 8 bits, or colour")
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def write_image(path: Path, pixels: np.ndarray, **options) -> None:
    """Write uint8 or bool pixels, with options of Pillow's `save`, such as the path's `format`."""
    memory = io.BytesIO()  # Pillow, given a file, does not notice a disk that takes only a part
    options.setdefault("format", Image.registered_extensions().get(path.suffix.lower()))
    Image.fromarray(pixels).save(memory, **options)
    path.write_bytes(memory.getvalue())


def write_mask(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W] as a grey PNG, in threads side by side, which Pillow's encoder is not."""
    rows = np.diff(pixels, axis=0, prepend=np.uint8(0))
    rows = np.pad(rows, ((0, 0), (1, 0)), constant_values=2)  # a row's filter: less the one above
    packer = zlib.compressobj(1, strategy=zlib.Z_RLE)  # runs alone, in half the time
    chunks = ((b"IHDR", struct.pack(">2I5B", *pixels.shape[::-1], 8, 0, 0, 0, 0)),
              (b"IDAT", packer.compress(rows.tobytes()) + packer.flush()), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks))


def write_animation(path: Path, images: Iterable[np.ndarray], fps: float) -> None:
    """Write images, uint8 [H, W, 3], as one that loops, .webp or .gif, of at most 480 x 480."""
    pictures = map(Image.fromarray, images)
    first = next(pictures)
    first.thumbnail((480, 480))
    rest = [picture.resize(first.size, Image.Resampling.BILINEAR) for picture in pictures]
    write_image(path, np.asarray(first), save_all=True, append_images=rest, loop=0,
                duration=1000 / fps, method=0)  # of WebP's: the fastest
