"""Tracking with the real wandb client: offline runs read back from their file, online ones against a local server."""
import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from helpers import call
from wandb_server import ENTITY, KEY, WandbServer
from wandb_world import ROOT, account, entries, feature_folder, flags, history, lines, offline_artifacts, records, sync, wandb_command

import files
import tracking

wandb = pytest.importorskip("wandb", reason="needs the wandb client: pip install wandb")
pytestmark = pytest.mark.usefixtures("own_world")


def log_everything(tracker, home):
    """Log one of each kind, as the four scripts do; return the feature folder and an output's path."""
    features = feature_folder(home / "features")
    model = home / "model.pt"
    checkpoint = home / "model-00000010.pt"
    output = home / "00000.png"
    model.write_bytes(b"final")
    checkpoint.write_bytes(b"tenth")
    iio.imwrite(output, np.full((6, 8), 200, np.uint8))
    for step in range(3):
        tracker.log(step, {"loss": 1.0 / (step + 1), "lr": 5e-4})
    frame, mask = np.zeros((6, 8, 3), np.uint8), np.eye(6, 8) > 0
    tracker.image(2, frame, ~mask, mask, caption="bear")
    tracking.log_features(tracker, features, "alexnet", "train", {"levels": ["s16"]})
    tracking.log_model(tracker, "linear", model, [checkpoint], {"val_iou": 0.5})
    tracking.log_results(tracker, "linear", {"outputs/00000.png": output, "paths.json": features / "paths.json"}, {"nparams": 12})
    tracking.log_scores(tracker, "linear", "val", [(output, np.eye(6, 8, dtype=np.uint8) * 255, -1.0)], {"mean_iou": 0.25})
    return features, output


# The local log, which needs no client.


def test_local_log_has_a_line_a_step(tmp_path):
    log = tmp_path / "log.jsonl"
    with tracking.start(account("disabled"), "train", {}, log=log) as tracker:
        tracker.log(0, {"loss": 0.5, "clip": "bear"})
        assert lines(log) == [{"step": 0, "loss": 0.5, "clip": "bear"}]  # there before the run ends
        tracker.log(1, {"loss": float("nan"), "val_iou": float("inf")})
    assert lines(log)[1] == {"step": 1, "loss": None, "val_iou": None}


def test_local_log_is_started_afresh_or_appended_to(tmp_path):
    log = tmp_path / "log.jsonl"
    for append, expected in ((False, [0]), (True, [0, 1]), (False, [2])):
        with tracking.start(account("disabled"), "train", {}, log=log, append=append) as tracker:
            tracker.log(len(lines(log)) if append else expected[0], {"loss": 1.0})
        assert [line["step"] for line in lines(log)] == expected


def test_local_log_that_cannot_be_written_is_bad_input(tmp_path):
    with pytest.raises(files.BadInput, match=r"absent.*cannot be written"):
        tracking.start(account("disabled"), "train", {}, log=tmp_path / "absent" / "log.jsonl")


def test_disabled_calls_do_nothing_anywhere(tmp_path):
    with tracking.start(account("disabled"), "train", {}) as tracker:
        tracker.image(0, None, None)
        tracker.watch(None)
        tracker.log(0, {"loss": 1.0})
        tracker.use("a/b/c:v0")
        tracker.summary({"x": 1})
        tracking.log_model(tracker, "linear", tmp_path / "absent", [], {})
        tracking.log_scores(tracker, "linear", "val", [("absent", "absent", 1.0)], {"mean_iou": 1.0})
    assert list((tmp_path / "wandb-home" / "dir").iterdir()) == []


# Flags and environment.


def test_mode_comes_from_the_flag_then_the_environment(monkeypatch):
    assert tracking.from_flags(flags()) == ("disabled", "davis", None, None)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert tracking.from_flags(flags()).mode == "online" and tracking.sweep_run_id() == "r1"
    for found, mode in (("offline", "offline"), ("dryrun", "offline"), ("DISABLED", "disabled"), ("online", "online")):
        monkeypatch.setenv("WANDB_MODE", found)
        assert tracking.from_flags(flags()).mode == mode
    given = flags("--wandb", "disabled", "--entity", "e", "--project", "p", "--run-name", "n")
    assert tracking.from_flags(given) == ("disabled", "p", "e", "n")
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(files.BadInput, match=r"WANDB_MODE=sometimes: expected one of disabled, offline, online"):
        tracking.from_flags(flags())


