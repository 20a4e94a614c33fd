"""The whole job over Weights & Biases: every step gets its inputs as artifacts, from a local server.

The data stand for the contest's: artifacts with a paths.json written on Windows. What a step wrote
is moved away before the next one starts, so that only artifacts can hand it over.
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
from helpers import call, ok, script
from wandb_server import ENTITY, WandbServer

pytest.importorskip("wandb", reason="needs the wandb client: pip install wandb")
OWNED = f"wandb:{ENTITY}/davis"
ONLINE = ("--wandb", "online", "--threads", "1")
OFF = ("--wandb", "disabled", "--threads", "1")
FEATURIZED = "efficientnet_lite0-featurized"
FEATURIZE = ("--weights", "random", "--levels", "s32")
VAL = f"{OWNED}/{FEATURIZED}-val:latest"
TRAIN = ("--features", f"{OWNED}/{FEATURIZED}-train:latest", "--val-features", VAL, "--decoder", "linear",
         "--steps", "4", "--log-every", "2")
EVALUATE = ("--model", f"{OWNED}/linear:best", "--features", VAL)
OUTPUTS = {f"outputs/{index:05d}.png" for index in range(4)}


class Chain(NamedTuple):
    """What the chain left: the server, and each step's folder, moved to where no step looks."""

    server: WandbServer
    home: Path
    kept: Path

    def run(self, job: str, number: int = 0) -> dict:
        """Return the number-th run of a job type, as the server has it."""
        return [run for run in self.server.runs.values() if run["job_type"] == job][number]

    def uses(self, run: dict) -> set[str]:
        """Return the artifacts that a run used, each as name:version."""
        used = [self.server.artifacts[name] for name in run["uses"]]
        return {f"{artifact['name']}:{artifact['version']}" for artifact in used}

    def files(self, name: str) -> dict[str, bytes]:
        return self.server.contents(self.server.artifact(name))


def publish_clips(server: WandbServer, root: Path) -> None:
    """Put a DAVIS root on the server as the contest's artifacts, with backslashes in paths.json."""
    for split in ("train", "val"):
        pairs = helpers.listed(root, split)
        contents, table = {}, {}
        for at, column in enumerate(("raw", "annotation")):
            names = [str(pair[at].relative_to(root)) for pair in pairs]
            contents |= {name: pair[at].read_bytes() for name, pair in zip(names, pairs)}
            table[column] = {str(i): name.replace("/", "\\") for i, name in enumerate(names)}
        contents["paths.json"] = json.dumps(table).encode()
        artifact = server.publish(f"davis2016-{split}", "dataset", contents)
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

        def featurize(split: str):
            source = f"{OWNED}/davis2016-{split}:contest"
            return script("featurize", "--data", source, *FEATURIZE, *ONLINE, cwd=home)

        with ThreadPoolExecutor(2) as pool:
            for done in pool.map(featurize, ("train", "val")):
                ok(done)
        kept = home / "kept"
        shutil.move(home / "features", kept / "features")
        ok(script("train", *TRAIN, *ONLINE, cwd=home))
        shutil.move(home / "runs/linear", kept / "run")
        ok(script("evaluate", *EVALUATE, *ONLINE, cwd=home))
        shutil.move(home / "results/linear", kept / "results")
        ok(script("package", "--results", f"{OWNED}/linear-result:latest", *ONLINE[:2], cwd=home))
        yield Chain(server, home, kept)


def test_the_submission_is_the_zip_byte_for_byte(chain):
    with zipfile.ZipFile(chain.home / "results/linear-result.zip") as archive:
        zipped = {name: archive.read(name) for name in archive.namelist()}
    assert set(zipped) == {*OUTPUTS, "paths.json", "metadata.json"}
    assert chain.files("linear-result:latest") == zipped
    assert {name: (chain.kept / "results" / name).read_bytes() for name in zipped} == zipped
    result = chain.server.artifact("linear-result:latest")
    assert result["type"] == "result" and result["metadata"] == json.loads(zipped["metadata.json"])
    featurizer = json.loads(chain.files(f"{FEATURIZED}-val:latest")["meta.json"])["parameters"]
    assert result["metadata"]["nparams"] == featurizer + 321  # a 1x1 of 320
    assert result["version"] == "v0"  # evaluate and package logged the same files


def test_lineage_is_recorded(chain):
    used = [chain.uses(chain.run("featurize", number)) for number in (0, 1)]
    assert sorted(used, key=str) == [{"davis2016-train:v0"}, {"davis2016-val:v0"}]
    assert chain.uses(chain.run("train")) == {f"{FEATURIZED}-{split}:v0" for split in ("train", "val")}
    assert chain.uses(chain.run("val-eval")) == {"linear:v0", f"{FEATURIZED}-val:v0"}
    assert chain.uses(chain.run("run-val")) == {"linear-result:v0"}
    runs = chain.server.runs.values()
    assert [(run["project"], run["exit"]) for run in runs] == [("davis", 0)] * 5
    assert chain.server.unknown == []


