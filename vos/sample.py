"""Write small synthetic clips with exact masks, for a machine that has no data.

    python -m vos.sample --out sample-data

writes a DAVIS root; the same flags write the same files. In every clip a camera pans over noise
with plain, bright patches, and one object moves over it, turns, and changes shape.
"""
import math
import sys
from pathlib import Path

import numpy as np

from vos.cli import Parser, count, progress, run
from vos.images import write_image
from vos.outputs import new_folder, write_json, write_text

PATTERNS = ("stripes", "checker", "dots")


def mix(first, second, share):
    """Return `first` where `share` (0..1) is 0, `second` where it is 1, and between in between."""
    return first * (1 - share) + second * share


def colour(rng: np.random.Generator, saturation: tuple, value: tuple) -> np.ndarray:
    """Return an RGB colour [3] float32 in 0..1 of any hue; saturation and value in these ranges."""
    hue, bright, pure = rng.uniform(0, 6), rng.uniform(*value), rng.uniform(*saturation)
    ramp = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)  # the hue as RGB
    return (bright * (1 - pure * (1 - ramp))).astype(np.float32)


def value_noise(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    """Return noise [height, width] float32 in 0..1 with cells of `cell`, cell / 2 ... 2 pixels."""
    total, weights = np.zeros((height, width), np.float32), 0.0
    y, x = np.arange(height), np.arange(width)
    while cell >= 2:
        grid = rng.random((height // cell + 2, width // cell + 2), dtype=np.float32)
        down, right = (y % cell / cell).astype(np.float32), (x % cell / cell).astype(np.float32)
        rows = mix(grid[y // cell], grid[y // cell + 1], down[:, None])  # [height, cells across]
        total += cell**0.7 * mix(rows[:, x // cell], rows[:, x // cell + 1], right)
        weights += cell**0.7
        cell //= 2
    return total / np.float32(weights)


def make_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return noise [height, width, 3] float32 in 0..1 with a few plain, bright patches in it."""
    blend = np.clip(2.5 * value_noise(rng, height, width, height // 3) - 0.75, 0, 1)[..., None]
    light = 0.5 + value_noise(rng, height, width, max(2, height // 12))[..., None]
    fore, back = colour(rng, (0.1, 0.5), (0.4, 0.8)), colour(rng, (0.1, 0.5), (0.2, 0.6))
    image = mix(back, fore, blend)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for _ in range(4):
        patch = Outline(rng, height * rng.uniform(0.06, 0.14))
        distance = patch.at(0, y - rng.uniform(0, height), x - rng.uniform(0, width))[0]
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        image = mix(image, colour(rng, (0.5, 0.9), (0.6, 0.9)), cover)
    return np.clip(image * light, 0, 1)


class Outline:
    """A closed outline, its radius (pixels) a sum of harmonics that turn at speeds of their own."""

    def __init__(self, rng: np.random.Generator, radius: float):
        self.radius = radius
        self.amplitude = rng.uniform(0.3, 1, 4) * (0.22, 0.14, 0.08, 0.05)  # of 2, 3, 4, 5 waves
        self.phase, self.speed = rng.uniform(0, 2 * np.pi, 4), rng.uniform(-0.35, 0.35, 4)
        self.angle = rng.uniform(0, 2 * np.pi)
        self.spin = rng.uniform(0.02, 0.08) * rng.choice([-1, 1])  # radians a frame, as `speed`

    def at(self, time: float, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return how far outside (pixels) the offsets y, x lie, and the offsets turned, v and u."""
        angle = self.angle + self.spin * time
        cos, sin = math.cos(angle), math.sin(angle)  # Python's floats keep float32 pixels float32
        u, v = x * cos + y * sin, y * cos - x * sin
        phases = self.phase + self.speed * time
        theta, reach = np.arctan2(v, u), np.ones_like(u)
        for i in range(4):
            reach += float(self.amplitude[i]) * np.cos((i + 2) * theta + float(phases[i]))
        return np.hypot(v, u) - self.radius * reach, v, u


def make_clip(seed: int, frames: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one clip: frames [N, H, W, 3] uint8 and their exact masks [N, H, W] bool.

    In a clip of 4 frames or more the object is out of sight for a tenth of them, at least one.
    """
    rng = np.random.default_rng(seed)
    pan = height // 8, width // 4
    background = make_background(rng, height + pan[0], width + pan[1])
    outline = Outline(rng, radius=height * rng.uniform(0.18, 0.28))
    period = max(4.0, height * rng.uniform(0.05, 0.08))  # pixels, of the pattern
    early, late = colour(rng, (0.6, 1), (0.7, 1)), colour(rng, (0.6, 1), (0.7, 1))
    second = 0.08 if (early + late) @ (0.3, 0.59, 0.11) > 0.9 else 0.92  # what stands out
    start, end = rng.uniform(0.25, 0.75, (2, 2))  # of the centre, shares of the frame
    pan_from, pan_to = rng.random((2, 2))
    hidden = max(1, frames // 10) if frames >= 4 else 0
    gone_at = rng.integers(1, frames - hidden) if hidden else 0

    images = np.empty((frames, height, width, 3), np.uint8)
    masks = np.zeros((frames, height, width), bool)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for t in range(frames):
        share = t / max(1, frames - 1)
        top, left = np.round(mix(pan_from, pan_to, share) * pan).astype(int)
        image = background[top:top + height, left:left + width]
        if not gone_at <= t < gone_at + hidden:
            sway = 0.08 * np.sin(2 * np.pi * share + outline.phase[:2])
            row, column = ((mix(start, end, share) + sway) * (height, width)).tolist()
            distance, v, u = outline.at(t, y - row, x - column)
            masks[t] = distance < 0
            u, v = np.sin(2 * np.pi * u / period), np.sin(2 * np.pi * v / period)
            wave = (u, u * v * 2, u + v - 0.8)[seed % 3]
            shown = np.clip(0.5 + wave * period / 6, 0, 1)[..., None]  # edges about a pixel soft
            paint = mix(mix(early, late, share), second, shown)
            image = mix(image, paint, np.clip(0.5 - distance, 0, 1)[..., None])
        grain = 0.015 * rng.standard_normal((height, width, 1), np.float32)
        images[t] = np.clip(255 * (image + grain) + 0.5, 0, 255)
    return images, masks


def write_dataset(root: Path, clips=8, val_clips=3, frames=20, height=240, width=427, seed=0,
                  overwrite=False) -> None:
    """Write a DAVIS root with splits train and val, whole or not at all. Raises BadInput."""
    lines = {"train": "", "val": ""}
    with new_folder(root, kind="sample", overwrite=overwrite, inputs=[]) as folder:
        for number in progress(range(clips + val_clips), "clips"):
            images, masks = make_clip(seed * 10_000 + number, frames, height, width)
            clip = f"480p/{PATTERNS[(seed * 10_000 + number) % 3]}-{number:02d}"
            (folder / "JPEGImages" / clip).mkdir(parents=True)
            (folder / "Annotations" / clip).mkdir(parents=True)
            for index in range(frames):
                name = f"{clip}/{index:05d}"
                image, mask = f"JPEGImages/{name}.jpg", f"Annotations/{name}.png"
                write_image(folder / image, images[index], quality=92)
                write_image(folder / mask, masks[index] * np.uint8(255))
                lines["train" if number < clips else "val"] += f"/{image} /{mask}\n"
        (folder / "ImageSets/480p").mkdir(parents=True)
        for split, text in lines.items():
            write_text(folder / f"ImageSets/480p/{split}.txt", text)
        write_json(folder / "sample.json", {
            "made_by": "vos.sample", "clips": clips, "val_clips": val_clips, "frames": frames,
            "height": height, "width": width, "seed": seed})


def size(text: str) -> tuple[int, int]:
    """Parse HEIGHTxWIDTH (argparse type)."""
    height, _, width = text.partition("x")
    side = count(10_000, least=32)  # below this the object is only a few pixels wide
    return side(height), side(width)


def main() -> None:
    """Parse the flags and write the clips."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("sample-data"), help="folder to write")
    parser.add_argument("--clips", type=count(999), default=8, help="to train on (8)")
    parser.add_argument("--val-clips", type=count(999), default=3, help="to validate on (3)")
    parser.add_argument("--frames", type=count(9999), default=20, help="in each clip (20)")
    parser.add_argument("--size", type=size, default=(240, 427), help="of a frame (240x427)")
    parser.add_argument("--seed", type=count(10**9, least=0), default=0, help="of all chance (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = vars(parser.parse_args())
    flags.pop("debug")
    out, (height, width) = flags.pop("out"), flags.pop("size")
    write_dataset(out, height=height, width=width, **flags)
    print(f"wrote {out}; next: python featurize.py --data {out} --split train")


if __name__ == "__main__":
    sys.exit(run(main))
