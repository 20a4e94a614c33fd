"""benchmark.py through its command line, at sizes that take a second."""
import json
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

import benchmark
import cli

ROOT = Path(__file__).resolve().parent.parent


def run(*flags) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "benchmark.py", *map(str, flags)], capture_output=True, text=True)


@pytest.fixture
def davis(tmp_path) -> tuple[Path, Path]:
    """Write a DAVIS root of one clip of 3 frames, and predictions for it; return both folders."""
    root, predictions, masks = tmp_path / "davis", tmp_path / "outputs", np.zeros((3, 20, 30), np.uint8)
    masks[:, 5:12, 4:20] = 255
    lines = []
    for index, mask in enumerate(masks):
        lines.append(f"/JPEGImages/480p/cat/{index:05d}.jpg /Annotations/480p/cat/{index:05d}.png\n")
        for folder, pixels in ((root / "Annotations/480p/cat", mask), (predictions, np.roll(mask, 3, axis=1))):
            folder.mkdir(parents=True, exist_ok=True)
            iio.imwrite(folder / f"{index:05d}.png", pixels)
        (root / "JPEGImages/480p/cat").mkdir(parents=True, exist_ok=True)
        iio.imwrite(root / f"JPEGImages/480p/cat/{index:05d}.jpg", mask)
    (root / "ImageSets/480p").mkdir(parents=True)
    (root / "ImageSets/480p/val.txt").write_text("".join(lines))
    return root, predictions


def test_scores_prints_json_last_and_writes_how_it_was_measured(tmp_path):
    done = run("scores", "--frames", 2, "--repeats", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["frames"] == 2 and results["max_deviation"] == 0
    written, = tmp_path.iterdir()
    record = json.loads(written.read_text())
    assert written.name == f"{record['date']}-scores.json"
    assert record["results"] == results and record["n"] == 2
    assert record["command"].startswith("python benchmark.py scores --frames 2")
    assert record["versions"].keys() == {"python", "torch", "numpy"} and record["machine"]["cores"] >= 1
    for figures in results["ms_per_frame"].values():
        assert len(figures["runs"]) == 2 and 0 < figures["lowest"] <= figures["median"] <= figures["highest"]


def test_scores_measures_masks_from_disk(tmp_path, davis):
    done = run("scores", "--data", davis[0], "--predictions", davis[1], "--repeats", 1, "--out", tmp_path / "out", "--name", "disk")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert (results["frames"], results["height"], results["width"]) == (3, 20, 30)
    assert [path.name.endswith("-disk.json") for path in (tmp_path / "out").iterdir()] == [True]


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, davis, monkeypatch, capsys):
    root, predictions = davis
    out = tmp_path / "out"

    def message(*flags) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "scores", "--data", str(root), "--out", str(out), *map(str, flags)])
        assert cli.run(benchmark.main) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        return error

    with pytest.raises(SystemExit, match="2"):
        message()
    assert "--data and --predictions go together" in capsys.readouterr().err
    assert message("--predictions", tmp_path / "absent").startswith(f"benchmark.py: {tmp_path / 'absent'}: no such folder")
    iio.imwrite(predictions / "00001.png", np.zeros((20, 31), np.uint8))
    assert "00001.png: expected 20x30 pixels" in message("--predictions", predictions)
    (predictions / "00001.png").unlink()
    assert "expected 3 images" in message("--predictions", predictions)
    assert not out.exists()


def test_candidates_are_timed_in_turns_after_a_warm_up():
    calls = []
    seconds = benchmark.time_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, clock=time.perf_counter)
    assert calls == ["a", "b"] * 4
    assert [len(runs) for runs in seconds.values()] == [3, 3]


def test_blobs_are_predicted_a_little_off():
    predictions, masks = benchmark.blobs(3, seed=0)
    assert masks.shape == (3, 480, 854) and masks.dtype == bool
    iou = (predictions & masks).sum(axis=(1, 2)) / (predictions | masks).sum(axis=(1, 2))
    assert (iou > 0.6).all() and (iou < 1).all()
    np.testing.assert_array_equal(benchmark.blobs(3, seed=0)[0], predictions)
