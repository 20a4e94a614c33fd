"""models.py: the notebook's decoder to the last bit that float32 has, what a model remembers, and what fits it."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import NotebookDecoder, change_json, cut, random_masks, write_features
from test_featurizers import Harmful

import checkpoints
import data
import inference
import models
import resident
from data import open_features
from files import BadInput
from models import DECODERS, make_decoder, pooling

CPU = torch.device("cpu")
SHAPE, SIZE = (6, 7, 9), (40, 60)
ODD = [((5, 6, 8), (33, 47)), ((3, 14, 25), (480, 854)),
       ((4, 9, 5), (31, 16)), ((2, 3, 3), (7, 5)), ((1, 12, 13), (8, 9)), ((7, 4, 30), (64, 28))]


def cells_of(decoder) -> tuple[torch.Tensor, torch.Tensor]:
    """A decoder's cells, and the share of the frame in each."""
    rows, columns = decoder.cells()
    return (rows, columns), torch.bincount(rows)[:, None] * torch.bincount(columns) / (len(rows) * len(columns))


def pooled(masks: np.ndarray, cells) -> torch.Tensor:
    """The share of foreground in each cell, of masks [N, H, W] bool."""
    return resident.pool_masks(torch.from_numpy(np.packbits(masks, axis=2)), torch.arange(len(masks)), masks.shape[1:], cells)


# --- simple ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, size", ODD)
def test_simple_is_the_notebooks_decoder(shape, size):
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((4, *shape), dtype=np.float32))
    masks = random_masks(rng, 4, size) ^ (rng.random((4, *size)) < 0.05)
    torch.manual_seed(3)
    notebook = NotebookDecoder(shape[0], size)
    torch.manual_seed(3)
    simple = make_decoder("simple", {"s32": shape}, size)
    assert all(torch.equal(*pair) for pair in zip(simple.conv.parameters(), notebook.conv.parameters(), strict=True))

    output = notebook(features)
    expected = F.binary_cross_entropy(output, torch.from_numpy(masks).float()[:, None])
    expected.backward()
    cells, area = cells_of(simple)
    loss = simple.loss(simple(levels := [features]), pooled(masks, cells), area).mean()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(simple.conv.parameters(), notebook.conv.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * float(theirs.grad.abs().max()))
    torch.testing.assert_close(simple.probabilities(simple(levels)), output[:, 0], rtol=1e-6, atol=1e-7)


def test_simple_works_on_far_fewer_numbers_than_pixels():
    decoder = make_decoder("simple", {"s32": (256, 14, 25)}, (480, 854))
    assert decoder([torch.zeros(1, 256, 14, 25)]).numel() < 480 * 854 / 300
    assert models.count_parameters(decoder) == 256 * 9 + 1


@pytest.mark.parametrize("cells, pixels", [(1, 1), (1, 9), (5, 3), (12, 480), (23, 854), (7, 7), (9, 13), (13, 9)])
def test_pooling_is_pytorchs(cells, pixels):
    mean, group = pooling(cells, pixels)
    values = torch.randn(2, cells, dtype=torch.float64)
    expected = torch.nn.AdaptiveAvgPool1d(pixels)(values)
    torch.testing.assert_close((values @ mean.double().T)[:, group], expected, rtol=1e-6, atol=1e-6)
    assert len({tuple(row) for row in mean.tolist()}) == len(mean) <= 2 * cells + 1  # each mean once


def test_simple_takes_one_level():
    with pytest.raises(BadInput, match="takes one level, found s32, s16; name one with --levels"):
        make_decoder("simple", {"s32": (6, 3, 4), "s16": (4, 7, 9)}, SIZE)


# --- every decoder -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_cells_tile_the_frame(name):
    decoder = make_decoder(name, {"s32": SHAPE}, SIZE)
    (rows, columns), area = cells_of(decoder)
    for pixels, cells, count in ((rows, decoder.grid[0], 40), (columns, decoder.grid[1], 60)):
        assert len(pixels) == count and pixels[0] == 0 and pixels[-1] == cells - 1 and set(pixels.diff().tolist()) <= {0, 1}
    assert area.shape == decoder.grid
    torch.testing.assert_close(area.sum(), torch.tensor(1.0))


