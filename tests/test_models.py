"""models.py: the notebook's decoder, losses and levels, what a model remembers."""
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, cut, random_masks, write_features

import data
import models
from benchmarks.notebook import make_decoder
from models import DECODERS
from vos.inputs import BadInput
from vos.layers import count_flops, fit_standardise

SHAPE, SIZE = (6, 7, 9), (40, 60)
TWO = {"s32": (6, 3, 4), "s16": (4, 7, 9)}
ODD = [((5, 6, 8), (33, 47)), ((4, 9, 5), (31, 16)), ((2, 3, 3), (7, 5)), ((1, 12, 13), (8, 9))]


def pool(masks: np.ndarray, decoder) -> torch.Tensor:
    """Return the share of foreground in each of a decoder's cells, of masks [N, H, W] bool."""
    packed, rows = torch.from_numpy(np.packbits(masks, axis=2)), torch.arange(len(masks))
    features = data.Features([], [], torch.device("cpu"), rows, packed)
    return data.pool_masks(features, decoder.cells)


def load(folder) -> data.Features:
    return data.load_features(data.open_features(folder))


@pytest.fixture
def saved(tmp_path):
    """A feature folder and a model for it: (folder, path of model.pt, decoder, description)."""
    write_features(tmp_path / "features", {"cat": 3})
    folder = data.open_features(tmp_path / "features")
    decoder = models.Linear(folder.shapes, folder.size)
    description = models.describe(decoder, folder, ["s32"])
    description |= {"recipe": {}, "clips": ["cat"], "held_out": [], "code": "", "step": 3}
    models.save_model(tmp_path / "model.pt", description, decoder)
    return folder, tmp_path / "model.pt", decoder, description


@pytest.mark.parametrize("shape, size", ODD)
def test_simple_is_the_notebooks_decoder(shape, size):
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((4, *shape), dtype=np.float32))
    masks = random_masks(rng, 4, size) ^ (rng.random((4, *size)) < 0.05)
    torch.manual_seed(3)
    notebook = make_decoder(shape[0], size)
    torch.manual_seed(3)
    simple = DECODERS["simple"]({"s32": shape}, size)
    pairs = list(zip(simple.conv.parameters(), notebook[0].parameters()))

    output = notebook(features)
    expected = F.binary_cross_entropy(output, torch.from_numpy(masks).float()[:, None])
    expected.backward()
    loss = simple.loss(simple([features]), pool(masks, simple)).mean()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    pixels = simple.pixels(simple([features])).int()
    assert (pixels - (255 * output[:, 0]).int()).abs().max() <= 1


def test_simple_works_on_far_fewer_numbers_than_pixels():
    decoder = DECODERS["simple"]({"s32": (256, 14, 25)}, (480, 854))
    assert decoder([torch.zeros(1, 256, 14, 25)]).numel() < 480 * 854 / 300
    assert sum(weight.numel() for weight in decoder.parameters()) == 256 * 9 + 1


@pytest.mark.parametrize("name, shapes, words", [
    ("simple", TWO, "takes one level .* name one with --levels"),
    ("simple", {"s32": (6, 2, 4)}, "at least 3 x 3"), ("unheard-of", TWO, "unknown; there are")])
def test_a_decoder_that_cannot_take_the_features_is_refused(name, shapes, words):
    with pytest.raises(BadInput, match=words):
        models.make_decoder(name, shapes, SIZE)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_cells_tile_the_frame(name):
    decoder = DECODERS[name]({"s32": SHAPE}, SIZE)
    for pixels, cells, count in zip(decoder.cells, decoder.grid, SIZE):
        assert len(pixels) == count and pixels[0] == 0 and pixels[-1] == cells - 1
        assert set(pixels.diff().tolist()) <= {0, 1}
    rows, columns = map(torch.bincount, decoder.cells)
    torch.testing.assert_close(decoder.area, rows[:, None] * columns / math.prod(SIZE))


@torch.no_grad()
def test_linear_is_one_convolution_a_level():
    decoder = DECODERS["linear"](TWO, SIZE)
    coarse, fine = torch.randn(2, 6, 3, 4), torch.randn(2, 4, 7, 9)
    decoder.norms[1].mean.fill_(0.5)
    decoder.norms[1].std.fill_(2)
    first, second = decoder.convs
    total = F.interpolate(first(coarse), (7, 9), mode="bilinear") + second((fine - 0.5) / 2)
    output = decoder([coarse, fine])
    torch.testing.assert_close(output, total[:, 0], rtol=1e-5, atol=1e-5)
    assert sum(weight.numel() for weight in decoder.parameters()) == 6 + 1 + 4 + 1
    assert count_flops(decoder, [coarse[:1], fine[:1]]) == 2 * (6 * 12 + 4 * 63)


