"""Upsampling along the frame's edges: against a plain loop over windows, and on a frame whose edge is known."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import guided


def slow_fit(image: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fit written from the paper's definition, a window at a time. image: [3, h, w]; target: [h, w]."""
    height, width = target.shape
    slope, offset = np.zeros((3, height, width)), np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            window = np.s_[max(0, y - guided.RADIUS):y + guided.RADIUS + 1, max(0, x - guided.RADIUS):x + guided.RADIUS + 1]
            colours, values = np.stack([channel[window].ravel() for channel in image]), target[window].ravel()
            spread = np.cov(colours, bias=True) + guided.EPSILON * np.eye(3)
            together = (colours * values).mean(1) - colours.mean(1) * values.mean()
            slope[:, y, x] = np.linalg.solve(spread, together)
            offset[y, x] = values.mean() - slope[:, y, x] @ colours.mean(1)
    return slope, offset


def test_the_fit_is_the_papers():
    image = torch.rand(1, 3, 11, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.randn(1, 1, 11, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope, offset = guided.fit(image, target)
    expected_slope, expected_offset = slow_fit(image[0].numpy(), target[0, 0].numpy())
    np.testing.assert_allclose(slope[0].numpy(), expected_slope, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(offset[0, 0].numpy(), expected_offset, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(96, 160), (97, 161)])
def test_a_coarse_mask_snaps_to_the_frames_edge(size):
    """An object of one colour on another, its mask known only to 16 pixels: refined, it is the object's own."""
    height, width = size
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[21:70, 37:118] = True
    frame = torch.where(mask, torch.tensor([200, 60, 40])[:, None, None], torch.tensor([40, 110, 60])[:, None, None]).to(torch.uint8)
    share = F.adaptive_avg_pool2d(mask[None, None].float(), (height // 16, width // 16))
    logits = torch.logit(share[0, 0], 0.02)
    plain = torch.sigmoid(F.interpolate(logits[None, None], size, mode="bilinear"))[0, 0] > 0.5
    refined = guided.guided_probabilities(logits, frame)
    assert refined.shape == size and refined.min() >= 0 and refined.max() <= 1

    def iou(prediction: torch.Tensor) -> float:
        return float((prediction & mask).sum() / (prediction | mask).sum())
    assert iou(plain) < 0.94 < 0.98 < iou(refined > 0.5)


def test_a_frame_without_edges_changes_nothing():
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    frame = torch.full((3, 48, 80), 90, dtype=torch.uint8)
    refined = guided.guided_probabilities(logits, frame)
    smooth = torch.sigmoid(F.interpolate(guided.box(guided.box(F.interpolate(logits[None, None], (12, 20), mode="bilinear"))), (48, 80),
                                         mode="bilinear"))[0, 0]
    torch.testing.assert_close(refined, smooth, rtol=0, atol=2e-3)