def test_without_wandb_installed():
    """A process in which `import wandb` fails logs locally, and is told what to install when it asks for more."""
    script = """
import argparse, sys
sys.modules["wandb"] = None  # what an import of a package that is not installed comes to
import artifacts
import tracking
from files import BadInput
parser = argparse.ArgumentParser()
tracking.add_tracking_flags(parser)
with tracking.start(tracking.from_flags(parser.parse_args([])), "train", {}, log="log.jsonl") as tracker:
    tracker.log(0, {"loss": 1.0})
    tracking.log_model(tracker, "linear", "m", [], {})
for act in (lambda: tracking.from_flags(parser.parse_args(["--wandb", "offline"])),
            lambda: artifacts.fetch("wandb:e/p/n:latest", tracking.from_flags(parser.parse_args([])))):
    try:
        act()
    except BadInput as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("--wandb offline: needs the package wandb") and "pip install wandb" in first
    assert "needs the package wandb" in second
    assert lines(Path("log.jsonl")) == [{"step": 0, "loss": 1.0}]


def test_redact_takes_out_keys_and_passwords(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    given = {"out": Path("a/b"), "note": f"key {KEY}!", "url": ["https://me:secret@host/x"], "lr": np.float32(0.5), "flag": None}
    assert tracking.redact(given) == {"out": str(Path("a/b")), "note": "key ***!", "url": ["https://***@host/x"], "lr": 0.5, "flag": None}


# Offline: what the client wrote, read back from its own file.


def test_offline_run_holds_everything(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    config = {"lr": 5e-4, "out": tmp_path, "note": f"my key is {KEY}"}
    with tracking.start(account("offline", name="first"), "train", config, log=tmp_path / "log.jsonl") as tracker:
        tracker.use("wandb/davis/davis2016-train:v3")
        features, output = log_everything(tracker, tmp_path)
    assert not tracker.failed
    rows = history(tracker.folder)
    assert [rows[step]["loss"] for step in range(3)] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert rows[2]["prediction/_type"] == "image-file" and rows[2]["prediction/caption"] == "bear"
    for layer, truth in (("predictions", np.eye(6, 8) == 0), ("ground_truth", np.eye(6, 8) > 0)):
        drawn = iio.imread(Path(tracker.folder) / "files" / rows[2][f"prediction/masks/{layer}/path"])
        assert (drawn == truth).all()

    run = next(record.run for record in records(tracker.folder) if record.WhichOneof("record_type") == "run")
    assert (run.project, run.job_type, run.display_name) == ("davis", "train", "first")
    updates = [item for record in records(tracker.folder) for item in (*record.run.config.update, *record.config.update)]
    config = {item.key: json.loads(item.value_json) for item in updates}
    assert config["lr"] == 5e-4 and config["note"] == "my key is ***" and config["used"] == ["wandb/davis/davis2016-train:v3"]
    labels = config["_wandb"]["mask/class_labels"]
    assert {tuple(item["value"].items()) for item in labels.values()} == {(("0", "background"), ("1", "object"))}
    summary = {item.key: json.loads(item.value_json) for record in records(tracker.folder) for item in record.summary.update if item.key}
    assert (summary["nparams"], summary["mean_iou"], summary["segmentation_metric"]) == (12, 0.25, 0.25)

    logged = offline_artifacts(tracker.folder)
    assert {name: artifact.type for name, artifact in logged.items()} == {
        "alexnet-featurized-train": "featurized-data", "linear": "trained-model", "linear-result": "result",
        "linear-result-submission": "submission"}
    found = entries(logged["alexnet-featurized-train"])
    assert set(found) == {"features_array", "masks", "paths.json", "meta.json"}
    assert (np.load(io.BytesIO(found["features_array"])) == np.load(features / "features.npy")).all()
    assert entries(logged["linear"]) == {"final_model": b"final", "model-00000010.pt": b"tenth"}
    assert set(logged["linear"].aliases) == {"latest", "best"} and json.loads(logged["linear"].metadata) == {"val_iou": 0.5}
    submitted = {"outputs/00000.png": output.read_bytes(), "paths.json": (features / "paths.json").read_bytes()}
    assert entries(logged["linear-result"]) == submitted
    assert json.loads(logged["linear-result"].metadata) == {"nparams": 12}
    table = json.loads(entries(logged["linear-result-submission"])["val-eval-data.table.json"])
    assert table["columns"] == ["out", "target", "iou_score"] and table["data"][0][2] == -1.0

    everything = b"".join(path.read_bytes() for path in (tmp_path / "wandb-home").rglob("*") if path.is_file())
    assert KEY.encode() not in everything and KEY not in (tmp_path / "log.jsonl").read_text()
    assert f"wandb sync {tracker.folder}" in capfd.readouterr().err


def test_timings_stay_out_of_the_local_log(tmp_path):
    with tracking.start(account("offline"), "train", {}, log=tmp_path / "log.jsonl") as tracker:
        tracker.log(3, {"loss": 1.0}, {"frames_per_second": 12.5})
    assert lines(tmp_path / "log.jsonl") == [{"step": 3, "loss": 1.0}]
    assert history(tracker.folder)[3]["frames_per_second"] == 12.5


def test_gradients_are_logged_at_their_step():
    torch = pytest.importorskip("torch", reason="needs torch")
    model = torch.nn.Linear(2, 1)
    with tracking.start(account("offline"), "train", {}) as tracker:
        tracker.watch(model, 10)
        for step in (0, 10, 15):
            model.zero_grad()
            (model(torch.ones(1, 2)) * (step + 1)).sum().backward()
            tracker.log(step, {"loss": 0.0})
    assert not tracker.failed
    rows = history(tracker.folder)
    assert not any("gradients" in key for key in rows.pop(15))
    for step, row in rows.items():
        counts, edges = row["gradients/weight/values"], row["gradients/weight/bins"]
        assert sum(counts) == 2 and edges[0] <= step + 1 <= edges[-1] and edges[-1] - edges[0] <= 1


def test_an_offline_run_is_uploaded_by_the_advice_it_gives(tmp_path, server):
    with tracking.start(account("offline"), "train", {"lr": 1.0}) as tracker:
        log_everything(tracker, tmp_path)
    assert server.operations == []
    sync(tracker.folder)
    assert [row["loss"] for row in next(iter(server.runs.values()))["history"]] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert server.contents(server.artifact("linear:best"))["final_model"] == b"final"
    assert server.artifact("linear-result-submission:latest")["type"] == "submission"


# Online, against the server.


def test_online_run_arrives_whole(tmp_path, server, capfd):
    server.publish("davis2016-train", "dataset", {"paths.json": b"{}"})
    with tracking.start(account("online"), "train", {"lr": 5e-4}, log=tmp_path / "log.jsonl") as tracker:
        tracker.use(f"{ENTITY}/davis/davis2016-train:v0")
        features, output = log_everything(tracker, tmp_path)
    assert not tracker.failed
    (name, run), = server.runs.items()
    assert (run["project"], run["job_type"], run["config"]["lr"], run["exit"]) == ("davis", "train", 5e-4, 0)
    assert [row["loss"] for row in run["history"]] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert run["uses"] == ["artifact0"] and run["summary"]["segmentation_metric"] == 0.25
    picture = run["history"][2]["prediction"]
    stored = iio.imread(server.files[f"run/{name}/{picture['masks']['ground_truth']['path']}"])
    assert (stored == (np.eye(6, 8) > 0)).all()
    featurized = server.contents(server.artifact("alexnet-featurized-train:latest"))
    assert set(featurized) == {"features_array", "masks", "paths.json", "meta.json"}
    assert server.contents(server.artifact("linear:best")) == {"final_model": b"final", "model-00000010.pt": b"tenth"}
    result = server.artifact("linear-result:latest")
    assert result["metadata"] == {"nparams": 12}
    assert server.contents(result) == {"outputs/00000.png": output.read_bytes(), "paths.json": (features / "paths.json").read_bytes()}
    assert "val-eval-data.table.json" in server.contents(server.artifact("linear-result-submission:latest"))

    assert server.unknown == []
    key = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
    assert server.keys == {"graphql": {key}, "files": {key}, "storage": {None}}  # a signed URL is not shown the key
    assert not any(KEY.encode() in data for data in server.files.values())
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err and server.url in printed.err


def test_best_stays_with_the_higher_iou(tmp_path, server):
    for val_iou, expected in ((None, "v0"), (0.5, "v1"), (0.4, "v1"), (0.6, "v3")):
        (tmp_path / "model.pt").write_bytes(f"{val_iou}".encode())
        with tracking.start(account("online"), "train", {}) as tracker:
            tracking.log_model(tracker, "linear", tmp_path / "model.pt", [], {"val_iou": val_iou})
        assert server.artifact("linear:best")["version"] == expected
    assert server.artifact("linear:latest")["version"] == "v3"


# Never in the way.


def test_a_server_that_dies_in_mid_run(tmp_path, server, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "2")
    monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)
    (tmp_path / "model.pt").write_bytes(b"final")
    with tracking.start(account("online"), "train", {}, log=tmp_path / "log.jsonl") as tracker:
        tracker.log(0, {"loss": 1.0})
        server.stop()
        for step in range(1, 4):
            tracker.log(step, {"loss": 1.0 / step})
        for name in ("linear", "simple"):
            tracking.log_model(tracker, name, tmp_path / "model.pt", [], {})
    printed = capfd.readouterr().err
    assert len(lines(tmp_path / "log.jsonl")) == 4
    assert tracker.failed and printed.count("; going on without") == 1
    advice = printed.split("to upload this run: wandb sync ")[1].split()
    assert len(advice) == 3 and set(offline_artifacts(advice[2])) == {"linear", "simple"}

    with WandbServer() as another:  # the network is back
        monkeypatch.setenv("WANDB_BASE_URL", another.url)
        sync(*advice)
        run, = another.runs.values()
        assert [row["_step"] for row in run["history"]] == [0, 1, 2, 3]
        assert another.contents(another.artifact("linear:latest")) == {"final_model": b"final"}


def test_files_that_are_refused(tmp_path, server, capfd):
    (tmp_path / "model.pt").write_bytes(b"final")
    with tracking.start(account("online"), "train", {}) as tracker:
        server.failing["storage"] = 403
        tracking.log_model(tracker, "linear", tmp_path / "model.pt", [], {})
        tracker.log(0, {"loss": 1.0})
    assert tracker.failed and server.artifact("linear:latest") is None
    printed = capfd.readouterr().err
    assert printed.count("not everything was uploaded") == 1
    assert f"to upload this run: wandb sync --include-online {tracker.folder}" in printed


def test_a_server_that_does_not_answer_at_the_start(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    with tracking.start(account("online"), "train", {"lr": 1.0}) as tracker:
        tracker.log(0, {"loss": 1.0})
    printed = capfd.readouterr().err
    assert "no answer from the server" in printed and "logging offline" in printed and KEY not in printed
    assert history(tracker.folder)[0]["loss"] == 1.0 and f"wandb sync {tracker.folder}" in printed


def test_a_refused_key_stops_before_any_work(server):
    server.failing["graphql"] = 401
    with pytest.raises(files.BadInput, match=r"--wandb online: refused .*check WANDB_API_KEY"):
        tracking.start(account("online"), "train", {})


@pytest.mark.parametrize("script", ["featurize", "train", "evaluate", "package"])
@pytest.mark.parametrize("key, said", [(None, "none was found"), ("short", "must have 40+ characters")])
def test_no_key_and_nobody_to_ask(server, monkeypatch, script, key, said):
    """A script with a closed standard input, as a job scheduler gives: one line, before it looks at its data, and no prompt."""
    monkeypatch.delenv("WANDB_API_KEY")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    given = {"featurize": ["--data"], "train": ["--features"], "evaluate": ["--features", "f", "--model"], "package": ["--results"]}
    result = call(script, *given[script], "absent", "--wandb", "online")
    assert result.status == 2 and "absent" not in result.err
    assert len(result.err.splitlines()) == 1 and said in result.err
    assert "set WANDB_API_KEY, run `wandb login`, or pass --wandb offline" in result.err
    assert server.operations == []


def test_only_the_first_of_several_processes_asks_for_a_key(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert tracking.from_flags(flags("--wandb", "online")).mode == "online"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(files.BadInput, match="no API key"):
        tracking.from_flags(flags("--wandb", "online"))


# Sweeps.


def test_a_sweep_agent_calls_train_with_flags_it_has():
    """The agent's own code turns sweep.yaml into a command; every parameter must be a flag of train.py."""
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with wandb")
    if not (ROOT / "train.py").exists():
        pytest.skip("there is no train.py here to ask for its flags")
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    assert (sweep["program"], sweep["metric"]) == ("train.py", {"name": "val_iou", "goal": "maximize"})
    parameters = sweep["parameters"]
    assert {"lr", "batch-size", "steps", "decoder"} <= set(parameters)
    values = {name: {"value": spec.get("value", spec.get("values", [spec.get("min")])[0])} for name, spec in parameters.items()}
    called = create_sweep_command_args({"args": values})["args"]
    assert f"--batch-size={values['batch-size']['value']}" in called
    flags = set(call("train", "--help").out.replace(",", " ").split())
    assert {argument.partition("=")[0] for argument in called} <= flags, flags


