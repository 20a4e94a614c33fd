"""Masks: what their values mean, decided once for a data set by the table of docs/formats.md."""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vos.images import image_file
from vos.inputs import BadInput

KINDS = {"1": "1-bit", "L": "grey", "LA": "grey", "P": "indexed", "PA": "indexed",
         "RGB": "colour", "RGBA": "colour"}
LABELS = 32  # grey masks of values up to this number the objects; brighter values are shades
RULES = {
    "any but 0": lambda values: values != 0,
    "above 127": lambda values: values > 127,
    "any but 0 and 255 (void)": lambda values: (values != 0) & (values != 255),
}
Meaning = dict[str, str]  # kind of mask -> the rule of RULES for all masks of that kind


def decide_meaning(files: list[Path], threads: int = 4, predictions: bool = False) -> Meaning:
    """Return which values are the object in these masks, for each kind by all its pixels together.

    The table is in docs/formats.md. Raises BadInput naming a mask that is outside it. Shades of
    `predictions` are probabilities, of any values.
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
        top, label = max(found), min(found.keys() - {0}, default=0)
        shades = any(LABELS < value < 255 for value in found)
        coloured = kind == "grey RGB" and "colour" in holders
        if kind == "indexed" and 0 < label < top == 255:
            meaning[kind] = "any but 0 and 255 (void)"
        elif coloured or top <= LABELS or kind in ("1-bit", "indexed", "colour"):
            meaning[kind] = "any but 0"
        elif predictions or (top == 255 and (shades or label > LABELS)):
            meaning[kind] = "above 127"
        else:
            raise BadInput(f"{found[label]}: a grey mask with the value {label}; the brightest is "
                           f"{top} ({found[top]}); expected 0 and 255, or labels up to {LABELS}")
    return meaning


def read_mask(path: Path, meaning: Meaning) -> np.ndarray:
    """Decode a mask to bool [H, W], true on the object. Raises BadInput as `decide_meaning`."""
    kind, values = mask_values(path)
    return RULES[meaning[kind]](values)


def mask_values(path: Path) -> tuple[str, np.ndarray]:
    """Return a mask's kind and values, uint8 [H, W]; a colour's is its brightest channel."""
    with image_file(path) as image:
        kind = KINDS.get(image.mode)
        if kind is None or (kind == "colour" and image.format in ("JPEG", "MPO")):
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
