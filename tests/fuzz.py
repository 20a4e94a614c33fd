"""Feed thousands of hostile inputs to the scripts: each must be refused in one line, or be right.

    python tests/fuzz.py --count 10000 --seed 0

Flags, outputs, layouts, encodings, videos and damaged bytes, drawn at random (the same seed, the same
inputs) in a small world of a user's files. Each ends in BadInput (a script: one line and status 2; the
rules that package.py finds broken: status 1) or in the right answer, which is computed here; in time
and in memory; with nothing else on standard error, no program started but ffmpeg, and no file outside
--out touched. Prints a count per family and outcome; failures are kept, and make the exit status 1.
"""
import argparse
import collections
import contextlib
import faulthandler
import io
import json
import math
import os
import re
import resource
import shutil
import stat
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from helpers import call, ok, write_json  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import featurize  # noqa: E402
import models  # noqa: E402
import package  # noqa: E402
import train  # noqa: E402
from vos import cli, clips, featurizers, images, sample, sources, video  # noqa: E402
from vos.efficientnet_lite import read  # noqa: E402
from vos.inputs import BadInput, is_name  # noqa: E402
from vos.masks import decide_meaning, read_mask  # noqa: E402

SECONDS, MEMORY = 60, 1500  # seconds and MB that one input may take, on a busy machine
SCRIPTS = {"sample": sample, "featurize": featurize, "train": train, "evaluate": evaluate,
           "package": package}
BASE = {"sample": "--clips=1 --val-clips=1 --frames=1 --size=32x32",
        "featurize": "--data=clips --split=train --featurizer=tiny --weights=random",
        "train": "--features=features --decoder=linear --steps=2 --batch-size=2 --no-pictures",
        "evaluate": "--model=run --features=features --no-pictures",
        "package": "--results=results"}
HOSTILE = ["", "0", "-1", "1", "2", "1e999", "nan", "inf", "9" * 20, "9" * 5000, "0x10", "1_0", "²", "٣",
           "1.5", "-0.0", "1e-320", ".", "..", "/", "~", "a/b", "\udcff", "\x1b[2J", "a\nb", "é" * 300,
           "s16", "s16@.5", "s8@0", "s0", "s8@nan", "s8,s8", "s٨", ",", "mirror", "mirror,mirror", "zoom0",
           "zoom1.5", "zoom١", "32x32", "0x0", "99999x99999", "cpu", "cpu:7", "cuda:99", "meta", "wandb:",
           "wandb:../x", "random", "tiny", "timm:", "fifo", "home", "home/letter.txt", "clips", "features",
           "results", "contest", "gone", "x" * 5000]
NASTY = [None, True, 0, -1, 2**31, 2**63, 10**400, 0.5, math.nan, math.inf, "", "..", "/etc/passwd",
         "C:\\x", "a\\..\\..\\x", "outputs/../../x.png", "a\0b", "\ud800", "a\nb", "\x1b[2J", "é" * 300,
         "a/" * 3000, [], {}, [[]], {"": ""}, [-1, 5], [10**9] * 2, [65000] * 2, "s16", "../features", "²"]
LIBTIFF = r"(tempfile\.tif|LZW\w+|TIFF\w+|Fax\w+): .*\n"  # prints its own words about a damaged file
REACHED: list[str] = []  # what the audit hook saw
CHANGES = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.symlink")
STARTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect")


class Tiny(featurizers.AlexNet):
    """A featurizer of one level that takes no time."""

    def __init__(self, name: str, weights: str | None):
        torch.nn.Sequential.__init__(self, torch.nn.AvgPool2d(8), torch.nn.Conv2d(3, 4, 1))
        self.mean, self.std, self.default, self.taps = (0.5,) * 3, (0.2,) * 3, ("s8",), {"s8": 2}
        if weights not in (None, "random"):
            self.load_state_dict(read(weights))