@torch.no_grad()
def test_loss_on_logits_is_the_mean_over_pixels():
    decoder = DECODERS["linear"]({"s16": (4, 7, 9)}, SIZE)
    masks, output = random_masks(np.random.default_rng(0), 3, SIZE), torch.randn(3, 7, 9)
    rows, columns = decoder.cells
    every_pixel = output[:, rows][:, :, columns]  # each pixel has its cell's logit
    expected = F.binary_cross_entropy_with_logits(every_pixel, torch.from_numpy(masks).float())
    loss = decoder.loss(output, pool(masks, decoder)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_standardise_takes_mean_and_spread_of_the_training_rows_alone(tmp_path):
    features, _ = write_features(tmp_path / "f", {"cat": 40, "dog": 5})
    training, _ = load(tmp_path / "f").hold_out(["dog"])
    decoder = DECODERS["linear"]({"s32": SHAPE}, SIZE)
    fit_standardise(decoder, training)
    level, norm = features["s32"][:40].astype(np.float64), decoder.norms[0]
    np.testing.assert_allclose(norm.mean.flatten(), level.mean((0, 2, 3)), atol=1e-3)
    np.testing.assert_allclose(norm.std.flatten(), level.std((0, 2, 3)), rtol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["simple", "linear"])
def test_predictions_are_255_times_the_probability_rounded_down(tmp_path, name):
    features, _ = write_features(tmp_path / "f", {"cat": 7})
    decoder = DECODERS[name]({"s32": SHAPE}, SIZE)
    rows = torch.tensor([6, 0, 3, 3, 1])
    pixels = torch.stack(list(models.predict(decoder, load(tmp_path / "f"), rows, batch_size=2)))
    levels = torch.from_numpy(features["s32"][rows.numpy()])
    if name == "simple":
        expected = F.adaptive_avg_pool2d(torch.sigmoid(decoder.conv(levels)), SIZE)
    else:
        expected = torch.sigmoid(F.interpolate(decoder.convs[0](levels), SIZE, mode="bilinear"))
    exact = 255 * expected[:, 0].double()
    assert pixels.shape == (5, *SIZE) and pixels.dtype == torch.uint8
    assert ((pixels <= exact + 1e-3) & (pixels > exact - 1 - 1e-3)).all()
    assert exact.max() - exact.min() > 10  # or the line above would say little


@torch.no_grad()
def test_a_frame_and_its_mirror_image_are_averaged():
    levels = [torch.randn(2, 6, 3, 4), torch.randn(2, 4, 7, 9)]
    decoder = DECODERS["fpn"](TWO, SIZE).eval()
    both, mirrored = decoder(levels), decoder([level.flip(-1) for level in levels]).flip(-1)
    torch.testing.assert_close(both, mirrored, rtol=0, atol=1e-6)


def test_a_model_comes_back_as_it_was_saved(saved, tmp_path):
    _, path, decoder, description = saved
    loaded, model = models.load_model(path)
    assert model == description and not loaded.training
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, decoder.state_dict()[key])
    assert models.load_model(tmp_path)[1] == model  # or the folder it is in
    models.save_model(tmp_path / "other-name.pt", description, decoder)
    assert (tmp_path / "other-name.pt").read_bytes() == path.read_bytes()


class Harmful(NamedTuple):
    """What a pickle can do to whoever loads it: make a folder."""

    folder: Path

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def resave(**changes):
    return lambda path: torch.save({**torch.load(path, weights_only=True), **changes}, path)


def flip_weight(path) -> None:
    """Change one bit of a weight in a checkpoint."""
    content, state = path.read_bytes(), torch.load(path, weights_only=True)["state"]
    at = content.index(state["convs.0.weight"].numpy().tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])


NAN = {"norms.0.mean": torch.zeros(6, 1, 1), "norms.0.std": torch.ones(6, 1, 1),
       "convs.0.weight": torch.full((1, 6, 1, 1), torch.nan), "convs.0.bias": torch.zeros(1)}
BAD_MODELS = {
    "missing": lambda path: path.unlink(),
    "cut": cut,
    "a flipped bit": flip_weight,
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "a bare state dict": lambda path: torch.save({"conv.weight": torch.zeros(1)}, path),
    "code": lambda path: torch.save({"decoder": Harmful(path.with_name("harm"))}, path),
    "another format": resave(format=1),
    "another decoder's weights": resave(decoder="simple"),
    "an unknown decoder": resave(decoder="unheard-of"),
    "a damaged shape": resave(shapes={"s32": "7x9"}),
    "a weight missing": resave(state={}),
    "a weight that is no number": resave(state=NAN),
    "probabilities": resave(returns="probabilities"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_checkpoint_that_is_none_is_refused_in_one_line(saved, case):
    path = saved[1]
    BAD_MODELS[case](path)
    with pytest.raises(BadInput) as caught:
        models.load_model(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not path.with_name("harm").exists()


def test_the_pretrained_decoder_is_small_and_says_what_it_was_trained_on():
    file = ROOT / "pretrained/temporal.pt"
    decoder, model = models.load_model(file)
    assert file.stat().st_size < 1_000_000 and model["decoder"] == "temporal"
    assert len(model["clips"]) == 29 and "hike" not in model["clips"] and model["step"] == 999
    assert all(parameter.dtype == torch.float32 for parameter in decoder.parameters())