def test_features_and_model_carry_the_contests_names(chain):
    found = chain.files(f"{FEATURIZED}-train:latest")
    assert set(found) == {"features_array", "masks", "paths.json", "meta.json"}
    assert chain.server.artifact(f"{FEATURIZED}-train:latest")["type"] == "featurized-data"
    features = chain.kept / "features/efficientnet_lite0-train/features.npy"
    assert found["features_array"] == features.read_bytes()
    assert np.load(io.BytesIO(found["features_array"])).shape[0] == 8

    model = chain.server.artifact("linear:latest")
    assert set(model["aliases"]) == {"best", "latest"} and model["type"] == "trained-model"
    saved = {path.name: path.read_bytes() for path in (chain.kept / "run/checkpoints").iterdir()}
    assert set(saved) == {f"model-{step:08d}.pt" for step in (0, 2, 3)}
    saved["final_model"] = (chain.kept / "run/model.pt").read_bytes()
    assert chain.files("linear:latest") == saved


def test_training_logs_what_it_should(chain):
    run, local = chain.run("train"), helpers.log_of(chain.kept / "run")
    rows = [row for row in run["history"] if "loss" in row]
    assert [row["_step"] for row in rows] == [row["step"] for row in local] == [0, 2, 3]
    for row, written in zip(rows, local):
        assert all(row[key] == written[key] for key in ("loss", "lr", "val_iou"))
    assert any(key.startswith("gradients/") for row in run["history"] for key in row)
    config = run["config"]
    assert (config["recipe"]["steps"], config["args"]["decoder"]) == (4, "linear")
    # the version that latest was
    assert config["args"]["features"] == f"{OWNED}/{FEATURIZED}-train:v0"

    name, = (name for name, found in chain.server.runs.items() if found is run)
    picture = [row["prediction"] for row in run["history"] if "prediction" in row][-1]
    layers = {layer: iio.imread(chain.server.files[f"run/{name}/{mask['path']}"])
              for layer, mask in picture["masks"].items()}
    assert set(layers) == {"predictions", "ground_truth"}
    assert all(set(np.unique(layer)) <= {0, 1} for layer in layers.values())
    frame = iio.imread(chain.server.files[f"run/{name}/{picture['path']}"])
    assert frame.shape == (64, 96, 3) and frame.std() > 10  # the clip's own frame, not black


def test_evaluation_logs_scores_and_the_contests_table(chain):
    scores = json.loads((chain.kept / "results/scores.json").read_text())
    summary = chain.run("val-eval")["summary"]
    assert summary["segmentation_metric"] == summary["mean_iou"] == scores["mean_iou"]
    name = "linear-result-submission:latest"
    assert chain.server.artifact(name)["type"] == "submission"
    files = chain.files(name)
    table = json.loads(files["val-eval-data.table.json"])
    assert table["columns"] == ["out", "target", "iou_score"] and len(table["data"]) == 4
    for output, (out, _, _) in zip(sorted(OUTPUTS), table["data"]):
        assert files[out["path"]] == (chain.kept / "results" / output).read_bytes()


def test_local_files_are_the_same_without_logging(chain, tmp_path):
    del chain.server.operations[:]
    runs = len(chain.server.runs)
    ok(call("train", *TRAIN, *OFF, "--out", tmp_path / "run"))
    ok(call("evaluate", *EVALUATE, *OFF, "--out", tmp_path / "results"))
    logging = {"UpsertBucket", "CreateArtifact", "UseArtifact"}
    assert len(chain.server.runs) == runs and not set(chain.server.operations) & logging
    told = {"args.json", "curves.svg", "report.html"}  # these name the command or the time
    for name in ("run", "results"):
        logged, unlogged = (helpers.tree(folder / name) for folder in (chain.kept, tmp_path))
        assert logged.keys() == unlogged.keys()
        assert {path for path in logged if logged[path] != unlogged[path]} <= told


def test_of_several_processes_one_logs(chain, tmp_path):
    runs = len(chain.server.runs)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [*TRAIN, *ONLINE, "--device", "cpu", "--out", tmp_path / "run"]
    done = subprocess.run([*launch, helpers.ROOT / "train.py", *flags], capture_output=True, text=True,
                          timeout=120, cwd=chain.home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(chain.server.runs) == runs + 1
    losses = [row["loss"] for row in chain.run("train", -1)["history"] if "loss" in row]
    assert losses == [row["loss"] for row in helpers.log_of(tmp_path / "run")]


def test_a_result_from_anywhere_is_scored(chain, tmp_path):
    """What an organiser does: score a result artifact against a data artifact's annotations."""
    given = ("--predictions", f"{OWNED}/linear-result:v0", "--data", f"{OWNED}/davis2016-val:contest")
    ok(script("evaluate", *given, *ONLINE, "--no-pictures", "--out", tmp_path / "scored"))
    scores = json.loads((tmp_path / "scored/scores.json").read_text())
    assert scores == json.loads((chain.kept / "results/scores.json").read_text())
    run = chain.run("val-eval", -1)
    assert run["summary"]["segmentation_metric"] == scores["mean_iou"]
    assert chain.uses(run) == {"linear-result:v0", "davis2016-val:v0"}