def make_world() -> None:
    """Write a user's files, and what every script makes, in the current folder."""
    featurizers.FEATURIZERS["tiny"] = Tiny
    for name in ("home", "now", "contest/ant", "videos"):
        Path(name).mkdir(parents=True)
    Path("home/letter.txt").write_text("dear")
    os.mkfifo("fifo")
    ok(call("vos.sample", "--out=clips", "--clips=2", "--val-clips=1", "--frames=2", "--size=48x64"))
    outs = {"featurize": "features", "train": "run", "evaluate": "results", "package": "sub.zip"}
    for name, out in outs.items():
        ok(call(name, *BASE[name].split(), f"--out={out}"))

    table: dict[str, dict] = {"raw": {}, "annotation": {}}
    pairs = zip(sorted(Path("clips").rglob("*.jpg")), sorted(Path("clips").rglob("*.png")))
    for number, pair in enumerate(pairs):
        for column, file in zip(table, pair):
            table[column][str(number)] = f"ant\\{number}{file.suffix}"
            shutil.copy(file, f"contest/ant/{number}{file.suffix}")
    write_json(Path("contest/paths.json"), table)
    picture = Image.open("contest/ant/0.jpg")
    for name, options in {"webp": {"lossless": True}, "tif": {"compression": "tiff_lzw"}, "bmp": {},
                          "png": {}, "jpeg": {"progressive": True}}.items():
        picture.save(f"home/picture.{name}", **options)
    for kind in video_kinds():
        walk = [np.full((32, 48, 3), 25 * number, np.uint8) for number in range(9)]
        video.write_video(Path(f"videos/walk.{kind}"), walk, 24, kind)


# --- running and judging -----------------------------------------------------------------------


def snapshot(*skipped: str) -> dict[str, tuple]:
    """Return what tells every file below the current folder from a changed one."""
    found = {}
    for folder, folders, files in os.walk("."):
        folders[:] = [name for name in folders if os.path.join(folder, name)[2:] not in skipped]
        for name in folders + files:
            state = os.lstat(path := os.path.join(folder, name))
            rest = () if stat.S_ISDIR(state.st_mode) else (state.st_size, state.st_mtime_ns)
            found[path[2:]] = state.st_mode, state.st_ino, *rest
    return found


def said() -> str:
    """Return what was written to standard error, a file here, since the last call."""
    sys.stderr.flush()
    text = os.pread(2, 1 << 20, 0).decode("utf-8", "replace")
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    return re.sub(LIBTIFF, "", text)


def run_script(name: str, *flags: str, out: str = "now/out") -> None:
    """Run a script, check how it ends and what it leaves; BadInput when it refuses in one line."""
    before = snapshot()
    argv = [f"{name}.py", *flags]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(io.StringIO()):
        status = cli.run(SCRIPTS[name].main)
    after, text = snapshot(), said()

    touched = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    if status != 2:
        touched -= {path for path in touched if f"{path}/".startswith(f"{out}/")}
    parents = {path for path in touched - before.keys() if f"{out}/".startswith(f"{path}/")}
    assert touched <= parents, f"touched {touched}"
    if status == 0:
        assert text == "" and os.path.lexists(out), f"status 0, but said {text!r}"
        return
    rules = name == "package" and status == 1
    assert status == 2 or rules or (status == 1 and "not finite" in text), (status, text)
    *lines, last = text.split("\n")
    assert last == "" and lines and lines[-1].startswith(f"{name}.py: "), text
    assert (rules or len(lines) == 1) and all(map(str.isprintable, lines)), text
    raise BadInput(text)


def expect(right: bool | None, work, *arguments):
    """Return what `work` does. right: whether it must be taken, or refused; None: either."""
    try:
        result = work(*arguments)
    except BadInput as error:
        assert right is not True, f"refused, though it is right: {error}"
        raise
    assert right is not False, "taken, though it should be refused"
    return result


def note(event: str, arguments: tuple) -> None:
    """Note programs started, and files read and changed outside the world (an audit hook)."""
    if event in STARTS and not {"git", "ffmpeg"} & set(os.path.basename(str(arguments[0])).split("-")):
        REACHED.append(f"{event}{arguments!r}"[:200])
    elif event in ("open", *CHANGES) and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        changes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        installed = [] if changes else [sys.prefix, sys.base_prefix, str(ROOT), "/proc/", "/sys/", "/usr/"]
        if not path.startswith((os.getcwd(), "/dev/null", *installed)):
            REACHED.append(f"{event} {path}"[:200])


