"""Tracking with the real wandb client: offline runs read back from their file, online ones against a local server."""
import argparse
import base64
import io
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

import artifacts
import files
import tracking

wandb = pytest.importorskip("wandb", reason="needs the wandb client: pip install wandb")
from tests.wandb_server import ENTITY, KEY, WandbServer  # noqa: E402

ROOT = Path(tracking.__file__).parent


@pytest.fixture(autouse=True)
def own_world(tmp_path, monkeypatch):
    """Everything the client keeps goes under tmp_path, nothing of the user's is read, and no other host is tried."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("DIR", "CACHE_DIR", "DATA_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
        folder = tmp_path / "wandb-home" / name.lower()
        folder.mkdir(parents=True)
        monkeypatch.setenv(f"WANDB_{name}", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")  # refuses, unless a test has a server
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # the client reads the environment once, in a process of its own
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch):
    """A running server, which the client finds in the environment with its key."""
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


def account(mode, **other):
    return tracking.Account(mode, **{"project": "davis", "entity": None, "name": None, **other})


def flags(*argv):
    parser = argparse.ArgumentParser()
    tracking.add_tracking_flags(parser)
    return parser.parse_args(argv)


def records(folder):
    """Return the records of a finished run's .wandb file, which the client closes soon after `finish` returns."""
    for _ in range(100):
        found = read_records(next(Path(folder).glob("*.wandb")).read_bytes())
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{folder}: no exit record after ten seconds")


def read_records(data):
    """Return the records in a .wandb file's bytes: seven of header, then LevelDB's log format, one protobuf message each."""
    from wandb.proto import wandb_internal_pb2
    found, whole, at = [], b"", 7
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the tail of a block is padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at:at + 7])
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the only or the last piece of a record
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


def history(folder):
    """Return the logged rows of an offline run, those of a step merged."""
    rows = {}
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.setdefault(row["_step"], {}).update(row)
    return rows


def offline_artifacts(folder):
    """Return {name: artifact record} of an offline run."""
    return {record.artifact.name: record.artifact for record in records(folder) if record.WhichOneof("record_type") == "artifact"}


def entries(artifact):
    """Return {entry path: bytes} of an offline run's artifact record."""
    return {entry.path: Path(entry.local_path).read_bytes() for entry in artifact.manifest.contents}


def feature_folder(folder, seed=0):
    """Write what stands for a feature folder: tracking copies files and does not look inside."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    np.save(folder / "features.npy", random.standard_normal((2, 3, 4, 5)).astype("float16"))
    np.save(folder / "masks.npy", random.integers(0, 256, (2, 8, 2)).astype("uint8"))
    files.write_json(folder / "paths.json", {"raw": {"0": "bear\\0.jpg", "1": "bear\\1.jpg"}})
    files.write_json(folder / "meta.json", {"seed": seed})
    return folder


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


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def sync(*arguments):
    """Run `wandb sync` as a user would."""
    wandb.teardown()
    wandb_command("sync", *arguments)


def wandb_command(*arguments):
    """Run the client's command line to its end, with its own log under WANDB_DIR too; return what it printed."""
    own = Path(os.environ["WANDB_DIR"]).parent
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(own), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "wandb", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


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


# Fetching.


def test_a_path_is_not_fetched(tmp_path):
    assert artifacts.fetch(str(tmp_path), account("disabled")) == (tmp_path, None)


def test_features_go_up_and_come_down_the_same(tmp_path, server):
    features = feature_folder(tmp_path / "features")
    with tracking.start(account("online"), "featurize", {}) as tracker:
        tracking.log_features(tracker, features, "alexnet", "train", {})
    runs = len(server.runs)
    folder, used = artifacts.fetch(f"wandb:{ENTITY}/davis/alexnet-featurized-train:latest", account("disabled"))
    assert used == f"{ENTITY}/davis/alexnet-featurized-train:v0"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {path.name: path.read_bytes() for path in features.iterdir()}
    assert len(server.runs) == runs  # fetching starts no run


def test_the_cache_is_used_without_the_network(server, monkeypatch, capfd):
    server.publish("linear", "trained-model", {"final_model": b"first"})
    latest, v0 = f"wandb:{ENTITY}/davis/linear:latest", f"wandb:{ENTITY}/davis/linear:v0"
    folder, _ = artifacts.fetch(latest, account("disabled"))
    assert (folder / "model.pt").read_bytes() == b"first"

    server.publish("linear", "trained-model", {"final_model": b"second"})
    newer, used = artifacts.fetch(latest, account("disabled"))
    assert (newer / "model.pt").read_bytes() == b"second" and used.endswith(":v1") and folder.is_dir()

    asked = len(server.operations)
    assert artifacts.fetch(v0, account("disabled"))[0] == folder
    assert artifacts.fetch(v0, account("offline"))[0] == folder
    assert len(server.operations) == asked  # a version is for ever: nobody was asked
    assert artifacts.fetch(latest, account("offline")) == (newer, used)
    assert f"using v1 of {ENTITY}/davis/linear:latest from the cache" in capfd.readouterr().err

    server.stop()
    monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)  # seconds; nobody will answer
    assert artifacts.fetch(latest, account("disabled")) == (newer, used)
    assert "using v1" in capfd.readouterr().err
    with pytest.raises(files.BadInput, match=r"not in the cache .*not to be had"):
        artifacts.fetch(f"wandb:{ENTITY}/davis/other:latest", account("disabled"))


