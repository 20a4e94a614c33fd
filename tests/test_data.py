"""data.py and resident.py: a feature folder is read as it was written, or refused by name; targets are exact; batches follow the seed."""
import numpy as np
import pytest
import torch
from helpers import change_json, cut, sign, write_features, write_json

import data
import resident
from files import BadInput

CPU = torch.device("cpu")
LEVELS = {"s32": (6, 3, 4), "s16": (4, 7, 9)}


@pytest.fixture
def folder(tmp_path):
    write_features(tmp_path / "features", {"cat": 3, "dog": 2}, levels=LEVELS)
    return tmp_path / "features"


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("levels", [LEVELS, {"s16": (4, 7, 9)}])
def test_reads_what_numpy_wrote(tmp_path, dtype, levels):
    features, masks = write_features(tmp_path / "f", {"cat": 3, "dog": 2}, size=(21, 30), levels=levels, dtype=dtype)
    folder = data.open_features(tmp_path / "f")
    assert folder.frames == 5 and folder.size == (21, 30)
    loaded = resident.load_features(folder, list(levels), CPU)
    for level, tensor in zip(levels, loaded.levels):
        assert tensor.dtype == getattr(torch, dtype)
        np.testing.assert_array_equal(tensor.numpy(), features[level])
    index = torch.tensor([4, 0, 4])
    for level, batch in zip(levels, loaded.batch(index)):
        assert batch.dtype == torch.float32
        np.testing.assert_array_equal(batch.numpy(), features[level][[4, 0, 4]].astype(np.float32))
    packed = resident.load_masks(folder, CPU)
    np.testing.assert_array_equal(np.unpackbits(packed.numpy(), axis=2, count=30).astype(bool), masks)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_rows_are_the_same_wherever_they_are_kept(folder, place):
    opened, index = data.open_features(folder), torch.tensor([4, 0, 4, 2])
    expected = resident.load_features(opened, list(LEVELS), CPU).batch(index)
    found = resident.load_features(opened, list(LEVELS), CPU, place).batch(index)
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    assert torch.equal(resident.load_masks(opened, CPU, place).index_select(0, index), resident.load_masks(opened, CPU)[index])


def test_large_arrays_are_read_in_pieces(folder, monkeypatch):
    whole = resident.load_features(data.open_features(folder), ["s16"], CPU).levels[0]
    monkeypatch.setattr(resident, "CHUNK", 2 * 4 * 4 * 7 * 9)  # two frames
    assert torch.equal(resident.load_features(data.open_features(folder), ["s16"], CPU).levels[0], whole)


def test_folder_without_annotations(tmp_path):
    write_features(tmp_path / "f", {"cat": 2}, annotated=False)
    folder = data.open_features(tmp_path / "f")
    assert folder.masks is None and [frame.annotation for frame in data.folder_frames(folder)] == [None, None]
    with pytest.raises(BadInput, match=r"f: has no masks\.npy"):
        resident.load_masks(folder, CPU)


def resave(file, change):
    np.save(file, change(np.load(file)))


