"""What the tests of the scripts share: tiny clips and feature folders, and running a script as its user would.

`script` runs a script as a process of its own, `call` in this one (the same lines run, a hundred times sooner).
"""
import contextlib
import hashlib
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

import imageio.v3 as iio
import numpy as np
import torch

import sample

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real clips, weights and reference results, where there are any
SCRIPTS = ("sample", "featurize", "train", "evaluate", "package")
QUIET = {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


class Result(NamedTuple):
    """How a script ended."""

    status: int
    out: str
    err: str


def command(name: str, *flags) -> list[str]:
    """The command line of a script."""
    return [sys.executable, str(ROOT / f"{name}.py"), *map(str, flags)]


def script(name: str, *flags, cwd: Path | None = None, timeout: float = 300) -> Result:
    """Run a script as a process of its own, for at most `timeout` seconds."""
    done = subprocess.run(command(name, *flags), capture_output=True, text=True, cwd=cwd, env={**os.environ, **QUIET}, timeout=timeout)
    return Result(done.returncode, done.stdout, done.stderr)


def call(name: str, *flags) -> Result:
    """Run a script's main, with its command line, in this process. What would end in a traceback has status 1."""
    argv, out, err = [f"{name}.py", *map(str, flags)], io.StringIO(), io.StringIO()
    status = 0
    with mock.patch.object(sys, "argv", argv), mock.patch.dict(os.environ, QUIET), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except Exception:
            traceback.print_exc()
            status = 1
    return Result(status, out.getvalue(), err.getvalue())


def ok(result: Result) -> Result:
    """Assert that a script did its work; return its result."""
    assert result.status == 0, result.err or result.out
    return result


def refuses(name: str, *flags, names: list, untouched: Path, run=call) -> str:
    """Assert that a script refuses its input as it should, and return what it said.

    Exit status 2; one line on standard error, no traceback, that holds each of `names`; and every file
    and folder below `untouched`, hidden ones too, as it was before.
    """
    before = tree(untouched)
    result = run(name, *flags)
    assert "Traceback" not in result.err, result.err
    assert result.status == 2, result
    assert result.err.startswith(f"{name}.py: ") and result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
    for wanted in names:
        assert str(wanted) in result.err, (str(wanted), result.err)
    assert tree(untouched) == before
    return result.err


def tree(root: Path) -> dict[str, str | None]:
    """Every path below a folder with the digest of its bytes (None for a folder)."""
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            for path in sorted(root.rglob("*"))}


# --- clips -------------------------------------------------------------------------------------


def write_davis(root: Path, clips: int = 2, val_clips: int = 1, frames: int = 4, size: tuple[int, int] = (96, 128), seed: int = 0) -> Path:
    """Write a DAVIS root of synthetic clips, with 2016's lists."""
    sample.write_dataset(root, clips=clips, val_clips=val_clips, frames=frames, height=size[0], width=size[1], seed=seed)
    return root


def listed(root: Path, split: str = "train") -> list[tuple[Path, Path]]:
    """The (frame, mask) files of a split, in order."""
    lines = (root / "ImageSets/480p" / f"{split}.txt").read_text().split("\n")
    return [tuple(root / part[1:] for part in line.split()) for line in lines if line]


