"""Read damaged and hostile files, thousands of them, and see that each ends in a clear error or a right result.

    python tests/fuzz.py --count 10000 --seed 0

Images and masks in every form, paths.json, meta.json, arrays, checkpoints and results are damaged at random (the same
seed, the same damage) and read as the scripts read them; before them come a few crafted by hand. Each must be refused
(BadInput, or a broken rule of package.py) or read right, in time, in memory, with nothing on standard error, no program
started and no file opened outside its folder (libtiff's own lines about a damaged TIFF excepted).
Prints a count per kind and outcome; what fails is kept in --failures and makes the exit status 1. Inputs are read in
child processes, so that a crash of one is counted too.
"""
import argparse
import collections
import contextlib
import copy
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from helpers import write_features  # noqa: E402
from PIL import Image  # noqa: E402

import checkpoints  # noqa: E402
import clips  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
import package  # noqa: E402
import resident  # noqa: E402
import runs  # noqa: E402
from cli import one_line  # noqa: E402
from distributed import Group  # noqa: E402
from files import BadInput  # noqa: E402
from optimizer import Adam  # noqa: E402

SECONDS = 20  # that one input may take, on a busy machine
MEMORY = 1500  # MB that one input may take: a picture of 64 million pixels in a few forms
CHUNK = 250  # inputs a child process reads
SIZE = (40, 60)  # (H, W) of frames
LIBTIFF = rb"(tempfile\.tif|LZW\w+|TIFF\w+|Fax\w+): .*\n"  # prints its own words about a damaged file
CPU = torch.device("cpu")


class Kind(NamedTuple):
    """One kind of input: whole files to damage, how, and how it is read."""

    files: list[Path]  # whole ones, in a folder that lends the rest of what is needed
    damage: Callable[[np.random.Generator, bytes], bytes]
    read: Callable[[Path], object]  # raises BadInput, AssertionError for a wrong result, or returns


# --- damage ------------------------------------------------------------------------------------


def damage_bytes(rng: np.random.Generator, whole: bytes) -> bytes:
    """Flip, overwrite, cut out, repeat or append a few bytes, or cut the end off."""
    content = bytearray(whole)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(min(len(content), 64) if rng.random() < 0.4 else len(content))) if content else 0
        length = int(rng.integers(1, 17))
        match int(rng.integers(7)):
            case 0 if content:
                content[at] ^= 1 << int(rng.integers(8))
            case 1:
                content[at:at + length] = rng.bytes(length)
            case 2:
                del content[at:at + length]
            case 3:
                content[at:at] = content[at:at + length] * int(rng.integers(1, 50))
            case 4:
                number = int(rng.choice([0, 1, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 60000]))
                content[at:at + 4] = struct.pack(">I" if rng.random() < 0.5 else "<I", number)
            case 5:
                del content[at:]
            case 6:
                content += rng.bytes(length)
    return bytes(content)


def damage_png(rng: np.random.Generator, whole: bytes) -> bytes:
    """Damage what is inside a PNG's chunks and make their checksums right again, so that it gets further."""
    if rng.random() < 0.4 or whole[:4] != b"\x89PNG":
        return damage_bytes(rng, whole)
    chunks, at = [], 8
    while at < len(whole):
        length, = struct.unpack(">I", whole[at:at + 4])
        chunks.append((whole[at + 4:at + 8], whole[at + 8:at + 8 + length]))
        at += length + 12
    chosen = int(rng.integers(len(chunks)))
    kind, body = chunks[chosen]
    if kind == b"IDAT" and rng.random() < 0.7:
        body = zlib.compress(damage_bytes(rng, zlib.decompress(body)))
    else:
        body = damage_bytes(rng, body) if rng.random() < 0.9 else b""
    chunks[chosen] = (kind, body)
    if rng.random() < 0.2:
        chunks.insert(int(rng.integers(len(chunks) + 1)), chunks[int(rng.integers(len(chunks)))])
    return whole[:8] + b"".join(png_chunk(kind, body) for kind, body in chunks)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


NASTY = [None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, float("nan"), float("inf"), "", ".", "..", "../x", "/etc/passwd",
         "C:\\x", "a\\..\\..\\x", "outputs/../../x.png", "a\0b", "\ud800", "a\nb", "\x1b[2J", "é" * 300, "a/" * 3000 + "b", "a" * 5000,
         [], {}, [[]], {"": ""}, [1, 2], [-1, 5], [10**9, 10**9], [65000, 65000], "s16", "features", "../features", "²", "1e5", [None] * 3]


