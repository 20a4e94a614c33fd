"""Pictures of masks, and of curves: overlays, and lines as SVG."""
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vos.outputs import write_text

# Readers who see no hue tell these two apart by their lightness.
FILL = np.array([0, 114, 178], np.uint8)  # the prediction: Okabe-Ito blue, #0072B2
OUTLINE = np.array([230, 159, 0], np.uint8)  # the truth: Okabe-Ito orange, #E69F00


def overlay(frame: np.ndarray, prediction: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Return uint8 [H, W, 3]: a frame, bool prediction filled blue, bool mask outlined orange."""
    picture = frame.copy()
    thickness = max(1, round(min(frame.shape[:2]) / 120))
    edge = max(1, thickness // 2)
    picture[prediction] = np.round(0.4 * frame[prediction] + 0.6 * FILL)
    picture[prediction & ~erode(prediction, edge)] = FILL  # stands out on sky and water
    if mask is not None:
        inner = erode(mask, thickness)
        picture[inner & ~erode(inner, edge)] = 0  # stands out on bright frames
        picture[mask & ~inner] = OUTLINE
    return picture


def erode(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Return a bool mask [H, W] less what is near its outside; beyond the frame is inside."""
    for _ in range(pixels):
        around = np.pad(mask, 1, constant_values=True)
        mask = mask & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return mask


def write_curves(path: Path, rows: Sequence[dict]) -> None:
    """Write the loss and validation IoU of a run's log against its steps as SVG."""
    span = rows[0]["step"], rows[-1]["step"]
    loss, iou = ([(row["step"], row[key]) for row in rows if known(row.get(key))]
                 for key in ("loss", "val_iou"))
    highest = max([value for _, value in loss], default=1) or 1
    write_text(path, f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 420" role="img"
aria-label="Loss and validation IoU against steps" fill="currentColor" font-size="13"
font-family="sans-serif" style="color-scheme: light dark; color: CanvasText">
<text x="60" y="26">Loss</text>{chart(loss, span, highest, (60, 40, 640, 140))}
<text x="60" y="226">Validation IoU</text>{chart(iou, span, 1, (60, 240, 640, 140))}
<text x="60" y="405">step {span[0]}</text>
<text x="700" y="405" text-anchor="end">step {span[1]}</text>
</svg>
""")


def chart(points: Iterable[tuple], span: tuple, high: float, box: tuple) -> str:
    """Return SVG of points (x, value or None) over rules at 0, `high` / 2 and `high`, in a box."""
    left, top, width, height = box
    drawn = ""
    for share in (0, 0.5, 1):
        y = top + height * (1 - share)
        drawn += f'<path d="M{left} {y:g}h{width}" stroke="currentColor" opacity=".3"/>'
        drawn += f'<text x="{left - 5}" y="{y + 4:g}" text-anchor="end">{high * share:.3g}</text>'
    return drawn + curve(points, span, high, box, "#2e8bc9")


def curve(points: Iterable[tuple], span: tuple, high: float, box: tuple, color: str) -> str:
    """Return SVG of a line through points (x, value or None), broken where there is no value."""
    left, top, width, height = box
    line, pen = "", "M"
    for x, value in points:
        if known(value):
            across = left + width * (x - span[0]) / (span[1] - span[0] or 1)
            line += f"{pen}{across:.1f} {top + height * (1 - value / high):.1f}h0"
        pen = "L" if known(value) else "M"
    pencil = f'fill="none" stroke="{color}" stroke-width="2" stroke-linecap="round"'
    return f'<path d="{line}" {pencil}/>'


def known(value: float | None) -> bool:
    """Say whether a number is there: neither None nor NaN."""
    return value is not None and math.isfinite(value)
