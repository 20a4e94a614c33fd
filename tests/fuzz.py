"""Feed thousands of hostile inputs to the scripts: each must be refused in one line, or be right.

    python tests/fuzz.py --count 10000 --seed 0

Flags, outputs, layouts, encodings, videos and damaged bytes are drawn at random in a small world of
a user's files, which must stay as they are outside --out. A script refuses with one line and status
2, a reader with BadInput; the right answer is computed here.
Prints a count per family and outcome; failures are kept, and make the exit status 1.
"""
import argparse
import contextlib
import faulthandler
import importlib
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from helpers import call, ok, tree, write_davis, write_json  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import models  # noqa: E402
from vos import cli, clips, featurizers, images, sources  # noqa: E402
from vos.inputs import BadInput, is_name  # noqa: E402

SECONDS = 60  # that one input may take, on a busy machine
MODULES = ("vos.sample", "featurize", "train", "evaluate", "package")
SCRIPTS = {name.rpartition(".")[2]: importlib.import_module(name) for name in MODULES}
BASE = {"sample": "--clips=1 --val-clips=1 --frames=1 --size=32x32",
        "featurize": "--data=clips --split=train --featurizer=tiny --weights=random",
        "train": "--features=features --decoder=linear --steps=2 --batch-size=2 --no-pictures",
        "evaluate": "--model=run --features=features --no-pictures", "package": "--results=results"}
HOSTILE = ["", "0", "-1", "1", "2", "1e999", "nan", "inf", "9" * 5000, "0x10", "²", "1.5", ".",
           "/", "~", "\udcff", "\x1b[2J", "a\nb", "é" * 300, "s16", "s8@.5", "s8@0", "s8@nan",
           "s٨", ",", "mirror,mirror", "zoom0", "zoom1.5", "32x32", "99999x99999", "cpu:7",
           "cuda:99", "meta", "hpu", "wandb:", "random", "tiny", "timm:", "fifo", "home",
           "home/letter.txt", "clips", "features", "results", "contest", "gone"]
NASTY = [None, True, 0, -1, 2**31, 2**63, 10**400, 0.5, math.nan, math.inf, "", "..", "a\0b",
         "\ud800", "/etc/passwd", "a\\..\\..\\x", "outputs/../../x.png", "\x1b[2J", "é" * 300,
         "a/" * 3000, [], {}, [[]], {"": ""}, [-1, 5], [10**9] * 2, [65000] * 2, "../features"]
DAMAGED = ["home/picture.*", "clips/Ann*/*/*/*.png", "contest/paths.json", "features/*.json",
           "features/*.npy", "run/model.pt", "run/last.pt", "run/args.json", "run/log.jsonl",
           "results/*.json", "results/outputs/*.png", "sub.zip"]
LIBTIFF = r"(tempfile\.tif|MissingRequired|LZW\w+|TIFF\w+|Fax\w+): .*\n"  # its own words
HARMFUL = type("Harmful", (), {"__reduce__": lambda self: (os.mkdir, ("harmed",))})


class Tiny(featurizers.AlexNet):
    """A featurizer of one level that takes no time."""

    def __init__(self, name: str, weights: str | None):
        torch.nn.Sequential.__init__(self, torch.nn.AvgPool2d(8), torch.nn.Conv2d(3, 4, 1))
        self.mean, self.std, self.default, self.taps = (0.5,) * 3, (0.2,) * 3, ("s8",), {"s8": 2}
        if weights not in (None, "random"):
            featurizers.load(self, weights)


def make_world() -> None:
    """Write a user's files, and what every script makes, in the current folder."""
    featurizers.FEATURIZERS["tiny"] = Tiny
    for name in ("home", "now"):
        Path(name).mkdir()
    Path("home/letter.txt").write_text("dear")
    os.mkfifo("fifo")
    write_davis(Path("clips"), clips=2, val_clips=1, frames=2, size=(48, 64))
    outs = {"featurize": "features", "train": "run", "evaluate": "results", "package": "sub.zip"}
    for name, out in outs.items():
        ok(call(name, *BASE[name].split(), f"--out={out}"))
    shutil.copytree("clips", "contest")
    columns = {name: sorted(Path("contest").rglob(f"*.{suffix}"))
               for name, suffix in {"raw": "jpg", "annotation": "png"}.items()}
    write_json(Path("contest/paths.json"), {
        name: {str(number): "\\".join(file.parts[1:]) for number, file in enumerate(files)}
        for name, files in columns.items()})
    for suffix in ("webp", "tif", "bmp", "png", "jpg"):
        Image.open(columns["raw"][0]).save(f"home/picture.{suffix}")


