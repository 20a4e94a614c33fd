"""What a whole clip tells about each of its positions, found without training, from frozen features alone.

The background is what the frames' borders show and what looks like it; the object is what differs from that, is
rare in the clip, and moves otherwise than the camera. Decoders that set `cues` get these maps beside the features.
"""
import contextlib

import numpy as np
import torch
import torch.nn.functional as F

from data import FeatureFolder, check_array, clip_ranges
from files import BadInput, read_json, sha256, whole_file, write_json
from resident import DiskRows, Features, Rows, gather, load_rows

VERSION = 1  # of what `clip_cues` computes: cues kept by another version are made anew
CUES = 4  # channels that `clip_cues` returns
KEPT = 32  # principal components of a level that frames are aligned and compared by
CELLS = 2000  # a finer grid than this is aligned at half its size: a fifth of the time
SPANS = (2, 4, 8, 16)  # frames from one to the other that it is compared with


# --- beside the features -----------------------------------------------------------------------


def with_cues(features: Features, clips: list[str], folder: FeatureFolder | None = None, levels: list[str] | None = None) -> Features:
    """Append to the features the cues of each level, [N, CUES, h, w] as float16, kept where the level is.

    clips: the clip of every frame. They take seconds a clip, so with `folder` and the names of its `levels` they are kept
    beside the features, as cues.<level>.npy, and read from there the next time.
    """
    added = []
    for number, level in enumerate(features.levels):
        kept = read_cues(folder, levels[number], level, features) if folder and levels else None
        if kept is None:
            made = make_cues(level, clips, features)
            if folder and levels and features.group.main:
                keep_cues(folder, levels[number], made)
            own = made[features.group.holds(torch.arange(len(made)))]
            kept = own.to(level.device) if isinstance(level, torch.Tensor) else own
        added.append(kept)
    return features._replace(levels=features.levels + added)


def make_cues(level: Rows, clips: list[str], features: Features) -> torch.Tensor:
    """Return the cues of all frames of a level, float16 [N, CUES, h, w] in host memory, clip by clip."""
    device, group, parts = features.device, features.group, []
    for _, first, stop in clip_ranges(clips):
        frames = torch.arange(first, stop)
        ours = gather(level, frames[group.holds(frames)], device, group)
        parts.append(clip_cues(group.interleave(ours, first, stop)).half().cpu())
    return torch.cat(parts)


def read_cues(folder: FeatureFolder, level: str, rows: Rows, features: Features) -> Rows | None:
    """Return the cues kept beside a level of a folder; None when there are none, or they were made of other features."""
    file, (_, height, width) = folder.path / f"cues.{level}.npy", folder.meta["levels"][level]
    shape = (folder.frames, CUES, height, width)
    with contextlib.suppress(BadInput, KeyError, TypeError):  # whatever is wrong with them, they can be made anew
        note = read_json(folder.path / "cues.json")[level]
        if note["version"] == VERSION and note["features"] == folder.meta["sha256"][folder.files[level].name]:
            check_array(file, shape, (np.float16,))
            place = "disk" if isinstance(rows, DiskRows) else "device" if rows.device == features.device else "host"
            return load_rows(file, shape, features.device, place, note["sha256"], features.group)
    return None


def keep_cues(folder: FeatureFolder, level: str, cues: torch.Tensor) -> None:
    """Write the cues of a level beside it. Where that cannot be done, they are made again the next time."""
    file, notes = folder.path / f"cues.{level}.npy", folder.path / "cues.json"
    with contextlib.suppress(BadInput, TypeError):
        with whole_file(file) as temporary, open(temporary, "wb") as handle:
            np.save(handle, cues.numpy())
        kept = read_json(notes) if notes.exists() else {}
        source = folder.meta["sha256"][folder.files[level].name]
        write_json(notes, {**kept, level: {"version": VERSION, "features": source, "sha256": sha256(file)}})


# --- of one clip -------------------------------------------------------------------------------


