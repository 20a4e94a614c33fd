"""vos/featurizers.py: what is tapped, with which weights, and what is refused."""
import sys

import numpy as np
import pytest
import torch
from torch import nn

from vos.featurizers import build_featurizer
from vos.inputs import BadInput

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def frames(height: int = 64, width: int = 96) -> torch.Tensor:
    """Random frames, uint8 [2, 3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    return (pixels / 255 - mean) / std


def make_alexnet() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(1)
    return torchvision.models.alexnet(weights=None).eval()


def make_timm(name: str, file) -> nn.Module:
    """Save the whole random network, with its classifier, to `file`; return it."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    network = timm.create_model(name, pretrained=False).eval()
    torch.save(network.state_dict(), file)
    return network


# --- what is tapped ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["features.", ""])
def test_alexnet_is_the_notebooks(tmp_path, prefix):
    whole = make_alexnet()
    state = {prefix + key: value for key, value in whole.features.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    pixels = frames(128, 160)

    featurizer = build_featurizer("alexnet", None, str(tmp_path / "w.pth"))
    assert featurizer.levels == ["s32"] and featurizer.parameters_count == 2_469_696
    expected = whole.features(normalised(pixels))
    torch.testing.assert_close(featurizer(pixels)[0], expected, rtol=1e-5, atol=1e-5)

    fine = build_featurizer("alexnet", ["s8"], str(tmp_path / "w.pth"))
    expected = whole.features[:5](normalised(pixels))
    torch.testing.assert_close(fine(pixels)[0], expected, rtol=1e-5, atol=1e-5)
    assert fine.parameters_count == sum(p.numel() for p in whole.features[:5].parameters())
    assert fine.digest == featurizer.digest


def test_shapes_parameters_and_order_of_levels():
    featurizer = build_featurizer("alexnet", ["s16", "s8", "s32"], "random")
    shapes = {"s32": [256, 14, 25], "s16": [256, 29, 52], "s8": [192, 59, 105]}
    assert list(featurizer.shapes((480, 854)).items()) == list(shapes.items())
    featurizer = build_featurizer("efficientnet_lite0", None, "random")
    assert featurizer.levels == ["s32", "s16", "s8"] and featurizer.parameters_count == 2_939_120
    assert not any(parameter.requires_grad for parameter in featurizer.parameters())
    assert not any(module.training for module in featurizer.network.modules())


def test_levels_at_half_size_see_the_frame_at_half_size():
    levels = ["s8", "s8@0.5", "s16", "s32@0.5"]
    featurizer = build_featurizer("efficientnet_lite0", levels, "random")
    assert featurizer.levels == ["s32@0.5", "s16", "s8@0.5", "s8"]
    assert featurizer.shapes((97, 130))["s8@0.5"] == [40, 6, 9]

    pixels = torch.full((1, 3, 96, 128), 90, dtype=torch.uint8)  # shrunk, it is itself
    half, = build_featurizer("efficientnet_lite0", ["s8"], "random")(pixels[:, :, :48, :64])
    torch.testing.assert_close(featurizer(pixels)[2], half, rtol=1e-4, atol=1e-5)


def test_bfloat16_gives_about_what_float32_gives():
    exact = build_featurizer("alexnet", ["s8", "s8@0.5"], "random")
    rough = build_featurizer("alexnet", ["s8", "s8@0.5"], "random", "bfloat16")
    assert exact.digest == rough.digest
    for level, other in zip(exact(frames()), rough(frames()), strict=True):
        assert other.dtype == torch.float32
        assert 0 < (level - other).norm() / level.norm() < 0.02


# --- networks of timm ----------------------------------------------------------------------------


@torch.no_grad()
def test_timm_resnet_is_timms_own(tmp_path):
    whole = make_timm("resnet18", tmp_path / "w.pth")
    featurizer = build_featurizer("timm:resnet18", None, str(tmp_path / "w.pth"))
    assert featurizer.levels == ["s32", "s16", "s8"]
    expected = whole.forward_features(normalised(frames()))
    torch.testing.assert_close(featurizer(frames())[0], expected, rtol=1e-4, atol=1e-4)

    fine = build_featurizer("timm:resnet18", ["s8"], str(tmp_path / "w.pth"))
    needed = whole.conv1, whole.bn1, whole.layer1, whole.layer2
    assert fine.parameters_count == sum(p.numel() for part in needed for p in part.parameters())
    assert fine.digest == featurizer.digest


@torch.no_grad()
def test_timm_vit_is_timms_own_at_frames_of_any_size(tmp_path):
    whole = make_timm("test_vit", tmp_path / "w.pth")
    featurizer = build_featurizer("timm:test_vit", None, str(tmp_path / "w.pth"))
    assert featurizer.levels == ["s16"] and featurizer.mean == tuple(whole.pretrained_cfg["mean"])

    pixels = frames(*whole.patch_embed.img_size)
    tokens = whole.forward_features((pixels / 255 - 0.5) / 0.5)[:, whole.num_prefix_tokens:]
    expected = tokens.transpose(1, 2).unflatten(2, whole.patch_embed.grid_size)
    torch.testing.assert_close(featurizer(pixels)[0], expected, rtol=1e-4, atol=1e-5)
    assert featurizer(frames(57, 103))[0].shape == (2, 64, 4, 6)  # of 64 x 96, the nearest there is


@pytest.mark.parametrize("name, levels, expected", [
    ("resnet50", ["s4", "s16@0.5"], {"s16@0.5": [1024, 15, 27], "s4": [256, 120, 214]}),
    ("convnext_tiny", None, {"s32": [768, 15, 26], "s16": [384, 30, 53], "s8": [192, 60, 106]}),
    ("swin_tiny_patch4_window7_224", ["s4"], {"s4": [96, 120, 214]}),
    ("vit_small_patch14_dinov2", None, {"s14": [384, 34, 61]}),
    ("vit_small_patch16_dinov3", ["s16", "s16@0.5"],
     {"s16@0.5": [384, 15, 27], "s16": [384, 30, 53]}),
])
def test_timm_levels_and_shapes(name, levels, expected):
    pytest.importorskip("timm")
    featurizer = build_featurizer(f"timm:{name}", levels, "random")
    assert list(featurizer.shapes((480, 854)).items()) == list(expected.items())


def test_without_timm_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadInput, match="pip install timm"):
        build_featurizer("timm:resnet18", None, "random")


