"""Measure this project beside the contest notebook's pipeline: seconds and memory of each stage.

    python benchmarks/peer.py --peer NOTEBOOK.py --data DAVIS --weights FILE

NOTEBOOK.py is a script of that pipeline which prints one JSON object of its seconds. Both run as
processes, in turns, so that a machine whose speed wanders is the same to both. Prints a Markdown
table of medians and ranges; its last line is one JSON object.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command) -> tuple[str, float]:
    """Run a command; return what it printed and its peak memory in GB. Raises RuntimeError."""
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE,
                               text=True)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(map(str, command))}: ended with status {status >> 8}")
    return printed, usage.ru_maxrss / 1e6


def run_peer(args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of each stage of the notebook's pipeline, and its peak memory in GB."""
    printed, memory = run(args.peer, "--data", args.data, "--weights", args.weights)
    seconds = json.loads(printed)["seconds"]
    return {"featurize": seconds["featurize_train"] + seconds["featurize_val"],
            "train": seconds["train"], "memory": memory,
            "predict, write, score": seconds["predict_and_write"] + seconds["score"]}


def run_ours(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return the same of this project's scripts."""
    features = {split: folder / split for split in ("train", "val")}
    commands: list[tuple] = []
    for split, place in features.items():
        commands.append(("featurize", ROOT / "featurize.py", "--data", args.data, "--split", split,
                         "--featurizer", "alexnet", "--weights", args.weights, "--compute",
                         args.compute, "--out", place))
    commands.append(("train", ROOT / "train.py", "--features", features["train"], "--log-every",
                     1000, "--no-pictures", "--out", folder / "run"))
    commands.append(("predict, write, score", ROOT / "evaluate.py", "--model", folder / "run",
                     "--features", features["val"], "--no-pictures", "--out", folder / "results"))
    spent: dict[str, float] = {"memory": 0.0}
    for stage, *command in commands:
        printed, memory = run(*command)
        seconds = float(re.search(r"seconds: [^\d\n]*([\d.]+)", printed)[1])
        spent[stage] = spent.get(stage, 0.0) + seconds
        spent["memory"] = max(spent["memory"], memory)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="the notebook's pipeline")
    parser.add_argument("--data", type=Path, required=True, help="DAVIS root: train and val")
    parser.add_argument("--weights", type=Path, required=True, help="AlexNet's weights")
    parser.add_argument("--compute", default="auto", help="of featurize.py (default: auto)")
    parser.add_argument("--turns", type=int, default=3, help="runs of each (default: 3)")
    args = parser.parse_args()

    peer, ours = [], []
    for _ in range(args.turns):
        peer.append(run_peer(args))
        with tempfile.TemporaryDirectory() as folder:
            ours.append(run_ours(args, Path(folder)))

    print("| stage | notebook | here | ratio |\n|---|--:|--:|--:|")
    table = {}
    for stage in ("featurize", "train", "predict, write, score", "memory"):
        columns = [[turn[stage] for turn in turns] for turns in (peer, ours)]
        ratios = [theirs / own for theirs, own in zip(*columns)]
        table[stage] = {"notebook": columns[0], "here": columns[1], "ratio": ratios}
        cells = [f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
                 for values in (*columns, ratios)]
        print(f"| {stage}, {'GB' if stage == 'memory' else 's'} | {' | '.join(cells)} |")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