def judge(case, rng: np.random.Generator) -> str:
    """Return how one input ended: right, refused, or what was wrong."""
    shutil.rmtree("now")
    os.mkdir("now")
    before, memory = snapshot("now"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    REACHED.clear()
    try:
        case(rng)
        outcome = "right"
    except BadInput as error:
        outcome = "refused" if str(error).strip() else "an error without words"
    except BaseException:  # whatever else it is, a user would see a traceback
        outcome = traceback.format_exc()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024
    wrong = {"reached out": list(REACHED), "said": said(), "took MB": grown * (grown > MEMORY),
             "touched": set(snapshot("now").items()) ^ set(before.items())}
    found = {what: value for what, value in wrong.items() if value}
    return f"{outcome} {found}" if found else outcome


# --- flags and outputs -------------------------------------------------------------------------


def flags(rng: np.random.Generator) -> None:
    """Random and hostile values of the flags of a script, parsed only or run on tiny inputs."""
    name, found = str(rng.choice(list(SCRIPTS))), []
    with (mock.patch.object(cli.Parser, "parse_args", lambda self: found.append(self) or sys.exit()),
          contextlib.suppress(SystemExit)):
        SCRIPTS[name].main()
    whole = name == "sample" or rng.random() < 0.4
    never = {"help", "debug", *(["out", "resume", "compile", "wandb", "threads"] if whole else [])}
    known = [action for action in found[0]._actions if action.dest not in never]
    given = BASE[name].split()
    for action in rng.choice(known, rng.integers(1, 4)):
        values = [*HOSTILE, *map(str, list(action.choices or []) * 10)]
        flag = action.option_strings[0][:-1 if rng.random() < 0.03 else None]
        bare = action.nargs == 0 and rng.random() < 0.9
        given.append(flag if bare else f"{flag}={values[rng.integers(len(values))]}")
    if whole:
        return run_script(name, *given, "--out=now/out")

    with mock.patch.object(sys, "argv", [f"{name}.py", *given]):
        args = vars(SCRIPTS[name].parse_args())
    for key, value in args.items():
        flag = f"--{key.replace('_', '-')}="
        text = [part.removeprefix(flag) for part in given if part.startswith(flag)]
        if text and type(value) in (int, float):
            assert math.isfinite(value) and value == float(text[-1]), (flag, text, value)
    for level in args.get("levels") or []:
        stride, at, scale = level.removeprefix("s").partition("@")
        assert 0 < int(stride) <= 4096 and scale != "1" and 0.1 <= float(scale or 1) <= 4, level
    assert math.prod(args.get("size") or ()) <= images.PIXELS_LIMIT


def outputs(rng: np.random.Generator) -> None:
    """A script writes, with and without --overwrite, where something else may be."""
    own = {"sample": "sample.json ImageSets", "featurize": "meta.json paths.json", "half": "meta.json",
           "train": "args.json log.jsonl", "evaluate": "metadata.json scores.json", "other": "letter.txt"}
    for kind, files in own.items():
        Path("now", kind).mkdir()
        for file in files.split():
            Path("now", kind, file).write_text("old")
    Path("now/empty").mkdir()
    shutil.copy("sub.zip", "now/package")
    with zipfile.ZipFile("now/other.zip", "w") as archive:
        archive.writestr("letter.txt", "dear")
    os.mkfifo("now/fifo")
    for link, target in {"link": "empty", "toward": "nowhere", "loop": "loop"}.items():
        Path("now", link).symlink_to(target)

    name, overwrite = str(rng.choice(list(SCRIPTS))), bool(rng.random() < 0.5)
    right = {f"now/{kind}": kind == name and overwrite for kind in [*own, "package"]}
    right |= {"now/new": True, "now/deep/er/new": True, "now/é \x1b[2J": True, "now/empty": name != "package"}
    never = [".", "..", "/", "", "home", "home/letter.txt", "home/letter.txt/new", "fifo", "now",
             "now/other.zip", "now/fifo", "now/link", "now/toward", "now/loop", "now/loop/new",
             "/dev/null", f"now/{'x' * 300}", "now/a\0b", os.getcwd(), "now/../home"]
    for part in BASE[name].split():
        read = part.partition("=")[2]
        never += [read, f"{read}/new", f"now/../{read}"] if read and Path(read).is_dir() else []
    targets = [*right] * 2 + never
    target = targets[rng.integers(len(targets))]
    given = [*BASE[name].split(), f"--out={target}", *["--overwrite"] * overwrite]
    expect(right.get(target, False), lambda: run_script(name, *given, out=target))


# --- layouts, encodings, videos ----------------------------------------------------------------


def layouts(rng: np.random.Generator) -> None:
    """An odd tree for --data: each frame found must be the one it is called, with its own mask."""
    odd = ["é", "=1+1", "a b", "\x1b[2J", "x:y", "n" * 150, "n" * 245, "\udcff", "x\\y", "-v", "~"]
    kind = str(rng.choice(["folders", "flat", "2016", "2017", "contest"]))
    names = [odd[rng.integers(len(odd))] if rng.random() < 0.1 else f"clip{n}" for n in (9, 10, 11)]
    names = names[:1] if kind == "flat" else names
    numbers = {(clip, f"f{5 * frame}"): 3 * n + frame for n, clip in enumerate(dict.fromkeys(names))
               for frame in range(int(rng.integers(1, 4)))}
    root, folders = Path("now/data"), ("JPEGImages/480p", "Annotations/480p")
    rows = [[f"{folder}/{clip}/{name}.png" for folder in folders] for clip, name in numbers]
    for number, files in zip(numbers.values(), rows):  # its grey and its mask's width tell which
        grey, mask = np.full((32, 40), 20 * number + 10, np.uint8), np.tile(np.arange(40) <= number, (32, 1))
        for file, pixels in zip(files, (grey, mask)):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            images.write_image(root / file, pixels)

    damage = int(rng.integers(11)) if rng.random() < 0.6 else 11
    victim = root / rows[rng.integers(len(rows))][damage % 2]
    lines = [f"/{image} /{mask}" for image, mask in rows] if kind == "2016" else names
    table = {key: dict(enumerate(column)) for key, column in zip(("raw", "annotation"), zip(*rows))}
    if damage < 9:
        victim.unlink()
        makes = [str, str, os.mkfifo, os.mkfifo, Path.mkdir, Path.mkdir, Path.touch,
                 lambda file: file.symlink_to(file), lambda file: Image.new("L", (48, 40)).save(file)]
        makes[damage](victim)
    elif damage < 11:
        wrong = ["/etc/passwd", "..", "JPEGImages/480p", "nobody", "/a /b /c", "\0", lines[0]]
        lines = [*lines, wrong[rng.integers(len(wrong))]]
        table["raw"][["0", -1, "x", len(rows)][rng.integers(4)]] = lines[-1]
    if kind == "contest":
        write_json(root / "paths.json", table)
    if kind.isdecimal():
        (root / "ImageSets/480p").mkdir(parents=True)
        (root / "ImageSets/480p/train.txt").write_bytes(os.fsencode("\n".join(lines)))
    below = {"folders": "", "flat": names[0]}.get(kind)
    place, masks = (root, None) if below is None else (root / folder / below for folder in folders)

    right = {2: False, 4: False, 6: False, 8: False, 11: all(map(is_name, names))}.get(damage)
    right = None if right and " " in "".join(names) and kind.isdecimal() else right
    if rng.random() < 0.2:
        given = [f"--data={place}", "--split=train", *([f"--masks={masks}"] if masks else [])]
        base = "--featurizer=tiny --weights=random --out=now/out".split()
        return expect(right, lambda: run_script("featurize", *given, *base))
    source = expect(right, sources.open_frames, place, "train", masks, 2)
    for index, (frame, shown) in enumerate(zip(source.frames, clips.read_images(source.frames))):
        number, mask = numbers[frame[:2]], source.mask(index)
        assert shown.shape == (32, 40, 3) and (shown == 20 * number + 10).all()
        assert damage < 11 if mask is None else (mask == (np.arange(40) <= number)).all()
    assert damage < 11 or {frame[:2] for frame in source.frames} == numbers.keys()


def png(pixels: np.ndarray, depth: int, colour: int, palette: np.ndarray, turn: int = 1) -> Path:
    """Write a PNG of [H, W, C] values of `depth` bits, turned as an EXIF orientation says."""
    height, width = pixels.shape[:2]
    bits = np.packbits((pixels[..., None] >> np.arange(depth)[::-1] & 1).reshape(height, -1), axis=1)
    exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + bytes([0, turn, 0, 0, 0, 0, 0, 0])
    file = Path(f"now/{len(os.listdir('now'))}.png")
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
        + (chunk(b"PLTE", palette.astype(np.uint8).tobytes()) if colour == 3 else b"")
        + chunk(b"eXIf", exif) + chunk(b"IDAT", zlib.compress(np.insert(bits, 0, 0, axis=1).tobytes()))
        + chunk(b"IEND", b""))
    return file


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a chunk of a PNG with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def encoded_frame(rng: np.random.Generator) -> None:
    """A frame as a PNG of any colour type, depth and orientation, beside what it shows."""
    colour = int(rng.choice([0, 2, 3, 4, 6]))
    depth = int(rng.choice({0: [1, 2, 4, 8, 16], 3: [1, 2, 4, 8]}.get(colour, [8, 16])))
    *size, turn = map(int, rng.integers(1, 9, 3))
    pixels = rng.integers(0, 1 << depth, (*size, {2: 3, 4: 2, 6: 4}.get(colour, 1)))
    palette = rng.integers(0, 256, (1 << min(depth, 8), 3))
    file = png(pixels, depth, colour, palette, turn)
    found = expect(colour > 0 or depth < 16, images.read_image, file)

    shown = pixels >> 8 if depth == 16 else pixels * 255 // ((1 << depth) - 1)
    shown = palette[pixels[..., 0]] if colour == 3 else shown[..., :1 if colour in (0, 4) else 3]
    shown = shown.swapaxes(0, 1) if turn > 4 else shown  # of 5 to 8 the rows are columns
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(turn, ())
    assert (np.broadcast_to(np.flip(shown, flips), found.shape) == found).all(), (colour, depth, turn)


