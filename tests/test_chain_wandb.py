"""The whole job over Weights & Biases: every step gets its inputs as artifacts of a local server.

The data have a paths.json written on Windows. What a step wrote is moved away before the next one.
"""
import contextlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import helpers
import imageio.v3 as iio
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
TRAIN = ("--features", f"{OWNED}/{FEATURIZED}-train:latest", "--val-features", VAL,
         "--decoder", "linear", "--steps", "4", "--log-every", "2")
EVALUATE = ("--model", f"{OWNED}/linear:best", "--features", VAL)
OUTPUTS = {f"outputs/{index:05d}.png" for index in range(4)}


class Chain(NamedTuple):
    """What the chain left: the server, and each step's folder, moved to where no step looks."""

    server: WandbServer
    home: Path
    kept: Path

    def run(self, job: str, number: int = 0) -> dict:
        return [run for run in self.server.runs.values() if run["job_type"] == job][number]

    def uses(self, run: dict) -> set[str]:
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
        server.publish(f"davis2016-{split}", "dataset", contents)["aliases"].append("contest")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    home = tmp_path_factory.mktemp("chain")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        wandb_world.isolate(home, patch)
        server = stack.enter_context(wandb_world.served(patch))
        publish_clips(server, helpers.write_davis(home / "clips", frames=4, size=(64, 96)))
        shutil.rmtree(home / "clips")
        for source in (f"{OWNED}/davis2016-{split}:contest" for split in ("train", "val")):
            ok(script("featurize", "--data", source, *FEATURIZE, *ONLINE, cwd=home))
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
    result = chain.server.artifact("linear-result:v0")  # evaluate and package logged the same
    assert "latest" in result["aliases"] and result["type"] == "result"
    assert result["metadata"] == json.loads(zipped["metadata.json"])


def test_lineage_is_recorded(chain):
    assert chain.uses(chain.run("featurize")) == {"davis2016-train:v0"}
    train, val = (f"{FEATURIZED}-{split}:v0" for split in ("train", "val"))
    assert chain.uses(chain.run("train")) == {train, val}
    assert chain.uses(chain.run("val-eval")) == {"linear:v0", val}
    assert chain.uses(chain.run("run-val")) == {"linear-result:v0"}
    assert [run["exit"] for run in chain.server.runs.values()] == [0] * 5
    assert chain.server.unknown == []


def test_features_and_model_carry_the_contests_names(chain):
    found = chain.files(f"{FEATURIZED}-train:latest")
    assert set(found) == {"features_array", "masks", "paths.json", "meta.json"}
    features = chain.kept / "features/efficientnet_lite0-train/features.npy"
    assert found["features_array"] == features.read_bytes()

    model = chain.server.artifact("linear:latest")
    assert set(model["aliases"]) == {"best", "latest"} and model["type"] == "trained-model"
    saved = {path.name: path.read_bytes() for path in (chain.kept / "run/checkpoints").iterdir()}
    assert min(saved) == "model-00000000.pt" and len(saved) == 3
    saved["final_model"] = (chain.kept / "run/model.pt").read_bytes()
    assert chain.files("linear:latest") == saved


def test_training_logs_what_it_should(chain):
    run, local = chain.run("train"), helpers.log_of(chain.kept / "run")
    rows = [row for row in run["history"] if "loss" in row]
    assert [row["_step"] for row in rows] == [row["step"] for row in local] == [0, 2, 3]
    for key in ("loss", "lr", "val_iou"):
        assert [row[key] for row in rows] == [row[key] for row in local]
    assert any(key.startswith("gradients/") for row in run["history"] for key in row)
    config = run["config"]
    assert config["recipe"]["steps"] == 4
    assert config["args"]["features"] == f"{OWNED}/{FEATURIZED}-train:v0"  # which latest was

    name = next(name for name, found in chain.server.runs.items() if found is run)
    picture = [row["prediction"] for row in run["history"] if "prediction" in row][-1]
    assert set(picture["masks"]) == {"predictions", "ground_truth"}
    frame = iio.imread(chain.server.files[f"run/{name}/{picture['path']}"])
    assert frame.shape == (64, 96, 3) and frame.std() > 10  # the clip's own frame, not black


def test_evaluation_logs_scores_and_the_contests_table(chain):
    expected = json.loads((chain.kept / "results/scores.json").read_text())["mean_iou"]
    summary = chain.run("val-eval")["summary"]
    assert summary["segmentation_metric"] == summary["mean_iou"] == expected
    files = chain.files("linear-result-submission:latest")
    table = json.loads(files["val-eval-data.table.json"])
    assert table["columns"] == ["out", "target", "iou_score"] and len(table["data"]) == 4
    for output, row in zip(sorted(OUTPUTS), table["data"]):
        assert files[row[0]["path"]] == (chain.kept / "results" / output).read_bytes()


def test_local_files_are_the_same_without_logging(chain, tmp_path):
    del chain.server.operations[:]
    ok(call("train", *TRAIN, *OFF, "--out", tmp_path / "run"))
    ok(call("evaluate", *EVALUATE, *OFF, "--out", tmp_path / "results"))
    assert not {"UpsertBucket", "CreateArtifact", "UseArtifact"} & set(chain.server.operations)
    told = {"args.json", "curves.svg", "report.html"}  # these name the command or the time
    for name in ("run", "results"):
        logged, unlogged = (helpers.tree(folder / name) for folder in (chain.kept, tmp_path))
        assert logged.keys() == unlogged.keys()
        assert {path for path in logged if logged[path] != unlogged[path]} <= told


def test_of_several_processes_one_logs(chain):
    runs = len(chain.server.runs)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, helpers.ROOT / "train.py", *TRAIN, *ONLINE, "--device=cpu", "--out=two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=chain.home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(chain.server.runs) == runs + 1


def test_a_result_from_anywhere_is_scored(chain, tmp_path):
    given = ("--predictions", f"{OWNED}/linear-result:v0", "--out", tmp_path / "scored")
    data = f"{OWNED}/davis2016-val:contest"
    ok(script("evaluate", *given, "--data", data, *ONLINE, "--no-pictures"))
    scores = (tmp_path / "scored/scores.json").read_text()
    assert scores == (chain.kept / "results/scores.json").read_text()
    assert chain.uses(chain.run("val-eval", -1)) == {"linear-result:v0", "davis2016-val:v0"}
