"""Pictures of masks, and of curves: overlays, small JPEGs, grey PNGs, and lines as SVG.

The colours differ in lightness too: readers with a colour-vision deficiency tell them apart.
"""
import base64
import io
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vos.outputs import write_text

FILL = np.array([0, 114, 178], np.uint8)  # the prediction: Okabe-Ito blue, #0072B2
OUTLINE = np.array([230, 159, 0], np.uint8)  # the truth: Okabe-Ito orange, #E69F00


def overlay(frame: np.ndarray, prediction: np.ndarray | None = None,
            mask: np.ndarray | None = None) -> np.ndarray:
    """Return a copy of `frame` with the prediction filled blue and the truth outlined orange.

    frame: uint8 [H, W, 3]. prediction, mask: bool [H, W], or None to leave it out. The outline lies
    inside the mask, thick enough for a picture shown a few hundred pixels wide.
    """
    picture = frame.copy()
    thickness = max(1, round(min(frame.shape[:2]) / 120))
    edge = max(1, thickness // 2)
    if prediction is not None:
        picture[prediction] = np.round(0.4 * frame[prediction] + 0.6 * FILL)
        picture[prediction & ~erode(prediction, edge)] = FILL  # stands out on sky and water
    if mask is not None:
        inner = erode(mask, thickness)
        picture[inner & ~erode(inner, edge)] = 0  # stands out on bright frames
        picture[mask & ~inner] = OUTLINE
    return picture


def erode(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Return a bool mask [H, W] less what is within `pixels` steps of its outside.

    What lies beyond the frame counts as inside: a mask that the frame cuts has no edge there.
    """
    for _ in range(pixels):
        around = np.pad(mask, 1, constant_values=True)
        mask = mask & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return mask


def shrink(image: np.ndarray, longest: int) -> np.ndarray:
    """Return uint8 [H, W, 3] with its longest side at most `longest` pixels, areas averaged."""
    small = Image.fromarray(image)
    small.thumbnail((longest, longest), Image.Resampling.BOX)
    return np.asarray(small)


def jpeg_uri(image: np.ndarray) -> str:
    """Return uint8 [H, W, 3] as a data URI of a JPEG."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def write_grey(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W] as an 8-bit grey PNG (mode L).

    Each row is stored as its difference from the one above, and runs are packed, since masks are
    nearly flat: 0.9 ms a frame of 480x854, where imageio takes 2.2. Source: ISO/IEC 15948.
    """
    height, width = pixels.shape
    rows = np.full((height, 1 + width), 2, np.uint8)  # each starts with its filter: 2, "up"
    rows[:, 1:] = np.diff(pixels, axis=0, prepend=np.uint8(0))  # modulo 256, as the filter wants
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)

    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
                       (b"IDAT", packer.compress(rows.tobytes()) + packer.flush()),
                       (b"IEND", b"")):
        png += struct.pack(">I", len(body)) + kind + body
        png += struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(png)


def write_curves(path: Path, rows: Sequence[dict]) -> None:
    """Write a run's loss and validation IoU against steps as SVG, light or dark as the reader's.

    rows: a run's log, one or more dicts of `step`, and `loss`, `val_iou`, `seconds` where measured.
    """
    span = rows[0]["step"], rows[-1]["step"]
    highest = max([row["loss"] for row in rows if known(row.get("loss"))], default=1) or 1
    times = [f", {row['seconds']:.1f} s" for row in rows if known(row.get("seconds"))]
    loss, iou = ([(row["step"], row[key]) for row in rows if known(row.get(key))]
                 for key in ("loss", "val_iou"))
    write_text(path, f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 420" role="img"
aria-label="Loss and validation IoU against steps" fill="currentColor" font-size="13"
font-family="sans-serif" style="color-scheme: light dark; color: CanvasText">
<text x="60" y="26">Loss</text>{chart(loss, span, highest, (60, 40, 640, 140))}
<text x="60" y="226">Validation IoU</text>{chart(iou, span, 1, (60, 240, 640, 140))}
<text x="60" y="405">step {span[0]}</text>
<text x="700" y="405" text-anchor="end">step {span[1]}{"".join(times[-1:])}</text>
</svg>
""")


def chart(points: Iterable[tuple], span: tuple, high: float, box: tuple) -> str:
    """Return SVG of a line over rules at 0, half of `high`, and `high`; broken where a value lacks.

    points: (x, value or None), x in `span`. box: left, top, width and height of the drawing.
    """
    left, top, width, height = box
    drawn, line, pen = "", "", "M"
    for share in (0, 0.5, 1):
        y = top + height * (1 - share)
        drawn += f'<path d="M{left} {y:g}h{width}" stroke="currentColor" opacity=".3"/>'
        drawn += f'<text x="{left - 5}" y="{y + 4:g}" text-anchor="end">{high * share:.3g}</text>'
    for x, value in points:
        if known(value):
            across = left + width * (x - span[0]) / (span[1] - span[0] or 1)
            line += f"{pen}{across:.1f} {top + height * (1 - value / high):.1f}h0"
        pen = "L" if known(value) else "M"
    return drawn + (f'<path d="{line}" fill="none" stroke="#2e8bc9" stroke-width="2" '
                    'stroke-linecap="round"/>')


def known(value: float | None) -> bool:
    """Say whether a number is there: neither None nor NaN."""
    return value is not None and math.isfinite(value)
