"""vos/metrics.py against its slow reference, cases with a known answer, and the toolkit's rules."""
import math

import numpy as np
import pytest
import reference_metrics as reference

from vos import metrics

SIZES = [(1, 1), (1, 9), (9, 1), (5, 63), (8, 65), (61, 129), (17, 200), (90, 31), (30, 1200)]

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def random_masks(height: int, width: int, seed: int) -> np.ndarray:
    """Return bool masks [N, H, W]: empty, full, single pixels, cut by the frame, noise, blobs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    masks = [y < 0, y >= 0, y < (height + 1) // 2, x >= width // 2]
    for row, column in [(0, width - 1), (height - 1, 0), (height // 2, width // 2)]:
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


def score(predictions: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return contest IoU, J and F [3, N] of bool masks [N, H, W]."""
    return np.array([metrics.score_frame(p, m) for p, m in zip(predictions, masks)], float).T


@pytest.mark.parametrize("height, width", SIZES)
def test_frames_agree_with_the_slow_reference(height, width):
    predictions, masks = random_pairs(height, width)
    expected = np.array([reference.frame_scores(p, m) for p, m in zip(predictions, masks)])
    np.testing.assert_array_equal(score(predictions, masks).T, expected)


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
        np.testing.assert_allclose(score(prediction, mask)[:, 0], [iou, J, F], rtol=1e-15, atol=0)
    assert score(square, np.roll(moved, 1, axis=2))[2, 0] < 1


@pytest.mark.parametrize("frames", [*range(1, 9), 25, 90, 255, 256, 257, 1000])
def test_statistics_agree_with_the_slow_reference(frames):
    J, F = np.random.default_rng(frames).random((2, frames))
    scores = metrics.summarize(["a"] * frames, J, J, F, "all")
    for measure, values in (("J", J), ("F", F)):
        expected = reference.clip_statistics(values.tolist())
        for statistic, value in zip(("mean", "recall", "decay"), expected):
            assert scores[f"{measure}_{statistic}"] == pytest.approx(value, abs=1e-12)


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
    assert (scores["protocol"], scores["frames"], scores["mean_iou"]) == ("davis2016", 5, 0.65)
    assert scores["J_mean"] == (0.25 + 0.75) / 2
    for clip in ("one", "two"):
        assert set(scores["per_clip"][clip].values()) == {0, None}


def test_frames_without_an_iou_count_in_no_mean_iou_and_recall_is_above_a_half():
    iou, J = np.array([math.nan, 1, 0.2, math.nan]), np.array([1, 1, 0.2, 0.5])
    scores = metrics.summarize(["a"] * 4, iou, J, J)
    assert (scores["mean_iou"], scores["J_mean"], scores["J_recall"]) == (0.6, 0.675, 0.5)
    assert metrics.summarize(["a"], iou[:1], J[:1], J[:1])["mean_iou"] is None
