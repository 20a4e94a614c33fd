"""metrics.py against its slow reference, closed-form cases, and the toolkit's figures for 420 real frames."""
import json
import math
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import metrics
from tests import reference_metrics as reference

SHARED = Path(__file__).resolve().parents[2] / "shared"
SIZES = [(1, 1), (1, 9), (9, 1), (2, 2), (5, 63), (7, 64), (8, 65), (33, 127), (40, 128), (61, 129), (17, 200), (90, 31)]

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def random_masks(height: int, width: int, seed: int) -> np.ndarray:
    """Return bool masks [N, H, W] of every kind: blobs, noise, empty, full, single pixels, rectangles at the borders."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    masks = [np.zeros((height, width), bool), np.ones((height, width), bool)]
    for row, column in [(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1), (height // 2, width // 2)]:
        masks.append((y == row) & (x == column))
    masks += [y < (height + 1) // 2, y >= height // 2, x < (width + 1) // 2, x >= width // 2]
    masks += [rng.random((height, width)) < share for share in (0.01, 0.3, 0.9)]
    for _ in range(6):
        centre_y, centre_x = rng.uniform(0, height), rng.uniform(0, width)
        masks.append(np.hypot(y - centre_y, x - centre_x) < rng.uniform(0.1, 0.6) * max(height, width))
    return np.stack(masks)


def random_pairs(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions and masks, bool [N, H, W] each: every kind against every kind."""
    kinds = random_masks(height, width, seed), random_masks(height, width, seed + 1)
    first, second = np.divmod(np.arange(len(kinds[0]) ** 2), len(kinds[0]))
    return kinds[0][first], kinds[1][second]


@pytest.mark.parametrize("height, width", SIZES)
def test_frames_agree_with_the_slow_reference(height, width):
    predictions, masks = random_pairs(height, width)
    expected = np.array([reference.frame_scores(p, m) for p, m in zip(predictions, masks)])
    scores = metrics.score_frames(metrics.pack(predictions), metrics.pack(masks), width)
    np.testing.assert_array_equal(np.stack(scores, axis=1), expected)
    np.testing.assert_array_equal(metrics.contest_iou(metrics.pack(predictions), metrics.pack(masks)), expected[:, 0])
    np.testing.assert_array_equal(np.stack(metrics.score_frames(predictions, masks, width)), np.stack(scores))


