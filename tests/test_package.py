"""package.py through its command line: the contest's rules, each broken by itself and all at once, and the zip."""
import json
import shutil
import zipfile

import imageio.v3 as iio
import numpy as np
import pytest
from helpers import call, change_json, cut, ok, refuses, script, tree, write_json
from PIL import Image

SIZES = [[40, 60], [40, 60], [33, 47]]


@pytest.fixture
def results(tmp_path):
    """A results folder that breaks no rule, with what evaluate.py writes beside."""
    folder = tmp_path / "results" / "mine"
    (folder / "outputs").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        iio.imwrite(folder / f"outputs/{number:05d}.png", np.random.default_rng(number).integers(0, 256, size, np.uint8))
    write_json(folder / "paths.json", {"output": {str(i): f"outputs/{i:05d}.png" for i in range(3)}})
    write_json(folder / "metadata.json", {"nparams": 49_999_999, "decoder": "simple", "frames": 3, "size": SIZES[0], "sizes": SIZES})
    for name in ("scores.json", "frames.csv", "report.html"):
        (folder / name).write_text("not part of a submission")
    return folder


def test_the_zip_holds_the_folders_files(results, tmp_path):
    result = ok(call("package", "--results", results))
    out = tmp_path / "results/mine.zip"
    assert f"wrote {out}: 3 outputs, nparams 49,999,999" in result.out
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [*(f"outputs/{i:05d}.png" for i in range(3)), "paths.json", "metadata.json"]
        for name in archive.namelist():
            assert archive.read(name) == (results / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["mine", "mine.zip"]


def test_the_same_results_give_the_same_bytes(results, tmp_path):
    ok(call("package", "--results", results, "--out", tmp_path / "a.zip"))
    shutil.copytree(results, tmp_path / "later")
    for file in (tmp_path / "later").rglob("*"):
        file.touch()
    ok(script("package", "--results", tmp_path / "later", "--out", tmp_path / "new/b.zip"))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "new/b.zip").read_bytes()


def column(**changes):
    """Change entries of paths.json's outputs; an entry set to `...` is taken out."""
    def harm(folder):
        table = {**json.loads((folder / "paths.json").read_text())["output"], **{key.lstrip("_"): path for key, path in changes.items()}}
        write_json(folder / "paths.json", {"output": {key: path for key, path in table.items() if path is not ...}})
    return harm


def image(mode: str, size=(60, 40)):
    return lambda folder: Image.new(mode, size).save(folder / "outputs/00001.png")


