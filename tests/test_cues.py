"""What a whole clip tells: against definitions, on clips whose answer is known."""
import numpy as np
import pytest
import torch

from vos import cues, motion


def make_moving_clip(frames: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a panning background of random features with an object that moves its own way.

    Its level [T, 12, 16, 24] and mask, bool [T, 16, 24].
    """
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 12, 10, 24, generator=draw)
    world = torch.nn.functional.interpolate(coarse, (20, 24 + 2 * frames), mode="bilinear")[0]
    own = torch.randn(12, 5, 5, generator=draw) + 2 * torch.randn(12, 1, 1, generator=draw)
    level, mask = torch.empty(frames, 12, 16, 24), torch.zeros(frames, 16, 24, dtype=torch.bool)
    for frame in range(frames):
        level[frame] = world[:, 2:18, frame:frame + 24]
        top, left = 3 + frame % 7, 17 - frame % 9
        level[frame, :, top:top + 5, left:left + 5] = own
        mask[frame, top:top + 5, left:left + 5] = True
    return level, mask


def test_distance_is_mahalanobis():
    draw = torch.Generator().manual_seed(0)
    level = torch.randn(3, 4, 5, 6, generator=draw, dtype=torch.float64)
    inside = torch.rand(3, 5, 6, generator=draw) > 0.5
    places = level.permute(0, 2, 3, 1)
    rows, chosen = places.reshape(-1, 4).numpy(), places[inside].numpy()
    covariance = np.cov(chosen.T, bias=True)
    covariance += 0.1 * np.diag(covariance).mean() * np.eye(4)
    off = rows - chosen.mean(0)
    squares = np.einsum("ij,jk,ik->i", off, np.linalg.inv(covariance), off)
    expected = np.log(squares + 1e-6).reshape(3, 5, 6)
    found = cues.distance(torch.from_numpy(rows), inside)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("down, right", [(0, 0), (2, -3), (-4, 5)])
def test_the_cameras_shift_is_found(down, right):
    world = torch.randn(40, 50, 6, generator=torch.Generator().manual_seed(0))
    world = torch.nn.functional.normalize(world, dim=2)
    first, second = world[10:26, 10:34], world[10 - down:26 - down, 10 - right:34 - right]
    spectra = [torch.fft.rfft2(x[None], s=(32, 48), dim=(1, 2)) for x in (first, second)]
    assert cues.camera_shift(*spectra, 16, 24).tolist() == [[down, right]]


def test_an_object_that_moves_its_own_way_stands_out():
    level, mask = make_moving_clip()
    maps = cues.clip_cues(level, mask[:, None].float())
    assert maps.shape == (20, 5, 16, 24) and maps.isfinite().all()
    torch.testing.assert_close(maps.mean((0, 2, 3)), torch.zeros(5), rtol=0, atol=1e-4)
    for cue in maps.unbind(1):  # the chance that the object has more of it than the background
        assert (cue[mask][:, None] > cue[~mask]).float().mean() > 0.85


@pytest.mark.parametrize("level", [
    make_moving_clip(1)[0], make_moving_clip(3)[0], torch.zeros(5, 3, 7, 9),
    torch.randn(2, 3, 1, 1), make_moving_clip(1)[0].expand(6, -1, -1, -1)],
    ids=["1 frame", "3", "nothing", "1x1", "static"])
def test_short_static_and_tiny_clips_have_cues_too(level):
    frames = torch.nn.functional.interpolate(level[:, :3], scale_factor=2)
    assert cues.clip_cues(level, motion.own_motion(frames)).isfinite().all()


def make_textured(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return colours [3, height, width], 0 to 1, that vary over a few pixels and over many."""
    draw = torch.Generator().manual_seed(seed)
    return sum(torch.nn.functional.interpolate(
        torch.rand(1, 3, height // step, width // step, generator=draw), (height, width),
        mode="bilinear")[0] for step in (3, 12)) / 2


@pytest.mark.parametrize("down, right", [(0, 0), (1.5, -2), (-6, 9)])
def test_the_flow_is_the_shift(down, right):
    world = make_textured(120, 160)[None]
    y, x = torch.meshgrid(torch.arange(30.0, 90), torch.arange(40.0, 120), indexing="ij")

    def look(down: float, right: float) -> torch.Tensor:
        place = torch.stack([(x + right) * 2 / 159 - 1, (y + down) * 2 / 119 - 1], 2)
        return torch.nn.functional.grid_sample(world, place[None], align_corners=True)

    pairs = list(zip(motion.pyramid(look(0, 0)), motion.pyramid(look(-down, -right))))
    found = motion.flow(pairs)[0, :, 16:-16, 20:-20]
    expected = torch.tensor([float(right), float(down)])[:, None, None].expand_as(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.2)


def test_what_moves_otherwise_than_the_camera_stands_out():
    """A camera that pans and zooms, and a square that goes its own way."""
    world, own = make_textured(200, 300), make_textured(24, 24, seed=1)
    frames, mask = torch.empty(6, 3, 96, 128), torch.zeros(6, 48, 64, dtype=torch.bool)
    for frame in range(6):
        side = 96 + 2 * frame
        shown = world[:, 20:20 + side, 30 + 3 * frame:30 + 3 * frame + side * 4 // 3]
        frames[frame] = torch.nn.functional.interpolate(shown[None], (96, 128), mode="bilinear")[0]
        top, left = 30 + 2 * frame, 80 - 5 * frame
        frames[frame, :, top:top + 24, left:left + 24] = own
        mask[frame, top // 2:top // 2 + 12, left // 2:left // 2 + 12] = True
    moved = motion.own_motion(frames)[:, 0]
    assert moved.shape == (6, 48, 64)
    assert (moved[mask][:, None] > moved[~mask]).float().mean() > 0.95