def write_frames(folder: Path, names: list[str], size: tuple[int, int] = (32, 40)) -> list[Path]:
    """Write frames of one grey each, so that a frame tells which it is: frame i is 10 * i."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        iio.imwrite(folder / name, np.full((*size, 3), 10 * number, np.uint8))
    return [folder / name for name in names]


def cut(file: Path, share: float = 0.5) -> None:
    """Truncate a file."""
    data = file.read_bytes()
    file.write_bytes(data[:int(len(data) * share)])


# --- feature folders ---------------------------------------------------------------------------


def random_masks(rng: np.random.Generator, frames: int, size: tuple[int, int]) -> np.ndarray:
    """Masks [N, H, W] bool: a rectangle each, whose edges fall anywhere in a grid's cells."""
    masks = np.zeros((frames, *size), bool)
    for mask in masks:
        (top, height), (left, width) = ((int(rng.integers(side // 2)), int(rng.integers(side // 4, side // 2 + 1))) for side in size)
        mask[top:top + height, left:left + width] = True
    return masks


def write_features(folder: Path, clips: dict[str, int], size: tuple[int, int] = (40, 60), seed: int = 0,
                   levels: dict[str, tuple[int, int, int]] | None = None, dtype: str = "float32", data: Path | None = None,
                   annotated: bool = True, **meta) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Write a feature folder as the format says, by hand: random features in which the masks can be seen.

    clips: frames of each. A clip's values depend on its name and the seed alone, so that folders can share clips.
    Returns (features [N, C, h, w] of each level, masks [N, H, W] bool). meta: keys of meta.json to change.
    """
    levels = levels or {"s32": (6, 7, 9)}
    features, masks = {level: [] for level in levels}, []
    for clip, frames in clips.items():
        rng = np.random.default_rng([seed, *clip.encode()])
        masks.append(random_masks(rng, frames, size))
        for level, (channels, height, width) in levels.items():
            rows, columns = ((np.arange(count) * 2 + 1) * side // (2 * count) for count, side in zip((height, width), size))
            seen = masks[-1][:, rows[:, None], columns].astype(np.float32)  # [n, h, w]
            noise = rng.standard_normal((frames, channels, height, width)).astype(np.float32)
            features[level].append(noise + seen[:, None] * np.linspace(-2, 2, channels, dtype=np.float32)[:, None, None])
    features = {level: np.concatenate(parts).astype(dtype) for level, parts in features.items()}
    masks = np.concatenate(masks)
    folder.mkdir(parents=True)
    for level, array in features.items():
        np.save(folder / ("features.npy" if len(levels) == 1 else f"features.{level}.npy"), array)
    if annotated:
        np.save(folder / "masks.npy", np.packbits(masks, axis=2))
    names = [(clip, f"{number:05d}") for clip, frames in clips.items() for number in range(frames)]
    columns = {"raw": [f"JPEGImages/480p/{clip}/{name}.jpg" for clip, name in names]}
    if annotated:
        columns["annotation"] = [f"Annotations/480p/{clip}/{name}.png" for clip, name in names]
    write_json(folder / "paths.json", {column: {str(i): path for i, path in enumerate(paths)} for column, paths in columns.items()})
    write_json(folder / "meta.json", {
        "format": 1, "featurizer": "made-up", "levels": {level: list(shape) for level, shape in levels.items()}, "dtype": dtype,
        "weights": "0123456789abcdef", "preprocessing": {}, "size": list(size), "sizes": None,
        "clips": [clip for clip, _ in names], "names": [name for _, name in names], "parameters": 1000, "flops_per_frame": 10,
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.npy")},
        "versions": {}, "data": str(data or folder / "nowhere"), "split": "train", **meta})
    return features, masks


def write_json(file: Path, value) -> None:
    file.write_text(json.dumps(value))


def change_json(file: Path, **changes) -> None:
    """Set keys of a JSON file's object; a key set to `...` is taken out."""
    value = {**json.loads(file.read_text()), **changes}
    write_json(file, {key: entry for key, entry in value.items() if entry is not ...})


def sign(folder: Path) -> None:
    """Put the digests of a feature folder's arrays in its meta.json, after a test has changed them."""
    change_json(folder / "meta.json", sha256={file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.npy")})


# --- the contest notebook, in plain PyTorch ----------------------------------------------------


class NotebookDecoder(torch.nn.Module):
    """The contest notebook's decoder, word for word."""

    def __init__(self, channels: int, size: tuple[int, int]):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, 1, kernel_size=3)
        self.resize = torch.nn.AdaptiveAvgPool2d(size)

    def forward(self, xs: torch.Tensor) -> torch.Tensor:
        return self.resize(torch.sigmoid(self.conv(xs)))


def train_notebook(features: np.ndarray, masks: np.ndarray, steps: int, batch: int, seed: int = 0) -> tuple[NotebookDecoder, list[float]]:
    """Train the notebook's decoder on full-size masks, frames in order; returns it and the loss of each step."""
    torch.manual_seed(seed)
    decoder = NotebookDecoder(features.shape[1], masks.shape[1:])
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-4, betas=(0.9, 0.999))
    xs, ys = torch.from_numpy(features).float(), torch.from_numpy(masks).float()[:, None]
    losses = []
    while len(losses) < steps:
        for first in range(0, len(xs), batch):
            if len(losses) < steps:
                loss = torch.nn.functional.binary_cross_entropy(decoder(xs[first:first + batch]), ys[first:first + batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    return decoder, losses


def mean_iou(predictions: list[np.ndarray], masks: list[np.ndarray]) -> tuple[float, list[float | None]]:
    """The contest's mean IoU of uint8 predictions [H, W] and bool masks, as the contest writes it; and each frame's."""
    ious = []
    for prediction, mask in zip(predictions, masks):
        p, t = np.round(prediction / 255.0), mask.astype(float)
        union = (p + t - p * t).sum()
        ious.append((p * t).sum() / union if union else None)
    return float(np.mean([iou for iou in ious if iou is not None])), ious


def log_of(run: Path) -> list[dict]:
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
