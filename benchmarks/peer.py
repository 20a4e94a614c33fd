"""Time this project's four scripts beside the contest notebook's pipeline, in turns, on the CPU.

    python benchmarks/peer.py --data DAVIS --weights ALEXNET --turns 3

A turn runs benchmarks/notebook.py, then featurize, train (`simple`), evaluate and package, each as
a process of its own. Prints a Markdown table: medians over the turns (lowest to highest).
"""
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import notebook
from vos import cli
from vos.inputs import BadInput

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {  # the README's, run in a folder of their own; the first two get --data and --weights
    "featurize.py --split train --featurizer alexnet --device cpu": "featurize",
    "featurize.py --split val --featurizer alexnet --device cpu": "featurize",
    "train.py --features features/alexnet-train --out runs/simple --log-every 1000 "
    "--no-pictures --device cpu": "train",
    "evaluate.py --model runs/simple --features features/alexnet-val --no-pictures "
    "--device cpu": "predict, write, score",
    "package.py --results results/simple": "package",
}


def run(script: str, *flags: str, folder: str) -> tuple[str, float, float]:
    """Run a script in `folder`; return what it printed, its wall seconds, its peak memory in GB."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / script), *flags], cwd=folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, "WANDB_MODE": "disabled"})
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise BadInput(f"{script}: ended with status {process.returncode} ({printed[-300:]})")
    return printed, time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9


def run_notebook(inputs: list[str], folder: str) -> dict[str, float]:
    """Return the seconds of the notebook's phases, its memory and mean IoU."""
    printed, seconds, memory = run("benchmarks/notebook.py", *inputs, folder=folder)
    told = json.loads(printed.splitlines()[-1])
    seconds -= told["seconds"].pop("check")  # the notebook checks nothing
    return told["seconds"] | {"everything": seconds, "memory": memory, "mean IoU": told["mean_iou"]}


def run_ours(inputs: list[str], folder: str) -> dict[str, float]:
    """Return the same of the four scripts: seconds as they print them, but for package.py's."""
    spent = dict.fromkeys((*COMMANDS.values(), "everything", "memory"), 0.0)
    for command, phase in COMMANDS.items():
        flags = inputs if phase == "featurize" else []
        printed, seconds, memory = run(*command.split(), *flags, folder=folder)
        told = re.search(r"seconds: [^\d\n]*([\d.]+)", printed)
        spent[phase] += float(told[1]) if told else seconds
        spent["everything"] += seconds
        spent["memory"] = max(spent["memory"], memory)
    scores = json.loads(Path(folder, "results/simple/scores.json").read_text())
    return spent | {"mean IoU": scores["mean_iou"]}


def describe_machine() -> str:
    """Return the command and the machine that runs it, a line of Markdown."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    command = shlex.join(["python", *sys.argv])
    return (f"`{command}`: {(names or [platform.processor()])[0]}, {os.cpu_count()} cores, load "
            f"{os.getloadavg()[0]:.1f}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="DAVIS root: splits train and val")
    parser.add_argument("--weights", help="AlexNet's: a state dict, or 'random' (torchvision's)")
    parser.add_argument("--turns", type=cli.count(1000), default=3, help="runs of each (3)")
    args = parser.parse_args()
    (training, validation), _ = notebook.open_inputs(args.data, args.weights)
    inputs = ["--data", str(args.data.resolve())]
    if args.weights:
        inputs += ["--weights", os.path.abspath(args.weights)]
    machine = describe_machine()  # with its load before it is busy

    theirs, ours = [], []
    for _ in cli.progress(range(args.turns), "turns"):
        with tempfile.TemporaryDirectory() as folder:
            theirs.append(run_notebook(inputs, folder))
            ours.append(run_ours(inputs, folder))

    print(f"{machine}\n\n{len(training.frames)} frames to train on, {len(validation.frames)} to "
          f"score; medians (lowest to highest) of {args.turns} turns\n\n"
          "| seconds; GB | notebook | here | times less |\n|---|--:|--:|--:|")
    for phase in ours[0]:
        columns = [[turn[phase] for turn in turns if phase in turn] for turns in (theirs, ours)]
        columns.append([] if phase == "mean IoU" else [a / b for a, b in zip(*columns)])
        cells = [f"{statistics.median(c):.3g} ({min(c):.3g} to {max(c):.3g})" if c else ""
                 for c in columns]
        print(f"| {phase} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(cli.run(main))
