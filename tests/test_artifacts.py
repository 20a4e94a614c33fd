"""Artifacts from a local server with the real client: verified, cached, used without network."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from wandb_server import ENTITY

from vos import tracking
from vos.inputs import BadInput

wandb = pytest.importorskip("wandb", reason="needs the wandb client: pip install wandb")
pytestmark = pytest.mark.usefixtures("own_world")
LATEST = f"wandb:{ENTITY}/davis/linear:latest"
MODEL = {"final_model": b"weights", "model-00000000.pt": b"w"}


def fetch_model(version="latest", mode="disabled"):
    """Fetch linear and return the bytes of its model."""
    folder, _ = tracking.fetch(f"wandb:{ENTITY}/davis/linear:{version}", mode)
    return (folder / "model.pt").read_bytes()


def test_a_version_fetched_once_is_used_without_the_network(server):
    server.publish("linear", "trained-model", {"final_model": b"first"})
    assert fetch_model() == b"first"
    server.publish("linear", "trained-model", {"final_model": b"second"})
    assert fetch_model() == b"second"  # an alias is looked up, though it was fetched before

    asked = len(server.operations)
    for version in ("v9", "latest"):
        with pytest.raises(BadInput, match=r"not in the cache.*--wandb offline asks no server"):
            fetch_model(version, "offline")
    assert fetch_model("v0") == fetch_model("v0", "offline") == b"first"
    assert len(server.operations) == asked  # nobody was asked


def test_short_names_take_the_environment_and_the_keys_entity(server, monkeypatch):
    server.publish("linear", "trained-model", MODEL)
    server.publish("other", "trained-model", MODEL, project="elsewhere")
    found = tracking.fetch("wandb:linear:latest", "disabled")
    assert found[1] == f"{ENTITY}/davis/linear:v0"
    assert tracking.fetch("wandb:davis/linear:latest", "disabled") == found
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    assert tracking.fetch("wandb:other:v0", "disabled")[1] == f"{ENTITY}/elsewhere/other:v0"


@pytest.mark.parametrize("source", ["wandb:linear", "wandb:a/b/c/d:v0", "wandb:../b/c:v0"])
def test_malformed_names(source):
    with pytest.raises(BadInput, match=r"expected wandb:<entity>/<project>/<name>:<alias or"):
        tracking.fetch(source, "disabled")


def test_what_is_not_there_or_cannot_be_kept(server, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=r"linear:latest: not in the cache .* not found in"):
        tracking.fetch(LATEST, "disabled")
    server.publish("linear", "trained-model", MODEL)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(BadInput, match=r"\(WANDB_CACHE_DIR\)"):
        tracking.fetch(LATEST, "disabled")


def test_a_tampered_download_is_refused(server):
    artifact = server.publish("linear", "trained-model", MODEL)
    server.files[f"blob/{artifact['id']}/final_model"] = b"changed"  # the same size
    with pytest.raises(BadInput, match=r"not in the cache .*igest mismatch.*final_model"):
        fetch_model()
    assert list(tracking.cached(f"{ENTITY}/davis/linear").iterdir()) == []  # nor half of it kept


@pytest.mark.parametrize("path", ["../evil", "..\\evil", "C:\\evil"])
def test_entries_that_leave_the_folder_are_refused(server, tmp_path, path):
    server.publish("linear", "trained-model", {path: b"x"})
    with pytest.raises(BadInput, match=r"tester/davis/linear:v0: .*is no path in its folder"):
        tracking.fetch(LATEST, "disabled")
    assert list(tmp_path.rglob("*evil*")) == []


def test_references_to_files_elsewhere_are_refused(server):
    key = f"manifest/{server.publish('linear', 'dataset', {'data': b'x'})['id']}"
    manifest = json.loads(server.files[key])
    manifest["contents"]["data"]["ref"] = "file:///etc/passwd"
    server.files[key] = json.dumps(manifest).encode()
    with pytest.raises(BadInput, match=r"'file:///etc/passwd' is no path in its folder"):
        tracking.fetch(LATEST, "disabled")


def test_processes_may_want_an_artifact_at_once(server):
    server.publish("linear", "dataset", {"paths.json": b"{}", "JPEGImages/bear/0.jpg": b"jpeg"})
    script = f"from vos import tracking; print(tracking.fetch({LATEST!r}, 'disabled')[0])"
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True,
             "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    both = [subprocess.Popen([sys.executable, "-c", script], **given) for _ in range(2)]
    printed, said = zip(*(process.communicate(timeout=60) for process in both))
    assert printed[0] == printed[1] and printed[0].endswith("v0\n"), said
    assert Path(printed[0].strip(), "JPEGImages", "bear", "0.jpg").read_bytes() == b"jpeg"
