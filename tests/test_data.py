"""data.py: a feature folder is read as it was written, or refused by name; targets; batches."""
import warnings

import numpy as np
import pytest
import torch
from helpers import change_json, cut, flip, sign, write_features, write_json

import data
from vos.inputs import BadInput

LEVELS = {"s32": (6, 3, 4), "s16": (4, 7, 9)}
FINE = "features.s16.npy"
CLIPS = np.repeat(["a", "b", "c", "d", "e"], [3, 1, 5, 2, 4])


@pytest.fixture
def folder(tmp_path):
    write_features(tmp_path / "features", {"cat": 3, "dog": 2}, levels=LEVELS, cued=True)
    return tmp_path / "features"


def load(folder, *args, **flags) -> data.Features:
    return data.load_features(data.open_features(folder), *args, **flags)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("levels", [LEVELS, {"s16": (4, 7, 9)}])
@pytest.mark.parametrize("resident", ["device", "disk", None])
def test_reads_what_numpy_wrote_wherever_it_is_kept(tmp_path, dtype, levels, resident):
    features, masks = write_features(tmp_path / "f", {"cat": 3, "dog": 2}, size=(21, 30),
                                     levels=levels, dtype=dtype)
    loaded = load(tmp_path / "f", resident=resident)
    assert loaded.names == list(levels) and loaded.index.tolist() == [0, 1, 2, 3, 4]
    index = torch.tensor([4, 0, 4])
    for level, tensor, batch in zip(levels, loaded.levels, loaded.batch(index), strict=True):
        assert tensor.dtype == getattr(torch, dtype) and batch.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), features[level])
        np.testing.assert_array_equal(batch.numpy(), features[level][[4, 0, 4]].astype(np.float32))
    np.testing.assert_array_equal(data.unpack(loaded.masks, 30).numpy(), masks)


def test_cues_come_after_the_levels(folder):
    loaded = load(folder, ["s16"], cues=True)
    assert [level.shape[1] for level in loaded.levels] == [4, 5]
    np.testing.assert_array_equal(loaded.levels[1].numpy(), np.load(folder / "cues.s16.npy"))


def test_only_labelled_rows_count(folder, tmp_path):
    change_json(folder / "meta.json", labelled=[True, False, False, True, True])
    assert load(folder).index.tolist() == [0, 3, 4]
    assert load(folder, labelled=False).index.tolist() == [0, 1, 2, 3, 4]
    write_features(tmp_path / "plain", {"cat": 2}, annotated=False)
    assert load(tmp_path / "plain", labelled=False).masks is None
    with pytest.raises(BadInput, match="plain: has no masks, and this step needs annotations"):
        load(tmp_path / "plain")


def change_meta(**changes):
    return lambda folder: change_json(folder / "meta.json", **changes)


def resave(name, change):
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


