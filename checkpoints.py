"""Model files: a decoder with what it must remember to be run again, saved and loaded as plain dicts.

Parted from models.py, which is left with the decoders themselves.
"""
import io
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from clips import checked_size
from data import FeatureFolder
from files import BadInput, whole_file
from models import Decoder, make_decoder


def describe(decoder_name: str, folder: FeatureFolder, levels: list[str]) -> dict:
    """What a model must remember to be run again: everything in model.pt but its weights."""
    meta = folder.meta
    return {"decoder": decoder_name, "featurizer": meta["featurizer"], "weights": meta["weights"],
            "shapes": {level: list(meta["levels"][level]) for level in levels}, "size": list(meta["size"]),
            "featurizer_levels": list(meta["levels"]), "featurizer_parameters": meta["parameters"],
            "featurizer_flops": meta["flops_per_frame"]}


def save_model(path: Path, description: dict, decoder: nn.Module) -> None:
    """Write model.pt: a plain dict of `description` and the state dict. The same values give the same bytes."""
    state = {key: value.detach().cpu().contiguous() for key, value in decoder.state_dict().items()}
    save_plain(path, {**description, "state": state})


def save_plain(path: Path, value: dict) -> None:
    """Write a dict of tensors and plain values, whole or not at all."""
    buffer = io.BytesIO()  # written to a file, the archive would hold the file's temporary name
    torch.save(value, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_plain(path: Path, keys: set[str]) -> dict:
    """Read a dict written by `save_plain`, running no code from it. Raises BadInput when it is not one with `keys`."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; train.py writes model.pt")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save packs nothing, so what is packed is not its own, and may be a bomb
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("its entries are larger than itself")
        with warnings.catch_warnings(action="ignore"):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises every kind
        raise BadInput(f"{path}: cannot be read as a checkpoint ({(str(error) or type(error).__name__).splitlines()[0][:200]})") from error
    if not isinstance(value, dict) or not keys <= value.keys():
        missing = keys - (value.keys() if isinstance(value, dict) else set())
        raise BadInput(f"{path}: expected a checkpoint of train.py, which has {', '.join(sorted(missing))}")
    return value


def load_model(path: Path) -> tuple[Decoder, dict]:
    """Return the decoder of a model.pt (or of the run folder that holds it), in eval mode, and its description.

    The description is what `describe` made. Raises BadInput when it is not a checkpoint of train.py, or does not fit the decoder it names.
    """
    path = Path(path)
    path = path / "model.pt" if path.is_dir() else path
    keys = {"decoder", "featurizer", "weights", "shapes", "size", "featurizer_levels", "featurizer_parameters",
            "featurizer_flops", "state"}
    model = load_plain(path, keys)
    try:
        state = model.pop("state")
        check_description(model)
        decoder = rebuild(model, state, model["shapes"], model["size"])
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    except Exception as error:  # a damaged description can break a decoder's constructor in any way
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: does not fit the decoder {model['decoder']!r} it names ({reason})") from error
    return decoder, model


def check_description(model: dict) -> None:
    """Raise BadInput unless a description read from a file is as `describe` makes it, and its decoder can be made at all."""
    shapes, size, levels = model["shapes"], model["size"], model["featurizer_levels"]
    if not all(isinstance(model[key], str) for key in ("decoder", "featurizer", "weights")):
        raise BadInput("its decoder, featurizer and weights should be text")
    if not all(type(model[key]) is int and 0 <= model[key] < 1 << 63 for key in ("featurizer_parameters", "featurizer_flops")):
        raise BadInput("its featurizer's parameters and FLOPs should be counts")
    if not isinstance(levels, list) or not isinstance(shapes, dict) or not shapes or not all(level in levels for level in shapes) \
            or not all(isinstance(level, str) for level in levels):
        raise BadInput("its shapes should be {level: [C, h, w]}, of levels of its featurizer")
    for shape, limits in [(size, (1 << 16, 1 << 16)), *((shape, (1 << 14, 1 << 12, 1 << 12)) for shape in shapes.values())]:
        if not isinstance(shape, list) or len(shape) != len(limits) or not all(
                type(n) is int and 0 < n <= limit for n, limit in zip(shape, limits)):
            raise BadInput(f"its size or a shape is {' '.join(str(shape).split())[:100]}; expected whole numbers, [H, W] or [C, h, w], "
                           f"up to {list(limits)}")
    checked_size(size, Path("its frames"))


def rebuild(model: dict, state: dict, shapes: dict, size: Sequence[int]) -> Decoder:
    """Make the decoder of a description for feature maps of `shapes` and frames of `size`, with the weights `state`."""
    height, width = size
    decoder = make_decoder(model["decoder"], {level: tuple(shape) for level, shape in shapes.items()}, (height, width))
    decoder.load_state_dict(state)
    return decoder.eval()


def check_fit(model: dict, path: Path, folder: FeatureFolder) -> None:
    """Raise BadInput unless the features are the model's: featurizer, weights, levels, shapes and frame size."""
    meta = folder.meta
    pairs = [("featurizer", model["featurizer"], meta["featurizer"])]
    if model["featurizer_levels"] == list(meta["levels"]):  # the digest covers the weights that the levels need
        pairs += [("weights digest", model["weights"], meta["weights"])]
    pairs += [(f"level {level}", list(shape), meta["levels"].get(level)) for level, shape in model["shapes"].items()]
    pairs += [("frame size", list(model["size"]), list(meta["size"]))]
    for what, wanted, found in pairs:
        if wanted != found:
            raise BadInput(f"{folder.path}: {what} is {found}, but {path} was trained on {wanted}; "
                           "featurize these clips as the model's training clips were")


def check_same_features(folders: list[FeatureFolder], levels: list[str]) -> None:
    """Raise BadInput unless all folders hold the same featurizer's features at one frame size."""
    first = folders[0]
    model = describe("", first, levels)
    for other in folders[1:]:
        check_fit(model, first.path, other)
