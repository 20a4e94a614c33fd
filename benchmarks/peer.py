"""Time this project's scripts beside the contest notebook's pipeline, in turns, on the CPU.

    python benchmarks/peer.py --data DAVIS --weights ALEXNET --turns 3

Prints a Markdown table: medians over the turns (lowest to highest), without starting and imports.
"""
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vos import cli
from vos.inputs import BadInput

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = "benchmarks/notebook.py --data {data}"
SCRIPTS = (  # the README's
    "featurize.py --data {data} --split train --featurizer alexnet --device cpu",
    "featurize.py --data {data} --split val --featurizer alexnet --device cpu",
    "train.py --features features/alexnet-train --no-pictures --log-every 1000 --device cpu",
    "evaluate.py --model runs/simple --features features/alexnet-val --no-pictures --device cpu",
)
ROWS = ("featurize, s", "101 steps, s", "predict, write, score, s", "peak memory, GB")


def run(command: str, folder: str, data: Path, weights: str | None) -> tuple[str, float]:
    """Run a script in `folder`; return what it prints, and its peak memory in GB. BadInput."""
    script, *flags = (part.format(data=data) for part in command.split())
    flags += ["--weights", weights] if weights and "--data" in flags else []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, ROOT / script, *flags], cwd=folder,
                                   env={**os.environ, "WANDB_MODE": "disabled"}, stdout=said,
                                   stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        said.seek(0)
        text = said.read()
    if status:
        raise BadInput(f"{script}: status {os.waitstatus_to_exitcode(status)} of {text[-1000:]}")
    return text, peak_memory(usage)


def peak_memory(usage) -> float:
    """Return the peak memory of a process in GB, of what `resource` says of it."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def take_turn(data: Path, weights: str | None) -> tuple[list[float], list[float]]:
    """Return ROWS and mean IoU of the scripts, by the seconds they print, and of the notebook."""
    with tempfile.TemporaryDirectory() as folder:
        done = [run(script, folder, data, weights) for script in SCRIPTS]
        seconds = [float(re.search(r"seconds: [^\d\n]*([\d.]+)", said)[1]) for said, _ in done]
        scores = json.loads(Path(folder, "results/simple/scores.json").read_text())
        said, peak = run(NOTEBOOK, folder, data, weights)
    told = json.loads(said.splitlines()[-1])
    ours = [sum(seconds[:2]), *seconds[2:], max(peak for _, peak in done), scores["mean_iou"]]
    return ours, [*told["seconds"], peak, told["mean_iou"]]


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
    machine = describe_machine()  # its load before it is busy
    turns = cli.progress(range(args.turns), "turns")
    values = np.array([take_turn(args.data.resolve(), args.weights) for _ in turns])
    print(f"{machine}\n\n| median of {args.turns} (range) | notebook | here | times |\n"
          "|---|--:|--:|--:|")
    for what, (ours, theirs) in zip(ROWS, values.T):
        cells = [f"{np.median(x):.3g} ({min(x):.3g} to {max(x):.3g})"
                 for x in (theirs, ours, theirs / ours)]
        print(f"| {what} | {' | '.join(cells)} |")
    print(f"\nmean IoU: notebook {values[0, 1, -1]:.4f}, here {values[0, 0, -1]:.4f}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
