"""A decoder adapted to one clip, and its coarse logits upsampled along the frame's own edges.

Source: He et al., "Guided Image Filtering", TPAMI 2013; "Fast Guided Filter", arXiv 1505.00996.
"""
import copy

import torch
import torch.nn.functional as F

SHRINK = 4  # the coefficients are found on a frame this much smaller
RADIUS = 4  # of the window, in pixels of the small frame
EPSILON = 1e-5  # colours (0..1) that vary by less, squared, do not count as an edge
LIMIT = 4.0  # logits beyond this are sure enough


def adapt(decoder, features, index: torch.Tensor, drawn: torch.Tensor, targets: torch.Tensor,
          steps: int):
    """Return a copy trained a little on one clip, whose rows of `features` are `index`, int64 [n].

    Where rows are `drawn`, int64 [m], it learns their masks: the share of foreground in each cell,
    `targets` [m, gh, gw]. Else it learns the positions that it is sure of itself.
    """
    tuned = copy.deepcopy(decoder).train()
    vars(tuned).update(hide=0.0, lose=0.0)  # hides no cues or features; still drops components
    optimizer = torch.optim.AdamW(tuned.parameters(), 5e-4, weight_decay=0.01, fused=True)
    if steps and not len(drawn):
        with torch.no_grad():
            logits = [decoder(features.batch(part)).float() for part in index.split(16)]
        probability = torch.sigmoid(torch.cat(logits))  # [n, gh, gw]
        guess = (probability > 0.5).float()
        sure = ((probability > 0.8) | (probability < 0.2)).float()

    for step in range(steps):
        torch.manual_seed(step)
        if len(drawn):
            chosen = torch.randint(len(drawn), (2,))
            loss = decoder.loss(tuned(features.batch(drawn[chosen])), targets[chosen]).mean()
            for group in optimizer.param_groups:  # rises for a tenth of the steps, then falls
                group["lr"] = 4e-3 * min(1, 10 * (step + 1) / steps) * (1 - step / steps)
        else:
            chosen = torch.randperm(len(index))[:8]
            output = tuned(features.batch(index[chosen]))
            loss = F.binary_cross_entropy_with_logits(output, guess[chosen], reduction="none")
            loss = (loss * sure[chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tuned.eval()


def guided_probabilities(logits: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """Return each pixel's probability [H, W] from logits [gh, gw] and a frame uint8 [3, H, W]."""
    image = frame[None].float() / 255  # [1, 3, H, W]
    size = image.shape[2:]
    small = F.interpolate(image, [max(1, side // SHRINK) for side in size], mode="area")
    target = F.interpolate(logits[None, None], small.shape[2:], mode="bilinear")
    slope, offset = fit_window(small, target.clamp(-LIMIT, LIMIT))
    slope = F.interpolate(box(slope), size, mode="bilinear")
    offset = F.interpolate(box(offset), size, mode="bilinear")
    return torch.sigmoid((slope * image).sum(1) + offset[:, 0])[0]


def fit_window(image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit target = slope . image + offset round every pixel, with a penalty on the slope."""
    mean, target_mean = box(image), box(target)
    pairs = image[:, :, None] * image[:, None]  # [1, 3, 3, h, w]
    covariance = box(pairs.flatten(1, 2)).view_as(pairs) - mean[:, :, None] * mean[:, None]
    covariance = covariance.permute(0, 3, 4, 1, 2) + EPSILON * torch.eye(3, device=image.device)
    together = (box(image * target) - mean * target_mean).permute(0, 2, 3, 1)  # [1, h, w, 3]
    slope = torch.linalg.solve(covariance, together).permute(0, 3, 1, 2)
    return slope, target_mean - (slope * mean).sum(1, keepdim=True)


def box(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of the window round every pixel of [B, C, h, w], as far as it lies inside."""
    side = 2 * RADIUS + 1
    x = F.avg_pool2d(x, (side, 1), 1, (RADIUS, 0), count_include_pad=False)
    return F.avg_pool2d(x, (1, side), 1, (0, RADIUS), count_include_pad=False)