def nasty(rng: np.random.Generator):
    """A value that a file might hold but should not."""
    return copy.deepcopy(NASTY[int(rng.integers(len(NASTY)))])


def damage_value(rng: np.random.Generator, value):
    """Change one entry somewhere in nested dicts and lists: replaced, taken out, renamed or doubled."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[int(rng.integers(len(keys)))]
        what = rng.random()
        if what < 0.7:
            value[key] = damage_value(rng, value[key])
        elif what < 0.8:
            del value[key]
        elif isinstance(value, list):
            value.insert(key, nasty(rng))
        else:
            with contextlib.suppress(TypeError):  # a nasty value that cannot be a key
                value[nasty(rng)] = value.pop(key) if rng.random() < 0.5 else nasty(rng)
        return value
    return nasty(rng)


def damage_json(rng: np.random.Generator, whole: bytes) -> bytes:
    """Damage JSON as text or as values; now and then nest it deeper than a parser likes."""
    what = rng.random()
    if what < 0.2:
        return damage_bytes(rng, whole)
    if what < 0.23:
        return b"[" * 100_000 if rng.random() < 0.5 else b'{"raw":' * 100_000
    value = damage_value(rng, json.loads(whole))
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError):  # mixed keys
        return damage_bytes(rng, whole)


def damage_array(rng: np.random.Generator, whole: bytes) -> bytes:
    """Damage an .npy file: its header as text, or bytes anywhere."""
    if rng.random() < 0.5:
        return damage_bytes(rng, whole)
    length, = struct.unpack("<H", whole[8:10])
    header = whole[10:10 + length]
    olds = [b"(", b")", b",", b"'<f2'", b"'<f4'", b"False", b"'shape'", b"'descr'", b" ", b"{", b"}"]
    news = [b"", b"(" * 3000, b"'O'", b"'V8'", b"'<U99999'", b"True", b"-1,", b"99999999999,", b"1e9", b"L,", b"'>f2'", b"'\\d'", b"None",
            b"[('a','O')]",
            b"__import__('os').system('x')", b"\xff", b"{}", b"5()", b"1_0", b"'" * 9]
    for _ in range(int(rng.integers(1, 3))):
        header = header.replace(olds[int(rng.integers(len(olds)))], news[int(rng.integers(len(news)))], int(rng.integers(1, 3)))
    header = header[:60000]
    return whole[:8] + struct.pack("<H", len(header)) + header + whole[10 + length:]


class Harmful:
    """An object that runs a program when it is unpickled."""

    def __init__(self, function, argument: str):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def damage_checkpoint(rng: np.random.Generator, whole: bytes) -> bytes:
    """Damage a checkpoint: its bytes, its values, its pickle with the archive made anew around it, or its packing."""
    what = rng.random()
    if what < 0.3:
        return damage_bytes(rng, whole)
    if what < 0.65:
        value = damage_value(rng, torch.load(io.BytesIO(whole), weights_only=True))
        if rng.random() < 0.1 and isinstance(value, dict):
            function = [os.system, eval, os.unlink, pickle.loads][int(rng.integers(4))]
            value[str(rng.choice(["state", "decoder", "run", "x"]))] = Harmful(function, "touch harmed")
        buffer = io.BytesIO()
        with contextlib.suppress(Exception):  # a value that cannot be pickled; what is there then is damaged too
            torch.save(value, buffer)
        return buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
        packing = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
        chosen = "data.pkl" if rng.random() < 0.8 else str(rng.choice(old.namelist())).rpartition("/")[2]
        for name in old.namelist():
            body = old.read(name)
            new.writestr(name, damage_bytes(rng, body) if name.endswith(chosen) else body, packing)
    return buffer.getvalue()


# --- reading, as the scripts do ----------------------------------------------------------------


def read_frame(file: Path) -> None:
    """A frame: its size from the header, and its pixels."""
    height, width = clips.image_size(file)
    image = clips.read_image(file)
    assert image.dtype == np.uint8 and image.shape == (height, width, 3), (image.dtype, image.shape)


def read_mask(file: Path) -> None:
    mask = clips.read_mask(file)
    assert mask.dtype == bool and mask.shape == clips.image_size(file), (mask.dtype, mask.shape)


def read_video(file: Path) -> None:
    for image in clips.read_video(file):
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, image.shape


def read_contest(file: Path) -> None:
    """paths.json of a contest folder, and the frames it names."""
    frames = clips.find_frames(file.parent)
    for frame in frames:
        assert file.parent in frame.image.parents
        assert frame.annotation is None or file.parent in frame.annotation.parents
    clips.check_frames(frames)


def read_features(file: Path) -> None:
    """A feature folder: checked, its paths, its arrays with their digests."""
    folder = data.open_features(file.parent)
    root = file.parent / "clips"
    assert all(root in frame.image.parents for frame in data.folder_frames(folder, root))
    assert all(clips.is_name(name) for name in folder.meta["clips"])
    for level in folder.files:
        features = resident.load_features(folder, [level], CPU).levels[0]
        assert features.shape == (folder.frames, *folder.meta["levels"][level]) and features.isfinite().all()
    if folder.masks:
        resident.load_masks(folder, CPU)


def read_array(file: Path) -> None:
    """An array of a feature folder: with its digest it is refused or what it was; without, anything of the right shape and finite."""
    folder = data.open_features(file.parent)
    whole = file.with_name("whole").read_bytes()
    try:
        read_features(file)
        assert file.read_bytes() == whole, "damage was not seen"
    except BadInput:
        assert file.read_bytes() != whole, "a whole array was refused"
    features = resident.load_features(folder, list(folder.files), CPU, verify=False)
    assert all(level.isfinite().all() for level in features.levels)


def read_model(file: Path) -> None:
    """A model: loaded, and run once."""
    decoder, model = checkpoints.load_model(file)
    levels = [torch.zeros(1, *shape) for shape in model["shapes"].values()]
    assert sum(level.numel() for level in levels) < 1 << 24, "shapes that no frame has"
    with torch.inference_mode():
        probabilities = decoder.probabilities(decoder(levels).float())
    assert probabilities.shape == (1, *model["size"])


def run_parts() -> tuple[dict, dict]:
    """What train.py saves in last.pt: its parts, and its counters."""
    decoder = models.make_decoder("linear", {"s32": (6, 7, 9)}, SIZE)
    parts = {"decoder": decoder, "optimizer": Adam(decoder.parameters())}
    return parts, {"step": 0, "best": -1.0, "since_best": 0, "total": torch.zeros(()), "count": 0}


def read_state(file: Path) -> None:
    """The state of a run, put back."""
    parts, state = run_parts()
    runs.load_state(file.parent, parts, state, Group())
    assert type(state["step"]) is int and type(state["best"]) is float and state["total"].shape == ()


def read_args(file: Path) -> None:
    """The arguments of a run, to repeat it."""
    import train
    args = train.parse_args(["--args", str(file)])
    assert args.steps is None or args.steps > 0


def read_results(file: Path) -> None:
    """A results folder, packaged when it breaks no rule."""
    folder = file.parent.parent if file.parent.name == "outputs" else file.parent
    names, broken = package.check(folder)
    assert all(isinstance(rule, str) for rule in broken)
    if broken:
        raise BadInput(broken[0])
    out = folder.parent / "out.zip"
    package.write_zip(folder, names, out, overwrite=True)
    with zipfile.ZipFile(out) as archive:
        assert all(name in ("paths.json", "metadata.json") or (name.startswith("outputs/") and ".." not in name.split("/"))
                   for name in archive.namelist())


# --- what is damaged ---------------------------------------------------------------------------


def make_kinds(root: Path) -> dict[str, Kind]:
    """Write whole files of every kind below `root`."""
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (*SIZE, 3), np.uint8).repeat(2, 0)[:SIZE[0]]
    grey = np.zeros(SIZE, np.uint8)
    grey[10:30, 20:50] = 255
    picture, mask = Image.fromarray(frame), Image.fromarray(grey)
    images, masks, contest, results = (root / name for name in ("images", "masks", "contest", "results"))
    for folder in (images, masks, contest / "ant", results / "outputs"):
        folder.mkdir(parents=True)
    for name, options in {"a.jpg": {}, "progressive.jpg": {"progressive": True}, "exif.jpg": {"exif": Image.Exif()}, "b.png": {},
                          "c.webp": {"lossless": True}, "d.bmp": {}, "e.tif": {}, "lzw.tif": {"compression": "tiff_lzw"}}.items():
        picture.save(images / name, **options)
    for name, form in {"L": mask, "LA": mask.convert("LA"), "P": mask.convert("P"), "RGB": mask.convert("RGB"),
                       "RGBA": mask.convert("RGBA"),
                       "1": mask.convert("1"), "16": Image.fromarray(grey.astype(np.uint16)), "01": Image.fromarray(grey // 255)}.items():
        form.save(masks / f"{name}.png")
    picture.save(images / "walk.gif", save_all=True, append_images=[picture.rotate(90 * turn) for turn in range(3)])
    paths: dict[str, dict[str, str]] = {"raw": {}, "annotation": {}}
    for number in range(3):
        picture.save(contest / f"ant/{number}.jpg")
        mask.save(contest / f"ant/{number}.png")
        paths["raw"][str(number)], paths["annotation"][str(number)] = f"ant/{number}.jpg", f"ant\\{number}.png"
        mask.save(results / f"outputs/{number:05d}.png")
    (contest / "paths.json").write_text(json.dumps(paths))
    (results / "paths.json").write_text(json.dumps({"output": {str(number): f"outputs/{number:05d}.png" for number in range(3)}}))
    (results / "metadata.json").write_text(json.dumps({"nparams": 1000, "frames": 3, "size": SIZE, "sizes": None, "decoder": "linear"}))
    write_features(root / "features", {"ant": 3, "bee": 2}, size=SIZE, levels={"s32": (2, 2, 3), "s16": (2, 3, 4)}, dtype="float16",
                   sizes=[SIZE] * 5)
    write_features(root / "array", {"ant": 3}, size=SIZE, dtype="float32")
    shutil.copy(root / "array/features.npy", root / "array/whole")
    folder = data.open_features(root / "array")
    for name in ("linear", "simple"):
        decoder = models.make_decoder(name, {"s32": (6, 7, 9)}, SIZE)
        (root / "models" / name).mkdir(parents=True)
        checkpoints.save_model(root / "models" / name / "model.pt", checkpoints.describe(name, folder, ["s32"]), decoder)
    parts, state = run_parts()
    sum(parameter.sum() for parameter in parts["decoder"].parameters()).backward()
    parts["optimizer"].step(1e-3)
    (root / "run").mkdir()
    runs.save_state(root / "run", parts, state)
    (root / "run/log.jsonl").write_text("")
    (root / "run/args.json").write_text(json.dumps({
        "args": {"features": "features/x", "steps": 10, "lr": 0.1, "shuffle": False, "decoder": "linear", "no_pictures": True,
                 "out": "runs/x"},
        "features": {"features/x": {"features.npy": "00"}}}))
    return {
        "frame": Kind([file for file in images.iterdir() if file.suffix != ".gif"], damage_png, read_frame),
        "mask": Kind(list(masks.iterdir()), damage_png, read_mask),
        "video": Kind([images / "walk.gif"], damage_bytes, read_video),
        "contest paths.json": Kind([contest / "paths.json"], damage_json, read_contest),
        "meta.json": Kind([root / "features/meta.json"], damage_json, read_features),
        "features paths.json": Kind([root / "features/paths.json"], damage_json, read_features),
        "array": Kind([root / "array/features.npy"], damage_array, read_array),
        "model.pt": Kind(sorted(root.glob("models/*/model.pt")), damage_checkpoint, read_model),
        "last.pt": Kind([root / "run/last.pt"], damage_checkpoint, read_state),
        "args.json": Kind([root / "run/args.json"], damage_json, read_args),
        "metadata.json": Kind([results / "metadata.json"], damage_json, read_results),
        "results paths.json": Kind([results / "paths.json"], damage_json, read_results),
        "output": Kind([results / "outputs/00001.png"], damage_png, read_results),
    }


def crafted(kinds: dict[str, Kind]) -> Iterator[tuple[str, Path, bytes]]:
    """Yield (kind, file, content) of inputs made by hand, each of which must be refused."""
    frame = next(file for file in kinds["frame"].files if file.suffix == ".png")
    for width, height in ((60000, 60000), (2**31 - 1, 2**31 - 1), (64_000_001, 1), (0, 0)):
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        yield "frame", frame, b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(10**7))) + png_chunk(b"IEND", b"")
    png = frame.read_bytes()
    for kind in (b"zTXt", b"iCCP"):
        yield "crafted text chunk", frame, png[:33] + png_chunk(kind, b"a\0\0" + zlib.compress(bytes(10**9 // 8))) + png[33:]
    jpeg = next(file for file in kinds["frame"].files if file.name == "a.jpg")
    content = jpeg.read_bytes()
    at = content.index(b"\xff\xc0") + 5
    yield "frame", jpeg, content[:at] + struct.pack(">HH", 65535, 65535) + content[at + 4:]
    yield "frame", jpeg, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n(touch harmed) system\n"
    gif = kinds["video"].files[0]
    content = gif.read_bytes()
    yield "video", gif, content[:6] + struct.pack("<HH", 65535, 65535) + content[10:]
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in (("a/data.pkl", b"\x80\x02}q\0."), ("a/version", b"3\n"), ("a/data/0", bytes(10**9))):
            archive.writestr(name, body)
    model, array = kinds["model.pt"].files[0], kinds["array"].files[0]
    yield "model.pt", model, bomb.getvalue()
    yield "model.pt", model, pickle.dumps({"decoder": Harmful(os.system, "touch harmed")})
    whole = torch.load(model, weights_only=True)
    for changes in ({"shapes": {"s32": [10**9, 1, 1]}}, {"size": [2**31, 2**31]}, {"size": [64_000_000, 1]}, {"shapes": {}},
                    {"state": {key: torch.zeros(1).expand(10**6, 10**6) for key in whole["state"]}}, {"featurizer_flops": 10**400}):
        buffer = io.BytesIO()
        torch.save({**whole, **changes}, buffer)
        yield "model.pt", model, buffer.getvalue()
    for shape in ("(9999999999, 6, 7, 9)", "(3, 6, 7, 9)" + " " * 60000, "(3, 6, 7, 9), 'x': " + "(" * 20000):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()
        yield "array", array, b"\x93NUMPY\x02\0" + struct.pack("<I", len(header)) + header
    flipped = bytearray(array.read_bytes())
    flipped[-1] ^= 1
    yield "flipped bit", array, bytes(flipped)
    paths = kinds["contest paths.json"].files[0]
    for path in ("../images/b.png", "/etc/passwd", "ant/../../images/b.png", "..\\images\\b.png", "C:\\x.png", "\\\\host\\x.png",
                 "ant/\ud800.png",
                 "a/" * 3000 + "b.png", "a" * 300 + ".png", "", ".", "a.zip/../x.png", "ant/0.jpg\0.png"):
        yield "contest paths.json", paths, json.dumps({"raw": {"0": path}}).encode()
        yield "results paths.json", kinds["results paths.json"].files[0], json.dumps({"output": {"0": path}}).encode()
    for text in (b"[" * 10**6, b'{"a":' * 10**6, b"NaN", b"1" * 10**6, b'{"raw": {"0": ' + b"9" * 5000 + b"}}", b"\xff\xfe{", b"",
                 b"null", b'"\\ud800"'):
        for kind in ("contest paths.json", "meta.json", "features paths.json", "metadata.json", "results paths.json", "args.json"):
            yield kind, kinds[kind].files[0], text


def read_flipped(file: Path) -> None:
    """One flipped bit: --no-verify reads past it, and the digest does not."""
    folder = data.open_features(file.parent)
    resident.load_features(folder, list(folder.files), CPU, verify=False)
    resident.load_features(folder, list(folder.files), CPU)


# --- judging -----------------------------------------------------------------------------------


class Guard:
    """Watches what reading does: files opened outside the work folder, programs started, standard error, time, memory."""

    def __init__(self, work: Path):
        self.work, self.on, self.seen = str(work), False, []
        installed = {str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix, ROOT)}
        self.mine = (self.work, *installed, "/proc/", "/dev/null", "/sys/")
        self.stderr = tempfile.TemporaryFile(dir=work)  # noqa: SIM115  for the life of the process
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
            self.seen.append(f"{event}{arguments!r}"[:200])
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(self.mine):
                self.seen.append(f"opened {path}"[:200])

    def watch(self, read: Callable[[], object]) -> str:
        """Return how reading ended: "read", "refused", or what was wrong."""
        def late(number, frame):
            raise TimeoutError(f"took more than {SECONDS} s")
        self.seen.clear()
        memory, written = peak(), os.fstat(self.stderr.fileno()).st_size
        signal.signal(signal.SIGALRM, late)
        before = os.dup(2)
        sys.stderr.flush()
        os.dup2(self.stderr.fileno(), 2)
        self.on = True
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            read()
            outcome = "read"
        except BadInput as error:
            shown = one_line(str(error))
            outcome = "refused" if shown and shown.isprintable() else f"an error without words: {error}"
        except BaseException:  # whatever else it is, a user would see a traceback
            outcome = traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.on = False
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
        if self.seen:
            outcome = f"reached out: {self.seen}"
        said = re.sub(LIBTIFF, b"", os.pread(self.stderr.fileno(), 10_000, written))
        if said:
            outcome = f"wrote to standard error: {said!r}"
        if peak() > memory + MEMORY:
            outcome = f"took {peak() - memory} MB"
        if (Path(self.work) / "harmed").exists():
            outcome = "ran code"
        return outcome


def peak() -> int:
    """The most memory this process has held, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def read_damaged(kind: Kind, file: Path, content: bytes, guard: Guard) -> str:
    """Put `content` in the place of `file`, read it, put the whole one back; return how it ended."""
    whole = file.read_bytes()
    try:
        file.write_bytes(content)
        return guard.watch(lambda: kind.read(file))
    finally:
        file.write_bytes(whole)


