"""featurizers.py: what is tapped where, with which weights, and what is refused. No weights are downloaded."""
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import featurizers
import models
from featurizers import build_featurizer, parse_level, to_tensor, weights_digest
from files import BadInput

CPU = torch.device("cpu")
CHANNELS = {  # of the last map at each stride, as the papers' tables have them, and the classifier, which is cut off
    "mobilenet_v3_large": ({"s2": 16, "s4": 24, "s8": 40, "s16": 112, "s32": 960}, "classifier"),
    "resnet50": ({"s4": 256, "s8": 512, "s16": 1024, "s32": 2048}, "fc"),
    "efficientnet_v2_s": ({"s2": 24, "s4": 48, "s8": 64, "s16": 160, "s32": 1280}, "classifier"),
    "convnext_tiny": ({"s4": 96, "s8": 192, "s16": 384, "s32": 768}, "classifier"),
    "swin_t": ({"s4": 96, "s8": 192, "s16": 384, "s32": 768}, "head"),
}


def frames(count: int = 1, size: tuple[int, int] = (64, 96)) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """What torchvision's own transforms make of frames, for its ImageNet weights."""
    transform = torchvision.transforms.Compose([
        torchvision.transforms.ToTensor(), torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    return torch.stack([transform(frame.permute(1, 2, 0).numpy()) for frame in pixels])


# --- taps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANNELS)
def test_torchvision_networks_tap_each_stride_and_count_their_parameters(name):
    channels, classifier = CHANNELS[name]
    featurizer = build_featurizer(name, list(channels), weights="random")
    assert featurizer.levels == list(channels)[::-1]  # coarse to fine
    shapes = featurizer.shapes((192, 320))
    assert shapes == {level: [count, 192 // int(level[1:]), 320 // int(level[1:])] for level, count in channels.items()}
    whole = torchvision.models.get_model(name, weights=None)
    assert models.count_parameters(featurizer) == models.count_parameters(whole) - models.count_parameters(getattr(whole, classifier))
    assert not any(parameter.requires_grad for parameter in featurizer.parameters())
    assert not any(module.training for module in featurizer.network.modules())


def test_parameters_are_those_that_the_levels_need():
    featurizer = build_featurizer("resnet50", ["s8"], weights="random")
    whole = torchvision.models.resnet50(weights=None)
    needed = (whole.conv1, whole.bn1, whole.layer1, whole.layer2)
    assert models.count_parameters(featurizer) == sum(map(models.count_parameters, needed))
    assert build_featurizer("resnet50", weights="random").levels == ["s32", "s16", "s8"]


@torch.no_grad()
def test_resnet_maps_are_the_networks_own(tmp_path):
    torch.manual_seed(1)
    whole = torchvision.models.resnet18(weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    s32, s8 = build_featurizer("resnet18", ["s8", "s32"], str(tmp_path / "w.pth"))(frames(2))
    stem = whole.maxpool(whole.relu(whole.bn1(whole.conv1(normalised(frames(2))))))
    expected = whole.layer2(whole.layer1(stem))
    torch.testing.assert_close(s8, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(s32, whole.layer4(whole.layer3(expected)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_swin_maps_have_channels_first(tmp_path):
    torch.manual_seed(1)
    whole = torchvision.models.swin_t(weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    s32, s4 = build_featurizer("swin_t", ["s4", "s32"], str(tmp_path / "w.pth"))(frames())
    x = whole.features[:2](normalised(frames()))
    torch.testing.assert_close(s4, x.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(s32, whole.permute(whole.norm(whole.features[2:](x))), rtol=1e-4, atol=1e-4)


def alexnet_weights(file, prefix: str = "features.") -> nn.Module:
    """Write the state dict of a random AlexNet's features, its keys with or without their prefix; return the network."""
    torch.manual_seed(1)
    whole = torchvision.models.alexnet(weights=None).eval()
    torch.save({prefix + key: value for key, value in whole.features.state_dict().items()}, file)
    return whole


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["features.", ""])
def test_alexnet_is_the_notebooks(tmp_path, prefix):
    whole = alexnet_weights(tmp_path / "w.pth", prefix)
    featurizer = build_featurizer("alexnet", weights=str(tmp_path / "w.pth"))
    pixels = frames(2, (128, 160))
    features, = featurizer(pixels)
    torch.testing.assert_close(features, whole.features(normalised(pixels)), rtol=1e-5, atol=1e-6)
    assert models.count_parameters(featurizer) == 2_469_696 == models.count_parameters(whole.features)


def test_alexnet_strides():
    shapes = build_featurizer("alexnet", ["s4", "s8", "s16", "s32"], weights="random").shapes((480, 854))
    assert shapes == {"s32": [256, 14, 25], "s16": [256, 29, 52], "s8": [192, 59, 105], "s4": [64, 119, 212]}


# --- levels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("level, parts", [("s16", ("s16", 1.0)), ("s8@0.5", ("s8", 0.5)), ("s32@2", ("s32", 2.0))])
def test_level_names(level, parts):
    assert parse_level(level) == parts


@pytest.mark.parametrize("level", ["16", "s", "s0", "s-8", "s8@0", "s8@x", "s8@nan", "s8@99", "", "features"])
def test_level_names_that_are_none(level):
    with pytest.raises(BadInput, match="expected a stride such as s16"):
        parse_level(level)


def test_levels_at_half_size_see_the_frame_at_half_size():
    featurizer = build_featurizer("efficientnet_lite0", ["s8", "s8@0.5", "s16", "s32@0.5"], weights="random")
    assert featurizer.levels == ["s32@0.5", "s16", "s8@0.5", "s8"]
    assert featurizer.shapes((96, 128)) == {"s32@0.5": [320, 2, 2], "s16": [112, 6, 8], "s8@0.5": [40, 6, 8], "s8": [40, 12, 16]}
    one_colour = torch.full((1, 3, 96, 128), 90, dtype=torch.uint8)  # shrunk it is itself
    half = build_featurizer("efficientnet_lite0", ["s8"], weights="random")(one_colour[:, :, :48, :64])[0]
    both = build_featurizer("efficientnet_lite0", ["s8", "s8@0.5"], weights="random")(one_colour)
    torch.testing.assert_close(both[0], half, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, most", [("alexnet", 0.02), ("resnet18", 0.05)])
def test_bfloat16_gives_about_what_float32_gives_at_every_size(name, most):
    levels = ["s32", "s8", "s8@0.5"]
    pixels = frames(2, (128, 160))
    exact, rough = (build_featurizer(name, levels, "random", compute=compute)(pixels) for compute in (torch.float32, torch.bfloat16))
    for level, other in zip(exact, rough, strict=True):
        assert other.dtype == torch.float32 and 0 < (level - other).norm() / level.norm() < most


@pytest.mark.parametrize("name, levels, words", [
    ("resnet51", None, "--featurizer resnet51: unknown; expected alexnet"),
    ("deeplabv3_resnet50", None, "unknown"),
    ("resnet18", ["s2", "s64"], "--levels s64: resnet18 has s2, s4, s8, s16, s32"),
    ("alexnet", ["s2"], "--levels s2: alexnet has s4, s8, s16, s32"),
    ("efficientnet_lite0", ["s64"], "--levels s64: efficientnet_lite0 has"),
    ("alexnet", ["16"], "--levels 16: expected a stride"),
    ("squeezenet1_1", None, "--levels s32: squeezenet1_1 has no map at a stride of 2 to 32"),
])
def test_unknown_names_are_refused_with_those_there_are(name, levels, words):
    with pytest.raises(BadInput) as caught:
        build_featurizer(name, levels, weights="random")
    assert words in str(caught.value)


# --- weights -----------------------------------------------------------------------------------


def test_random_weights_are_a_function_of_the_seed():
    digests = [weights_digest(build_featurizer("alexnet", weights="random", seed=seed)) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_digest_is_of_the_weights_whatever_they_are_computed_in():
    """A model trained on features of one machine's bfloat16 is for another's float32 too."""
    exact, rough = (build_featurizer("alexnet", weights="random", compute=compute) for compute in (torch.float32, torch.bfloat16))
    assert exact.digest == rough.digest == weights_digest(exact) != weights_digest(rough)


def test_digest_tells_one_changed_weight():
    featurizer = build_featurizer("alexnet", weights="random")
    before = weights_digest(featurizer)
    with torch.no_grad():
        next(featurizer.parameters())[7, 0, 3, 3] += 1e-4
    assert weights_digest(featurizer) != before


class Harmful:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


BAD_WEIGHTS = {
    "missing": (lambda state: None, "no such file; expected a state dict, or 'random'"),
    "damaged": (lambda state: b"PK\x03\x04 and then nothing", "cannot be read as a state dict"),
    "not a dict": (lambda state: [1, 2], "expected a state dict of tensors"),
    "empty": (lambda state: {}, "expected a state dict of tensors"),
    "a checkpoint": (lambda state: {"state": state}, "expected a state dict of tensors"),
    "a key missing": (lambda state: {key: value for key, value in state.items() if key != "features.3.bias"}, "lacks features.3.bias"),
    "a key too many": (lambda state: {**state, "features.99.bias": torch.zeros(3)}, "has features.99.bias"),
    "a shape": (lambda state: {**state, "features.0.bias": torch.zeros(3)}, "features.0.bias is [3], expected [64]"),
    "another network's": (lambda state: torchvision.models.squeezenet1_0().state_dict(), "these are not the weights of alexnet"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_other_weights_are_never_loaded(tmp_path, case):
    alexnet_weights(tmp_path / "good.pth")
    change, words = BAD_WEIGHTS[case]
    content = change(torch.load(tmp_path / "good.pth", weights_only=True))
    if isinstance(content, bytes):
        (tmp_path / "w.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BadInput) as caught:
        build_featurizer("alexnet", weights=str(tmp_path / "w.pth"))
    assert words in str(caught.value) and str(tmp_path / "w.pth") in str(caught.value)


def test_weights_that_would_run_code_do_not(tmp_path):
    torch.save({"features.0.bias": Harmful(tmp_path / "harm")}, tmp_path / "w.pth")
    with pytest.raises(BadInput, match="cannot be read as a state dict"):
        build_featurizer("alexnet", weights=str(tmp_path / "w.pth"))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), TimeoutError("timed out"), RuntimeError("invalid hash value")])
def test_download_that_fails_names_the_two_ways_on(monkeypatch, error, tmp_path):
    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(BadInput) as caught:
        build_featurizer("alexnet")
    message = str(caught.value)
    assert "https://download.pytorch.org/models/alexnet" in message and "\n" not in message
    assert "--weights" in message and "--featurizer efficientnet_lite0" in message


# --- frames ------------------------------------------------------------------------------------


def test_frames_of_another_size_are_resized():
    rng = np.random.default_rng(0)
    same, other = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), np.full((33, 21, 3), 77, np.uint8)
    batch = to_tensor([same, other], (20, 30), CPU)
    assert batch.shape == (2, 3, 20, 30) and batch.dtype == torch.uint8
    np.testing.assert_array_equal(batch[0].permute(1, 2, 0).numpy(), same)
    assert (batch[1] == 77).all()
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(10, axis=0)  # [10, 100, 3]
    half = to_tensor([ramp], (5, 50), CPU)[0, 0, 2].float()
    torch.testing.assert_close(half[2:-2], torch.arange(50)[2:-2] * 4.0 + 1, atol=0.51, rtol=0)  # the mean of each pair of columns


def test_flops_are_those_of_the_convolutions():
    network = nn.ModuleDict({"first": nn.Conv2d(3, 8, 3, padding=1), "second": nn.Conv2d(8, 4, 1)})

    class Two(nn.Module):
        def forward(self, frames):
            return {"s1": network["second"](torch.relu(network["first"](frames)))}
    featurizer = featurizers.Featurizer("two", Two(), ["s1"], (0.5,) * 3, (0.5,) * 3)
    assert featurizers.count_flops(featurizer, (10, 12)) == 2 * 120 * (3 * 8 * 9 + 8 * 4)
