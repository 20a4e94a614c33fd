"""Runs with the real wandb client: offline ones synced to, online ones logged to a local server."""
import io
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from wandb_server import KEY, WandbServer
from wandb_world import sync

from vos import cli, tracking
from vos.inputs import BadInput

wandb = pytest.importorskip("wandb", reason="needs the wandb client: pip install wandb")
pytestmark = pytest.mark.usefixtures("own_world")
MASK, LR = np.eye(6, 8) > 0, np.float32(0.5)


def log_some(run, home):
    """Log numbers, a picture, a model and a score."""
    checkpoints = [home / "model-00000010.pt"]
    (home / "model.pt").write_bytes(b"final")
    checkpoints[0].write_bytes(b"tenth")
    for step in range(3):
        run.log({"loss": 1.0 / (step + 1), "lr": LR}, step=step)
    run.image(2, np.zeros((6, 8, 3), np.uint8), ~MASK, MASK, caption="bear")
    files = {path.name: path for path in (home / "model.pt", *checkpoints)}
    run.artifact("linear", "trained-model", files, {"val_iou": 0.5}, ["best"])
    tracking.log_result(run, home, {}, "linear-result", "val", None, [], [], {"mean_iou": 0.25})


def check_run(server):
    """Check that the server's only run holds what `log_some` logged."""
    (name, run), = server.runs.items()
    assert (run["project"], run["job_type"], run["exit"]) == ("davis", "train", 0)
    assert run["config"]["lr"] == 5e-4 and run["config"]["out"] == str(Path.cwd())
    assert run["config"]["used"] == ["wandb/davis/davis2016-train:v3"]
    assert [row["loss"] for row in run["history"]] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert run["history"][0]["lr"] == 0.5
    assert run["summary"]["mean_iou"] == run["summary"]["segmentation_metric"] == 0.25
    picture = run["history"][2]["prediction"]
    for layer, mask in (("predictions", ~MASK), ("ground_truth", MASK)):
        drawn = iio.imread(server.files[f"run/{name}/{picture['masks'][layer]['path']}"])
        assert (drawn == mask).all()
    model = {"final_model": b"final", "model-00000010.pt": b"tenth"}
    assert server.contents(server.artifact("linear:best")) == model


def advice(printed):
    """Return the arguments of the `wandb sync` that a run printed."""
    return printed.split("what is missing there: wandb sync ")[1].splitlines()[0].split()


def test_the_mode_is_the_flag_then_the_environment(monkeypatch):
    def found(*flags: str) -> str:
        parser = cli.Parser(None)
        cli.add_run_flags(parser)
        return parser.parse_args(flags).wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert found() == "disabled"
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert found() == "online"
    for there, mode in (("DISABLED", "disabled"), ("offline", "offline"), ("", "online")):
        monkeypatch.setenv("WANDB_MODE", there)
        assert found() == mode
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    assert found("--wandb", "offline") == "offline"
    with pytest.raises(BadInput, match=r"--wandb: expected disabled, offline or .* sometimes"):
        found()


def test_without_wandb_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where the package is not installed
    with pytest.raises(BadInput, match=r"^--wandb offline: cannot be used .*pip install wandb"):
        tracking.start("offline", "train", {}, [])
    with pytest.raises(BadInput, match=r"^wandb:e/p/n:latest: not in the cache .*import of wandb"):
        tracking.fetch("wandb:e/p/n:latest", "disabled")


@pytest.mark.parametrize("key, said", [("", "No API key"), ("short", "must have 40")])
def test_no_key_and_nobody_to_ask(server, monkeypatch, key, said):
    """With a closed standard input, as under a job scheduler: one line, and no prompt."""
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(BadInput, match=f"^--wandb online: cannot be used .*{said}") as caught:
        tracking.start("online", "train", {}, [])
    assert "\n" not in str(caught.value) and "set WANDB_API_KEY" in str(caught.value)
    assert server.operations == []


def test_a_password_in_the_servers_address_is_not_printed(monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://me:secret@127.0.0.1:1")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)
    with pytest.raises(BadInput) as caught:
        tracking.fetch("wandb:e/p/n:latest", "disabled")
    with tracking.start("offline", "train", {}, []) as run:
        run.log({"loss": 1.0}, step=0)
    assert "secret" not in str(caught.value) + "".join(capfd.readouterr())
    assert "127.0.0.1_1" in str(caught.value)


def test_an_offline_run_is_uploaded_by_the_advice_it_gives(tmp_path, server, capfd):
    config = {"lr": 5e-4, "out": tmp_path}
    with tracking.start("offline", "train", config, ["wandb/davis/davis2016-train:v3"]) as run:
        log_some(run, tmp_path)
    printed = capfd.readouterr().err
    assert "could not be logged" not in printed and server.operations == []

    sync(*advice(printed))
    assert server.unknown == []
    check_run(server)


def test_a_failed_script_is_a_failed_run(server, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")  # the flag goes first
    with pytest.raises(RuntimeError), tracking.start("online", "train", {}, []) as run:
        run.artifact("linear", "trained-model", {"model.pt": Path(__file__)}, {})
        raise RuntimeError("the script's own")
    assert server.runs.popitem()[1]["exit"] == 1
    assert server.artifact("linear:latest")["aliases"] == ["latest"]


def test_a_server_that_dies_in_mid_run(tmp_path, server, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "2")
    monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)
    (tmp_path / "model.pt").write_bytes(b"final")
    with tracking.start("online", "train", {}, []) as run:
        for step in range(4):
            run.log({"loss": 1.0}, step=step)
            server.stop()
        for name in ("linear", "simple"):
            run.artifact(name, "trained-model", {"model.pt": tmp_path / "model.pt"}, {})
    printed = capfd.readouterr().err
    told = [printed.count(f"the artifact {name} could not") for name in ("linear", "simple")]
    assert told == [1, 1]
    assert "give the command again with --wandb offline" in printed

    with WandbServer() as another:  # the network is back
        monkeypatch.setenv("WANDB_BASE_URL", another.url)
        sync(*advice(printed))
        synced, = another.runs.values()
        assert [row["_step"] for row in synced["history"]] == [0, 1, 2, 3]


def test_a_server_that_does_not_answer_stops_before_any_work(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    with pytest.raises(BadInput, match=r"^--wandb online: cannot be used .+") as caught:
        tracking.start("online", "train", {}, [])
    assert "pass --wandb offline" in str(caught.value) and KEY not in str(caught.value)


def test_a_refused_key_stops_before_any_work(server):
    server.refusing = True
    with pytest.raises(BadInput, match=r"--wandb online: cannot be used .*set WANDB_API_KEY"):
        tracking.start("online", "train", {}, [])