def make_input(kinds: dict[str, Kind], seed: int, number: int) -> tuple[str, Path, bytes]:
    """Return (kind, file, content) of the damaged input `number`."""
    rng = np.random.default_rng([seed, number])
    name = list(kinds)[number % len(kinds)]
    kind = kinds[name]
    file = kind.files[int(rng.integers(len(kind.files)))]
    return name, file, kind.damage(rng, file.read_bytes())


def read_chunk(inputs: Iterator[tuple[str, str, Path, bytes]], kinds: dict[str, Kind], work: Path,
               failures: Path) -> Iterator[tuple[str, str, float]]:
    """Read (label, kind, file, content) inputs; yield each one's kind, outcome and seconds. Failures are kept."""
    guard = Guard(work)
    os.chdir(work)
    for label, name, file, content in inputs:
        (work / "now").write_text(f"{label} {name}")
        started = time.perf_counter()
        kind = kinds.get(name) or Kind([], damage_bytes, read_flipped if name == "flipped bit" else read_frame)
        outcome = read_damaged(kind, file, content, guard)
        if outcome == "read" and label.startswith("crafted") and name != "crafted text chunk":
            outcome = "read, though it should be refused"
        if outcome not in ("read", "refused"):
            failures.mkdir(parents=True, exist_ok=True)
            (failures / f"{label}-{file.name}").write_bytes(content)
            (failures / f"{label}-{file.name}.txt").write_text(f"{name}\n{outcome}\n")
        yield name, outcome, time.perf_counter() - started