@pytest.mark.parametrize("radius", [1, 2, 3, 8, 13, 40, 63, 64, 65, 150])
def test_dilation_is_the_disk_at_any_radius(radius):
    """Both word sizes, at radii beyond a word and beyond the frame."""
    rng = np.random.default_rng(radius)
    masks = rng.random((2, 75, 203)) < 0.001
    padded = np.zeros((2, 75, -(-(203 + radius) // 64) * 64), bool)
    padded[:, :, :203] = masks
    packed = np.packbits(padded, axis=-1)
    expected = np.stack([reference.dilate(mask, radius) for mask in masks])
    near = metrics._dilate(packed.view(">u8").astype(np.uint64), radius)
    near_bytes = near.astype(">u8").view(np.uint8)
    np.testing.assert_array_equal(np.unpackbits(near_bytes, axis=-1)[:, :, :203], expected)
    near = metrics._dilate(torch.from_numpy(packed), radius).numpy()
    np.testing.assert_array_equal(np.unpackbits(near, axis=-1)[:, :, :203], expected)


def test_frames_with_a_known_answer():
    empty, full = np.zeros((1, 480, 854), bool), np.ones((1, 480, 854), bool)
    square, moved = empty.copy(), empty.copy()
    square[0, 100:200, 300:400] = True
    moved[0, 100:200, 308:408] = True  # 8 pixels right: as far as the boundaries may lie apart at this size
    further = np.roll(moved, 1, axis=2)
    for prediction, mask, iou, J, F in [
        (empty, empty, math.nan, 1, 1), (full, full, 1, 1, 1), (empty, square, 0, 0, 0), (square, empty, 0, 0, 0),
        (full, square, 10000 / 480 / 854, 10000 / 480 / 854, 0), (full, empty, 0, 0, 1),  # neither has a boundary
        (square, square, 1, 1, 1), (square, moved, 92 / 108, 92 / 108, 1),
    ]:
        scores = metrics.score_frames(prediction, mask, 854)
        np.testing.assert_allclose([scores.iou[0], scores.J[0], scores.F[0]], [iou, J, F], rtol=1e-15, atol=0)
    assert metrics.boundary_radius(480, 854) == 8
    assert metrics.score_frames(square, further, 854).F[0] < 1
    assert metrics.score_frames(square, further, 854, bound_th=9).F[0] == 1


def test_foreground_is_the_rounded_pixel():
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(metrics.foreground(pixels), np.round(pixels / 255) == 1)
    assert metrics.foreground(torch.from_numpy(pixels)).sum() == 128


@pytest.mark.parametrize("width", [1, 7, 8, 9, 130])
def test_tensors_pack_as_arrays_do(width):
    masks = np.random.default_rng(width).random((3, 4, width)) < 0.5
    np.testing.assert_array_equal(metrics.pack(torch.from_numpy(masks)).numpy(), np.packbits(masks, axis=-1))
    np.testing.assert_array_equal(metrics.pack(masks), np.packbits(masks, axis=-1))


@pytest.mark.parametrize("height, width", SIZES)
def test_the_code_for_devices_counts_what_the_code_for_arrays_does(height, width, monkeypatch):
    monkeypatch.setattr(metrics, "TENSOR_CHUNK", 7)  # several chunks, the last one short
    predictions, masks = (metrics.pack(each) for each in random_pairs(height, width, seed=5))
    radius = metrics.boundary_radius(height, width)
    counts = metrics._count_tensors(torch.from_numpy(predictions), torch.from_numpy(masks), width, radius)
    np.testing.assert_array_equal(counts.numpy(), metrics._count_arrays(predictions, masks, width, radius))


@pytest.mark.parametrize("code_for", ["cpu", "device"])
@pytest.mark.parametrize("packed", [True, False])
def test_tensors_score_as_arrays_do(code_for, packed, monkeypatch):
    if code_for == "device":
        monkeypatch.setattr(metrics, "_on_cpu", lambda masks: False)  # what runs on an accelerator, here
    predictions, masks = (metrics.pack(each) if packed else each for each in random_pairs(40, 77))
    expected = metrics.score_frames(predictions, masks, 77)
    found = metrics.score_frames(torch.from_numpy(predictions), torch.from_numpy(masks), 77)
    for name, values in found._asdict().items():
        assert values.dtype == torch.float64
        np.testing.assert_array_equal(values.numpy(), getattr(expected, name), err_msg=name)
    iou = metrics.contest_iou(torch.from_numpy(predictions), torch.from_numpy(masks))
    np.testing.assert_array_equal(iou.numpy(), expected.iou)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_scores_as_the_cpu_does_without_waiting():
    predictions, masks = random_pairs(61, 129)
    expected = np.stack(metrics.score_frames(predictions, masks, 129))
    on_device = torch.from_numpy(predictions).cuda(), torch.from_numpy(masks).cuda()
    metrics.score_frames(*on_device, 129)  # kernels are loaded here
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores, iou = metrics.score_frames(*on_device, 129), metrics.contest_iou(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_array_equal(torch.stack(scores).cpu().numpy(), expected)
    np.testing.assert_array_equal(iou.cpu().numpy(), expected[0])


def test_no_frames_give_no_scores():
    for none in (np.zeros((0, 4, 2), np.uint8), torch.zeros((0, 4, 2), dtype=torch.uint8)):
        assert [len(scores) for scores in metrics.score_frames(none, none, 9)] == [0, 0, 0]
        assert len(metrics.contest_iou(none, none)) == 0


def test_what_does_not_fit_together_is_refused():
    packed = np.zeros((2, 4, 2), np.uint8)
    with pytest.raises(ValueError, match="expected 1 columns of uint8 for a width of 8, found 2"):
        metrics.score_frames(packed, packed, 8)
    with pytest.raises(ValueError, match="expected 3 columns of bool for a width of 3, found 2"):
        metrics.score_frames(packed > 0, packed > 0, 3)
    for other in (packed[:1], packed[0], packed > 0, packed.astype(np.float32), torch.from_numpy(packed)):
        with pytest.raises(ValueError, match="expected"):
            metrics.score_frames(packed, other, 16)
        with pytest.raises(ValueError, match="expected"):
            metrics.contest_iou(packed, other)
    with pytest.raises(ValueError, match="bound_th above 0"):
        metrics.score_frames(packed, packed, 16, bound_th=0)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7, 8, 25, 90, 255, 256, 257, 300, 1000])
def test_statistics_agree_with_the_slow_reference(frames):
    """Also beyond 256 frames, where the toolkit's own bin edges wrap."""
    rng = np.random.default_rng(frames)
    J, F = rng.random(frames), rng.random(frames)
    scores = metrics.summarize(["a"] * frames, J, J, F, "all")
    for measure, values in (("J", J), ("F", F)):
        for statistic, expected in zip(("mean", "recall", "decay"), reference.clip_statistics(values.tolist())):
            assert scores[f"{measure}_{statistic}"] == pytest.approx(expected, abs=1e-12)
            assert scores["per_clip"]["a"][f"{measure}_{statistic}"] == scores[f"{measure}_{statistic}"]


def test_decay_has_the_toolkits_bin_edges():
    for frames in range(1, 257):  # the toolkit's expression, where its uint8 holds
        edges = (np.round(np.linspace(1, frames, 5) + 1e-10) - 1).astype(np.uint8).astype(int)
        values = np.random.default_rng(frames).random(frames)
        expected = values[edges[0]:edges[1] + 1].mean() - values[edges[3]:edges[4] + 1].mean()
        assert metrics.decay(values) == pytest.approx(expected, abs=1e-12)


def test_recall_counts_what_is_above_a_half():
    J = np.array([0.5, 0.6, 0.4, 0.9])
    assert metrics.summarize(["a"] * 4, J, J, J)["J_recall"] == 0.5


def test_the_set_is_a_mean_over_clips_and_the_contest_over_frames():
    clips = ["long"] * 6 + ["short"] * 2
    J = np.array([1, 1, 1, 1, 1, 1, 0, 0], dtype=float)
    scores = metrics.summarize(clips, J, J, J / 2, "all")
    assert (scores["mean_iou"], scores["J_mean"], scores["F_mean"]) == (0.75, 0.5, 0.25)
    assert (scores["frames"], scores["per_clip"]["long"]["frames"], scores["per_clip"]["short"]["frames"]) == (8, 6, 2)
    assert list(scores["per_clip"]) == ["long", "short"]


def test_davis2016_leaves_out_first_and_last_frames():
    clips = ["one"] + ["two"] * 2 + ["three"] * 3 + ["six"] * 6
    J = np.array([9, 9, 9, 9, 0.25, 9, 9, 0.5, 0.75, 0.75, 1.0, 9])
    scores = metrics.summarize(clips, J, J, J, "davis2016")
    assert scores["protocol"] == "davis2016"
    assert scores["frames"] == 5
    assert scores["mean_iou"] == pytest.approx((0.25 + 0.5 + 0.75 + 0.75 + 1) / 5)
    assert scores["J_mean"] == pytest.approx((0.25 + 0.75) / 2)
    for clip in ("one", "two"):
        assert set(scores["per_clip"][clip].values()) == {0, None}
    assert scores["per_clip"]["three"]["J_mean"] == 0.25
    assert scores["per_clip"]["six"]["J_decay"] == pytest.approx(reference.clip_statistics([0.5, 0.75, 0.75, 1.0])[2])
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
@pytest.mark.parametrize("frames", [0, 1, 2, 3, 4, 5])
def test_short_and_empty_clips_make_json_without_warnings(protocol, frames):
    empty = np.zeros((frames, 6, 1), np.uint8)
    scores = metrics.summarize(["a"] * frames, *metrics.score_frames(empty, empty, 7), protocol)
    json.dumps(scores, allow_nan=False)
    assert scores["mean_iou"] is None  # every frame is empty in both: none has a contest IoU
    kept = frames if protocol == "all" else max(frames - 2, 0)
    assert scores["frames"] == kept
    assert scores["J_mean"] == (1 if kept else None)


def test_frames_left_out_as_nan_count_nowhere():
    J = np.array([math.nan, 1, 0.2, math.nan])
    scores = metrics.summarize(["a"] * 4, J, J, np.full(4, math.nan))
    assert (scores["mean_iou"], scores["J_mean"], scores["J_recall"]) == (0.6, 0.6, 0.5)
    assert scores["J_decay"] == pytest.approx(1 - 0.2)
    assert scores["F_mean"] is scores["F_recall"] is scores["F_decay"] is None
    json.dumps(scores, allow_nan=False)


def test_summaries_refuse_unknown_protocols_and_missing_scores():
    with pytest.raises(ValueError, match="all, davis2016, found davis2017"):
        metrics.summarize(["a"], [1.0], [1.0], [1.0], "davis2017")
    with pytest.raises(ValueError, match="as many scores as frames"):
        metrics.summarize(["a", "a"], [1.0], [1.0], [1.0])


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the reference figures in ../shared")
def test_real_frames_agree_with_the_official_toolkit():
    """420 predictions of a real model, scored by the toolkit: every frame, every clip, and the whole."""
    figures = json.loads((SHARED / "reference" / "notebook-val.json").read_text())
    frames = figures["frames"]
    predictions = [iio.imread(SHARED / "reference" / "notebook-val" / f"{frame['index']:05d}.png") for frame in frames]
    annotations = [iio.imread(SHARED / "davis" / frame["annotation"]) for frame in frames]
    predictions, masks = (metrics.pack(metrics.foreground(np.stack(each))) for each in (predictions, annotations))
    scores = metrics.score_frames(predictions, masks, 854)
    for name, values in zip(("contest_iou", "J", "F"), scores):
        np.testing.assert_allclose(values, [frame[name] for frame in frames], rtol=0, atol=1e-9, err_msg=name)

    summary = metrics.summarize([frame["clip"] for frame in frames], *scores, "all")
    assert summary["mean_iou"] == pytest.approx(figures["contest_mean_iou"], abs=1e-9)
    assert {key: summary[key] for key in figures["overall"]} == pytest.approx(figures["overall"], abs=1e-9)
    assert summary["per_clip"].keys() == figures["per_clip"].keys()
    for clip, expected in figures["per_clip"].items():
        assert {key: summary["per_clip"][clip][key] for key in expected} == pytest.approx(expected, abs=1e-9), clip
