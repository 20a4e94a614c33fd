"""A decoder adapted to one clip, and its coarse logits upsampled along the frame's own edges.

Source: He et al., "Guided Image Filtering", TPAMI 2013; "Fast Guided Filter", arXiv 1505.00996.
"""
import copy
import itertools

import torch
import torch.nn.functional as F

SHRINK = 4  # the coefficients are found on a frame this much smaller
RADIUS = 4  # of the window, in pixels of the small frame
EPSILON = 1e-5  # colours (0..1) that vary by less, squared, do not count as an edge
ENOUGH = 2  # drawn masks of a clip
LIMIT = 4.0  # logits beyond this are sure enough
MOST = 32  # frames of a clip, evenly, that a decoder adapts to where none is drawn: enough


def adapt(decoder, features, index: torch.Tensor, drawn: torch.Tensor, targets: torch.Tensor,
          steps: int):
    """Return a copy trained a little on one clip, whose rows of `features` are `index`, int64 [n].

    It learns the positions that it is sure of, and sees alike by the clip's cues alone: two views
    that seldom err together (Blum and Mitchell, "Co-Training", COLT 1998). Where rows are `drawn`,
    int64 [m], with the share of foreground in each cell as `targets` [m, gh, gw], it learns these;
    ENOUGH of them alone. One does not tell how the object looks elsewhere, but a first copy that
    learned it shows what the decoder was wrongly sure of: a second learns it, and in two rounds the
    positions of which the last copy is sure and that the decoder never saw otherwise.
    """
    rounds, rate = 1, 5e-4
    if len(drawn) >= ENOUGH:
        rate = 4e-3
    elif len(drawn):  # fewer steps, since most are of three times as many frames
        rounds, rate, steps = 3, 2e-3, -(-steps * 3 // 5)
    else:
        index = index[:: -(-len(index) // MOST)]
    bounds = [steps * turn // rounds for turn in range(rounds + 1)]
    before = logits = look(decoder, features, index)
    if decoder.cues and not len(drawn):
        before = look(decoder, features, index, blind=True)
    tuned = copy.deepcopy(decoder)
    for turn, (first, stop) in enumerate(itertools.pairwise(bounds)):
        alone = turn == 0 and len(drawn) > 0
        if turn:
            logits = look(tuned, features, index)
        if turn < 2:
            tuned, begin, end = copy.deepcopy(decoder), first, stop if alone else steps
            vars(tuned).update(hide=0.0, lose=0.0)  # hides no cues or features; drops components
            optimizer = torch.optim.AdamW(tuned.parameters(), rate, weight_decay=0.01, fused=True)
        tuned.train()
        probability = torch.sigmoid(logits)  # [n, gh, gw]
        guess = (probability > 0.5).float()
        sure = (probability - 0.5).abs() > 0.3
        sure = (sure & ((logits > 0) == (before > 0))).float()

        for step in range(first, stop):
            torch.manual_seed(step)
            chosen = torch.randperm(len(index))[:0 if alone else 4]
            given = torch.randint(len(drawn), (2,)) if len(drawn) else torch.arange(0)
            output = tuned(features.batch(torch.cat([index[chosen], drawn[given]])))
            guesses, shown = output.split([len(chosen), len(given)])
            loss = F.binary_cross_entropy_with_logits(guesses, guess[chosen], reduction="none")
            loss = (loss * sure[chosen]).sum() / max(loss.numel(), 1)
            if len(drawn):
                loss = loss / 2 + decoder.loss(shown, targets[given]).mean()
                share = (step - begin) / (end - begin)  # the rate rises for a tenth, then falls
                optimizer.param_groups[0]["lr"] = rate * min(1, 10 * share + 0.1) * (1 - share)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return tuned.eval()


@torch.no_grad()
def look(decoder, features, index: torch.Tensor, blind: bool = False) -> torch.Tensor:
    """Return the logits of rows `index`, float32 [n, gh, gw]; `blind`: by the clip's cues alone."""
    logits = []
    for part in index.split(16):
        levels = features.batch(part)
        for norm, level in zip(getattr(decoder, "norms", ()), levels) if blind else ():
            level[:] = norm.mean  # which says nothing
        logits.append(decoder.eval()(levels).float())
    return torch.cat(logits)


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


def fit_window(image: torch.Tensor, target: torch.Tensor,
               radius: int = RADIUS) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit target = slope . image + offset round every pixel, with a penalty on the slope.

    image: [B, 3, h, w]; target: [B, 1, h, w]. Returns slope [B, 3, h, w], offset [B, 1, h, w].
    """
    mean, target_mean = box(image, radius), box(target, radius)
    pairs = image[:, :, None] * image[:, None]  # [B, 3, 3, h, w]
    covariance = box(pairs.flatten(1, 2), radius).view_as(pairs)
    covariance = covariance - mean[:, :, None] * mean[:, None]
    covariance = covariance.permute(0, 3, 4, 1, 2) + EPSILON * torch.eye(3, device=image.device)
    together = box(image * target, radius) - mean * target_mean  # [B, 3, h, w]
    slope = torch.linalg.solve(covariance, together.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return slope, target_mean - (slope * mean).sum(1, keepdim=True)


def box(x: torch.Tensor, radius: int = RADIUS) -> torch.Tensor:
    """Return the mean of the window round every pixel of [B, C, h, w], as far as it lies inside."""
    rows, columns = (x.new_ones(side, side).tril(radius).triu(-radius) for side in x.shape[2:])
    # on the CPU matrix products take a fifth to three fifths of avg_pool2d's time
    return (rows / rows.sum(1, keepdim=True)) @ x @ (columns / columns.sum(0))