@torch.no_grad()
def test_linear_is_one_convolution_a_level():
    torch.manual_seed(0)
    shapes = {"s32": (6, 3, 4), "s16": (4, 7, 9)}
    decoder = make_decoder("linear", shapes, SIZE)
    coarse, fine = torch.randn(2, 6, 3, 4), torch.randn(2, 4, 7, 9)
    mean, std = torch.randn(4), torch.rand(4) + 0.5
    decoder.norms[1].mean.copy_(mean[:, None, None])
    decoder.norms[1].std.copy_(std[:, None, None])
    maps = [torch.einsum("bchw,c->bhw", level, conv.weight[0, :, 0, 0]) + conv.bias for level, conv in
            zip((coarse, (fine - mean[:, None, None]) / std[:, None, None]), decoder.convs)]
    expected = F.interpolate(maps[0][:, None], (7, 9), mode="bilinear")[:, 0] + maps[1]
    output = decoder([coarse, fine])
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    shown = torch.sigmoid(F.interpolate(output[:, None], SIZE, mode="bilinear")[:, 0])
    torch.testing.assert_close(decoder.probabilities(output), shown)
    assert models.count_parameters(decoder) == 6 + 1 + 4 + 1


@torch.no_grad()
def test_loss_on_logits_is_the_mean_over_pixels():
    decoder = make_decoder("linear", {"s16": (4, 7, 9)}, SIZE)
    masks = random_masks(np.random.default_rng(0), 3, SIZE)
    output = torch.randn(3, 7, 9)
    (rows, columns), area = cells_of(decoder)
    every_pixel = output[:, rows][:, :, columns]  # each pixel has its cell's logit
    expected = F.binary_cross_entropy_with_logits(every_pixel, torch.from_numpy(masks).float())
    torch.testing.assert_close(decoder.loss(output, pooled(masks, (rows, columns)), area).mean(), expected, rtol=1e-5, atol=0)


def test_standardise_takes_mean_and_spread_of_the_training_frames_alone(tmp_path):
    features, _ = write_features(tmp_path / "f", {"cat": 40, "dog": 5})
    loaded = resident.load_features(open_features(tmp_path / "f"), ["s32"], CPU)
    decoder = make_decoder("linear", {"s32": SHAPE}, SIZE)
    decoder.standardise(loaded, torch.arange(40))
    level = features["s32"][:40].astype(np.float64)
    np.testing.assert_allclose(decoder.norms[0].mean.flatten().numpy(), level.mean((0, 2, 3)), atol=2e-2)
    np.testing.assert_allclose(decoder.norms[0].std.flatten().numpy(), level.std((0, 2, 3)), rtol=2e-2)


def test_flops_of_a_decoder_are_its_convolutions():
    decoder = make_decoder("linear", {"s32": (6, 3, 4), "s16": (4, 7, 9)}, SIZE)
    assert models.count_flops(decoder, {"s32": (6, 3, 4), "s16": (4, 7, 9)}) == 2 * (6 * 12 + 4 * 63)


@torch.no_grad()
@pytest.mark.parametrize("name", ["simple", "linear"])
def test_predictions_are_255_times_the_probability_rounded_down(tmp_path, name):
    features, _ = write_features(tmp_path / "f", {"cat": 7})
    loaded = resident.load_features(open_features(tmp_path / "f"), ["s32"], CPU)
    decoder = make_decoder(name, {"s32": SHAPE}, SIZE).eval()
    index = torch.tensor([6, 0, 3, 3, 1])
    pixels = torch.stack(list(inference.predict(decoder, loaded, index, batch=2)))
    probabilities = decoder.probabilities(decoder([torch.from_numpy(features["s32"][index.numpy()])]))
    assert pixels.shape == (5, *SIZE) and pixels.dtype == torch.uint8
    exact = 255 * probabilities.double()
    assert ((pixels <= exact + 1e-3) & (pixels > exact - 1 - 1e-3)).all()
    assert (probabilities.max() - probabilities.min()) > 0.05  # or the line above would say little


# --- saving and loading ------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A feature folder and a model made for it: (folder, path of model.pt, decoder, description)."""
    write_features(tmp_path / "features", {"cat": 3})
    folder = data.open_features(tmp_path / "features")
    torch.manual_seed(0)
    decoder = make_decoder("linear", {"s32": SHAPE}, SIZE)
    description = checkpoints.describe("linear", folder, ["s32"])
    checkpoints.save_model(tmp_path / "model.pt", description, decoder)
    return folder, tmp_path / "model.pt", decoder, description


