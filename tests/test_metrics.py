"""vos/metrics.py against its slow reference, cases with a known answer, and the toolkit's rules."""
import json
import math

import numpy as np
import pytest
import reference_metrics as reference
import torch

from vos import metrics

SIZES = [(1, 1), (1, 9), (9, 1), (2, 2), (5, 63), (7, 64), (8, 65), (61, 129), (17, 200), (90, 31)]

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def random_masks(height: int, width: int, seed: int) -> np.ndarray:
    """Return bool masks [N, H, W]: empty, full, single pixels, cut by the frame, noise, blobs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    masks = [y < 0, y >= 0, y < (height + 1) // 2, y >= height // 2, x < (width + 1) // 2,
             x >= width // 2]
    for row, column in [(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1),
                        (height // 2, width // 2)]:
        masks.append((y == row) & (x == column))
    masks += [rng.random((height, width)) < share for share in (0.01, 0.3, 0.9)]
    for _ in range(6):
        distance = np.hypot(y - rng.uniform(0, height), x - rng.uniform(0, width))
        masks.append(distance < rng.uniform(0.1, 0.6) * max(height, width))
    return np.stack(masks)


def random_pairs(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions and masks, bool [N, H, W] each: every kind against every kind."""
    kinds = random_masks(height, width, 0), random_masks(height, width, 1)
    first, second = np.divmod(np.arange(len(kinds[0]) ** 2), len(kinds[0]))
    return kinds[0][first], kinds[1][second]


@pytest.mark.parametrize("height, width", SIZES)
def test_frames_agree_with_the_slow_reference(height, width):
    predictions, masks = random_pairs(height, width)
    expected = np.array([reference.frame_scores(p, m) for p, m in zip(predictions, masks)])
    scores = metrics.score_frames(metrics.pack(predictions), metrics.pack(masks), width)
    np.testing.assert_array_equal(np.stack(scores, axis=1), expected)