def saved_frame(rng: np.random.Generator) -> None:
    """A frame of one grey, saved by Pillow in every format and mode."""
    modes = {"jpg": "RGB L CMYK", "webp": "RGB RGBA", "bmp": "RGB L P 1", "gif": "P L",
             "tif": "RGB RGBA L LA P 1 CMYK I;16 F I"}
    suffix = str(rng.choice(list(modes)))
    mode, value = str(rng.choice(modes[suffix].split())), int(rng.integers(0, 200))
    file, wide, turn = Path(f"now/a.{suffix}"), mode in ("I;16", "F", "I"), int(rng.integers(1, 9))
    grey = Image.new("L" if mode == "P" else "RGB", (16, 24), (value,) * (1 if mode == "P" else 3))
    picture = Image.new(mode, (16, 24), value) if wide else grey.convert(mode, dither=Image.Dither.NONE)
    exif = Image.Exif()
    exif[274] = turn if suffix in ("jpg", "webp", "tif") else 1
    picture.save(file, **({"exif": exif} if exif[274] > 1 else {}))
    found = expect(not wide, images.read_image, file)
    assert found.shape == ((16, 24, 3) if exif[274] > 4 else (24, 16, 3)), (suffix, mode, turn)
    wanted = 255 * (value > 127) if mode == "1" else value
    assert np.abs(found.astype(int) - wanted).max() <= 3, (suffix, mode, found[0, 0], wanted)