def test_a_model_comes_back_as_it_was_saved(saved, tmp_path):
    folder, path, decoder, description = saved
    loaded, model = checkpoints.load_model(path)
    assert model == description and not loaded.training
    assert all(torch.equal(value, decoder.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert models.count_all(loaded, model) == 1000 + 6 + 1
    assert checkpoints.load_model(tmp_path)[1] == model  # or the folder it is in
    checkpoints.check_fit(model, path, folder)
    plain = torch.load(path, weights_only=True)
    assert plain["decoder"] == "linear" and isinstance(plain["state"], dict)


def test_the_same_model_is_the_same_bytes(saved, tmp_path):
    _, path, decoder, description = saved
    (tmp_path / "elsewhere").mkdir()
    checkpoints.save_model(tmp_path / "elsewhere" / "other-name.pt", description, decoder)
    assert (tmp_path / "elsewhere" / "other-name.pt").read_bytes() == path.read_bytes()


def resave(path, **changes) -> None:
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


BAD_MODELS = {
    "missing": (lambda path: path.unlink(), "no such file; train.py writes model.pt"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a checkpoint"),
    "cut": (cut, "cannot be read as a checkpoint"),
    "text": (lambda path: path.write_text("a model"), "cannot be read as a checkpoint"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "expected a checkpoint of train.py"),
    "a bare state dict": (lambda path: torch.save({"conv.weight": torch.zeros(1)}, path), "expected a checkpoint of train.py"),
    "another decoder's weights": (lambda path: resave(path, decoder="simple"), "does not fit the decoder 'simple' it names"),
    "an unknown decoder": (lambda path: resave(path, decoder="unheard-of"), "decoder 'unheard-of': unknown; there are simple, linear"),
    "another shape": (lambda path: resave(path, shapes={"s32": [8, 7, 9]}), "does not fit the decoder 'linear' it names"),
    "a damaged shape": (lambda path: resave(path, shapes={"s32": "7x9"}), "a shape is 7x9"),
    "no state": (lambda path: resave(path, state=None), "does not fit"),
    "a weight missing": (lambda path: resave(path, state={}), "does not fit"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_checkpoint_that_is_none_is_refused(saved, case):
    path, (harm, words) = saved[1], BAD_MODELS[case]
    harm(path)
    with pytest.raises(BadInput) as caught:
        checkpoints.load_model(path)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_that_would_run_code_does_not(saved, tmp_path):
    torch.save({"decoder": Harmful(tmp_path / "harm")}, saved[1])
    with pytest.raises(BadInput, match="cannot be read as a checkpoint"):
        checkpoints.load_model(saved[1])
    assert not (tmp_path / "harm").exists()


MISFITS = {
    "featurizer": ({"featurizer": "alexnet"}, "featurizer is alexnet, but .* was trained on made-up"),
    "weights": ({"weights": "fedcba9876543210"}, "weights digest is fedcba9876543210"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_features_of_another_featurizer_do_not_fit(saved, case):
    folder, path, _, description = saved
    changes, words = MISFITS[case]
    change_json(folder.path / "meta.json", **changes)
    with pytest.raises(BadInput, match=words) as caught:
        checkpoints.check_fit(description, path, open_features(folder.path))
    assert str(folder.path) in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("options, words", [
    ({"levels": {"s16": (6, 7, 9)}}, "level s32 is None"),
    ({"levels": {"s32": (6, 8, 9)}}, r"level s32 is \[6, 8, 9\]"),
    ({"levels": {"s32": (5, 7, 9)}}, r"level s32 is \[5, 7, 9\]"),
    ({"size": (41, 60)}, r"frame size is \[41, 60\]"),
])
def test_features_of_another_shape_do_not_fit(saved, tmp_path, options, words):
    write_features(tmp_path / "other", {"dog": 2}, **options)
    with pytest.raises(BadInput, match=words):
        checkpoints.check_fit(saved[3], saved[1], open_features(tmp_path / "other"))


def test_a_folder_with_more_levels_fits_when_it_has_the_models(saved, tmp_path):
    """The digest covers the weights that the levels need, so it differs and is not compared."""
    write_features(tmp_path / "other", {"dog": 2}, levels={"s32": SHAPE, "s16": (4, 14, 18)}, weights="fedcba9876543210")
    checkpoints.check_fit(saved[3], saved[1], open_features(tmp_path / "other"))


def test_folders_to_train_on_together_must_agree(saved, tmp_path):
    write_features(tmp_path / "val", {"dog": 2}, weights="fedcba9876543210")
    folders = [saved[0], open_features(tmp_path / "val")]
    with pytest.raises(BadInput, match="weights digest"):
        checkpoints.check_same_features(folders, ["s32"])
    checkpoints.check_same_features(folders[:1] * 2, ["s32"])


def test_a_frame_and_its_mirror_image_are_averaged_unless_one_view_is_asked_for():
    torch.manual_seed(0)
    levels = [torch.randn(2, 12, 7, 9), torch.randn(2, 20, 4, 5)]
    decoder = make_decoder("fpn", {"s16": (12, 7, 9), "s32": (20, 4, 5)}, SIZE).eval()
    both, decoder.views = decoder(levels), 1
    one, other = decoder(levels), models.mirror(decoder([models.mirror(level) for level in levels]))
    assert torch.allclose(both, (one + other) / 2, atol=1e-6) and not torch.allclose(both, one, atol=1e-3)
