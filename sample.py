"""Write small synthetic clips with exact masks, for a machine that has no data.

    python sample.py --out sample-data

writes a DAVIS root: JPEGImages/480p/<clip>/00000.jpg, Annotations/480p/<clip>/00000.png (8-bit
grey, 0 or 255) and ImageSets/480p/train.txt and val.txt. By default 8 clips to train on and 3 to
validate on, 20 frames each of 240x427 pixels, about 8 MB. The same flags write the same files.

In every clip a camera pans over a noise texture that also holds plain, brightly coloured patches.
One object (striped, chequered or dotted) moves over it, turns and changes shape; it is out of sight
for a few frames. Colour alone does not give it away: its texture does.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np

from cli import Parser, positive_int, progress, run
from clips import write_image
from files import BadInput, whole_folder

PATTERNS = ("stripes", "checker", "dots")
LUMA = np.array([0.3, 0.59, 0.11], np.float32)  # how bright red, green and blue look
SMALLEST_SIDE = 32  # pixels; below this the object is only a few pixels wide


def value_noise(rng: np.random.Generator, height: int, width: int, coarsest: int) -> np.ndarray:
    """Return noise [height, width] float32 in 0..1, summed over cells of `coarsest`, /2, /4, ... 2 pixels.

    Each octave is a grid of random values, interpolated bilinearly, and weighs as much as its cells
    are wide to the power 0.7: near the 1/f spectrum of photographs, with some more fine detail.
    """
    total, weights = np.zeros((height, width), np.float32), 0.0
    cell = coarsest
    while cell >= 2:
        grid = rng.random((height // cell + 2, width // cell + 2), dtype=np.float32)
        y, x = np.arange(height), np.arange(width)
        top, left = y // cell, x // cell
        down, right = (y % cell / cell).astype(np.float32)[:, None], (x % cell / cell).astype(np.float32)
        rows = grid[top] * (1 - down) + grid[top + 1] * down  # [height, cells across]
        weight = cell**0.7
        total += weight * (rows[:, left] * (1 - right) + rows[:, left + 1] * right)
        weights += weight
        cell //= 2
    return total / np.float32(weights)


def colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """Return a random RGB colour [3] float32 in 0..1: any hue, saturation and value within the given ranges."""
    hue = rng.uniform(0, 6)
    ramp = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)  # the pure hue as RGB
    return (rng.uniform(*value) * (1 - rng.uniform(*saturation) * (1 - ramp))).astype(np.float32)


def make_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a noise texture [height, width, 3] float32 in 0..1 with a few plain, bright patches in it."""
    coarsest = max(2, height // 3)
    blend = np.clip(2.5 * value_noise(rng, height, width, coarsest) - 0.75, 0, 1)[..., None]
    light = 0.5 + value_noise(rng, height, width, max(2, height // 12))[..., None]
    image = blend * colour(rng, (0.1, 0.5), (0.4, 0.8)) + (1 - blend) * colour(rng, (0.1, 0.5), (0.2, 0.6))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for _ in range(4):
        outline = Outline(rng, radius=height * rng.uniform(0.06, 0.14))
        distance, _, _ = outline.at(0.0, y - float(rng.uniform(0, height)), x - float(rng.uniform(0, width)))
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        image = cover * colour(rng, (0.5, 0.9), (0.6, 0.9)) + (1 - cover) * image
    return np.clip(image * light, 0, 1)


class Outline:
    """A closed outline, its radius a sum of harmonics that turn at speeds of their own."""

    def __init__(self, rng: np.random.Generator, radius: float):
        self.radius = float(radius)  # pixels; a Python float, so that float32 pixels stay float32
        self.amplitude = rng.uniform(0.3, 1, 4) * (0.22, 0.14, 0.08, 0.05)  # of 2, 3, 4 and 5 waves around
        self.phase = rng.uniform(0, 2 * np.pi, 4)
        self.speed = rng.uniform(-0.35, 0.35, 4)  # radians a frame
        self.angle = float(rng.uniform(0, 2 * np.pi))
        self.spin = rng.uniform(0.02, 0.08) * rng.choice([-1, 1])  # radians a frame

    def at(self, time: float, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (distance, v, u) at pixel offsets y, x from the centre, at `time` in frames; all shaped like y.

        distance: pixels outside the outline along the ray from the centre, negative inside.
        v, u: the offsets in the object's own turning frame, for its texture.
        """
        angle = self.angle + float(self.spin * time)
        u = x * math.cos(angle) + y * math.sin(angle)
        v = y * math.cos(angle) - x * math.sin(angle)
        theta = np.arctan2(v, u)
        reach = np.ones_like(theta)
        for waves, amplitude, phase in zip((2, 3, 4, 5), self.amplitude.tolist(), (self.phase + self.speed * time).tolist()):
            reach += amplitude * np.cos(waves * theta + phase)
        return np.hypot(v, u) - self.radius * reach, v, u


def texture(pattern: str, v: np.ndarray, u: np.ndarray, period: float) -> np.ndarray:
    """Return how much of the second colour shows, float in 0..1, shaped like v: one of PATTERNS, `period` pixels wide."""
    wave_u, wave_v = np.sin(2 * np.pi * u / period), np.sin(2 * np.pi * v / period)
    wave = {"stripes": wave_u, "checker": wave_u * wave_v * 2, "dots": wave_u + wave_v - 0.8}[pattern]
    return np.clip(0.5 + wave * period / 6, 0, 1)  # edges about a pixel soft


def make_clip(seed: int, frames: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one clip: frames [N, H, W, 3] uint8 and their exact masks [N, H, W] bool.

    The pattern is PATTERNS[seed % 3]. A clip of 4 frames or more has its object out of sight for a
    tenth of them (at least one), never in the first or the last.
    """
    rng = np.random.default_rng(seed)
    pan_y, pan_x = height // 8, width // 4
    background = make_background(rng, height + pan_y, width + pan_x)
    outline = Outline(rng, radius=height * rng.uniform(0.18, 0.28))
    pattern, period = PATTERNS[seed % len(PATTERNS)], max(4.0, float(height * rng.uniform(0.05, 0.08)))
    early, late = colour(rng, (0.6, 1), (0.7, 1)), colour(rng, (0.6, 1), (0.7, 1))  # its first colour changes over the clip
    second = 0.08 if (early + late) @ LUMA > 0.9 else 0.92  # near black or near white, whichever stands out
    start, end = rng.uniform(0.25, 0.75, 2), rng.uniform(0.25, 0.75, 2)  # centre as (y, x) shares of the frame
    pan_from, pan_to = rng.random(2), rng.random(2)
    hidden = max(1, frames // 10) if frames >= 4 else 0
    gone_at = rng.integers(1, frames - hidden) if hidden else 0

    images, masks = np.empty((frames, height, width, 3), np.uint8), np.zeros((frames, height, width), bool)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for t in range(frames):
        share = t / max(1, frames - 1)
        top, left = np.round((pan_from * (1 - share) + pan_to * share) * (pan_y, pan_x)).astype(int)
        image = background[top:top + height, left:left + width]
        if not gone_at <= t < gone_at + hidden:
            sway = 0.08 * np.sin(2 * np.pi * share + outline.phase[:2])
            centre_y, centre_x = ((start * (1 - share) + end * share + sway) * (height, width)).tolist()
            distance, v, u = outline.at(t, y - centre_y, x - centre_x)
            masks[t] = distance < 0
            cover = np.clip(0.5 - distance, 0, 1)[..., None]
            first = (1 - share) * early + share * late
            shown = texture(pattern, v, u, period)[..., None]
            image = cover * (shown * second + (1 - shown) * first) + (1 - cover) * image
        grain = 0.015 * rng.standard_normal((height, width, 1), np.float32)
        images[t] = np.clip(255 * (image + grain) + 0.5, 0, 255)
    return images, masks


def write_clip(root: Path, clip: str, frames: np.ndarray, masks: np.ndarray) -> list[str]:
    """Write frames [N, H, W, 3] uint8 and masks [N, H, W] bool under a DAVIS root; return their lines for a split's list."""
    lines = []
    for folder in ("JPEGImages", "Annotations"):
        (root / folder / "480p" / clip).mkdir(parents=True)
    for index, (frame, mask) in enumerate(zip(frames, masks)):
        image_path, mask_path = f"/JPEGImages/480p/{clip}/{index:05d}.jpg", f"/Annotations/480p/{clip}/{index:05d}.png"
        write_image(root / image_path[1:], frame, quality=92)
        write_image(root / mask_path[1:], mask.astype(np.uint8) * 255)
        lines.append(f"{image_path} {mask_path}")
    return lines


def write_dataset(root: Path, clips: int = 8, val_clips: int = 3, frames: int = 20, height: int = 240, width: int = 427,
                  seed: int = 0, overwrite: bool = False) -> None:
    """Write a DAVIS root of synthetic clips to `root`, whole or not at all: a train split and a val split.

    Raises BadInput when the clips would be too small, the seed is negative, or `root` is there and not `overwrite`.
    """
    if min(height, width) < SMALLEST_SIDE:
        raise BadInput(f"--size {height}x{width}: expected at least {SMALLEST_SIDE} pixels on each side; pass a larger one")
    if seed < 0:
        raise BadInput(f"--seed {seed}: expected 0 or more")
    with whole_folder(root, overwrite) as folder:
        lists = folder / "ImageSets" / "480p"
        lists.mkdir(parents=True)
        for number in progress(range(clips + val_clips), "clips"):
            images, masks = make_clip(seed * 10_000 + number, frames, height, width)
            lines = write_clip(folder, f"{PATTERNS[(seed * 10_000 + number) % len(PATTERNS)]}-{number:02d}", images, masks)
            with open(lists / ("train.txt" if number < clips else "val.txt"), "a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)


def size(text: str) -> tuple[int, int]:
    """Parse HEIGHTxWIDTH (argparse type)."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels, such as 240x427, found {text}")
    return int(height), int(width)


def parse() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--out", type=Path, default=Path("sample-data"), help="folder to write (default: sample-data)")
    group.add_argument("--clips", type=positive_int, default=8, help="clips to train on (default: 8)")
    group.add_argument("--val-clips", type=positive_int, default=3, help="clips to validate on (default: 3)")
    group.add_argument("--frames", type=positive_int, default=20, help="frames in each clip (default: 20)")
    group.add_argument("--size", type=size, default=(240, 427), metavar="HxW", help="of a frame, pixels (default: 240x427)")
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    group.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


def main() -> None:
    args = parse()
    height, width = args.size
    write_dataset(args.out, args.clips, args.val_clips, args.frames, height, width, args.seed, args.overwrite)
    print(f"wrote {args.out}: {args.clips} clips to train on, {args.val_clips} to validate on, {args.frames} frames each, {height}x{width}")
    print(f"next: python featurize.py --data {args.out} --split train --featurizer efficientnet_lite0")


if __name__ == "__main__":
    sys.exit(run(main))
