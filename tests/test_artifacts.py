"""Fetching artifacts with the real wandb client from a local server: into the cache, verified, used again without the network."""
import json
import os
import subprocess
import sys

import pytest
from wandb_server import ENTITY
from wandb_world import ROOT, account, feature_folder, flags

import artifacts
import files
import tracking

wandb = pytest.importorskip("wandb", reason="needs the wandb client: pip install wandb")
pytestmark = pytest.mark.usefixtures("own_world")


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


def test_processes_that_want_the_same_download_it_once(server):
    server.publish("linear", "trained-model", {"final_model": b"x" * 1000})
    script = f"""
import tracking, artifacts
print(artifacts.fetch("wandb:{ENTITY}/davis/linear:latest", tracking.Account("disabled", "davis", None, None))[0])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
            for _ in range(2)]
    printed, said = zip(*(process.communicate(timeout=60) for process in both))
    assert printed[0] == printed[1] and printed[0].endswith("v0\n"), said
    assert "".join(said).count("downloading") == 1


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    server.publish("linear", "trained-model", {"final_model": b"x"})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(files.BadInput, match="set WANDB_CACHE_DIR"):
        artifacts.fetch(f"wandb:{ENTITY}/davis/linear:latest", account("disabled"))
