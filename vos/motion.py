"""What moves in a clip otherwise than the camera. T its frames, n pairs of them, h w pixels.

Sources: Lucas and Kanade, "An Iterative Image Registration Technique", IJCAI 1981, from coarse to
fine, with the smoothness of Horn and Schunck, "Determining Optical Flow", 1981, which ends where
motion does as in Black and Anandan, "The Robust Estimation of Multiple Motions", CVIU 1996.
"""
import torch
import torch.nn.functional as F

from vos.refine import box, fit_window

SHRINK = 4  # frames are compared at a size this much smaller
SCALES = 5  # each half the size of the one before
STEPS = 4  # at each scale
PULL = 0.05  # of the neighbours' motion, beside the contrast of a window
REACH = 6  # of these neighbours, in pixels of half the size
ALIKE = 0.2  # pixels: a neighbour that moves otherwise by more counts less than half
EDGES = 6  # radius of the windows in which it follows the frame's colours, see vos/refine.py
PAIRS = 8  # of frames at a time


def shrink(frames: torch.Tensor) -> torch.Tensor:
    """Return what `own_motion` takes of frames uint8 [T, 3, H, W]."""
    size = [max(2, side // SHRINK) for side in frames.shape[2:]]
    return F.interpolate(frames.float() / 255, size, mode="area")


@torch.inference_mode()
def own_motion(frames: torch.Tensor) -> torch.Tensor:
    """Return the log of how far each place moves beside the camera, float32 [T, 1, h / 2, w / 2].

    frames: [T, 3, h, w], as `shrink` returns them. Of the motions to the frames beside it the
    smaller counts: what is uncovered has no match in one of them. It follows the frame's edges.
    """
    small = F.avg_pool2d(frames, 2, ceil_mode=True)
    pairs = [zip(x[:-1].split(PAIRS), x[1:].split(PAIRS)) for x in pyramid(frames)]
    both: tuple[list, list] = [], []  # to the next frame, and to the one before
    for there in zip(*pairs):  # (one, other) at each scale
        for found, way in zip(both, (there, [pair[::-1] for pair in there])):
            found.append(beside_camera(F.avg_pool2d(flow(way), 2, ceil_mode=True)))
    none = small.new_full((1, 1, *small.shape[2:]), 0.0 if len(frames) == 1 else torch.inf)
    moved = (torch.cat([*both[0], none]).minimum(torch.cat([none, *both[1]])) + 0.05).log()

    slope, offset = (box(x, EDGES) for x in fit_window(small, moved, EDGES))
    return (slope * small).sum(1, keepdim=True) + offset


def pyramid(frames: torch.Tensor) -> list[torch.Tensor]:
    """Return frames at SCALES, coarse to fine, less the mean of a window, over its contrast."""
    scales = [frames]
    while len(scales) < SCALES and min(scales[-1].shape[2:]) >= 8:
        scales.append(F.avg_pool2d(scales[-1], 2))
    even = []
    for image in reversed(scales):
        mean = box(image, 3)
        contrast = (box(image * image, 3) - mean * mean).clamp_min(0).mean(1, keepdim=True).sqrt()
        even.append((image - mean) / (contrast + 0.1))
    return even


def flow(pairs) -> torch.Tensor:
    """Return where in the other frame each pixel of one is: [n, 2, h, w], columns and rows to add.

    pairs: (one, other) at each scale, as `pyramid` returns them, [n, 3, h, w] the last.
    """
    moved = torch.zeros_like(pairs[0][0][:, :2])
    for one, other in pairs:
        height, width = one.shape[2:]
        larger = torch.tensor([[[width / moved.shape[3]]], [[height / moved.shape[2]]]])
        moved = F.interpolate(moved, (height, width), mode="bilinear") * larger.to(one.device)

        # what a pixel's motion changes, to first order, in the window round it
        wide = F.pad(one, (1, 1, 1, 1), mode="replicate")
        across = (wide[:, :, 1:-1, 2:] - wide[:, :, 1:-1, :-2]) / 2
        down = (wide[:, :, 2:, 1:-1] - wide[:, :, :-2, 1:-1]) / 2
        products = [across * across, across * down, down * down]
        xx, xy, yy = box(torch.stack([p.sum(1) for p in products], 1), 2).unbind(1)
        xx, yy = xx + PULL, yy + PULL
        columns = torch.arange(width, device=one.device)
        rows = torch.arange(height, device=one.device)[:, None]
        for _ in range(STEPS):
            x, y = moved[:, 0] + columns, moved[:, 1] + rows
            place = torch.stack([x * 2 / max(width - 1, 1), y * 2 / max(height - 1, 1)], 3) - 1
            there = F.grid_sample(other, place, padding_mode="border", align_corners=True)
            wrong = torch.stack([(side * (there - one)).sum(1) for side in (across, down)], 1)
            x, y = (PULL * (neighbours(moved) - moved) - box(wrong, 2)).unbind(1)
            step = torch.stack([yy * x - xy * y, xx * y - xy * x], 1)
            moved = moved + (step / (xx * yy - xy * xy)[:, None]).clamp(-1, 1)
    return moved


def neighbours(moved: torch.Tensor) -> torch.Tensor:
    """Return the mean motion round each place, in which what moves otherwise counts less."""
    size = moved.shape[2:]
    mean = box(F.avg_pool2d(moved, 2, ceil_mode=True), REACH)
    beside = (moved - F.interpolate(mean, size, mode="bilinear")) / ALIKE
    weight = 1 / (1 + beside.square().sum(1, keepdim=True))
    sums = box(F.avg_pool2d(torch.cat([moved * weight, weight], 1), 2, ceil_mode=True), REACH)
    return F.interpolate(sums[:, :2] / sums[:, 2:], size, mode="bilinear")


def beside_camera(moved: torch.Tensor) -> torch.Tensor:
    """Return how far motion [n, 2, h, w] is from the camera's: pixels, [n, 1, h, w].

    The camera's is a quadratic in the place, which is fitted again and again with less weight on
    what it does not fit (Cauchy's), at first with more on the frame's border.
    """
    sides = [torch.linspace(-1, 1, side, device=moved.device) for side in moved.shape[2:]]
    y, x = torch.meshgrid(*sides, indexing="ij")
    terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], 2).flatten(0, 1)
    border = (x.abs().maximum(y.abs()) > 0.85).flatten()
    vectors = moved.flatten(2).transpose(1, 2)  # [n, h * w, 2]
    weights = (0.2 + border).expand(len(moved), -1)
    little = 1e-4 * torch.eye(6, device=moved.device)
    for _ in range(6):
        weighed = terms.T * weights[:, None]  # [n, 6, h * w]
        fitted = torch.linalg.solve(weighed @ terms + little, weighed @ vectors)
        beside = torch.hypot(*(vectors - terms @ fitted).unbind(2))
        usual = beside.median(1, keepdim=True).values.clamp_min(0.025)
        weights = 1 / (1 + (beside / (1.5 * usual)).square())
    return beside.view(len(moved), 1, *moved.shape[2:])