def test_offline_does_not_ask_for_what_is_not_in_the_cache(server):
    with pytest.raises(files.BadInput, match=r"not in the cache.*--wandb disabled fetches"):
        artifacts.fetch(f"wandb:{ENTITY}/davis/linear:v0", account("offline"))
    assert server.operations == []


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_fetching_without_logging_is_not_held_up_by_the_environment(server, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    server.publish("linear", "trained-model", {"final_model": b"x"})
    folder, _ = artifacts.fetch(f"wandb:{ENTITY}/davis/linear:latest", tracking.from_flags(flags("--wandb", "disabled")))
    assert (folder / "model.pt").read_bytes() == b"x" and server.runs == {}


def test_short_names_use_the_account(server, tmp_path):
    server.publish("linear", "trained-model", {"final_model": b"x"})
    folder, used = artifacts.fetch("wandb:linear:latest", account("disabled"))
    assert used == f"{ENTITY}/davis/linear:v0"
    assert artifacts.fetch("wandb:davis/linear:v0", account("offline")) == (folder, used)  # the entity is remembered
    server.publish("other", "trained-model", {"final_model": b"x"}, project="elsewhere")
    assert artifacts.fetch("wandb:other:latest", account("disabled", project="elsewhere"))[1] == f"{ENTITY}/elsewhere/other:v0"


@pytest.mark.parametrize("source", ["wandb:", "wandb:linear", "wandb:a/b/c/d:v0", "wandb:a/b/c", "wandb:../b/c:v0",
                                    "wandb:a/b/c:..", "wandb:a/b/c:v0/x"])
def test_malformed_references(source):
    with pytest.raises(files.BadInput, match=r"expected wandb:<entity>/<project>/<name>:<alias or version>"):
        artifacts.fetch(source, account("disabled"))


def test_an_artifact_that_is_not_there(server):
    with pytest.raises(files.BadInput, match=r"there is no such artifact .*nothing:latest"):
        artifacts.fetch(f"wandb:{ENTITY}/davis/nothing:latest", account("disabled"))


def test_a_tampered_download_is_refused(server):
    artifact = server.publish("linear", "trained-model", {"final_model": b"weights", "model-00000000.pt": b"w"})
    key = f"blob/{artifact['id']}/final_model"
    server.files[key] = b"changed"  # the same size, so that only the digest can tell
    with pytest.raises(files.BadInput, match=r"final_model is not what the manifest says"):
        artifacts.fetch(f"wandb:{ENTITY}/davis/linear:latest", account("disabled"))
    home = artifacts.cache_folder() / ENTITY / "davis" / "linear"
    assert list(home.iterdir()) == []  # nothing half-fetched is left
    server.files[key] = b"weights"
    folder, _ = artifacts.fetch(f"wandb:{ENTITY}/davis/linear:latest", account("disabled"))
    assert (folder / "model.pt").read_bytes() == b"weights"


@pytest.mark.parametrize("path", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:\\evil"])
def test_entries_that_leave_the_folder_are_refused(server, path):
    server.publish("linear", "trained-model", {path: b"x"})
    with pytest.raises(files.BadInput, match=r"has an entry .*expected paths inside the artifact"):
        artifacts.fetch(f"wandb:{ENTITY}/davis/linear:latest", account("disabled"))
    assert list(artifacts.cache_folder().rglob("*evil*")) == []


def test_references_to_files_elsewhere_are_refused(server):
    artifact = server.publish("linear", "dataset", {"data": b"x"})
    key = f"manifest/{artifact['id']}"
    manifest = json.loads(server.files[key])
    manifest["contents"]["data"]["ref"] = "file:///etc/passwd"
    server.files[key] = json.dumps(manifest).encode()
    with pytest.raises(files.BadInput, match=r"refers to file:///etc/passwd, expected a stored file"):
        artifacts.fetch(f"wandb:{ENTITY}/davis/linear:latest", account("disabled"))


def test_entries_written_on_windows_become_folders(server):
    contents = {"paths.json": b"{}", "JPEGImages\\480p\\bear\\00000.jpg": b"jpeg"}
    server.publish("davis2016-val", "dataset", contents)
    folder, _ = artifacts.fetch(f"wandb:{ENTITY}/davis/davis2016-val:latest", account("disabled"))
    assert (folder / "JPEGImages" / "480p" / "bear" / "00000.jpg").read_bytes() == b"jpeg"


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


def test_no_key_and_nobody_to_ask(server, monkeypatch):
    """Run with a closed standard input, as a job scheduler would: one line, and no prompt to wait at."""
    monkeypatch.delenv("WANDB_API_KEY")
    script = """
import sys, cli, tracking
sys.exit(cli.run(lambda: tracking.start(tracking.Account("online", "davis", None, None), "train", {}) and 0))
"""
    done = subprocess.run([sys.executable, "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "set WANDB_API_KEY, run `wandb login`, or pass --wandb offline" in done.stderr
    assert server.operations == []


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
    done = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True, timeout=60)
    flags = set(done.stdout.replace(",", " ").split())
    assert {argument.partition("=")[0] for argument in called} <= flags, done.stdout + done.stderr


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
