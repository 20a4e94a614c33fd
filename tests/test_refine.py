"""A decoder adapted to a clip, masks upsampled along edges: against loops and known answers."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import write_features

import data
import models
from vos import refine


def test_the_fit_is_the_papers_a_window_at_a_time():
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 11, 14, generator=draw, dtype=torch.float64)
    target = torch.randn(1, 1, 11, 14, generator=draw, dtype=torch.float64)
    slope, offset = refine.fit_window(image, target)
    for y, x in np.ndindex(11, 14):
        rows = slice(max(0, y - refine.RADIUS), y + refine.RADIUS + 1)
        columns = slice(max(0, x - refine.RADIUS), x + refine.RADIUS + 1)
        colours = image[0, :, rows, columns].flatten(1).numpy()
        values = target[0, 0, rows, columns].flatten().numpy()
        spread = np.cov(colours, bias=True) + refine.EPSILON * np.eye(3)
        together = (colours * values).mean(1) - colours.mean(1) * values.mean()
        expected = np.linalg.solve(spread, together)
        np.testing.assert_allclose(slope[0, :, y, x], expected, rtol=1e-6, atol=1e-6)
        rest = values.mean() - expected @ colours.mean(1)
        np.testing.assert_allclose(offset[0, 0, y, x], rest, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(96, 160), (97, 161)])
def test_a_coarse_mask_snaps_to_the_frames_edge(size):
    """A mask known only to 16 pixels, in a frame of two colours, becomes the object's own."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[21:70, 37:118] = True
    colours = torch.tensor([[40, 110, 60], [200, 60, 40]], dtype=torch.uint8)
    share = F.adaptive_avg_pool2d(mask[None].float(), (size[0] // 16, size[1] // 16))[0]
    refined = refine.guided_probabilities(share.logit(0.02), colours[mask.long()].permute(2, 0, 1))
    plain = F.interpolate(share.logit(0.02)[None, None], size, mode="bilinear")[0, 0] > 0
    assert refined.shape == size and refined.min() >= 0 and refined.max() <= 1
    iou = [float((found & mask).sum() / (found | mask).sum()) for found in (plain, refined > 0.5)]
    assert iou[0] < 0.94 < 0.98 < iou[1]


def test_adapting_changes_a_copy_and_repeats_itself(tmp_path):
    write_features(tmp_path / "f", {"cat": 9}, cued=True)
    features = data.load_features(data.open_features(tmp_path / "f"), cues=True)
    decoder = models.Temporal(features.folder.shapes, features.folder.size).eval()
    with torch.no_grad():
        decoder.output.weight.mul_(40)  # sure of itself somewhere
    before = {key: value.clone() for key, value in decoder.state_dict().items()}
    drawn, targets = torch.tensor([3]), torch.rand(1, *decoder.grid)
    tuned, again = (refine.adapt(decoder, features, features.index, drawn, targets, 5).state_dict()
                    for _ in range(2))
    for key, value in decoder.state_dict().items():
        assert torch.equal(value, before[key]) and torch.equal(tuned[key], again[key])
    assert any(not torch.equal(value, before[key]) for key, value in tuned.items())


def test_adapting_learns_what_the_cues_alone_show_too(tmp_path, monkeypatch):
    write_features(tmp_path / "f", {"cat": 9}, cued=True)
    features = data.load_features(data.open_features(tmp_path / "f"), cues=True)
    decoder = models.Temporal(features.folder.shapes, features.folder.size)
    blind = refine.look(decoder, features, features.index, blind=True)
    for level in features.levels[:len(decoder.norms)]:
        level.mul_(3)  # is not looked at
    assert torch.equal(blind, refine.look(decoder, features, features.index, blind=True))

    def learn(other: float) -> float:
        """Return how far the bias moves where the cues alone show this many times the logits."""
        own = refine.look(decoder, features, features.index[:5]) * 100  # sure of itself
        monkeypatch.setattr(refine, "MOST", 5)  # of 9 frames
        monkeypatch.setattr(refine, "look", lambda *_, blind=False: own * other if blind else own)
        tuned = refine.adapt(decoder, features, features.index, *[torch.arange(0)] * 2, 2)
        monkeypatch.undo()
        return (tuned.output.bias - decoder.output.bias).abs().item()
    assert learn(1) > 5e-4 > 1e-5 > learn(-1)  # the weights decay a little