BROKEN = {
    "no folder": (lambda f: f.rename(f.with_name("away")), "features: no such feature folder"),
    "no meta.json": (lambda f: (f / "meta.json").unlink(), "meta.json: no such file"),
    "meta.json cut": (lambda f: cut(f / "meta.json"), "meta.json: expected a JSON object"),
    "another format": (change_meta(format=1), "meta.json: format 1, expected 2; make "),
    "no featurizer": (change_meta(featurizer=...), "meta.json: 'featurizer' is missing"),
    "no levels": (change_meta(levels={}), "meta.json: "),
    "a level below 0": (change_meta(levels={"s32": [6, 3, -4], "s16": [4, 7, 9]}), "meta.json"),
    "a level that leaves": (change_meta(levels={"../s32": [6, 3, 4]}), "meta.json"),
    "a name too few": (change_meta(names=["0"] * 4), "meta.json"),
    "sizes of one frame": (change_meta(sizes=[[40, 60]]), "meta.json: "),
    "views that do not add up": (change_meta(views=["mirror"]), "meta.json: "),
    "labels of one frame": (change_meta(labelled=[True]), "meta.json: "),
    "no digest": (change_meta(sha256={}), "meta.json"),
    "no array": (lambda f: (f / FINE).unlink(), f"{FINE}: no such file"),
    "no cues": (lambda f: (f / "cues.s16.npy").unlink(), "cues.s16.npy: no such file"),
    "array of text": (lambda f: (f / FINE).write_text("text"), f"{FINE}: "),
    "array cut": (lambda f: cut(f / FINE, 0.9), f"{FINE}: "),
    "a row too few": (resave(FINE, lambda a: a[:-1]), "[4, 4, 7, 9]"),
    "float64": (resave(FINE, lambda a: a.astype(float)), "float64"),
    "objects": (resave(FINE, lambda a: a.astype(object)), f"{FINE}: "),
    "columns first": (resave(FINE, np.asfortranarray), f"{FINE}: "),
    "masks too wide": (change_meta(size=[40, 65]), "[5, 40, 8]"),
    "no paths.json": (lambda f: (f / "paths.json").unlink(), "paths.json: no such file"),
    "a path too few": (lambda f: write_json(f / "paths.json", {"raw": {"0": "a"}}), "paths.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_folder_that_disagrees_with_itself_is_refused(folder, case):
    harm, words = BROKEN[case]
    with warnings.catch_warnings(action="ignore"):
        harm(folder)
    with pytest.raises(BadInput) as caught:
        data.open_features(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("resident", ["device", "disk"])
@pytest.mark.parametrize("name", ["features.s32.npy", "cues.s16.npy", "masks.npy"])
def test_one_flipped_bit_is_found(folder, name, resident):
    load(folder, cues=True, resident=resident)
    flip(folder / name)
    with pytest.raises(BadInput, match=rf"{name}: its SHA-256"):
        load(folder, cues=True, resident=resident)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_that_are_no_numbers_are_refused(tmp_path, value, dtype):
    features, _ = write_features(tmp_path / "f", {"cat": 5}, dtype=dtype)
    features["s32"][3, 2, 1, 1] = value
    np.save(tmp_path / "f/features.npy", features["s32"])
    sign(tmp_path / "f")
    with pytest.raises(BadInput, match=r"features\.npy: .*NaN or infinity"):
        load(tmp_path / "f")


def draw_runs(rng: np.random.Generator, pixels: int, groups: int) -> torch.Tensor:
    """Return the group of every pixel: `groups` runs of random lengths, none empty."""
    starts = np.sort(rng.permutation(np.arange(1, pixels))[:groups - 1])
    return torch.from_numpy(np.searchsorted(starts, np.arange(pixels), side="right"))


@pytest.mark.parametrize("size, grid", [((7, 9), (3, 4)), ((33, 16), (33, 1)), ((1, 1), (1, 1)),
                                        ((600, 20), (2, 3))])
def test_shares_of_foreground_are_counted_exactly(size, grid):
    rng = np.random.default_rng(0)
    masks = rng.random((20, *size)) < rng.random((20, 1, 1))
    masks[0], masks[1] = False, True  # 1: a byte a column would overflow in cells of over 255 rows
    rows, columns = (draw_runs(rng, *pair) for pair in zip(size, grid))
    packed = torch.from_numpy(np.packbits(masks, axis=2))
    index = torch.tensor([0, 1, *range(3, 20)])
    features = data.Features([], [], torch.device("cpu"), index, packed)
    pooled = data.pool_masks(features, (rows, columns)).numpy()
    assert pooled.shape == (20, *grid) and pooled.dtype == np.float32
    assert not pooled[2].any()  # does not count
    for number in index.tolist():
        for row, column in np.ndindex(grid):
            cell = masks[number][np.ix_(rows.numpy() == row, columns.numpy() == column)]
            assert pooled[number, row, column] == np.float32(cell.sum()) / np.float32(cell.size)


@pytest.mark.parametrize("order", ["given", "shuffled"])
@pytest.mark.parametrize("batch", [1, 4, 15, 32])
def test_an_epoch_visits_every_frame_once(order, batch):
    steps, seen = -(-15 // batch), []
    for epoch in range(3):
        parts = [data.batch_order(CLIPS, batch, order, 7, epoch * steps + i) for i in range(steps)]
        assert max(map(len, parts[:-1]), default=batch) == batch
        seen.append(np.concatenate(parts).tolist())
        assert sorted(seen[-1]) == list(range(15))
    assert (seen[0] == seen[1] == list(range(15))) == (order == "given")


@pytest.mark.parametrize("order", ["shuffled", "balanced"])
def test_batches_depend_on_seed_and_step_alone(order):
    once = [data.batch_order(CLIPS, 4, order, 3, step).tolist() for step in range(9)]
    np.random.seed(99)
    for step in (8, 2, 5):  # whatever was asked before
        assert data.batch_order(CLIPS, 4, order, 3, step).tolist() == once[step]
    assert data.batch_order(CLIPS, 4, order, 4, 0).tolist() != once[0] != once[4]


def test_balanced_batches_take_clips_in_turn_whatever_their_length():
    for step in range(20):
        drawn = CLIPS[data.batch_order(CLIPS, 10, "balanced", 0, step)]
        assert sorted(drawn) == sorted("abcde" * 2)


def test_clips_are_held_out_whole_with_their_views_which_are_not_validated_on(tmp_path):
    clips = {"cat": 3, "dog": 2, "elk": 4}
    both = clips | {f"{clip}@mirror": frames for clip, frames in clips.items()}
    write_features(tmp_path / "f", both, views=["mirror"])
    kept, held = load(tmp_path / "f").hold_out(["dog"])
    assert held.index.tolist() == [3, 4]
    assert kept.index.tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 14, 15, 16, 17]


@pytest.mark.parametrize("groups", [2, 3, 5])
def test_groups_part_the_clips(groups):
    drawn = data.draw_clips(CLIPS, groups, 0)
    assert sorted(np.concatenate(drawn)) == list("abcde")
    assert {len(group) for group in drawn} <= {5 // groups, -(-5 // groups)}
    assert any(data.draw_clips(CLIPS, groups, seed) != drawn for seed in range(1, 9))
