"""Pictures of masks, and of curves: overlays, and lines as SVG."""
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from vos.outputs import write_text

# Okabe-Ito's colors. Readers who see no hue tell the first two apart by their lightness.
FILL = np.array([0, 114, 178], np.uint8)  # the prediction: blue, #0072B2
OUTLINE = np.array([230, 159, 0], np.uint8)  # the truth: orange, #E69F00
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#808080")


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
    """Return a bool mask [H, W] less what is near its outside; a mask goes on beyond the frame."""
    image = Image.fromarray(mask * np.uint8(255))
    return np.asarray(image.filter(ImageFilter.BoxBlur(pixels))) == 255


def write_curves(path: Path, *logs: Sequence[dict], names: Sequence[str] = ("",)) -> None:
    """Write the losses and validation IoUs of logs against their steps as SVG.

    names: of the runs that the logs are of, at most as many as COLORS. Logs of a run share a color.
    """
    colors = dict(zip(dict.fromkeys(names), COLORS))
    last = max((rows[-1]["step"] for rows in logs), default=0)
    highest = max((row["loss"] for rows in logs for row in rows), default=0)
    drawn = ""
    for key, title, high, top in (("loss", "Loss", highest or 1, 40),
                                  ("val_iou", "Validation IoU", 1, 240)):
        drawn += f'<text x="60" y="{top - 14}">{title}</text>\n'
        for share in (0, 0.5, 1):
            y = top + 140 * (1 - share)
            drawn += f'<path d="M60 {y:g}h640" stroke="currentColor" opacity=".3"/>'
            drawn += f'<text x="55" y="{y + 4:g}" text-anchor="end">{high * share:.3g}</text>\n'
        for name, rows in zip(names, logs):
            points = [f"{60 + 640 * row['step'] / (last or 1):.1f} "
                      f"{top + 140 * (1 - row[key] / high):.1f}" for row in rows if key in row]
            drawn += f'<polyline points="{" ".join(points)}" stroke="{colors[name]}"/>\n'
    for number, name in enumerate(filter(None, colors)):
        drawn += (f'<text x="60" y="{430 + 20 * number}"><tspan fill="{colors[name]}">'
                  f"\u25a0</tspan> {escape(name)}</text>\n")
    write_text(path, f"""<svg xmlns="http://www.w3.org/2000/svg" role="img"
viewBox="0 0 720 {420 + 20 * len(colors)}" aria-label="Loss and validation IoU against steps"
fill="currentColor" font-size="13" font-family="sans-serif"
style="color-scheme: light dark; color: CanvasText">
<style>polyline {{ fill: none; stroke-width: 2 }}</style>
{drawn}<text x="60" y="405">step 0</text>
<text x="700" y="405" text-anchor="end">step {last}</text>
</svg>
""")
