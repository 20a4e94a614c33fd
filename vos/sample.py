"""Write a DAVIS root of small synthetic clips with exact masks, for a machine that has no data.

    python -m vos.sample --out sample-data
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vos.cli import Parser, count, parse_size, progress, run
from vos.images import write_image
from vos.outputs import new_folder, write_json, write_text


def make_clip(seed: int, frames: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return frames uint8 [N, H, W, 3] of a moving object, and its exact masks bool [N, H, W]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 20, 3), np.uint8))
    wide = coarse.resize((width + width // 4, height), Image.Resampling.BICUBIC)
    colour, angles = rng.uniform(90, 255, 3), rng.uniform(0, 6, 2)
    radius, stripe = height * rng.uniform((0.22, 0.03), (0.30, 0.06))  # in pixels

    images = np.empty((frames, height, width, 3), np.uint8)
    masks = np.zeros((frames, height, width), bool)
    y, x = np.mgrid[:height, :width]
    for t, share in enumerate(np.linspace(0, 1, frames)):
        left = int(share * width / 4)  # the camera pans
        image = np.asarray(wide)[:, left:left + width]
        if t % 10 != 3:  # else it is hidden
            u = x - width / 2 - 0.2 * height * np.cos(angles[0] + 3 * share)
            v = y - height / 2 - 0.2 * height * np.sin(angles[0] + 3 * share)
            masks[t] = np.hypot(u, v * (1 + 0.3 * np.sin(angles[1] + 4 * share))) < radius
            paint = (0.7 + 0.3 * np.sin(6 * u / stripe))[..., None] * colour
            image = np.where(masks[t, ..., None], paint, image)
        images[t] = np.clip(image + rng.normal(0, 4, (height, width, 1)), 0, 255)
    return images, masks


def main(flags: list[str] | None = None) -> None:
    """Write a DAVIS root with splits train and val, whole or not at all. flags: None for argv."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("sample-data"), help="folder to write")
    parser.add_argument("--clips", type=count(999), default=8, help="to train on (8)")
    parser.add_argument("--val-clips", type=count(999), default=3, help="to validate on (3)")
    parser.add_argument("--frames", type=count(9999), default=20, help="in each clip (20)")
    parser.add_argument("--size", type=parse_size, default=(240, 427), help="HxW (240x427)")
    parser.add_argument("--seed", type=count(10**9, least=0), default=0, help="of chance (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    args = parser.parse_args(flags)

    lines = {"train": "", "val": ""}
    with new_folder(args.out, "sample", args.overwrite) as folder:
        for number in progress(range(args.clips + args.val_clips), "clips"):
            clip = make_clip(args.seed * 10_000 + number, args.frames, *args.size)
            for index, (pixels, mask) in enumerate(zip(*clip)):
                name = f"480p/clip-{number:02d}/{index:05d}"
                image, annotation = f"JPEGImages/{name}.jpg", f"Annotations/{name}.png"
                for file, values in (image, pixels), (annotation, mask * np.uint8(255)):
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    write_image(folder / file, values, quality=92)  # of the JPEG
                lines["train" if number < args.clips else "val"] += f"/{image} /{annotation}\n"
        (folder / "ImageSets/480p").mkdir(parents=True)
        for split, text in lines.items():
            write_text(folder / f"ImageSets/480p/{split}.txt", text)
        write_json(folder / "sample.json", {"made_by": "vos.sample", "seed": args.seed})
    print(f"wrote {args.out}; next: python featurize.py --data {args.out} --split train")


if __name__ == "__main__":
    sys.exit(run(main))
