"""Views of a frame: mirrored, magnified or shrunk, to be featurized as clips of their own."""
import argparse
import re

import numpy as np


def parse_views(text: str) -> list[str]:
    """Parse "mirror,zoom1.5" (argparse type): mirror, or zoom and a factor of 0.25 to 4, not 1."""
    views = text.split(",")
    zooms = [re.fullmatch(r"zoom(\d(?:\.\d{1,6})?)", view) for view in views if view != "mirror"]
    fit = all(zoom and 0.25 <= float(zoom[1]) <= 4 and float(zoom[1]) != 1 for zoom in zooms)
    if not fit or len(set(views)) < len(views):
        raise argparse.ArgumentTypeError("expected mirror, or zoom and a factor from 0.25 to 4, "
                                         f"such as zoom1.5, each once, found {text!r}")
    return views


def show(pixels: np.ndarray, view: str) -> np.ndarray:
    """Return a view of a frame or mask [H, W, ...]; itself when `view` is "".

    zoom2 is the middle half of each side; zoom0.5 is [2 H, 2 W, ...], the frame amid its own
    reflections, as a frame has no more to show.
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