STAND_IN = """
import argparse, tracking
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
parser.add_argument("--batch-size", type=int)
tracking.add_tracking_flags(parser)
args = parser.parse_args()
with tracking.start(tracking.from_flags(args), "train", vars(args)) as tracker:
    tracker.log(0, {"val_iou": args.lr * args.batch_size})
"""


def test_a_sweep_runs_online_with_the_agents_flags(tmp_path, server):
    """The real `wandb sweep` and `wandb agent` drive a script that takes flags and logs as train.py does."""
    if not (Path(sys.executable).parent / "python").exists():
        pytest.skip("the agent runs `python`, which is not beside this interpreter")
    (tmp_path / "train.py").write_text(STAND_IN)
    server.planned = [{"lr": 0.25, "batch-size": 2}]
    wandb_command("sweep", "--project", "davis", ROOT / "sweep.yaml")
    printed = wandb_command("agent", "--count", "1", f"{ENTITY}/davis/sweep0")
    assert "planned0" in server.runs, printed
    run = server.runs["planned0"]
    assert (run["sweep"], run["exit"], run["history"][0]["val_iou"]) == ("sweep0", 0, 0.5), printed
    assert run["config"]["lr"] == 0.25 and run["config"]["batch_size"] == 2
    assert not any(b"add_tracking_flags" in data for data in server.files.values())  # the code stays here
