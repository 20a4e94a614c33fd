"""benchmark.py through its command line, at sizes that take a second."""
import json
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from helpers import call, ok

import benchmark
import benchmark_peer
import benchmark_synthetic
import cli
import data
import measure
from files import BadInput

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
    done = ok(call("benchmark", "scores", "--data", davis[0], "--predictions", davis[1], "--repeats", 1, "--out", tmp_path / "out",
                   "--name", "disk"))
    results = json.loads(done.out.splitlines()[-1])
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
    seconds = measure.time_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, clock=time.perf_counter)
    assert calls == ["a", "b"] * 4
    assert [len(runs) for runs in seconds.values()] == [3, 3]


def test_a_childs_memory_is_its_own_and_not_what_we_hold():
    held = np.ones(50_000_000)  # 400 MB, all touched
    small = measure.run_child(sys.executable, "-c", "print('out')")
    large = measure.run_child(sys.executable, "-c", "held = b'x' * 200_000_000")
    assert (small.out, small.status) == ("out\n", 0)
    assert small.peak < 100_000_000 < held.nbytes
    assert 200_000_000 < large.peak < 300_000_000
    with pytest.raises(BadInput, match=r"status 1: ZeroDivisionError"):
        measure.run_child(sys.executable, "-c", "1 / 0")


def test_blobs_are_predicted_a_little_off():
    predictions, masks = benchmark.blobs(3, seed=0)
    assert masks.shape == (3, 480, 854) and masks.dtype == bool
    iou = (predictions & masks).sum(axis=(1, 2)) / (predictions | masks).sum(axis=(1, 2))
    assert (iou > 0.6).all() and (iou < 1).all()
    np.testing.assert_array_equal(benchmark.blobs(3, seed=0)[0], predictions)


# --- beside the notebook ------------------------------------------------------------------------