def said() -> str:
    """Return what was written to standard error, a file here, since the last call."""
    text = os.pread(2, 1 << 20, 0).decode("utf-8", "replace")
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    return re.sub(LIBTIFF, "", text)


def run_script(name: str, *flags: str, out: str = "now/out") -> None:
    """Run a script, check how it ends and what it leaves; BadInput when it refuses in one line."""
    before = tree(Path("now"))
    with (mock.patch.object(sys, "argv", [f"{name}.py", *flags]),
          contextlib.redirect_stdout(io.StringIO())):
        status = cli.run(SCRIPTS[name].main)
    text = said()
    for path, _ in before.items() ^ tree(Path("now")).items():
        within = status != 2 and f"now/{path}/".startswith(f"{out}/")
        assert within or (path not in before and f"{out}/".startswith(f"now/{path}/")), path
    if status == 0:
        assert text == "" and os.path.lexists(out), f"status 0, but said {text!r}"
        return
    assert status == 2 or (status == 1 and "not finite" in text), (status, text)
    *lines, last = text.split("\n")
    assert last == "" and lines and lines[-1].startswith(f"{name}.py: "), text
    assert len(lines) == 1 and lines[0].isprintable(), text
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


def judge(family, rng: np.random.Generator) -> str:
    """Return how one input ended: right, refused, or what was wrong."""
    shutil.rmtree("now")
    os.mkdir("now")
    before = tree(Path())
    try:
        family(rng)
        outcome = "right"
    except BadInput as error:
        outcome = "refused" if str(error).strip() else "an error without words"
    except BaseException:  # whatever else it is, a user would see a traceback
        outcome = traceback.format_exc()
    after = {path: value for path, value in tree(Path()).items() if path[:4] != "now/"}
    text, touched = said(), before.items() ^ after.items()
    return f"{outcome} said {text!r}, touched {touched}" if text or touched else outcome


def flags(rng: np.random.Generator) -> None:
    """Random and hostile values of the flags of a script, run on tiny inputs."""
    name, found = str(rng.choice(list(SCRIPTS))), []
    with (contextlib.suppress(SystemExit), mock.patch.object(
            cli.Parser, "parse_args", lambda self, *_: found.append(self) or sys.exit())):
        SCRIPTS[name].main()
    known = [action for action in found[0]._actions
             if action.dest not in ("help", "debug", "out", "compile", "wandb")]
    given = []
    for action in rng.choice(known, rng.integers(1, 4)):
        values = [*HOSTILE, *map(str, list(action.choices or []) * 10)]
        flag, value = action.option_strings[0], values[rng.integers(len(values))]
        given.append(flag if action.nargs == 0 and rng.random() < 0.9 else f"{flag}={value}")
    run_script(name, *BASE[name].split(), *given, "--out=now/out")


def outputs(rng: np.random.Generator) -> None:
    """A script writes, with and without --overwrite, where something else may be."""
    own = {"sample": "sample.json ImageSets", "featurize": "meta.json paths.json",
           "half": "meta.json", "train": "args.json log.jsonl", "other": "letter.txt",
           "evaluate": "metadata.json outputs"}
    for kind, files in own.items():
        for file in files.split():
            Path("now", kind).mkdir(exist_ok=True)
            Path("now", kind, file).write_text("old")
    Path("now/empty").mkdir()
    shutil.copy("sub.zip", "now/package")
    os.mkfifo("now/fifo")
    for link, target in {"link": "empty", "toward": "nowhere", "loop": "loop"}.items():
        Path("now", link).symlink_to(target)

    name, overwrite = str(rng.choice(list(SCRIPTS))), bool(rng.random() < 0.5)
    right = {f"now/{kind}": kind == name and overwrite for kind in [*own, "package"]}
    right |= {"now/new": True, "now/a/b": True, "now/\x1b": True, "now/empty": name != "package"}
    never = [".", "..", "/", "", "home", "home/letter.txt", "home/letter.txt/new", "fifo", "now",
             "now/fifo", "now/link", "now/toward", "now/loop", "now/loop/new", "/dev/null",
             f"now/{'x' * 300}", "now/a\0b", os.getcwd(), "now/../home"]
    for place in re.findall(r"=(clips|features|run|results)\b", BASE[name]):
        never += [place, f"{place}/new", f"now/../{place}"]
    target = [*right, *right, *never][rng.integers(2 * len(right) + len(never))]
    given = [*BASE[name].split(), f"--out={target}", *["--overwrite"] * overwrite]
    expect(right.get(target, False), lambda: run_script(name, *given, out=target))