def test_failed_download_says_the_way_out(monkeypatch):
    timm = pytest.importorskip("timm")

    def fail(*args, **options):
        raise ConnectionError("no route")
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(BadInput, match=r"pretrained weights.*no route.*--weights FILE.*random"):
        build_featurizer("timm:resnet18", None, None)


# --- what is refused, and weights ----------------------------------------------------------------


@pytest.mark.parametrize("name, levels, words", [
    ("resnet51", None, "--featurizer resnet51: unknown; expected alexnet"),
    ("alexnet", ["s2"], "--levels s2: alexnet has s4, s8, s16, s32"),
    ("efficientnet_lite0", ["s64"], "--levels s64: efficientnet_lite0 has s2"),
])
def test_unknown_names_are_refused_with_those_there_are(name, levels, words):
    with pytest.raises(BadInput, match=words):
        build_featurizer(name, levels, "random")


def test_frames_too_small_are_refused():
    with pytest.raises(BadInput, match="frames of 20 x 16 do not fit alexnet at levels s32"):
        build_featurizer("alexnet", None, "random").shapes((16, 20))


def test_random_weights_are_always_the_same_and_leave_the_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (build_featurizer("alexnet", None, "random").digest for _ in range(2))
    assert first == second and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("change, words", [
    (lambda state: {}, "Missing key.*10[.]bias"),
    (lambda state: {"state": state}, "expected a state dict"),
    (lambda state: [1, 2], "expected a state dict"),
    (lambda state: {**state, "features.99.bias": torch.zeros(3)}, "Unexpected key.*99[.]bias"),
    (lambda state: {**state, "features.0.bias": torch.zeros(3)}, "size mismatch for 0[.]bias"),
    (lambda state: {**state, "classifier.1.bias": np.array}, "Weights only load"),
])
def test_other_weights_are_never_loaded(tmp_path, change, words):
    torch.save(change(make_alexnet().state_dict()), tmp_path / "w.pth")
    with pytest.raises(BadInput, match=rf"w\.pth.*{words}") as caught:
        build_featurizer("alexnet", None, str(tmp_path / "w.pth"))
    assert "\n" not in str(caught.value)
