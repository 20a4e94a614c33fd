"""What tests share: tiny clips, feature folders, and scripts, run in this process or their own."""
import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from vos import cues, sample
from vos.folder import CUES
from vos.inputs import sha256

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real clips, weights and reference results, where there are any
SCRIPTS = ("vos.sample", "featurize", "train", "evaluate", "package")
QUIET = {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
META = {"format": 2, "featurizer": "made-up", "weights": "0123456789abcdef", "preprocessing": {},
        "sizes": None, "labelled": None, "views": [], "cues": None, "parameters": 1000,
        "flops_per_frame": 10, "versions": {}, "split": "train"}


class Result(NamedTuple):  # how a script ended
    status: int
    out: str
    err: str


def script(name: str, *flags, cwd: Path | None = None, timeout: float = 300) -> Result:
    """Run a script, "train", or a module, "vos.sample", as a process of its own."""
    start = ["-m", name] if "." in name else [str(ROOT / f"{name}.py")]
    env = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *start, *map(str, flags)], capture_output=True,
                          text=True, cwd=cwd, env=env, timeout=timeout)
    return Result(done.returncode, done.stdout, done.stderr)


def call(name: str, *flags) -> Result:
    """Run a script's main in this process. What would end in a traceback has status 1."""
    file, out, err = f"{name.replace('.', '/')}.py", io.StringIO(), io.StringIO()
    status: int | str | None = 0
    argv = mock.patch.object(sys, "argv", [file, *map(str, flags)])
    with (argv, mock.patch.dict(os.environ, QUIET),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try:
            runpy.run_path(str(ROOT / file), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        except Exception:
            traceback.print_exc()
            status = 1
    return Result(status if isinstance(status, int) else 1, out.getvalue(), err.getvalue())


def ok(result: Result) -> Result:
    """Assert that a script did its work; return its result."""
    assert result.status == 0, result.err or result.out
    return result


def refuses(name: str, *flags, names: list, untouched: Path, run=call) -> str:
    """Assert status 2, one line that holds `names`, `untouched` as it was; return the line."""
    before = tree(untouched)
    result = run(name, *flags)
    assert result.status == 2, result
    assert result.err.startswith(f"{name.rpartition('.')[2]}.py: "), result.err
    assert result.err.find("\n") == len(result.err) - 1, result.err
    for wanted in names:
        assert str(wanted) in result.err, (str(wanted), result.err)
    assert tree(untouched) == before
    return result.err


def tree(root: Path) -> dict[str, str | None]:
    """Return every path below a folder with the digest of its bytes (None for a folder)."""
    return {str(path.relative_to(root)): sha256(path) if path.is_file() else None
            for path in sorted(root.rglob("*"))}


def cut(file: Path, share: float = 0.5) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:int(len(content) * share)])


def flip(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])  # one bit


def write_json(file: Path, value) -> None:
    file.write_text(json.dumps(value))


def change_json(file: Path, **changes) -> None:
    """Set keys of a JSON file's object; a key set to `...` is taken out."""
    value = {**json.loads(file.read_text()), **changes}
    write_json(file, {key: entry for key, entry in value.items() if entry is not ...})


def log_of(run: Path) -> list[dict]:
    """Return the rows of a run's log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def write_davis(root: Path, clips: int = 2, val_clips: int = 1, frames: int = 4,
                size: tuple[int, int] = (96, 128), seed: int = 0) -> Path:
    """Write a DAVIS root of synthetic clips, with 2016's lists."""
    sample.main([f"--out={root}", f"--clips={clips}", f"--val-clips={val_clips}",
                 f"--frames={frames}", "--size={}x{}".format(*size), f"--seed={seed}"])
    return root


def listed(root: Path, split: str = "train") -> list[tuple[Path, ...]]:
    """Return the (frame, mask) files of a split, in order."""
    lines = (root / "ImageSets/480p" / f"{split}.txt").read_text().splitlines()
    return [tuple(root / part[1:] for part in line.split()) for line in lines]