def layouts(rng: np.random.Generator) -> None:
    """An odd tree for --data: each frame found must be the one it is called, with its own mask."""
    odd = ["é", "=1+1", "a b", "\x1b[2J", "x:y", "n" * 150, "n" * 245, "\udcff", "x\\y", "-v", "~"]
    kind = str(rng.choice(["folders", "2016", "2017", "contest"]))
    names = {odd[rng.integers(11)] if rng.random() < 0.1 else f"clip{n}": n for n in range(3)}
    numbers = {(clip, f"f{5 * frame}"): 3 * n + frame for n, clip in enumerate(names)
               for frame in range(rng.integers(1, 4))}
    root, parts = Path("now/data"), ("JPEGImages/480p", "Annotations/480p")
    rows = [[f"{part}/{clip}/{name}.png" for part in parts] for clip, name in numbers]
    for number, files in zip(numbers.values(), rows):  # its grey and its mask's width tell which
        mask = np.tile(np.arange(40) <= number, (32, 1))
        for file, pixels in zip(files, (np.full_like(mask, 20 * number + 10, np.uint8), mask)):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            images.write_image(root / file, pixels)

    damage = int(rng.integers(10)) if rng.random() < 0.6 else 10
    victim = root / rows[rng.integers(len(rows))][damage % 2]
    lines = [f"/{row[0]} /{row[1]}" for row in rows] if kind == "2016" else list(names)
    table = {key: dict(enumerate(column)) for key, column in zip(("raw", "annotation"), zip(*rows))}
    if damage < 9:
        victim.unlink()
        [str, str, os.mkfifo, os.mkfifo, Path.mkdir, Path.mkdir, Path.touch, Path.touch,
         lambda file: Image.new("L", (48, 40)).save(file)][damage](victim)
    elif damage == 9:
        wrong = ["/etc/passwd", "..", "JPEGImages/480p", "nobody", "/a /b /c", "\0", lines[0]]
        lines.append(wrong[rng.integers(len(wrong))])
        table["raw"][len(rows) - int(rng.integers(2))] = lines[-1]
    if kind == "contest":
        write_json(root / "paths.json", table)
    (root / "ImageSets/480p").mkdir(parents=True)
    (root / "ImageSets/480p/train.txt").write_bytes(os.fsencode("\n".join(lines)))
    place, paired = (root / part for part in parts) if kind == "folders" else (root, None)

    right = {2: False, 4: False, 6: False, 8: False, 10: all(map(is_name, names))}.get(damage)
    right = None if right and "a b" in names and kind.isdecimal() else right
    if rng.random() < 0.2:
        given = [f"--data={place}", "--out=now/out", *([f"--masks={paired}"] if paired else [])]
        return expect(right, run_script, "featurize", *BASE["featurize"].split(), *given)
    source = expect(right, sources.open_frames, place, "train", paired)
    for index, (frame, shown) in enumerate(zip(source.frames, clips.read_images(source.frames))):
        number, mask = numbers[frame[:2]], source.mask(index)
        assert shown.shape == (32, 40, 3) and (shown == 20 * number + 10).all()
        assert damage < 10 if mask is None else (mask == (np.arange(40) <= number)).all()
    assert damage < 10 or {frame[:2] for frame in source.frames} == numbers.keys()


