"""benchmarks/: each command at a tiny size, and the notebook's pipeline, whose losses are known."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import QUIET, ROOT, Result, ok, write_davis
from test_reference import DAVIS, REFERENCE, WEIGHTS, features  # noqa: F401  # a fixture

import data
from benchmarks import notebook
from vos import featurizers, sources
from vos.inputs import BadInput

pytest.importorskip("resource", reason="peak memory is counted on Linux and macOS alone")


def bench(name: str, *flags, cwd) -> Result:
    """Run a script of benchmarks/ as a process of its own, in another folder."""
    done = subprocess.run([sys.executable, ROOT / f"benchmarks/{name}.py", *map(str, flags)],
                          capture_output=True, text=True, cwd=cwd, env={**os.environ, **QUIET})
    return Result(done.returncode, done.stdout, done.stderr)


def rows_of(printed: str) -> dict[str, list[list[float]]]:
    """Return the rows of the Markdown table in `printed`: {first cell: numbers of each other}."""
    lines = [line[2:-2].split(" | ") for line in printed.splitlines() if line[:2] == "| "]
    return {cells[0]: [[float(n.replace(",", "")) for n in re.findall(r"[\d.,e+]+", cell)]
                       for cell in cells[1:]] for cells in lines[1:]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A DAVIS root of frames just large enough, and random weights of AlexNet in a file."""
    folder = tmp_path_factory.mktemp("inputs")
    davis = write_davis(folder / "davis", size=(160, 192))
    network = featurizers.build_featurizer("alexnet", None, "random").network
    torch.save({f"features.{key}": value for key, value in network.state_dict().items()},
               folder / "alexnet.pth")
    return ["--data", davis, "--weights", folder / "alexnet.pth"]


def test_the_peer_is_timed_beside_the_four_scripts(inputs, tmp_path):
    result = ok(bench("peer", *inputs, "--turns", 1, cwd=tmp_path))
    rows = rows_of(result.out)
    assert list(rows) == ["featurize", "train", "predict, write, score", "package", "everything",
                          "memory", "mean IoU"]
    for name, (theirs, ours, ratio) in rows.items():
        if name == "package":
            assert not theirs and ours[0] > 0
        elif name == "mean IoU":  # the features of ours may be in bfloat16
            assert theirs[0] == pytest.approx(ours[0], abs=0.02) and not ratio
        else:
            assert ratio[0] == pytest.approx(theirs[0] / ours[0], rel=0.02) and ours[0] > 0, name
    assert "8 frames to train on, 4 to score" in result.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["notebook", "peer"])
def test_frames_too_small_for_the_notebook_are_refused(name, inputs, tmp_path):
    small = write_davis(tmp_path / "small", size=(96, 128))
    result = bench(name, *inputs, "--data", small, cwd=tmp_path)
    assert result.status == 2 and not result.out
    assert re.fullmatch(rf"{name}\.py: {small}: .*\(96, 128\).* 127 x 127 .*\n", result.err)


def test_what_is_no_input_of_the_notebook_is_refused(inputs, tmp_path):
    davis = inputs[1]
    for root, weights, wanted in [(davis, "nowhere.pth", "nowhere.pth"),
                                  (tmp_path / "none", None, "expected a DAVIS root"),
                                  (davis / "JPEGImages/480p", None, "a mask for every")]:
        with pytest.raises(BadInput, match=wanted):
            notebook.open_inputs(root, weights)


def test_speed_prints_a_figure_for_everything(tmp_path):
    result = ok(bench("speed", "--device", "cpu", "--seconds", 0.01, "--size", "160x160",
                      cwd=tmp_path))
    rows = rows_of(result.out)
    whats = ["frames featurized by alexnet", "frames featurized by efficientnet_lite0"]
    for name in ("simple", "linear", "fpn", "temporal"):
        whats += [f"steps of {name}", f"frames predicted and scored by {name}"]
    assert [row.partition(" in ")[0] for row in rows] == [*whats, "steps of the notebook"]
    for name, cells in rows.items():
        (figure,), (moved,), _, (memory,) = cells
        assert figure > 0 and 0 < moved < 1000 and memory > 0.1, name
    assert bench("speed", "--device", "none", cwd=tmp_path).status == 2


@pytest.mark.skipif(not (DAVIS.is_dir() and WEIGHTS.is_file() and REFERENCE.is_dir()),
                    reason=f"the reference clips, weights and results are not in {DAVIS.parent}")
def test_the_losses_are_the_notebooks(features):  # noqa: F811
    """On features kept from run to run, in 40 of its 101 steps, which is more than an epoch."""
    told = json.loads((REFERENCE / "notebook-val.json").read_text())
    training = sources.open_folder(data.open_features(features["train"]), DAVIS, False,
                                   torch.from_numpy(np.load(features["train"] / "masks.npy")), 1)
    kept = torch.from_numpy(np.load(features["train"] / "features.npy"))
    alexnet = featurizers.build_featurizer("alexnet", None, str(WEIGHTS))
    made = notebook.featurize(alexnet, training._replace(frames=training.frames[:2]))
    torch.testing.assert_close(made, kept[:2], rtol=1e-3, atol=1e-4)

    torch.manual_seed(0)
    decoder = notebook.make_decoder(256, (480, 854))
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-4)
    batches = torch.utils.data.DataLoader(notebook.Examples(kept, training), 32)
    losses = notebook.train(decoder, optimizer, batches, 40)
    np.testing.assert_allclose(losses, told["losses"][:40], rtol=1e-3)
