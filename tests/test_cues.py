"""What a whole clip tells: against definitions, on clips whose answer is known, and kept beside the features."""
import numpy as np
import pytest
import torch
from helpers import write_features

import cues
import inference
import models
import resident
from data import open_features

CPU = torch.device("cpu")


def moving_clip(frames: int = 20, channels: int = 12, height: int = 16, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """A panning background of smooth random features, and an object of others that moves its own way. Returns level, mask."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, channels, 10, 24, generator=draw)
    world = torch.nn.functional.interpolate(coarse, (height + 4, width + 2 * frames), mode="bilinear")[0]
    own = torch.randn(channels, 5, 5, generator=draw) + 2 * torch.randn(channels, 1, 1, generator=draw)
    level, mask = torch.empty(frames, channels, height, width), torch.zeros(frames, height, width, dtype=torch.bool)
    for frame in range(frames):
        level[frame] = world[:, 2:2 + height, frame:frame + width]
        top, left = 3 + frame % 7, width - 7 - frame % 9
        level[frame, :, top:top + 5, left:left + 5] = own
        mask[frame, top:top + 5, left:left + 5] = True
    return level, mask


def auc(values: torch.Tensor, mask: torch.Tensor) -> float:
    """The chance that a position of the mask has a higher value than one outside."""
    inside, outside = values[mask], values[~mask]
    return float((inside[:, None] > outside).float().mean())


def test_distance_is_mahalanobis():
    level = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows, share = level.permute(0, 2, 3, 1).reshape(-1, 4).numpy(), weight.flatten().numpy()
    covariance = np.cov(rows.T, aweights=share, bias=True)
    covariance += 0.1 * np.diag(covariance).mean() * np.eye(4)
    off = rows - np.average(rows, axis=0, weights=share)
    expected = np.log(np.einsum("ij,jk,ik->i", off, np.linalg.inv(covariance), off) + 1e-6).reshape(3, 5, 6)
    np.testing.assert_allclose(cues.distance(level, weight).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("shift", [(0, 0), (2, -3), (-4, 5)])
def test_the_cameras_shift_is_found(shift):
    world = torch.nn.functional.normalize(torch.randn(40, 50, 6, generator=torch.Generator().manual_seed(0)), dim=2)
    first, second = world[10:26, 10:34], world[10 - shift[0]:26 - shift[0], 10 - shift[1]:34 - shift[1]]
    spectra = [torch.fft.rfft2(x[None], s=(32, 48), dim=(1, 2)) for x in (first, second)]
    assert cues.camera_shift(*spectra, 16, 24).tolist() == [list(shift)]


def test_an_object_that_moves_its_own_way_stands_out():
    level, mask = moving_clip()
    maps = cues.clip_cues(level)
    assert maps.shape == (20, cues.CUES, 16, 24) and maps.isfinite().all()
    torch.testing.assert_close(maps.mean((0, 2, 3)), torch.zeros(cues.CUES), rtol=0, atol=1e-4)
    assert [auc(maps[:, cue], mask) > 0.85 for cue in range(cues.CUES)] == [True] * cues.CUES, \
        [auc(maps[:, cue], mask) for cue in range(cues.CUES)]


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_clips_have_cues_too(frames):
    assert cues.clip_cues(moving_clip()[0][:frames]).isfinite().all()


def test_cues_are_kept_beside_the_features_and_made_anew_when_damaged(tmp_path, monkeypatch):
    write_features(tmp_path / "f", {"cat": 5, "dog": 4})
    folder = open_features(tmp_path / "f")
    level = next(iter(folder.meta["levels"]))
    loaded = resident.load_features(folder, [level], CPU)
    first = cues.with_cues(loaded, folder.meta["clips"], folder, [level]).levels[1]
    assert first.shape == (9, cues.CUES, *folder.meta["levels"][level][1:]) and first.dtype == torch.float16

    monkeypatch.setattr(cues, "make_cues", lambda *_: pytest.fail("made again"))
    assert torch.equal(cues.with_cues(loaded, folder.meta["clips"], folder, [level]).levels[1], first)
    monkeypatch.undo()
    file = tmp_path / "f" / f"cues.{level}.npy"
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    assert torch.equal(cues.with_cues(loaded, folder.meta["clips"], folder, [level]).levels[1], first)


def test_adapting_changes_a_copy_and_repeats_itself(tmp_path):
    write_features(tmp_path / "f", {"cat": 9})
    folder = open_features(tmp_path / "f")
    levels = list(folder.meta["levels"])
    torch.manual_seed(0)
    decoder = models.make_decoder("temporal", {level: tuple(folder.meta["levels"][level]) for level in levels}, folder.size).eval()
    loaded = models.look_at_clips("temporal", resident.load_features(folder, levels, CPU), folder.meta["clips"])
    with torch.no_grad():
        decoder.output.weight.mul_(40)  # sure of itself somewhere
    before = {key: value.clone() for key, value in decoder.state_dict().items()}
    tuned, again = (inference.adapt(decoder, loaded, torch.arange(9)).state_dict() for _ in range(2))
    assert all(torch.equal(value, before[key]) for key, value in decoder.state_dict().items())
    assert all(torch.equal(value, again[key]) for key, value in tuned.items())
    assert any(not torch.equal(value, before[key]) for key, value in tuned.items())
