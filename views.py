"""Views of a frame: the frame mirrored, magnified or shrunk, featurized as further rows that training draws from.

A view of a clip is a clip of its own, `<clip>@<view>`, with masks of its own: what looks at whole clips need not know.
Only what parts clips, to hold some out, and what scores frames must: see FeatureFolder.originals.
"""
import argparse
import re

import numpy as np


def parse_views(text: str) -> list[str]:
    """Parse "mirror,zoom1.5" (argparse type): each is mirror, or zoom and a factor from 0.25 to 4, other than 1."""
    views = text.split(",")
    for view in views:
        if not is_view(view):
            raise argparse.ArgumentTypeError(f"expected mirror, or zoom and a factor from 0.25 to 4, such as zoom1.5, found {view!r}")
    if len(set(views)) < len(views):
        raise argparse.ArgumentTypeError(f"expected each view once, found {text}")
    return views


def is_view(view) -> bool:
    """Say whether `view` names a view."""
    if view == "mirror":
        return True
    factor = re.fullmatch(r"zoom(\d{1,3}(?:\.\d{1,6})?)", view) if isinstance(view, str) else None
    return factor is not None and 0.25 <= float(factor[1]) <= 4 and float(factor[1]) != 1


def show(pixels: np.ndarray, view: str) -> np.ndarray:
    """Return a view of a frame or a mask, [H, W, ...]; itself when `view` is "".

    zoom2 is the middle half of each side, [H / 2, W / 2, ...], to be resized to the frame's size like any small frame;
    zoom0.5 is [2 H, 2 W, ...], the frame amid its own reflections, as a frame has no more to show.
    """
    if not view:
        return pixels
    if view == "mirror":
        return np.ascontiguousarray(pixels[:, ::-1])
    rows, columns = (reflected(length, float(view.removeprefix("zoom"))) for length in pixels.shape[:2])
    return pixels[rows[:, None], columns]


def reflected(length: int, zoom: float) -> np.ndarray:
    """The positions 0 .. length that a side magnified by `zoom` shows, int64 [round(length / zoom)], about its middle."""
    shown = max(1, round(length / zoom))
    position = (np.arange(shown) + (length - shown) // 2) % (2 * length)
    return np.minimum(position, 2 * length - 1 - position)
