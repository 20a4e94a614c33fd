"""What a whole clip's features tell about each position. T its frames, C channels, h w grid."""
import torch
import torch.nn.functional as F

KEPT = 32  # principal components of a level that frames are aligned and compared by
CELLS = 2000  # a finer grid than this is aligned at half its size: a fifth of the time
SPANS = (2, 4, 8, 16)  # frames from one to the other that it is compared with


def clip_cues(level: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    """Return float32 [T, 5, h, w]: distance from background and clip, change in time and place.

    The last one is `motion`, [T, 1, H', W'] of any size: see vos/motion.py.
    """
    level = level.float()
    frames, _, height, width = level.shape
    edge = max(1, height // 15)
    border = torch.ones(frames, height, width, dtype=torch.bool, device=level.device)
    border[:, edge:-edge, edge:-edge] = False

    flat = level.permute(0, 2, 3, 1).reshape(-1, level.shape[1])
    far = distance(flat, border)
    for _ in range(2):
        usual = border & (far < far[border].quantile(0.9))
        far = distance(flat, (far <= far.median()) | usual)
    rare = distance(flat, torch.ones_like(border))

    spread = level.std((0, 2, 3))[:, None, None] + 1e-3
    median = level.median(0).values
    change = ((level - median) / spread).square().mean(1).add(1e-3).log()

    step = 2 if height * width > CELLS else 1
    moved = aligned_change(F.avg_pool2d(level, step) / spread)
    moved = F.interpolate(moved[:, None], (height, width), mode="bilinear")[:, 0]

    motion = F.adaptive_avg_pool2d(motion, (height, width))  # H', W' are those of s8 or so
    # logarithms, standardised over the clip
    cues = torch.cat([torch.stack([far, rare, change, moved], 1), motion], 1)
    return (cues - cues.mean((0, 2, 3), keepdim=True)) / (cues.std((0, 2, 3), keepdim=True) + 1e-3)


def distance(flat: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Return log squared Mahalanobis distance of places [n, C] from those `inside`, [T, h, w]."""
    chosen = flat[inside.flatten()]
    mean = chosen.mean(0)
    covariance = torch.cov(chosen.T, correction=0).reshape(len(mean), -1)
    spread = covariance.diagonal().mean().clamp_min(1e-6)  # not 0 where nothing differs
    covariance += 0.1 * spread * torch.eye(len(mean), device=flat.device)
    whitened = (flat - mean) @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T
    return torch.linalg.vector_norm(whitened, dim=1).square().add(1e-6).log().view(inside.shape)


def aligned_change(level: torch.Tensor) -> torch.Tensor:
    """Return the log of how much a place differs in other frames, camera aside, [T, h, w]."""
    frames, channels, height, width = level.shape
    x = (level - level.mean((0, 2, 3), keepdim=True)).permute(0, 2, 3, 1)  # [T, h, w, C]
    flat = x.reshape(-1, channels)
    covariance = flat.T @ flat / len(flat)
    covariance += 1e-6 * torch.eye(channels, device=x.device)  # where nothing differs
    directions = torch.linalg.eigh(covariance).eigenvectors[:, -KEPT:]
    x = F.normalize(x @ directions, dim=3)

    spectra = torch.fft.rfft2(x, s=(2 * height, 2 * width), dim=(1, 2))
    total = torch.zeros(frames, height, width, device=level.device)
    count = torch.zeros_like(total)
    for span in SPANS:
        if span >= frames:
            continue
        shift = camera_shift(spectra[:-span], spectra[span:], height, width)
        least = torch.full_like(total, torch.inf)
        least[:-span] = mismatch(x[:-span], x[span:], shift)
        # the better of both sides counts: uncovered background matches on one only
        least[span:] = torch.minimum(least[span:], mismatch(x[span:], x[:-span], -shift))
        seen = least.isfinite()
        total += torch.where(seen, least, 0)
        count += seen

    change = (total / count).clamp(min=1e-3).log()  # NaN where never seen
    return torch.where(count > 0, change, change.nanmedian()).nan_to_num()  # 0: one or two frames


def camera_shift(one: torch.Tensor, other: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return how far (rows, columns) most of a frame moved, int64 [n, 2], from padded spectra."""
    product = (one.conj() * other).sum(3)
    correlation = torch.fft.irfft2(product, s=(2 * height, 2 * width))  # [n, 2h, 2w]
    rows, columns = (torch.fft.fftfreq(2 * n, 0.5 / n, device=product.device).round().long()
                     for n in (height, width))
    overlap = (height - rows.abs())[:, None] * (width - columns.abs())
    enough = overlap > 0.4 * height * width  # stays in sight
    correlation = torch.where(enough, correlation / overlap.clamp(min=1), -torch.inf)
    best = correlation.flatten(1).argmax(1)
    return torch.stack([rows[best // (2 * width)], columns[best % (2 * width)]], 1)


def mismatch(x: torch.Tensor, other: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine to the best of the 3 x 3 in `other`, shifted, or inf outside, [n, h, w]."""
    frames, height, width, _ = x.shape
    frame = torch.arange(frames, device=x.device)[:, None, None]
    rows = torch.arange(-1, height + 1, device=x.device)[:, None] + shift[:, 0, None, None]
    columns = torch.arange(-1, width + 1, device=x.device) + shift[:, 1, None, None]  # [n, 1, w+2]
    there = other[frame, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    alike = [(x * there[:, down:down + height, right:right + width]).sum(3)
             for down in range(3) for right in range(3)]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return torch.where(inside[:, 1:-1, 1:-1], 1 - torch.stack(alike).amax(0), torch.inf)
