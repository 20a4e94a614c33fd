"""The whole job over Weights & Biases: every step a process of its own that gets its inputs as artifacts, from a local server.

The data stand for the contest's: artifacts with a paths.json written on Windows. What a step wrote is moved away
before the next one starts, so that only artifacts can hand it over.
"""
import contextlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import helpers
import imageio.v3 as iio
import numpy as np
import pytest
import wandb_world
from helpers import ok, tree
from wandb_server import ENTITY, WandbServer

pytest.importorskip("wandb", reason="needs the wandb client: pip install wandb")
OWNED = f"wandb:{ENTITY}/davis"
ONLINE = ("--wandb", "online", "--threads", "1")
FEATURIZED = "efficientnet_lite0-featurized"
FEATURIZE = ("--featurizer", "efficientnet_lite0", "--weights", "random", "--levels", "s32", "--threads", "1")
FEATURES = ("--features", f"{OWNED}/{FEATURIZED}-train:latest",
            "--val-features", f"{OWNED}/{FEATURIZED}-val:latest")
TRAIN = (*FEATURES, "--decoder", "linear", "--steps", "4", "--log-every", "2")
EVALUATE = ("--model", f"{OWNED}/linear:best", "--features", f"{OWNED}/{FEATURIZED}-val:latest")


class Chain(NamedTuple):
    """What the chain left: the server with all that was logged, and each step's folder, moved to where no step looks."""

    server: WandbServer
    home: Path
    kept: Path

    def run(self, job: str, number: int = 0) -> dict:
        """The number-th run of a job type, as the server has it."""
        return [run for run in self.server.runs.values() if run["job_type"] == job][number]

    def uses(self, run: dict) -> set[str]:
        """The artifacts that a run used, each as name:version."""
        return {f"{self.server.artifacts[used]['name']}:{self.server.artifacts[used]['version']}" for used in run["uses"]}

    def files(self, name: str) -> dict[str, bytes]:
        """The entries of the artifact called name:alias."""
        return self.server.contents(self.server.artifact(name))


