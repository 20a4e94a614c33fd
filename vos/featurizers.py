"""Frozen, pretrained image networks: a frame in, one feature map per level out."""
import copy
import hashlib
import itertools
from typing import Any

import torch
from torch import nn

from vos.cli import level_name, level_stride, parse_level
from vos.efficientnet_lite import VARIANTS, EfficientNetLite, read
from vos.inputs import BadInput


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

    def __init__(self, name: str, weights: str | None):
        from torchvision.models import alexnet
        super().__init__(*alexnet(weights=None if weights else "DEFAULT").features)
        self.mean, self.std, self.default = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), ("s32",)
        self.taps = {"s4": 2, "s8": 5, "s16": 12, "s32": 13}
        if weights not in (None, "random"):
            state = read(weights)
            kept = [key for key in state if not key.startswith("classifier.")]
            self.load_state_dict({key.removeprefix("features."): state[key] for key in kept})

    def cut(self, levels: set[str]) -> None:
        self.taps = {level: self.taps[level] for level in levels}
        del self[max(self.taps.values()):]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = list(itertools.accumulate(self, lambda x, layer: layer(x), initial=x))
        return {level: maps[count] for level, count in self.taps.items()}


class Timm(nn.Module):
    """A network of timm; a vision transformer's one level, of its patch, passes its last norm."""

    def __init__(self, name: str, weights: str | None):
        import timm
        super().__init__()
        options: Any = {"pretrained": weights is None, "num_classes": 0}
        try:
            network: Any = timm.create_model(name[5:], dynamic_img_size=True, **options)
        except TypeError:  # no vision transformer: takes frames of any size as it is
            network = timm.create_model(name[5:], **options)
        if weights not in (None, "random"):
            state, own = read(weights), network.state_dict()
            spare = network.pretrained_cfg.get("classifier") or ()
            kept = [key for key in state if key in own or not key.startswith(spare)]
            network.load_state_dict({key: state[key] for key in kept})

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


CPU = torch.device("cpu")
# To add one, write a network with `mean`, `std`, `default` levels, `taps` (by level), `cut(levels)`
# (drops what they do not need) and `forward` (normalised frames to {level: map}).
FEATURIZERS: dict[str, Any] = {"alexnet": AlexNet, **dict.fromkeys(VARIANTS, EfficientNetLite)}


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