def frames(rng: np.random.Generator) -> None:
    """A frame in any format, mode and EXIF orientation, beside what it shows."""
    modes = {"png": "1 L LA P RGB RGBA I;16", "jpg": "RGB L CMYK", "webp": "RGB RGBA", "gif": "L P",
             "bmp": "1 L P RGB", "tif": "1 L LA P RGB RGBA CMYK I;16 I F"}
    suffix = str(rng.choice(list(modes)))
    mode, file, exif = str(rng.choice(modes[suffix].split())), Path(f"now/a.{suffix}"), Image.Exif()
    exif[274] = turn = 1 if suffix in ("gif", "bmp") else int(rng.integers(1, 9))
    shown = rng.integers(0, 256, (5, 7, 3), np.uint8)
    shown = shown[:1, :1].repeat(16, 0).repeat(24, 1) if suffix == "jpg" else shown
    shown = shown // 128 * 255 if mode == "1" else shown
    shown = shown if mode in ("RGB", "RGBA", "CMYK", "P") else shown[..., :1].repeat(3, 2)
    picture, wide = Image.fromarray(shown), {"I;16": "u2", "I": "i4", "F": "f4"}.get(mode)
    if wide:
        picture = Image.fromarray(shown[..., 0].astype(wide) * 100)
    elif mode == "P":
        picture = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7))
        picture.putpalette(shown.tobytes())
    else:
        picture = picture.convert(mode)
    options = {"webp": {"lossless": True, "exact": True}, "jpg": {"quality": 95}}.get(suffix, {})
    picture.save(file, **options, **({"exif": exif} if turn > 1 else {}))

    found = expect(not wide, images.read_image, file)
    shown = shown.swapaxes(0, 1) if turn > 4 else shown  # of 5 to 8 the rows are columns
    shown = np.flip(shown, {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(turn, ()))
    assert found.shape == shown.shape, (suffix, mode, turn)
    assert np.abs(found - shown.astype(int)).max() <= 5 * (suffix == "jpg"), (suffix, mode, turn)


def videos(rng: np.random.Generator) -> None:
    """A GIF of an odd rate: whole, cut, or with damaged bytes."""
    greys, file = rng.choice(256, int(rng.integers(1, 9)), replace=False), Path("now/walk.gif")
    shown = [np.full((16, 24, 3), grey, np.uint8) for grey in greys]
    images.write_animation(file, shown, float(rng.choice([0.1, 5, 24, 29.97, 60])))
    whole, what = file.read_bytes(), int(rng.integers(3))
    file.write_bytes([whole, whole[:rng.integers(len(whole))], damage_bytes(rng, whole)][what])
    found = expect(True if what == 0 else None, lambda: list(clips.read_video(file)))
    assert all(image.dtype == np.uint8 and image.ndim == 3 for image in found)
    assert what == 2 or len(found) == len(shown)
    assert what == 2 or np.abs(np.subtract(found, shown, dtype=int)).max() < 5


def damage_bytes(rng: np.random.Generator, whole: bytes) -> bytes:
    """Flip a bit, overwrite, cut out, repeat or insert a few bytes, or cut the end off."""
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(1 + (min(len(whole), 64) if rng.random() < 0.4 else len(whole))))
        stop, odd = at + int(rng.integers(1, 17)), rng.bytes(int(rng.integers(1, 17)))
        flipped = bytes(byte ^ 1 << int(rng.integers(8)) for byte in whole[at:at + 1])
        changes = [flipped + whole[at + 1:], odd + whole[at + len(odd):], whole[stop:], b"",
                   whole[at:stop] * 40 + whole[at:], b"\xff" * 4 + whole[at + 4:], odd + whole[at:]]
        whole = whole[:at] + changes[rng.integers(len(changes))]
    return whole