def random_masks(rng: np.random.Generator, frames: int, size: tuple[int, int]) -> np.ndarray:
    """Return masks [N, H, W] bool: a rectangle each, its edges anywhere in a grid's cells."""
    masks = np.zeros((frames, *size), bool)
    for mask in masks:
        top, left = (int(rng.integers(side // 2)) for side in size)
        height, width = (int(rng.integers(side // 4, side // 2 + 1)) for side in size)
        mask[top:top + height, left:left + width] = True
    return masks


def write_features(folder: Path, clips: dict[str, int], size: tuple[int, int] = (40, 60),
                   seed: int = 0, levels: dict | None = None, dtype: str = "float32",
                   data: Path | None = None, annotated: bool = True, cued: bool = False,
                   **meta) -> tuple[dict, np.ndarray]:
    """Write a feature folder by hand: random features in which the masks can be seen.

    clips: frames of each; a clip's values depend on its name and the seed alone. levels: (C, h, w)
    of each. cued: with cues. meta: keys of meta.json to change.
    Returns (features [N, C, h, w] of each level, masks [N, H, W] bool).
    """
    levels = levels or {"s32": (6, 7, 9)}
    parts, masks = {level: [] for level in levels}, []
    for clip, frames in clips.items():
        rng = np.random.default_rng([seed, *clip.encode()])
        masks.append(random_masks(rng, frames, size))
        for level, (channels, *grid) in levels.items():
            noise = rng.standard_normal((frames, channels, *grid), dtype=np.float32)
            share = F.adaptive_avg_pool2d(torch.from_numpy(masks[-1])[:, None].float(), grid)
            slopes = np.linspace(-2, 2, channels, dtype=np.float32)[:, None, None]
            parts[level].append((noise + share.numpy() * slopes).astype(dtype))
    features = {level: np.concatenate(each) for level, each in parts.items()}

    folder.mkdir(parents=True)
    for level, each in parts.items():
        name = "features.npy" if len(levels) == 1 else f"features.{level}.npy"
        np.save(folder / name, features[level])
        if cued:
            rows = [torch.from_numpy(clip) for clip in each]
            made = [cues.clip_cues(clip, clip[:, :1].float()).half().numpy() for clip in rows]
            np.save(folder / f"cues.{level}.npy", np.concatenate(made))
    if annotated:
        np.save(folder / "masks.npy", np.packbits(np.concatenate(masks), axis=2))
    rows = [(clip, f"{number:05d}") for clip, frames in clips.items() for number in range(frames)]
    paths = {"raw": [f"JPEGImages/480p/{clip}/{name}.jpg" for clip, name in rows]}
    if annotated:
        paths["annotation"] = [f"Annotations/480p/{clip}/{name}.png" for clip, name in rows]
    write_json(folder / "paths.json", {name: dict(enumerate(each)) for name, each in paths.items()})
    own = {"levels": levels, "dtype": dtype, "size": size, "data": str(data or folder / "nowhere"),
           "clips": [clip for clip, _ in rows], "names": [name for _, name in rows],
           "cues": CUES if cued else None}
    write_json(folder / "meta.json", META | own | meta)
    sign(folder)
    return features, np.concatenate(masks)


def sign(folder: Path) -> None:
    """Put the digests of a feature folder's arrays in its meta.json."""
    digests = {file.name: sha256(file) for file in sorted(folder.glob("*.npy"))}
    change_json(folder / "meta.json", sha256=digests)


def mean_iou(predictions: list[np.ndarray], masks: list[np.ndarray]) -> tuple[float, list]:
    """Return the contest's mean IoU of uint8 predictions and bool masks; and each frame's."""
    ious = []
    for prediction, mask in zip(predictions, masks):
        p, t = np.round(prediction / 255.0), mask.astype(float)
        union = (p + t - p * t).sum()
        ious.append((p * t).sum() / union if union else None)
    return float(np.mean([iou for iou in ious if iou is not None])), ious