def publish_clips(server: WandbServer, root: Path) -> None:
    """Put a DAVIS root on the server as the contest's artifacts, with backslashes in paths.json."""
    for split in ("train", "val"):
        pairs = helpers.listed(root, split)
        names = [[str(path.relative_to(root)) for path in pair] for pair in pairs]
        contents = {name: path.read_bytes() for pair, row in zip(pairs, names) for path, name in zip(pair, row)}
        columns = {column: {str(index): name.replace("/", "\\") for index, name in enumerate(values)}
                   for column, values in zip(("raw", "annotation"), zip(*names))}
        artifact = server.publish(f"davis2016-{split}", "dataset", {**contents, "paths.json": json.dumps(columns).encode()})
        artifact["aliases"].append("contest")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Run the chain online, each step in its own process."""
    home = tmp_path_factory.mktemp("chain")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        wandb_world.isolate(home, patch)
        server = stack.enter_context(wandb_world.served(patch))
        publish_clips(server, helpers.write_davis(home / "clips", frames=4, size=(64, 96)))
        shutil.rmtree(home / "clips")
        (home / "kept").mkdir()
        with ThreadPoolExecutor(2) as pool:
            for done in pool.map(lambda split: helpers.script("featurize", "--data", f"{OWNED}/davis2016-{split}:contest", *FEATURIZE,
                                                              *ONLINE, cwd=home), ("train", "val")):
                ok(done)
        (home / "features").rename(home / "kept/features")
        ok(helpers.script("train", *TRAIN, "--log-gradients", *ONLINE, cwd=home))
        (home / "runs/linear").rename(home / "kept/run")
        ok(helpers.script("evaluate", *EVALUATE, *ONLINE, cwd=home))
        (home / "results/linear").rename(home / "kept/results")
        ok(helpers.script("package", "--results", f"{OWNED}/linear-result:latest", *ONLINE, cwd=home))
        yield Chain(server, home, home / "kept")


def test_the_submission_is_the_zip_byte_for_byte(chain):
    with zipfile.ZipFile(chain.home / "results/linear-result.zip") as archive:
        zipped = {name: archive.read(name) for name in archive.namelist()}
    assert set(zipped) == {*(f"outputs/{index:05d}.png" for index in range(4)), "paths.json", "metadata.json"}
    assert chain.files("linear-result:latest") == zipped
    assert {name: (chain.kept / "results" / name).read_bytes() for name in zipped} == zipped
    metadata = chain.server.artifact("linear-result:latest")["metadata"]
    assert metadata == json.loads(zipped["metadata.json"])
    assert metadata["nparams"] == json.loads(chain.files(f"{FEATURIZED}-val:latest")["meta.json"])["parameters"] + 321  # a 1x1 of 320
    assert chain.server.artifact("linear-result:latest")["version"] == "v0"  # evaluate and package logged the same files


def test_lineage_is_recorded(chain):
    features = {f"{FEATURIZED}-train:v0", f"{FEATURIZED}-val:v0"}
    used = [chain.uses(chain.run("featurize", number)) for number in (0, 1)]
    assert sorted(used, key=str) == [{"davis2016-train:v0"}, {"davis2016-val:v0"}]
    assert chain.uses(chain.run("train")) == features
    assert chain.uses(chain.run("val-eval")) == {"linear:v0", f"{FEATURIZED}-val:v0"}
    assert chain.uses(chain.run("run-val")) == {"linear-result:v0"}
    assert len(chain.server.runs) == 5 and {run["project"] for run in chain.server.runs.values()} == {"davis"}
    assert [run["exit"] for run in chain.server.runs.values()] == [0] * 5
    assert chain.server.unknown == []


def test_features_carry_the_contests_names(chain):
    found = chain.files(f"{FEATURIZED}-train:latest")
    assert set(found) == {"features_array", "masks", "paths.json", "meta.json"}
    assert chain.server.artifact(f"{FEATURIZED}-train:latest")["type"] == "featurized-data"
    folder = chain.kept / "features/efficientnet_lite0-train"
    assert found["features_array"] == (folder / "features.npy").read_bytes()
    assert np.load(io.BytesIO(found["features_array"])).shape[0] == 8
    assert "\\" not in json.dumps(json.loads(found["paths.json"]))


def test_training_logs_what_it_should(chain):
    run, local = chain.run("train"), helpers.log_of(chain.kept / "run")
    rows = [row for row in run["history"] if "loss" in row]
    assert [row["_step"] for row in rows] == [row["step"] for row in local] == [0, 2, 3]
    for row, written in zip(rows, local):
        assert {key: row[key] for key in ("loss", "lr", "val_iou")} == {key: written[key] for key in ("loss", "lr", "val_iou")}
        assert row["frames_per_second"] > 0 and "frames_per_second" not in written
    assert all(any(key.startswith("gradients/") for key in row) for row in rows[:2])  # at multiples of --log-every
    assert (run["config"]["steps"], run["config"]["decoder"], run["config"]["frames"]) == (4, "linear", 8)
    assert run["config"]["features"] == f"{OWNED}/{FEATURIZED}-train:v0"  # the version that latest was
    assert run["summary"]["val_iou"] == max(row["val_iou"] for row in local)

    name, = (name for name, found in chain.server.runs.items() if found is run)
    picture = next(row["prediction"] for row in run["history"] if row["_step"] == 3 and "prediction" in row)
    layers = {layer: iio.imread(chain.server.files[f"run/{name}/{mask['path']}"]) for layer, mask in picture["masks"].items()}
    assert set(layers) == {"predictions", "ground_truth"} and all(set(np.unique(layer)) <= {0, 1} for layer in layers.values())
    frame = iio.imread(chain.server.files[f"run/{name}/{picture['path']}"])
    assert frame.shape == (64, 96, 3) and frame.std() > 10  # the clip's own frame, not black

    model = chain.server.artifact("linear:latest")
    assert set(model["aliases"]) == {"best", "latest"} and model["type"] == "trained-model"
    checkpoints = {path.name: path.read_bytes() for path in (chain.kept / "run/checkpoints").iterdir()}
    assert set(checkpoints) == {f"model-{step:08d}.pt" for step in (0, 2, 3)}
    assert chain.files("linear:latest") == {"final_model": (chain.kept / "run/model.pt").read_bytes(), **checkpoints}


def test_evaluation_logs_scores_and_the_contests_table(chain):
    scores = json.loads((chain.kept / "results/scores.json").read_text())
    summary = chain.run("val-eval")["summary"]
    assert summary["segmentation_metric"] == summary["mean_iou"] == scores["mean_iou"]
    assert summary["nparams"] == json.loads((chain.kept / "results/metadata.json").read_text())["nparams"]
    submission = chain.server.artifact("linear-result-submission:latest")
    assert submission["type"] == "submission"
    table = json.loads(chain.files("linear-result-submission:latest")["val-eval-data.table.json"])
    assert table["columns"] == ["out", "target", "iou_score"] and len(table["data"]) == 4
    pictures = chain.files("linear-result-submission:latest")
    for index, (out, _, _) in enumerate(table["data"]):
        assert pictures[out["path"]] == (chain.kept / f"results/outputs/{index:05d}.png").read_bytes()


def test_local_files_are_the_same_without_logging(chain, tmp_path):
    """Train and evaluate again from the same artifacts, with --wandb disabled: the same bytes, and nothing more on the server."""
    operations, runs = set(chain.server.operations), len(chain.server.runs)
    del chain.server.operations[:]
    ok(helpers.call("train", *TRAIN, "--log-gradients", "--wandb", "disabled", "--threads", "1", "--out", tmp_path / "run"))
    ok(helpers.call("evaluate", *EVALUATE, "--wandb", "disabled", "--threads", "1", "--out", tmp_path / "results"))
    assert len(chain.server.runs) == runs and not set(chain.server.operations) & {"UpsertBucket", "CreateArtifact", "UseArtifact"}
    assert {"UpsertBucket", "CreateArtifact", "UseArtifact"} <= operations  # which the chain itself needed

    told = {"args.json", "times.jsonl", "curves.svg", "report.html"}  # these name the command or the time
    for name, least in (("run", {"model.pt", "log.jsonl", "predictions/00000003.png", "checkpoints/model-00000003.pt"}),
                        ("results", {"outputs/00000.png", "scores.json", "frames.csv", "metadata.json"})):
        logged, unlogged = ({path: digest for path, digest in tree(folder / name).items() if path not in told}
                            for folder in (chain.kept, tmp_path))
        assert least <= set(logged) and logged == unlogged


def test_of_several_processes_one_logs(chain, tmp_path):
    runs = len(chain.server.runs)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", helpers.ROOT / "train.py",
               *TRAIN, *ONLINE, "--device", "cpu", "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=chain.home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(chain.server.runs) == runs + 1
    losses = [row["loss"] for row in chain.run("train", -1)["history"] if "loss" in row]
    assert losses == [row["loss"] for row in helpers.log_of(tmp_path / "run")]


def test_a_result_from_anywhere_is_scored(chain, tmp_path):
    """What an organiser does: the outputs of a result artifact against the annotations of a data artifact."""
    ok(helpers.script("evaluate", "--predictions", f"{OWNED}/linear-result:v0", "--data", f"{OWNED}/davis2016-val:contest", *ONLINE,
                      "--no-pictures", "--out", tmp_path / "scored"))
    scores = json.loads((tmp_path / "scored/scores.json").read_text())
    assert scores == json.loads((chain.kept / "results/scores.json").read_text())
    run = chain.run("val-eval", -1)
    assert run["summary"]["segmentation_metric"] == scores["mean_iou"]
    assert chain.uses(run) == {"linear-result:v0", "davis2016-val:v0"}


def test_frames_that_are_gone_come_from_the_data_artifact(chain, tmp_path):
    """Features made on another machine: pictures need the frames, and the refusal says where to get them."""
    shutil.copytree(chain.kept / "features/efficientnet_lite0-val", tmp_path / "features")
    helpers.change_json(tmp_path / "features/meta.json", data=str(tmp_path / "gone"))
    given = ("--model", chain.kept / "run", "--features", tmp_path / "features", "--threads", "1", "--out", tmp_path / "out")
    helpers.refuses("evaluate", *given, names=["00000.jpg", "--data", "--no-pictures"], untouched=tmp_path)
    ok(helpers.call("evaluate", *given, "--data", f"{OWNED}/davis2016-val:contest"))
    assert (tmp_path / "out/outputs/00000.png").read_bytes() == (chain.kept / "results/outputs/00000.png").read_bytes()
