"""Time this project's scripts beside the contest notebook's pipeline, in turns, on the CPU.

    python benchmarks/peer.py --data DAVIS --weights ALEXNET --turns 3

Prints a Markdown table: medians over the turns (lowest to highest), without starting and imports.
"""
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vos import cli
from vos.inputs import BadInput

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (  # the README's; the first two get --data and --weights
    "featurize.py --featurizer alexnet --split train",
    "featurize.py --featurizer alexnet --split val",
    "train.py --features features/alexnet-train --no-pictures --log-every 1000",
    "evaluate.py --model runs/simple --features features/alexnet-val --no-pictures",
)
ROWS = ("featurize, s", "101 steps, s", "predict, write, score, s", "peak memory, GB")


def run_notebook(root: Path, weights: str | None) -> list[float]:
    """Run notebook.py as a process; return ROWS and mean IoU."""
    command = [sys.executable, str(ROOT / "benchmarks/notebook.py"), "--data", str(root)]
    done = subprocess.run(command + (["--weights", weights] if weights else []), text=True,
                          capture_output=True)
    if done.returncode:
        raise BadInput(f"status {done.returncode} of {done.stderr[-1000:]}")
    told = json.loads(done.stdout)
    return [*told["seconds"], told["peak_gb"], told["mean_iou"]]


def run_scripts(root: Path, weights: str | None) -> list[float]:
    """Run COMMANDS as processes; return ROWS, with seconds as they print them, and mean IoU."""
    inputs = ["--data", str(root)] + (["--weights", weights] if weights else [])
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for script, *flags in map(str.split, COMMANDS):
            flags += ["--device", "cpu", "--wandb", "disabled"]
            flags += inputs if script == "featurize.py" else []
            done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=folder, text=True,
                                  capture_output=True)
            if done.returncode:
                raise BadInput(f"status {done.returncode} of {done.stderr[-1000:]}")
            seconds.append(float(re.search(r"seconds: [^\d\n]*([\d.]+)", done.stdout)[1]))
        scores = json.loads(Path(folder, "results/simple/scores.json").read_text())
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return [sum(seconds[:2]), *seconds[2:], usage.ru_maxrss * 1024 / 1e9, scores["mean_iou"]]


def describe_machine() -> str:
    """Return the command and the machine that runs it, a line of Markdown."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return (f"`python {' '.join(sys.argv)}`: {found[1] if found else platform.machine()}, "
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, PyTorch {torch.__version__}")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="DAVIS root: splits train and val")
    parser.add_argument("--weights", type=os.path.abspath, help="AlexNet's (torchvision's)")
    parser.add_argument("--turns", type=cli.count(1000), default=3, help="runs of each (3)")
    args = parser.parse_args()
    machine, turns = describe_machine(), []  # its load before it is busy

    for _ in cli.progress(range(args.turns), "turns"):
        for pipeline in (run_scripts, run_notebook):  # the first checks its input
            with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:  # with a peak of its own
                turns.append(pool.submit(pipeline, args.data.resolve(), args.weights).result())

    print(f"{machine}\n\n| median of {args.turns} (range) | notebook | here | times |\n"
          "|---|--:|--:|--:|")
    for what, values in zip(ROWS, np.array(turns).T):
        ours, theirs = values[::2], values[1::2]
        cells = [f"{np.median(x):.3g} ({min(x):.3g} to {max(x):.3g})"
                 for x in (theirs, ours, theirs / ours)]
        print(f"| {what} | {' | '.join(cells)} |")
    print(f"\nmean IoU: notebook {turns[1][-1]:.4f}, here {turns[0][-1]:.4f}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