def encoded_masks(rng: np.random.Generator) -> None:
    """A data set of masks: read as the table in docs/formats.md says, whatever EXIF says."""
    pools = [[0, 1], [0, 255], [0, 1, 3], [0, 1, 255], [0, 38], [0, 128, 255], [0, 33, 255],
             [0, 9, 128, 255], [0, 254], [0, 200], [0, 32], [0]]
    pool, predictions = pools[rng.integers(len(pools))], bool(rng.random() < 0.3)
    palette = rng.integers(0, 256, (256, 3)) if rng.random() < 0.7 else np.arange(256)[:, None].repeat(3, 1)
    greys, palette[0] = bool(palette[9, 0] == 9), 255 * (rng.random() < 0.1)
    files, kinds, read, right = [], [], [], True
    colours = rng.choice([0, 2, 3, 4, 6], 3) if rng.random() < 0.3 else [rng.choice([0, 2, 3, 4, 6])] * 3
    for colour in map(int, colours):
        depth = int(rng.choice([1, 2, 4, 8, 8])) if colour == 0 else 8
        pixels = rng.choice(pool, (8, 8, {2: 3, 4: 2, 6: 4}.get(colour, 1))) % (1 << depth)
        pixels = pixels[..., :1].repeat(3, 2) if colour == 2 and rng.random() < 0.6 else pixels
        files.append(png(pixels, depth, colour, palette, turn=6))
        seen = pixels[..., :-1] if colour in (4, 6) else pixels
        blank = colour in (4, 6) and np.ptp(pixels[..., -1]) and (seen == seen[0, 0]).all()
        right = right and not blank and not (colour == 3 and palette[0, 0])
        same = (seen == seen[..., :1]).all()
        kinds.append({2: "equal" if same else "colour", 6: "equal" if same else "colour", 0: "bit" * (depth < 2),
                      3: "" if greys else "indexed"}.get(colour) or "grey")
        read.append(seen.max(axis=2) * (255 // ((1 << depth) - 1)))
    wanted = []
    for kind, values in zip(kinds, read):
        held = set(np.concatenate([more for other, more in zip(kinds, read) if other == kind]).flat)
        shades = max(held) > 32 and (kind == "grey" or (kind == "equal" and "colour" not in kinds))
        fine = predictions or (max(held) == 255 and (held & {*range(33, 255)} or not held & {*range(1, 33)}))
        right = right and (not shades or bool(fine))
        void = kind == "indexed" and 255 in held and held - {0, 255}
        wanted.append(values > 127 if shades else (values > 0) & ((values < 255) | (not void)))
    meaning = expect(right, decide_meaning, files, 2, predictions)
    for file, mask in zip(files, wanted):
        assert (read_mask(file, meaning) == mask).all(), (kinds, pool, meaning)


def encodings(rng: np.random.Generator) -> None:
    """Frames and masks of every mode, beside the right answer."""
    [encoded_frame, saved_frame, encoded_masks, encoded_masks][rng.integers(4)](rng)


def video_kinds() -> list[str]:
    """Return the kinds of video that can be written here."""
    with contextlib.suppress(ImportError):
        import imageio_ffmpeg  # noqa: F401
        return ["gif", "mp4"]
    return ["gif"]


def videos(rng: np.random.Generator) -> None:
    """A GIF of random length, or a prepared MP4: whole, cut, or with flipped bytes."""
    kind, file, count = "gif", Path("now/walk.gif"), int(rng.integers(1, 9))
    greys = np.array([int(value) for value in rng.choice(256, count, replace=False)], np.uint8)
    if rng.random() < 0.1 and "mp4" in video_kinds():
        kind, file, greys = "mp4", Path("now/walk.mp4"), np.arange(9, dtype=np.uint8) * 25
        shutil.copy("videos/walk.mp4", file)
    else:
        video.write_video(file, [np.full((16, 24, 3), grey) for grey in greys], float(rng.choice([5, 24, 29.97])), "gif")
    whole, what = file.read_bytes(), rng.random()
    if what < 0.4:
        ends = [at for at in range(20, len(whole) - 1) if whole[at - 1] == ord(";")] or [len(whole) // 2]
        at = int(rng.choice(ends)) if rng.random() < 0.3 else int(rng.integers(len(whole) - 1))
        file.write_bytes(whole[:at])
    elif what < 0.8:
        file.write_bytes(damage_bytes(rng, whole))
    found = expect({0: False, 2: True}.get(int(what / 0.4)), lambda: list(video.read_video(file)))
    assert all(image.dtype == np.uint8 and image.ndim == 3 for image in found)
    if what >= 0.8:
        assert len(found) == len(greys) and all(
            np.abs(image.astype(int) - int(grey)).max() <= 4 for image, grey in zip(found, greys))


# --- damaged bytes -----------------------------------------------------------------------------


def damage_bytes(rng: np.random.Generator, whole: bytes) -> bytes:
    """Flip, overwrite, cut out, repeat or append a few bytes, or cut the end off."""
    content = bytearray(whole)
    for _ in range(int(rng.integers(1, 4))):
        at, length = int(rng.integers(min(len(content), 64) or 1)), int(rng.integers(1, 17))
        at = int(rng.integers(len(content) or 1)) if rng.random() < 0.6 else at
        number = int(rng.choice([0, 1, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 60000]))
        match int(rng.integers(6)):
            case 0 if content:
                content[at] ^= 1 << int(rng.integers(8))
            case 1:
                content[at:at + length] = rng.bytes(length)
            case 2:
                del content[at:at + length]
            case 3:
                content[at:at] = content[at:at + length] * int(rng.integers(1, 50))
            case 4:
                content[at:at + 4] = struct.pack(">I" if rng.random() < 0.5 else "<I", number)
            case 5:
                del content[at:]
    return bytes(content)


def damage_png(rng: np.random.Generator, whole: bytes) -> bytes:
    """Damage what is inside a PNG's chunk and make its checksum right again, to get further."""
    at, parts = 8, []
    while whole[:4] == b"\x89PNG" and at < len(whole):
        length, = struct.unpack(">I", whole[at:at + 4])
        parts.append((whole[at + 4:at + 8], whole[at + 8:at + 8 + length]))
        at += length + 12
    if not parts or rng.random() < 0.4:
        return damage_bytes(rng, whole)
    chosen = int(rng.integers(len(parts)))
    kind, body = parts[chosen]
    is_data = kind == b"IDAT" and rng.random() < 0.7
    body = zlib.compress(damage_bytes(rng, zlib.decompress(body))) if is_data else damage_bytes(rng, body)
    parts[chosen] = kind, body
    return whole[:8] + b"".join(chunk(*part) for part in parts)


def damage_value(rng: np.random.Generator, value):
    """Change one entry somewhere in nested dicts and lists: replaced, taken out or renamed."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return NASTY[rng.integers(len(NASTY))]
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, what = keys[rng.integers(len(keys))], rng.random()
    if what < 0.8:
        value[key] = damage_value(rng, value[key])
    elif what < 0.9 or isinstance(value, list):
        del value[key]
    else:
        value[str(NASTY[rng.integers(len(NASTY))])] = value.pop(key)
    return value


def damage_json(rng: np.random.Generator, whole: bytes) -> bytes:
    """Damage JSON as text or as values; now and then nest it deeper than a parser likes."""
    if rng.random() < 0.25:
        return damage_bytes(rng, whole) if rng.random() < 0.9 else b'{"raw":' * 100_000
    return json.dumps(damage_value(rng, json.loads(whole))).encode()


class Harmful:
    """An object that runs a program when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch now/harmed",)


def damage_checkpoint(rng: np.random.Generator, whole: bytes) -> bytes:
    """Damage a checkpoint's bytes, its values, or its pickle in an archive made anew around it."""
    what, buffer = rng.random(), io.BytesIO()
    if what < 0.3:
        return damage_bytes(rng, whole)
    if what < 0.65:
        value = damage_value(rng, torch.load(io.BytesIO(whole), weights_only=True))
        torch.save({"state": Harmful(), "format": 2} if what < 0.33 else value, buffer)
        return buffer.getvalue()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            body = old.read(name)
            packing = zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED
            chosen = name.endswith("data.pkl") or rng.random() < 0.05
            new.writestr(name, damage_bytes(rng, body) if chosen else body, packing)
    return buffer.getvalue()


def damage_array(rng: np.random.Generator, whole: bytes) -> bytes:
    """Damage an .npy file: its header as text, or bytes anywhere."""
    olds = [b"(", b")", b",", b"'<f2'", b"False", b"'shape'", b"'descr'", b" ", b"{", b"}"]
    news = [b"", b"(" * 3000, b"'O'", b"'V8'", b"'<U9'", b"True", b"-1,", b"99999999999,", b"1e9", b"'>f2'",
            b"None", b"[('a','O')]", b"__import__('os').system('x')", b"\xff", b"{}", b"5()", b"'" * 9]
    old, new = olds[rng.integers(len(olds))], news[rng.integers(len(news))]
    if rng.random() < 0.5:
        return damage_bytes(rng, whole)
    header = whole[10:128].replace(old, new, 1)
    return whole[:8] + struct.pack("<H", len(header)) + header + whole[128:]


def read_features(file: Path) -> None:
    folder = data.open_features(file.parent)
    features = data.load_features(folder, labelled=bool(folder.meta["labelled"]))
    assert features.levels[0].shape == (len(folder.meta["clips"]), *next(iter(folder.shapes.values())))
    source = sources.open_folder(folder, Path("clips"), False, features.masks, 2)
    assert all(Path("clips") in frame.image.parents for frame in source.frames)


def read_contest(file: Path) -> None:
    source = sources.open_frames(file.parent, None, None, 2)
    assert all(file.parent in frame.image.parents for frame in source.frames)


def read_model(file: Path) -> None:
    decoder, model = models.load_model(file)
    pixels = decoder.pixels(decoder([torch.zeros(1, *shape) for shape in model["shapes"].values()]))
    assert pixels.shape == (1, *model["size"])


def resume(file: Path) -> None:
    run_script("train", f"--resume={file.parent}", out=str(file.parent))


def pack(file: Path) -> None:
    folder = "now/results" if Path("now/results").is_dir() else "results"
    run_script("package", f"--results={folder}", "--out=now/sub.zip", "--overwrite", out="now/sub.zip")


def read_frame(file: Path) -> None:
    assert images.read_image(file).shape[:2] == images.image_size(file)


def read_annotation(file: Path) -> None:
    assert read_mask(file, decide_meaning([file])).dtype == bool


# what is copied, which file of it is damaged, how, and how it is read
KINDS = [
    ("home", "picture.*", damage_png, read_frame), ("clips", "Annotations/*/*/*.png", damage_png, read_annotation),
    ("contest", "paths.json", damage_json, read_contest), ("features", "*.json", damage_json, read_features),
    ("features", "*.json", damage_json, read_features), ("features", "*.npy", damage_array, read_features),
    ("run", "model.pt", damage_checkpoint, read_model), ("run", "last.pt", damage_checkpoint, resume),
    ("run", "args.json", damage_json, resume), ("run", "log.jsonl", damage_bytes, resume),
    ("results", "*.json", damage_json, pack), ("results", "outputs/*.png", damage_png, pack),
    ("sub.zip", "", damage_bytes, pack)]


def damaged(rng: np.random.Generator) -> None:
    """A file of some kind with damaged bytes or values; an array with damage is never read."""
    source, pattern, damage, reader = KINDS[rng.integers(len(KINDS))]
    place = Path("now", source)
    if pattern:
        shutil.copytree(source, place)
    else:
        shutil.copy(source, place)
    files = sorted(place.glob(pattern)) if pattern else [place]
    file = files[rng.integers(len(files))]
    whole = file.read_bytes()
    file.write_bytes(content := damage(rng, whole))
    expect(content == whole if file.suffix == ".npy" else None, reader, file)


# --- the command -------------------------------------------------------------------------------

FAMILIES = {"flags": flags, "outputs": outputs, "layouts": layouts, "encodings": encodings,
            "videos": videos, "damaged": damaged}
MIX = [*FAMILIES, "damaged", "damaged", "encodings", "layouts"]


def read_inputs(seed: int, numbers: list[int], log: Path, failures: Path) -> None:
    """Read inputs, in a child process; a line of `log` says how each ended. Failures are kept."""
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    errors = tempfile.TemporaryFile()  # noqa: SIM115  for the life of the process
    os.dup2(errors.fileno(), 2)
    sys.addaudithook(note)
    with open(log, "w") as lines:
        for number in numbers:
            started = time.perf_counter()
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=lines)
            name = MIX[number % len(MIX)]
            outcome = judge(FAMILIES[name], np.random.default_rng([seed, number]))
            if outcome not in ("right", "refused"):
                with contextlib.suppress(shutil.Error):  # a pipe is not copied
                    shutil.copytree("now", failures / f"{seed}-{number}", symlinks=True, dirs_exist_ok=True)
                (failures / f"{seed}-{number}.txt").write_text(outcome)
            row = number, name, outcome, time.perf_counter() - started
            print(json.dumps(row), file=lines, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="read this one input")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    args = parser.parse_args()
    failures = args.failures.resolve()
    numbers = list(range(args.count)) if args.only is None else [args.only]
    counts = collections.defaultdict(collections.Counter)
    started, rows = time.perf_counter(), []
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This process .* is multi-threaded")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as temporary:
        log = Path(temporary).resolve() / "log"
        world = log.with_name("world")
        world.mkdir()
        os.chdir(world)
        os.environ["HOME"], tempfile.tempdir = str(world / "home"), str(world / "now")
        make_world()
        while numbers:
            pid, part = os.fork(), numbers[:250]
            if not pid:
                try:
                    read_inputs(args.seed, part, log, failures)
                    os._exit(0)
                except BaseException:
                    log.write_text(traceback.format_exc())
                finally:
                    os._exit(1)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            lines = log.read_text().splitlines()
            done = [json.loads(line) for line in lines if line.startswith("[")]
            if status:
                number = part[len(done)]
                said = "\n".join(lines[len(done):])
                done.append([number, MIX[number % len(MIX)], f"ended with {status} {said}", 0.0])
            rows += done
            numbers = numbers[len(done):]
    for number, name, outcome, _ in rows:
        fine = outcome in ("right", "refused")
        counts[name][outcome if fine else "FAILED"] += 1
        if not fine:
            print(f"--- {number} {name}: {outcome}")
    print(f"{'family':<12}{'inputs':>9}{'refused':>9}{'right':>9}{'FAILED':>9}")
    for name, row in [*counts.items(), ("all", sum(counts.values(), collections.Counter()))]:
        print(f"{name:<12}{row.total():>9}{row['refused']:>9}{row['right']:>9}{row['FAILED']:>9}")
    print(f"seed {args.seed}: slowest {max(row[3] for row in rows):.1f} s; "
          f"{time.perf_counter() - started:.0f} s in all")
    return int(any(row["FAILED"] for row in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
