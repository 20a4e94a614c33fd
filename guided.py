"""Edges back from the frame: a decoder's coarse logits upsampled along the frame's own colours.

Source: He, Sun and Tang, "Guided Image Filtering", TPAMI 2013, with a colour guide; its coefficients are found at
a quarter of the frame's size (He and Sun, "Fast Guided Filter", arXiv 1505.00996).
"""
import torch
import torch.nn.functional as F

SHRINK = 4  # the coefficients are found on a frame this much smaller
RADIUS = 4  # of the window, in pixels of the small frame
EPSILON = 1e-5  # colours (0..1) that vary by less, squared, do not count as an edge
LIMIT = 4.0  # logits beyond this are sure enough


def guided_probabilities(logits: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """Return the probability of each pixel of one frame, float32 [H, W] in 0..1.

    logits: float32 [gh, gw]; frame: uint8 [3, H, W], RGB. Within every window the logits are fitted as a linear
    function of the frame's colours; that function is then read off the frame at its full size.
    """
    image = frame[None].float() / 255  # [1, 3, H, W]
    size = image.shape[2:]
    small = F.interpolate(image, [max(1, side // SHRINK) for side in size], mode="area")  # [1, 3, h, w]
    target = F.interpolate(logits[None, None], small.shape[2:], mode="bilinear", align_corners=False).clamp(-LIMIT, LIMIT)
    slope, offset = fit(small, target)
    slope, offset = (F.interpolate(box(part), size, mode="bilinear", align_corners=False) for part in (slope, offset))
    return torch.sigmoid((slope * image).sum(1) + offset[:, 0])[0]


def fit(image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit target = slope . image + offset in the window round every pixel, by least squares with a penalty on the slope.

    image: [1, 3, h, w] in 0..1; target: [1, 1, h, w]. Returns slope [1, 3, h, w] and offset [1, 1, h, w].
    """
    mean, target_mean = box(image), box(target)
    pairs = image[:, :, None] * image[:, None]  # [1, 3, 3, h, w]
    covariance = box(pairs.flatten(1, 2)).view_as(pairs) - mean[:, :, None] * mean[:, None]
    covariance = covariance.permute(0, 3, 4, 1, 2) + EPSILON * torch.eye(3, device=image.device)  # [1, h, w, 3, 3]
    together = (box(image * target) - mean * target_mean).permute(0, 2, 3, 1)  # [1, h, w, 3]
    slope = torch.linalg.solve(covariance, together).permute(0, 3, 1, 2)
    return slope, target_mean - (slope * mean).sum(1, keepdim=True)


def box(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of the window round every pixel of [B, C, h, w], as far as it lies in the frame."""
    side = 2 * RADIUS + 1
    x = F.avg_pool2d(x, (side, 1), 1, (RADIUS, 0), count_include_pad=False)
    return F.avg_pool2d(x, (1, side), 1, (0, RADIUS), count_include_pad=False)