def damage_value(rng: np.random.Generator, value):
    """Change one entry somewhere in nested dicts and lists: replaced or taken out."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return NASTY[rng.integers(len(NASTY))]
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[rng.integers(len(keys))]
    if rng.random() < 0.9:
        value[key] = damage_value(rng, value[key])
    else:
        del value[key]
    return value


def damage(rng: np.random.Generator, file: Path) -> bytes:
    """Return what a file holds, with damaged bytes or, half the time, values."""
    whole, what = file.read_bytes(), rng.random()
    if file.suffix == ".json" and what < 0.7:
        value = damage_value(rng, json.loads(whole))
        return json.dumps(value).encode() if what > 0.02 else b'{"raw":' * 100_000
    if file.suffix == ".pt" and what < 0.5:
        value = damage_value(rng, torch.load(file, weights_only=True))
        torch.save(value if what > 0.1 else {"state": HARMFUL(), "format": 2}, file)
        return file.read_bytes()
    return damage_bytes(rng, whole)


def damaged(rng: np.random.Generator) -> None:
    """A file of any kind with damaged bytes or values, read as the scripts do or by one of them."""
    pattern = DAMAGED[rng.integers(len(DAMAGED))]
    source = pattern.partition("/")[0]
    (shutil.copytree if Path(source).is_dir() else shutil.copy)(source, f"now/{source}")
    files = sorted(Path("now").glob(pattern))
    file = files[rng.integers(len(files))]
    whole = file.read_bytes()
    file.write_bytes(damage(rng, file))
    if source == "home":
        assert images.read_image(file).ndim == 3
    elif source == "clips":
        assert clips.read_mask(file, clips.decide_meaning([file])).dtype == bool
    elif source == "contest":
        found = sources.open_frames(file.parent, None, None).frames
        assert all(file.parent in frame.image.parents for frame in found)
    elif source == "features":
        folder = data.open_features(file.parent)
        right = None if file.suffix == ".json" else file.read_bytes() == whole
        expect(right, data.load_features, folder, None, False, "cpu", None, False)
        sources.open_folder(folder, Path("now"), False)
    elif file.name == "model.pt":
        decoder, model = models.load_model(file)
        output = decoder([torch.zeros(1, *shape) for shape in model["shapes"].values()])
        assert decoder.pixels(output).shape == (1, *model["size"])
    elif source == "run":
        run_script("train", f"--resume={file.parent}", out=str(file.parent))
    else:
        given = ["--out=now/sub.zip", "--overwrite"]
        given += ["--results=now/results" if source == "results" else BASE["package"]]
        run_script("package", *given, out="now/sub.zip")


MIX = [flags, outputs, layouts, frames, videos, damaged, flags, layouts, frames, damaged]


def read_inputs(seed: int, numbers: list[int], log: Path, failures: Path) -> list[list]:
    """Return how inputs ended, up to one that ends the child process: [number, family, outcome]."""
    if pid := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        lines = log.read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.startswith("[")]
        if status:
            rows.append([numbers[len(rows)], "child", f"ended with {status}: {lines[len(rows):]}"])
        return rows
    with contextlib.ExitStack() as stack, open(log, "w") as lines:
        stack.callback(os._exit, 1)  # whatever happens
        os.dup2(os.memfd_create("stderr"), 2)
        for number in numbers:
            family = MIX[number % len(MIX)]
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=lines)
            outcome = judge(family, np.random.default_rng([seed, number]))
            if outcome not in ("right", "refused"):
                with contextlib.suppress(shutil.Error):  # a pipe is not copied
                    shutil.copytree("now", failures / f"{seed}-{number}", dirs_exist_ok=True)
            print(json.dumps([number, family.__name__, outcome]), file=lines, flush=True)
        os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    args = parser.parse_args()
    started, rows, failures = time.perf_counter(), [], args.failures.resolve()
    torch.set_num_threads(1)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as temporary:
        world, tempfile.tempdir = Path(temporary).resolve() / "world", temporary
        os.environ["HOME"] = str(world / "home")
        world.mkdir()
        os.chdir(world)
        make_world()
        while len(rows) < args.count:
            numbers = list(range(len(rows), min(len(rows) + 250, args.count)))
            rows += read_inputs(args.seed, numbers, world.with_name("log"), failures)
        os.chdir(ROOT)

    counts = Counter()
    for number, name, outcome in rows:
        result = outcome if outcome in ("right", "refused") else "FAILED"
        counts.update([(name, result), ("all", result)])
        if result == "FAILED":
            print(f"--- {args.seed}-{number} {name}: {outcome}")
    for name in sorted(dict.fromkeys(name for name, _ in counts), key="all".__eq__):
        right, refused, failed = (counts[name, end] for end in ("right", "refused", "FAILED"))
        print(f"{name:<12} right {right:>5}, refused {refused:>5}, FAILED {failed}")
    print(f"seed {args.seed}: {time.perf_counter() - started:.0f} s")
    return int(counts["all", "FAILED"] > 0)


if __name__ == "__main__":
    sys.exit(main())