def clip_cues(level: torch.Tensor, spans: tuple[int, ...] = SPANS) -> torch.Tensor:
    """What a whole clip tells about each of its positions, without training: [T, C, h, w] -> float32 [T, 4, h, w].

    How far its features lie from the background's (at first what is at the frames' borders, then, twice, what looks
    like that), how far from all that the clip shows, how much they changed against their median over time, and how
    much more than most positions against other frames once the camera's shift is undone. All are logarithms, standardised
    over the clip. T frames of one clip, in order.
    """
    level = level.float()
    frames, _, height, width = level.shape
    edge = max(1, height // 15)
    border = torch.ones(height, width, dtype=torch.bool, device=level.device)
    border[edge:-edge, edge:-edge] = False
    border = border.expand(frames, height, width)
    far = distance(level, border.float())
    for _ in range(2):
        at_border = far[border]
        usual = at_border[:: 1 + len(at_border) // 1_000_000].quantile(0.9)  # quantile takes 16 million values at most
        far = distance(level, ((far < far.median()) | (border & (far < usual))).float())
    rare = distance(level, torch.ones_like(far))
    spread = level.std((0, 2, 3))[:, None, None] + 1e-3
    change = ((level - level.median(0).values) / spread).square().mean(1).add(1e-3).log()
    fine = height * width > CELLS
    moved = aligned_change(F.avg_pool2d(level / spread, 2) if fine else level / spread, spans)
    if fine:
        moved = F.interpolate(moved[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
    cues = torch.stack([far, rare, change, moved], 1)
    return (cues - cues.mean((0, 2, 3), keepdim=True)) / (cues.std((0, 2, 3), keepdim=True) + 1e-3)


def aligned_change(level: torch.Tensor, spans: tuple[int, ...]) -> torch.Tensor:
    """Log of how little a clip's positions look like the same place in frames before and after, the camera's shift undone.

    level: [T, C, h, w]. Of the frames before and after the one that matches better counts: what only uncovers background
    matches on one side. Mean over `spans`; positions that leave the frame both ways get the median. Returns [T, h, w].
    """
    frames, channels, height, width = level.shape
    x = (level - level.mean((0, 2, 3), keepdim=True)).permute(0, 2, 3, 1)  # [T, h, w, C]
    flat = x.reshape(-1, channels)
    x = F.normalize(x @ torch.linalg.eigh(flat.T @ flat / len(flat)).eigenvectors[:, -KEPT:], dim=3)
    total, count = torch.zeros(2, frames, height, width, device=level.device)
    spectra = torch.fft.rfft2(x, s=(2 * height, 2 * width), dim=(1, 2))
    for span in spans:
        if span >= frames:
            continue
        shift = camera_shift(spectra[:-span], spectra[span:], height, width)
        least = torch.full((frames, height, width), torch.inf, device=level.device)
        least[:-span] = mismatch(x[:-span], x[span:], shift)
        least[span:] = torch.minimum(least[span:], mismatch(x[span:], x[:-span], -shift))
        seen = least.isfinite()
        total, count = total + torch.where(seen, least, 0), count + seen
    if not count.any():  # a clip of one or two frames
        return total
    change = (total / count).clamp(min=1e-3).log()  # NaN where never seen
    return torch.where(count > 0, change, change[count > 0].median())


def camera_shift(first: torch.Tensor, second: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The shift (rows, columns) by which most of a frame moved to become another: int64 [n, 2], by cross-correlation.

    first, second: the frames' spectra, [n, 2h, w + 1, C], of unit vectors padded with zeros to twice the size. Only shifts
    that leave 40 % of the frame in sight count.
    """
    correlation = torch.fft.irfft2((first.conj() * second).sum(3), s=(2 * height, 2 * width))  # [n, 2h, 2w]
    rows, columns = (torch.fft.fftfreq(2 * n, 0.5 / n, device=correlation.device).round().long() for n in (height, width))
    overlap = (height - rows.abs())[:, None] * (width - columns.abs())
    correlation = torch.where(overlap > 0.4 * height * width, correlation / overlap.clamp(min=1), -torch.inf)
    best = correlation.flatten(1).argmax(1)
    return torch.stack([rows[best // (2 * width)], columns[best % (2 * width)]], 1)


def mismatch(x: torch.Tensor, other: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """1 - cosine of each position of x with the best of the 3 x 3 around it in `other`, shifted: [n, h, w], inf where that is outside.

    x, other: unit vectors [n, h, w, C]; shift: int64 [n, 2].
    """
    frames, height, width, _ = x.shape
    frame = torch.arange(frames, device=x.device)[:, None, None]
    rows = torch.arange(height, device=x.device)[:, None] + shift[:, 0, None, None]  # [n, h, 1]
    columns = torch.arange(width, device=x.device) + shift[:, 1, None, None]  # [n, 1, w]
    best = torch.full((frames, height, width), -1.0, device=x.device)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            there = other[frame, (rows + down).clamp(0, height - 1), (columns + right).clamp(0, width - 1)]
            best = torch.maximum(best, (x * there).sum(3))
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return torch.where(inside, 1 - best, torch.inf)


def distance(level: torch.Tensor, weight: torch.Tensor, shrink: float = 0.1) -> torch.Tensor:
    """Log of the squared Mahalanobis distance of every position of a clip from a Gaussian of the positions that `weight` names.

    level: [T, C, h, w]; weight: [T, h, w], at least 0. The covariance is shrunk towards its mean variance, by the share
    `shrink`. Returns [T, h, w].
    """
    frames, channels, height, width = level.shape
    x, share = level.permute(0, 2, 3, 1).reshape(-1, channels), weight.reshape(-1) / weight.sum()
    x = x - share @ x
    covariance = (x * share[:, None]).T @ x
    covariance += shrink * covariance.diagonal().mean() * torch.eye(channels, device=x.device)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), x.T, upper=False)
    return whitened.square().sum(0).add(1e-6).log().reshape(frames, height, width)
