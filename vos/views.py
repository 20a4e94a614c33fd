"""Views of a frame: mirrored, magnified or shrunk, to be featurized as clips of their own."""
import argparse
import re

import numpy as np


def parse_views(text: str) -> list[str]:
    """Parse "mirror,zoom1.5" (argparse type): mirror, or zoom and a factor of 0.25 to 4, not 1."""
    views = text.split(",")
    if not all(map(is_view, views)) or len(set(views)) < len(views):
        raise argparse.ArgumentTypeError("expected mirror, or zoom and a factor from 0.25 to 4, "
                                         f"such as zoom1.5, each once, found {text!r}")
    return views


def is_view(view) -> bool:
    """Say whether `view` names a view."""
    if view == "mirror":
        return True
    factor = re.fullmatch(r"zoom(\d{1,3}(?:\.\d{1,6})?)", view) if isinstance(view, str) else None
    return factor is not None and 0.25 <= float(factor[1]) <= 4 and float(factor[1]) != 1


def show(pixels: np.ndarray, view: str) -> np.ndarray:
    """Return a view of a frame or mask [H, W, ...]; itself when `view` is "".

    zoom2 is the middle half of each side, to be resized like any small frame; zoom0.5 is
    [2 H, 2 W, ...], the frame amid its own reflections, as a frame has no more to show.
    """
    if not view:
        return pixels
    if view == "mirror":
        return np.ascontiguousarray(pixels[:, ::-1])
    zoom = float(view.removeprefix("zoom"))
    index = []
    for length in pixels.shape[:2]:
        shown = max(1, round(length / zoom))
        position = (np.arange(shown) + (length - shown) // 2) % (2 * length)
        index.append(np.minimum(position, 2 * length - 1 - position))
    return pixels[np.ix_(*index)]