@pytest.mark.parametrize("radius", [1, 2, 3, 8, 13, 40, 64, 90])
def test_dilation_is_the_disk_at_any_radius(radius):
    """Also beyond the frame."""
    mask = np.random.default_rng(radius).random((40, 203)) < 0.001
    stride = -(-(203 + radius) // 8) * 8
    padded = np.zeros((40, stride), bool)
    padded[:, :203] = mask
    bits = int.from_bytes(np.packbits(padded).tobytes())
    near = metrics._dilate(bits, stride, radius) % (1 << 40 * stride)  # less what lies above
    near = np.frombuffer(near.to_bytes(40 * stride // 8), np.uint8).reshape(40, -1)
    found = np.unpackbits(near, axis=-1)[:, :203]
    np.testing.assert_array_equal(found, reference.dilate(mask, radius))


def test_frames_with_a_known_answer():
    empty, full = np.zeros((1, 480, 854), bool), np.ones((1, 480, 854), bool)
    square = empty.copy()
    square[0, 100:200, 300:400] = True
    moved = np.roll(square, 8, axis=2)  # as far as boundaries may lie apart at this size
    share = 10000 / 480 / 854
    for prediction, mask, iou, J, F in [
        (empty, empty, math.nan, 1, 1), (full, full, 1, 1, 1), (empty, square, 0, 0, 0),
        (square, empty, 0, 0, 0), (full, square, share, share, 0), (square, square, 1, 1, 1),
        (full, empty, 0, 0, 1),  # neither has a boundary
        (square, moved, 92 / 108, 92 / 108, 1),
    ]:
        scores = metrics.score_frames(metrics.pack(prediction), metrics.pack(mask), 854)
        np.testing.assert_allclose(np.concatenate(scores), [iou, J, F], rtol=1e-15, atol=0)
    further = np.roll(moved, 1, axis=2)
    assert metrics.score_frames(metrics.pack(square), metrics.pack(further), 854).F[0] < 1


def test_foreground_is_the_rounded_pixel():
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(metrics.foreground(pixels), np.round(pixels / 255) == 1)
    assert metrics.foreground(torch.from_numpy(pixels)).sum() == 128


def test_contest_iou_of_arrays_packed_arrays_and_tensors_is_one():
    predictions, masks = random_pairs(33, 77)
    expected = [reference.frame_scores(p, m)[0] for p, m in zip(predictions, masks)]
    packed = metrics.contest_iou(metrics.pack(predictions), metrics.pack(masks))
    tensors = metrics.contest_iou(torch.from_numpy(predictions), torch.from_numpy(masks))
    assert tensors.dtype == torch.float64
    for found in (metrics.contest_iou(predictions, masks), packed, tensors.numpy()):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_contest_iou_does_not_wait_for_the_device():
    predictions, masks = random_pairs(61, 129)
    on_device = torch.from_numpy(predictions).cuda(), torch.from_numpy(masks).cuda()
    metrics.contest_iou(*on_device)  # kernels are loaded here
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = metrics.contest_iou(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_array_equal(found.cpu().numpy(), metrics.contest_iou(predictions, masks))


def test_no_frames_give_no_scores():
    none = np.zeros((0, 4, 2), np.uint8)
    assert [len(scores) for scores in metrics.score_frames(none, none, 9)] == [0, 0, 0]
    assert metrics.summarize([], *metrics.score_frames(none, none, 9))["mean_iou"] is None


def test_what_does_not_fit_together_is_refused():
    packed = np.zeros((2, 4, 2), np.uint8)
    with pytest.raises(ValueError, match=r"expected uint8 \(2, 4, 1\), found uint8 \(2, 4, 2\)"):
        metrics.score_frames(packed, packed, 8)
    for other in (packed[:1], packed[0], packed > 0):
        with pytest.raises(ValueError, match="expected uint8"):
            metrics.score_frames(packed, other, 16)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7, 8, 25, 90, 255, 256, 257, 300, 1000])
def test_statistics_agree_with_the_slow_reference(frames):
    """Also beyond 256 frames, where the toolkit's own bin edges wrap."""
    rng = np.random.default_rng(frames)
    J, F = rng.random(frames), rng.random(frames)
    scores = metrics.summarize(["a"] * frames, J, J, F, "all")
    for measure, values in (("J", J), ("F", F)):
        expected = reference.clip_statistics(values.tolist())
        for statistic, value in zip(("mean", "recall", "decay"), expected):
            assert scores[f"{measure}_{statistic}"] == pytest.approx(value, abs=1e-12)


def test_decay_has_the_toolkits_bin_edges():
    for frames in range(1, 257):  # the toolkit's expression, where its uint8 holds
        edges = (np.round(np.linspace(1, frames, 5) + 1e-10) - 1).astype(np.uint8).astype(int)
        values = np.random.default_rng(frames).random(frames)
        first, last = values[edges[0]:edges[1] + 1], values[edges[3]:edges[4] + 1]
        assert metrics.decay(values) == pytest.approx(first.mean() - last.mean(), abs=1e-12)


def test_recall_counts_what_is_above_a_half():
    J = np.array([0.5, 0.6, 0.4, 0.9])
    assert metrics.summarize(["a"] * 4, J, J, J)["J_recall"] == 0.5


def test_the_set_is_a_mean_over_clips_and_the_contest_over_frames():
    J = np.array([1.0, 1, 1, 1, 1, 1, 0, 0])
    scores = metrics.summarize(["long"] * 6 + ["short"] * 2, J, J, J / 2)
    assert (scores["mean_iou"], scores["J_mean"], scores["F_mean"]) == (0.75, 0.5, 0.25)
    counts = {clip: of_clip["frames"] for clip, of_clip in scores["per_clip"].items()}
    assert (scores["frames"], counts) == (8, {"long": 6, "short": 2})


def test_davis2016_leaves_out_first_and_last_frames():
    clips = ["one"] + ["two"] * 2 + ["three"] * 3 + ["six"] * 6
    J = np.array([9, 9, 9, 9, 0.25, 9, 9, 0.5, 0.75, 0.75, 1.0, 9])
    scores = metrics.summarize(clips, J, J, J, "davis2016")
    assert (scores["protocol"], scores["frames"]) == ("davis2016", 5)
    assert scores["mean_iou"] == pytest.approx((0.25 + 0.5 + 0.75 + 0.75 + 1) / 5)
    assert scores["J_mean"] == pytest.approx((0.25 + 0.75) / 2)
    for clip in ("one", "two"):
        assert set(scores["per_clip"][clip].values()) == {0, None}
    expected = reference.clip_statistics([0.5, 0.75, 0.75, 1.0])[2]
    assert scores["per_clip"]["six"]["J_decay"] == pytest.approx(expected)
    json.dumps(scores, allow_nan=False)
    with pytest.raises(ValueError, match="all, davis2016, found davis2017"):
        metrics.summarize(clips, J, J, J, "davis2017")


def test_frames_left_out_as_nan_count_nowhere():
    J = np.array([math.nan, 1, 0.2, math.nan])
    scores = metrics.summarize(["a"] * 4, J, J, np.full(4, math.nan))
    assert (scores["mean_iou"], scores["J_mean"], scores["J_recall"]) == (0.6, 0.6, 0.5)
    assert scores["J_decay"] == pytest.approx(1 - 0.2)
    assert scores["F_mean"] is scores["F_recall"] is scores["F_decay"] is None
    json.dumps(scores, allow_nan=False)
