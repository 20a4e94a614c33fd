"""package.py through its command line: the contest's rules, each broken alone."""
import json
import shutil
import zipfile

import imageio.v3 as iio
import numpy as np
import pytest
from helpers import call, change_json, cut, ok, refuses, script, write_json
from PIL import Image

SIZES = [[40, 60], [40, 60], [33, 47]]


@pytest.fixture
def results(tmp_path):
    """A results folder that breaks no rule, with what evaluate.py writes beside."""
    folder = tmp_path / "results" / "mine"
    (folder / "outputs").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, size, np.uint8)
        iio.imwrite(folder / f"outputs/{number:05d}.png", pixels)
    outputs = {str(index): f"outputs/{index:05d}.png" for index in range(3)}
    write_json(folder / "paths.json", {"output": outputs})
    write_json(folder / "metadata.json", {"nparams": 49_999_999, "decoder": "simple", "frames": 3,
                                          "size": SIZES[0], "sizes": SIZES})
    (folder / "report.html").write_text("not part of a submission")
    return folder


def test_the_same_results_give_the_same_zip_of_the_folders_files(results, tmp_path):
    out = tmp_path / "results/mine.zip"
    said = ok(call("package", "--results", results)).out
    assert f"wrote {out}" in said
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert names == [*(f"outputs/{i:05d}.png" for i in range(3)), "paths.json", "metadata.json"]
        assert all(archive.read(name) == (results / name).read_bytes() for name in names)
    shutil.copytree(results, tmp_path / "later", copy_function=shutil.copyfile)
    ok(script("package", "--results", tmp_path / "later", "--out", tmp_path / "new/b.zip"))
    assert out.read_bytes() == (tmp_path / "new/b.zip").read_bytes()


def column(**changes):
    """Return a change of paths.json's outputs; an entry set to `...` is taken out."""
    def harm(folder):
        table = json.loads((folder / "paths.json").read_text())["output"]
        table |= {key.lstrip("_"): path for key, path in changes.items()}
        outputs = {key: path for key, path in table.items() if path is not ...}
        write_json(folder / "paths.json", {"output": outputs})
    return harm


def metadata(**changes):
    return lambda folder: change_json(folder / "metadata.json", **changes)


def image(mode: str, size=(60, 40), **options):
    return lambda f: Image.new(mode, size).save(f / "outputs/00001.png", **options)


BROKEN = [  # what is done to the folder, and words of the line that says so
    (lambda f: (f / "paths.json").unlink(), "paths.json: no such file"),
    (lambda f: write_json(f / "paths.json", []), "paths.json: expected"),
    (lambda f: write_json(f / "paths.json", {"output": {}}), "paths.json"),
    (column(_1=...), "paths.json: expected"), (column(_2=...), "3 frames"),
    (column(_1=..., _01="outputs/00001.png"), "paths.json: expected"),
    (column(_1="outputs/00000.png"), "'outputs/00000.png'"),
    (column(_1="outputs/../../secret.png"), "'outputs/../../secret.png' is not a PNG in outputs"),
    (column(_1=["outputs/00001.png"]), "paths.json"),
    (lambda f: (f / "outputs/00001.png").unlink(), "outputs/00001.png: no such file"),
    (lambda f: cut(f / "outputs/00001.png"), "outputs/00001.png: cannot be decoded"),
    (image("L", format="JPEG"), "00001.png: is not an 8-bit grey PNG"),
    *[(image(mode), "is not an 8-bit grey PNG") for mode in ("RGB", "LA", "P", "1", "I;16")],
    (image("L", (40, 60)), "outputs/00001.png: is [60, 40] (H, W), its frame [40, 60]"),
    (lambda f: cut(f / "metadata.json"), "metadata.json: expected a JSON object"),
    (lambda f: write_json(f / "metadata.json", []), "metadata.json: expected a JSON object"),
    *[(metadata(nparams=bad), "metadata.json: nparams") for bad in (..., "few", True, -1, 1.5)],
    (metadata(nparams=50_000_000), "fewer than 50,000,000"),
    (metadata(frames=4), "4 frames"), (metadata(sizes=SIZES[:1]), "sizes [["),
    (metadata(sizes=5), "metadata.json: speaks of 3 frames, sizes 5"),
]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_broken_rule_is_named_and_nothing_is_written(results, tmp_path, number):
    harm, words = BROKEN[number]
    harm(results)
    refuses("package", "--results", results, names=[words, results], untouched=tmp_path)


def test_what_cannot_be_packaged_is_refused(results, tmp_path, monkeypatch):
    refuses("package", "--results", "none", names=["no such results folder"], untouched=tmp_path)
    ok(call("package", "--results", results))
    flags = ("--results", results)
    refuses("package", *flags, names=["mine.zip: is there already; pass --o"], untouched=tmp_path)
    monkeypatch.chdir(results)
    refuses("package", *flags, "--out", ".", "--overwrite", names=["current"], untouched=tmp_path)
    metadata(nparams=7)(results)
    ok(call("package", *flags, "--overwrite"))
    with zipfile.ZipFile(tmp_path / "results/mine.zip") as archive:
        assert json.loads(archive.read("metadata.json"))["nparams"] == 7