BROKEN = {
    "no meta.json": (lambda f: (f / "meta.json").unlink(), "meta.json: no such file"),
    "meta.json cut": (lambda f: cut(f / "meta.json"), "meta.json: expected a JSON file"),
    "meta.json a list": (lambda f: write_json(f / "meta.json", []), "meta.json: expected an object"),
    "another format": (lambda f: change_json(f / "meta.json", format=2), "meta.json: format 2, expected 1"),
    "no featurizer": (lambda f: change_json(f / "meta.json", featurizer=...), "meta.json: 'featurizer' is missing"),
    "featurizer a number": (lambda f: change_json(f / "meta.json", featurizer=7), "meta.json: 'featurizer' is of another type"),
    "no levels": (lambda f: change_json(f / "meta.json", levels={}), "meta.json"),
    "level of two numbers": (lambda f: change_json(f / "meta.json", levels={"s32": [6, 3], "s16": [4, 7, 9]}), "meta.json"),
    "level of text": (lambda f: change_json(f / "meta.json", levels={"s32": [6, 3, "4"], "s16": [4, 7, 9]}), "meta.json"),
    "level below nought": (lambda f: change_json(f / "meta.json", levels={"s32": [6, 3, -4], "s16": [4, 7, 9]}), "meta.json"),
    "level that leaves": (lambda f: change_json(f / "meta.json", levels={"../s32": [6, 3, 4], "s16": [4, 7, 9]}), "holds a path"),
    "a name too few": (lambda f: change_json(f / "meta.json", names=["0"] * 4), "meta.json: 'clips' and 'names'"),
    "sizes of one frame": (lambda f: change_json(f / "meta.json", sizes=[[40, 60]]), "meta.json: 'sizes'"),
    "no array": (lambda f: (f / "features.s16.npy").unlink(), "features.s16.npy: no such file"),
    "array of text": (lambda f: (f / "features.s16.npy").write_text("text"), "features.s16.npy: expected a .npy array"),
    "array without bytes": (lambda f: (f / "features.s16.npy").write_bytes(b""), "features.s16.npy: expected a .npy array"),
    "array cut": (lambda f: cut(f / "features.s16.npy", 0.9), "features.s16.npy: is "),
    "array added to": (lambda f: (f / "features.s16.npy").open("ab").write(b"0"), "features.s16.npy: is "),
    "a frame too few": (lambda f: resave(f / "features.s16.npy", lambda a: a[:-1]), "features.s16.npy: holds float32 [4, 4, 7, 9]"),
    "another shape": (lambda f: resave(f / "features.s16.npy", lambda a: a.transpose(0, 1, 3, 2).copy()), "holds float32 [5, 4, 9, 7]"),
    "float64": (lambda f: resave(f / "features.s16.npy", lambda a: a.astype(float)), "features.s16.npy: holds float64"),
    "objects": (lambda f: resave(f / "features.s16.npy", lambda a: a.astype(object)), "features.s16.npy: holds object"),
    "columns first": (lambda f: resave(f / "features.s16.npy", np.asfortranarray), "features.s16.npy: holds "),
    "masks of bytes": (lambda f: resave(f / "masks.npy", lambda a: np.unpackbits(a, axis=2)), "masks.npy: holds uint8 [5, 40, 64]"),
    "masks of another width": (lambda f: change_json(f / "meta.json", size=[40, 65]), "masks.npy: holds uint8 [5, 40, 8]"),
    "no paths.json": (lambda f: (f / "paths.json").unlink(), "paths.json: no such file"),
    "a path too few": (lambda f: write_json(f / "paths.json", {"raw": {"0": "a.jpg"}}), "paths.json: 1 paths in 'raw', expected 5"),
    "no frames' paths": (lambda f: write_json(f / "paths.json", {}), "paths.json: expected a column 'raw'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_folder_that_disagrees_with_itself_is_refused(folder, case):
    harm, words = BROKEN[case]
    harm(folder)
    with pytest.raises(BadInput) as caught:
        data.open_features(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(BadInput, match="features: no such feature folder"):
        data.open_features(tmp_path / "features")


@pytest.mark.parametrize("name", ["features.s32.npy", "features.s16.npy", "masks.npy"])
def test_one_flipped_bit_is_found_unless_told_not_to_look(folder, name):
    def load(verify: bool) -> None:
        opened = data.open_features(folder)
        resident.load_features(opened, list(LEVELS), CPU, verify=verify)
        resident.load_masks(opened, CPU, verify=verify)
    load(True)
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BadInput, match=rf"{name}: its SHA-256 differs"):
        load(True)
    load(False)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_that_are_no_numbers_are_named_by_frame(tmp_path, value, dtype):
    features, _ = write_features(tmp_path / "f", {"cat": 5}, dtype=dtype)
    features["s32"][3, 2, 1, 1] = value
    np.save(tmp_path / "f/features.npy", features["s32"])
    sign(tmp_path / "f")
    folder = data.open_features(tmp_path / "f")
    for verify in (True, False):
        with pytest.raises(BadInput, match=r"features\.npy: NaN or infinity in the features of frame 3;"):
            resident.load_features(folder, ["s32"], CPU, verify=verify)


def test_large_values_whose_sum_overflows_are_numbers(tmp_path):
    features, _ = write_features(tmp_path / "f", {"cat": 2})
    features["s32"][:] = 3e38
    np.save(tmp_path / "f/features.npy", features["s32"])
    sign(tmp_path / "f")
    assert (resident.load_features(data.open_features(tmp_path / "f"), ["s32"], CPU).levels[0] > 1e38).all()


def test_level_that_is_not_there(folder):
    with pytest.raises(BadInput, match=r"has no level 's8', only s32, s16; featurize with --levels s8"):
        resident.load_features(data.open_features(folder), ["s8"], CPU)


def test_frames_of_a_folder_are_found_below_its_root_or_another(folder, tmp_path):
    opened = data.open_features(folder)
    frames = data.folder_frames(opened, tmp_path)
    assert [(frame.clip, frame.name) for frame in frames] == [("cat", "00000"), ("cat", "00001"), ("cat", "00002"),
                                                              ("dog", "00000"), ("dog", "00001")]
    assert frames[3].image == tmp_path / "JPEGImages/480p/dog/00000.jpg"
    assert frames[3].annotation == tmp_path / "Annotations/480p/dog/00000.png"
    assert data.folder_frames(opened)[0].image == folder / "nowhere/JPEGImages/480p/cat/00000.jpg"
    write_json(folder / "paths.json", {"raw": {str(i): "../../etc/passwd" for i in range(5)}})
    with pytest.raises(BadInput, match=r"paths\.json: .* leaves its folder"):
        data.folder_frames(data.open_features(folder))


# --- targets -----------------------------------------------------------------------------------


def runs(rng: np.random.Generator, pixels: int, groups: int) -> torch.Tensor:
    """The group of every pixel: `groups` runs of random lengths, none empty."""
    starts = np.sort(rng.permutation(np.arange(1, pixels))[:groups - 1])
    return torch.from_numpy(np.searchsorted(starts, np.arange(pixels), side="right"))


@pytest.mark.parametrize("size, grid", [((7, 9), (3, 4)), ((40, 61), (5, 61)), ((33, 16), (33, 1)), ((1, 1), (1, 1)), ((600, 20), (2, 3))])
def test_shares_of_foreground_are_counted_exactly(size, grid):
    rng = np.random.default_rng(0)
    masks = rng.random((40, *size)) < rng.random((40, 1, 1))
    masks[0], masks[1] = False, True  # 1: in a cell of more than 255 rows, a byte a column would overflow
    rows, columns = (runs(rng, *pair) for pair in zip(size, grid))
    index = torch.from_numpy(rng.permutation(40)[:37])
    index[:2] = torch.tensor([0, 1])
    pooled = resident.pool_masks(torch.from_numpy(np.packbits(masks, axis=2)), index, size, (rows, columns))
    assert pooled.shape == (37, *grid) and pooled.dtype == torch.float32
    for number, share in zip(index.tolist(), pooled.numpy()):
        for row in range(grid[0]):
            for column in range(grid[1]):
                cell = masks[number][np.ix_(rows.numpy() == row, columns.numpy() == column)]
                assert share[row, column] == np.float32(cell.sum()) / np.float32(cell.size)


# --- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, batch", [(10, 3), (12, 4), (5, 32), (1, 1), (33, 32)])
@pytest.mark.parametrize("seed", [None, 0, 7])
def test_an_epoch_visits_every_frame_once(frames, batch, seed):
    steps = -(-frames // batch)
    for epoch in range(3):
        parts = [resident.batch_order(epoch * steps + position, np.zeros(frames), batch, seed) for position in range(steps)]
        assert [len(part) for part in parts] == [batch] * (frames // batch) + ([frames % batch] if frames % batch else [])
        order = np.concatenate(parts).tolist()
        assert sorted(order) == list(range(frames))
        if seed is None:
            assert order == list(range(frames))


def test_batches_depend_on_seed_and_step_alone():
    steps = np.random.default_rng(0).permutation(40)
    once = {step: resident.batch_order(step, np.zeros(50), 8, 3).tolist() for step in sorted(steps)}
    np.random.seed(99)
    assert {step: resident.batch_order(step, np.zeros(50), 8, 3).tolist() for step in steps} == once  # whatever was asked before
    epochs = {tuple(tuple(once[7 * epoch + position]) for position in range(7)) for epoch in range(5)}
    assert len(epochs) == 5  # each epoch its own order
    assert resident.batch_order(0, np.zeros(50), 8, 4).tolist() != once[0]


CLIPS = [clip for clip, frames in (("a", 3), ("b", 1), ("c", 5), ("d", 2), ("e", 4)) for _ in range(frames)]


@pytest.mark.parametrize("share, count", [(0.01, 1), (0.2, 1), (0.4, 2), (0.9, 4), (0.99, 4)])
def test_holdout_takes_whole_clips(share, count):
    for seed in range(10):
        kept, held = resident.split_clips(CLIPS, share, seed)
        assert sorted([*kept, *held]) == list(range(len(CLIPS)))
        names = {CLIPS[i] for i in held}
        assert len(names) == count and not names & {CLIPS[i] for i in kept}
    assert len({tuple(resident.split_clips(CLIPS, 0.2, seed)[1]) for seed in range(20)}) > 1  # the seed chooses


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_part_the_clips(folds):
    groups = resident.fold_clips(CLIPS, folds, seed=1)
    assert len(groups) == folds and sorted(np.concatenate(groups)) == list(range(len(CLIPS)))
    names = [{CLIPS[i] for i in group} for group in groups]
    assert sum(map(len, names)) == 5 and max(map(len, names)) - min(map(len, names)) <= 1


@pytest.mark.parametrize("folds", [-1, 0, 1, 6])
def test_more_folds_than_clips_are_refused(folds):
    with pytest.raises(BadInput, match=f"--folds {folds}: expected from 2 up to the number of clips, 5"):
        resident.fold_clips(CLIPS, folds, seed=0)


# --- writing -----------------------------------------------------------------------------------


def test_array_written_in_any_order_is_the_array(tmp_path):
    array = np.random.default_rng(0).standard_normal((10, 3, 4)).astype(np.float16)
    file = tmp_path / "a.npy"
    writer = data.ArrayWriter(file, array.shape, np.float16)
    writer.write(6, array[6:])
    writer.close()
    writer = data.ArrayWriter(file, array.shape, np.float16)  # gone on with, by another process
    writer.write(3, array[3:6].astype(np.float32))  # stored in the array's own dtype
    writer.write(0, array[:3, :, ::-1][:, :, ::-1])  # strided
    assert writer.read(6, 4) == array[6:].tobytes()
    writer.close()
    np.testing.assert_array_equal(np.load(file), array)
    np.save(tmp_path / "b.npy", array)
    assert file.read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_runs_of_one_clip():
    assert list(data.clip_ranges(["a", "a", "b", "a"])) == [("a", 0, 2), ("b", 2, 3), ("a", 3, 4)]
    assert list(data.clip_ranges(["a"])) == [("a", 0, 1)]