SHARED = ROOT.parent / "shared"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared, which holds the notebook, its clips and its weights")
def test_peer_compares_every_stage_and_the_losses_are_the_notebooks(tmp_path):
    done = run("peer", "--peer", SHARED / "peers/notebook.py", "--data", SHARED / "davis", "--limit", 2, "--steps", 3,
               "--weights", SHARED / "weights/alexnet-features.pth", "--compute", "float32", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for key in ("featurize_ratio", "train_ratio", "after_featurize_seconds", "predict_write_score_ratio", "memory_ratio"):
        assert results[key] > 0
    assert results["loss_difference"] < 1e-5 and results["features_difference"] < 1e-3
    assert (results["train_frames"], results["val_frames"], results["compute"]) == (2, 2, "float32")


def turn(factor: float) -> tuple[dict, dict]:
    """Return made-up figures of the notebook and of ours: ours 2, 10 and 5 times faster, in half the memory."""
    theirs = {"seconds": {"featurize_train": 80.0, "featurize_val": 20.0, "train": 40.0, "predict_and_write": 3.0, "score": 2.0},
              "train_frames": 90, "val_frames": 10, "peak": 4 * 10**9}
    ours = {"seconds": {"featurize_train": 45.0 / factor, "featurize_val": 5.0 / factor, "train": 4.0 / factor, "train_steps": 2.0,
                        "predict_write_score": 1.0, "after_featurize": 9.0},
            "peaks": {"train": 2 * 10**9, "evaluate": 10**9}, "compute": "float32"}
    return theirs, ours


def test_ratios_say_how_many_times_faster_and_memory_what_share():
    theirs, ours = zip(*(turn(factor) for factor in (1, 1.5, 0.5)))
    results = benchmark_peer.compare(list(theirs), list(ours), 101)
    expected = {"featurize_ratio": 2, "train_ratio": 10, "train_ratio_steps": 20, "predict_write_score_ratio": 5, "memory_ratio": 0.5,
                "after_featurize_seconds": 9}
    assert {key: results[key] for key in expected} == pytest.approx(expected)
    featurize = results["rows"][0]
    assert (featurize["peer"]["median"], featurize["ours"]["runs"]) == (1, [2, 3, 1])
    assert benchmark_peer.largest_difference([1, 2.2], [1, 2, 3]) == pytest.approx(0.1)


# --- made-up features ---------------------------------------------------------------------------


def test_scale_costs_and_losses_are_the_same_wherever_features_are(tmp_path):
    done = run("scale", "--frames", 3, "--shape", "8x6x7", "--size", "24x40", "--steps", 2, "--threads", 1, "--out", tmp_path / "out",
               "--folder", tmp_path, "--resident", "device", "disk")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert [one["resident"] for one in results["runs"]] == ["device", "disk"] and results["losses_equal"]
    for one in results["runs"]:
        assert one["fits"] and all(one[key][0] > 0 for key in ("train_peak_gb", "ms_per_scored_frame", "score_peak_gb"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # its temporary folder is gone


def test_scale_refuses_what_the_disk_cannot_hold(tmp_path):
    with pytest.raises(BadInput, match=r"1,000,000,000,000 frames take [\d.]+ GB, but only [\d.]+ GB are free"):
        benchmark_synthetic.check_disk(tmp_path, 10**12, (8, 6, 7), (24, 40))


def test_scale_notices_losses_that_differ():
    one, other = ({"resident": place, "losses": [loss], "scores": "x"} for place, loss in (("device", 0.5), ("disk", 0.5000001)))
    benchmark_synthetic.check_equal([one, one], 3)
    with pytest.raises(BadInput, match="the losses differ between --resident device and disk"):
        benchmark_synthetic.check_equal([one, other], 3)


def test_made_up_features_are_a_feature_folder(tmp_path):
    benchmark_synthetic.write_features(tmp_path / "made", 3, (8, 6, 7), (24, 40), seed=0)
    folder = data.open_features(tmp_path / "made")
    assert folder.frames == 3 and folder.size == (24, 40)
    features, masks = np.load(tmp_path / "made/features.npy"), np.unpackbits(np.load(tmp_path / "made/masks.npy"), axis=2)
    assert np.isfinite(features).all() and (masks.mean((1, 2)) > 0.1).all()


def test_train_times_every_decoder(tmp_path):
    done = run("train", "--repeats", 1, "--steps", 1, "--frames", 4, "--batch-size", 1, "--size", "128x192", "--device", "cpu",
               "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["decoders"].keys() >= {"simple", "linear"}
    for one in results["decoders"].values():
        assert one["frames_per_second"]["median"] == pytest.approx(one["steps_per_second"]["median"] * one["frames_per_step"])
        assert one["share_of_copy"] > 0 and one["frame_to_mask_per_second"]["median"] > 0


# --- the README's table -------------------------------------------------------------------------


def test_readmes_table_is_what_the_results_give():
    assert measure.write_table(ROOT / "README.md", ROOT / "benchmarks", check=True), "stale: run `python benchmark.py table`"


def test_results_name_no_path_of_this_machine():
    for file in (ROOT / "benchmarks").glob("*.json"):
        assert not any(part.startswith("/") for part in json.loads(file.read_text())["command"].split()), file


def record(folder: Path, date: str, name: str, median: float) -> None:
    """Write a made-up result."""
    rows = [measure.row("training", "frames/s", measure.spread([median, median * 2]), measure.spread([1000.0]), 12.34, "10x or more")]
    (folder / f"{date}-{name}.json").write_text(json.dumps({
        "name": name, "date": date, "command": f"python benchmark.py {name}", "n": 2, "rows": rows, "versions": {"torch": "2.0"},
        "machine": {"cpu": "CPU", "cores": 2, "accelerator": None, "load_1min": 0.1}}))


def test_table_holds_the_newest_of_each_name_between_the_markers(tmp_path):
    record(tmp_path, "2020-01-02", "a", 2.0)
    record(tmp_path, "2020-01-01", "a", 7.0)
    record(tmp_path, "2019-01-01", "b", 0.00012345)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    assert not measure.write_table(readme, tmp_path, check=True) and "old" in readme.read_text()
    assert not measure.write_table(readme, tmp_path, check=False)
    assert measure.write_table(readme, tmp_path, check=True)
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmarks -->\n| measured |") and text.endswith("\n<!-- /benchmarks -->\nafter\n")
    assert "| training, frames/s | 1,000 | 3 (2 to 4) | 12.3x | 10x or more | 2 |" in text and "7" not in text.split("Measured by")[0]
    assert "`python benchmark.py a`: 2020-01-02, CPU, 2 cores, load 0.1 before it began, torch 2.0" in text
    record(tmp_path, "2021-01-01", "b", 5.0)
    assert not measure.write_table(readme, tmp_path, check=True)


def test_table_gives_each_case_one_line(tmp_path):
    record(tmp_path, "2020-01-01", "a", 2.0)
    made = json.loads((tmp_path / "2020-01-01-a.json").read_text())
    made["rows"] += [measure.row(what, unit, measure.spread([value])) for what, unit, value in
                     [("10 frames, disk: step", "ms", 1.0), ("10 frames, disk: memory", "GB", 2.0), ("20 frames, disk: memory", "GB", 3.0)]]
    (tmp_path / "2020-01-01-a.json").write_text(json.dumps(made))
    lines = measure.make_table(tmp_path).split("\n")
    assert lines[2].startswith("| training, frames/s |") and lines[3] == ""
    assert lines[4:8] == ["| | step, ms | memory, GB | runs |", "|---|--:|--:|--:|", "| 10 frames, disk | 1 | 2 | 2 |",
                          "| 20 frames, disk |  | 3 | 2 |"]


@pytest.mark.parametrize("text", ["", "<!-- benchmarks -->", "<!-- /benchmarks --><!-- benchmarks -->",
                                  "<!-- benchmarks --><!-- /benchmarks --><!-- benchmarks -->"])
def test_table_needs_its_markers_once_and_in_order(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(BadInput, match="expected the lines <!-- benchmarks --> and"):
        measure.write_table(tmp_path / "README.md", tmp_path, check=False)
    assert (tmp_path / "README.md").read_text() == text