def in_child(work: Callable[[], Iterator[tuple]]) -> tuple[list[tuple], int]:
    """Run a generator in a forked process; return what it yielded, and the signal that ended it (0: none)."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with os.fdopen(write_end, "w") as pipe:
                for row in work():
                    pipe.write(json.dumps(row) + "\n")
                    pipe.flush()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        rows = [json.loads(line) for line in pipe]
    _, status = os.waitpid(child, 0)
    return rows, status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="damaged inputs, besides the crafted ones (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: 0)")
    parser.add_argument("--only", type=int, default=None, metavar="N", help="read this one input, and show how it ended")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"),
                        help="where to keep inputs that fail (default: fuzz-failures)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    failures = args.failures.resolve()
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    slowest, failed, started = 0.0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary).resolve()
        kinds = make_kinds(work)

        def damaged(numbers) -> Iterator[tuple[str, str, Path, bytes]]:
            return ((f"{args.seed}-{number}", *make_input(kinds, args.seed, number)) for number in numbers)
        chunks = [lambda: ((f"crafted-{number}", *item) for number, item in enumerate(crafted(kinds)))]
        chunks += [lambda first=first: damaged(range(first, min(first + CHUNK, args.count))) for first in range(0, args.count, CHUNK)]
        if args.only is not None:
            chunks = [lambda: damaged([args.only])]
        for chunk in chunks:
            rows, status = in_child(lambda: read_chunk(chunk(), kinds, work, failures))  # noqa: B023  called before the next turn
            for name, outcome, seconds in rows:
                good = outcome in ("read", "refused")
                counts[name][outcome if good else "FAILED"] += 1
                slowest, failed = max(slowest, seconds), failed + (not good)
                if not good:
                    print(f"{name}: {outcome}")
            if status:
                failed += 1
                print(f"a child process ended with status {status} while reading {(work / 'now').read_text()}")
    print(f"{'kind':<24}{'inputs':>9}{'refused':>9}{'read':>9}{'FAILED':>9}")
    for name, row in [*counts.items(), ("all", sum(counts.values(), collections.Counter()))]:
        print(f"{name:<24}{sum(row.values()):>9}{row['refused']:>9}{row['read']:>9}{row['FAILED']:>9}")
    print(f"seed {args.seed}: {failed} failed; slowest {slowest:.1f} s; {time.perf_counter() - started:.0f} s in all"
          + (f"; kept in {failures}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