BROKEN = {
    "no paths.json": (lambda f: (f / "paths.json").unlink(), ["paths.json: no such file"]),
    "paths.json cut": (lambda f: cut(f / "paths.json"), ["paths.json: expected a JSON file"]),
    "paths.json a list": (lambda f: write_json(f / "paths.json", []), ["paths.json: expected a JSON object"]),
    "paths.json of frames": (lambda f: write_json(f / "paths.json", {"raw": {"0": "a.jpg"}}), ["paths.json: expected {\"output\""]),
    "no outputs": (lambda f: write_json(f / "paths.json", {"output": {}}), ["paths.json: expected {\"output\""]),
    "an index missing": (column(_1=...), ["paths.json: index '2' is not a number from 0 to 1", "paths.json: index 1 is missing",
                                          "metadata.json: speaks of 3 frames"]),
    "indices from 1": (column(_0=..., _3="outputs/00000.png"), ["index '3' is not a number from 0 to 2", "index 0 is missing"]),
    "an index of words": (column(_1=..., one="outputs/00001.png"), ["index 'one' is not a number", "index 1 is missing"]),
    "an index padded": (column(_1=..., _01="outputs/00001.png"), ["index '01' is not a number", "index 1 is missing"]),
    "a file twice": (column(_1="outputs/00000.png"), ["paths.json: 'outputs/00000.png' is named 2 times"]),
    "a path that leaves": (column(_1="outputs/../../secret.png"), ["'outputs/../../secret.png' is not a PNG in outputs/"]),
    "an absolute path": (column(_1="/etc/secret.png"), ["'/etc/secret.png' is not a PNG in outputs/"]),
    "a backslash": (column(_1="outputs\\00001.png"), ["00001.png' is not a PNG in outputs/"]),
    "a JPEG": (column(_1="outputs/00001.jpg"), ["'outputs/00001.jpg' is not a PNG in outputs/"]),
    "a number for a path": (column(_1=1), ["paths.json: 1 is not a PNG in outputs/"]),
    "a list for a path": (column(_1=["outputs/00001.png"]), ["is not a PNG in outputs/"]),
    "a file missing": (lambda f: (f / "outputs/00001.png").unlink(), ["outputs/00001.png: no such file"]),
    "a file cut": (lambda f: cut(f / "outputs/00001.png"), ["outputs/00001.png: cannot be decoded"]),
    "a JPEG named PNG": (lambda f: Image.new("L", (60, 40)).save(f / "outputs/00001.png", format="JPEG"), ["00001.png"]),
    "colour": (image("RGB"), ["outputs/00001.png: is not an 8-bit grey PNG (mode L)"]),
    "grey with alpha": (image("LA"), ["outputs/00001.png: is not an 8-bit grey PNG (mode L)"]),
    "indexed": (image("P"), ["outputs/00001.png: is not an 8-bit grey PNG (mode L)"]),
    "1-bit": (image("1"), ["outputs/00001.png: is not an 8-bit grey PNG (mode L)"]),
    "16-bit": (image("I;16"), ["outputs/00001.png: is not an 8-bit grey PNG (mode L)"]),
    "another size": (image("L", (60, 41)), ["outputs/00001.png: is 60 x 41, its frame 60 x 40"]),
    "turned": (image("L", (40, 60)), ["outputs/00001.png: is 40 x 60, its frame 60 x 40"]),
    "no metadata": (lambda f: (f / "metadata.json").unlink(), ["metadata.json: no such file"]),
    "metadata cut": (lambda f: cut(f / "metadata.json"), ["metadata.json: expected a JSON file"]),
    "no nparams": (lambda f: change_json(f / "metadata.json", nparams=...), ["metadata.json: 'nparams'"]),
    "nparams of words": (lambda f: change_json(f / "metadata.json", nparams="few"), ["metadata.json: 'nparams'"]),
    "nparams true": (lambda f: change_json(f / "metadata.json", nparams=True), ["metadata.json: 'nparams'"]),
    "nparams below nought": (lambda f: change_json(f / "metadata.json", nparams=-1), ["metadata.json: 'nparams'"]),
    "too many parameters": (lambda f: change_json(f / "metadata.json", nparams=50_000_000), ["nparams is 50,000,000"]),
    "more frames than outputs": (lambda f: change_json(f / "metadata.json", frames=4), ["metadata.json: speaks of 4 frames"]),
}


def rejects(results, tmp_path, run=call) -> list[str]:
    """Assert that a folder is rejected and nothing written; return the lines, without the last, which counts them."""
    before = tree(tmp_path)
    result = run("package", "--results", results)
    assert result.status == 1 and "Traceback" not in result.err and tree(tmp_path) == before, result
    *lines, last = result.err.splitlines()
    assert last == f"package.py: {results} breaks {len(lines)} of the contest's rules; nothing was written"
    assert all(str(results) in line for line in lines)
    return lines


@pytest.mark.parametrize("case", BROKEN)
def test_each_rule_by_itself(results, tmp_path, case):
    harm, names = BROKEN[case]
    harm(results)
    lines = rejects(results, tmp_path)
    assert len(lines) == len(names)
    for line, words in zip(lines, names):
        assert words in line


def test_all_broken_rules_are_listed(results, tmp_path):
    image("RGB")(results)
    (results / "outputs/00000.png").unlink()
    iio.imwrite(results / "outputs/00002.png", np.zeros((40, 60), np.uint8))
    change_json(results / "metadata.json", nparams=60_000_000)
    column(extra="outputs/00009.png")(results)
    lines = "\n".join(rejects(results, tmp_path, run=script))
    for words in ("00000.png: no such file", "00001.png: is not an 8-bit grey", "00002.png: is 60 x 40, its frame 47 x 33",
                  "nparams is 60,000,000", "index 'extra' is not a number from 0 to 3", "index 3 is missing"):
        assert words in lines


def test_what_cannot_be_packaged_is_refused(results, tmp_path):
    refuses("package", "--results", tmp_path / "none", names=["none: no such results folder"], untouched=tmp_path, run=script)
    ok(call("package", "--results", results))
    refuses("package", "--results", results, names=["mine.zip: is there already; pass --overwrite"], untouched=tmp_path)
    change_json(results / "metadata.json", nparams=7)
    ok(call("package", "--results", results, "--overwrite"))
    with zipfile.ZipFile(tmp_path / "results/mine.zip") as archive:
        assert json.loads(archive.read("metadata.json"))["nparams"] == 7
    (tmp_path / "file").write_text("mine")
    refuses("package", "--results", results, "--out", tmp_path / "file/x.zip", names=["x.zip: cannot be written"], untouched=tmp_path)
    debug = call("package", "--results", tmp_path / "none", "--debug")
    assert debug.status == 1 and "Traceback" in debug.err
