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
from vos import featurizers

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


def test_the_peer_is_timed_beside_the_scripts(inputs, tmp_path):
    result = ok(bench("peer", *inputs, "--turns", 1, cwd=tmp_path))
    rows = rows_of(result.out)
    assert list(rows) == ["featurize, s", "101 steps, s", "predict, write, score, s",
                          "peak memory, GB"]
    for name, (theirs, ours, ratio) in rows.items():
        assert theirs[0] > 0 and ratio[0] == pytest.approx(theirs[0] / ours[0], rel=0.02), name
    theirs, ours = map(float, re.findall(r"\d\.\d{4}", result.out.splitlines()[-1]))
    assert theirs == pytest.approx(ours, abs=0.02)  # the features of ours may be in bfloat16
    assert not list(tmp_path.iterdir())


def test_what_the_scripts_refuse_is_said_in_a_line(inputs, tmp_path):
    result = bench("peer", *inputs, "--weights", tmp_path / "none.pth", cwd=tmp_path)
    assert result.status == 2 and not result.out
    assert re.fullmatch(r"peer\.py: .*featurize\.py: .*none.pth: no such.*\n", result.err)


def test_speed_prints_a_figure_for_everything(tmp_path):
    result = ok(bench("speed", "--device", "cpu", "--size", "160x160", cwd=tmp_path))
    rows = rows_of(result.out)
    whats = ["frames of alexnet", "frames of efficientnet_lite0"]
    for name in ("simple", "linear", "fpn", "temporal"):
        whats += [f"steps of {name}", f"frames predicted and scored by {name}"]
    assert list(rows) == [*whats, "steps of the notebook"]
    for name, (figure, moved, computed, memory) in rows.items():
        assert figure[0] > 0 and 0 <= moved[0] < 100 and 0 <= computed[0] < 100, name
        assert 0.1 < memory[0] < 100, name
    assert rows["steps of simple"][1][0] > 0
    assert bench("speed", "--device", "none", cwd=tmp_path).status == 2


@pytest.mark.skipif(not (DAVIS.is_dir() and WEIGHTS.is_file() and REFERENCE.is_dir()),
                    reason=f"the reference clips, weights and results are not in {DAVIS.parent}")
def test_the_losses_are_the_notebooks(features):  # noqa: F811
    """On features kept from run to run, in 16 of its 101 steps."""
    told = json.loads((REFERENCE / "notebook-val.json").read_text())
    kept, packed = (torch.from_numpy(np.load(features["train"] / f"{name}.npy"))
                    for name in ("features", "masks"))
    torch.manual_seed(0)
    decoder = notebook.make_decoder(256, (480, 854))
    masks = data.unpack(packed, 854)[:, None].float()
    losses = notebook.train(decoder, kept, masks, steps=16)
    np.testing.assert_allclose(losses, told["losses"][:16], rtol=1e-3)
