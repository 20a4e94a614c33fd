"""Measure this project beside the contest notebook's pipeline: seconds and memory of each stage.

    python benchmarks/peer.py NOTEBOOK.py DAVIS ALEXNET_WEIGHTS --turns 3

NOTEBOOK.py is that pipeline, which prints its seconds as JSON. Prints a Markdown table.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile


def run(*command: str) -> tuple[str, float]:
    """Run a command; return what it printed and its peak memory in GB. Raises RuntimeError."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)}: ended with status {status >> 8}")
    return printed, usage.ru_maxrss / 1e6


def run_ours(data: str, weights: str, folder: str) -> dict[str, float]:
    """Return the seconds of each stage of this project's scripts, and their peak memory in GB."""
    alexnet = f"--featurizer alexnet --weights {weights}"
    commands = {
        "featurize": [f"featurize.py --data {data} --split {split} {alexnet} --out {folder}/{split}"
                      for split in ("train", "val")],
        "train": [f"train.py --features {folder}/train --log-every 1000 --out {folder}/run"],
        "predict, write, score": [f"evaluate.py --model {folder}/run --features {folder}/val "
                                  f"--out {folder}/results"]}
    spent = {"memory": 0.0}
    for stage, lines in commands.items():
        for line in lines:
            pictures = [] if stage == "featurize" else ["--no-pictures"]
            printed, memory = run(*line.split(), *pictures)
            seconds = re.search(r"seconds: [^\d\n]*([\d.]+)", printed)
            spent[stage] = spent.get(stage, 0.0) + float(seconds[1])
            spent["memory"] = max(spent["memory"], memory)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", help="the notebook's pipeline, a script")
    parser.add_argument("data", help="DAVIS root with the splits train and val")
    parser.add_argument("weights", help="AlexNet's weights, a state dict")
    parser.add_argument("--turns", type=int, default=3, help="runs of each (default: 3)")
    args = parser.parse_args()

    theirs, ours = [], []
    for _ in range(args.turns):
        printed, memory = run(args.peer, "--data", args.data, "--weights", args.weights)
        told = json.loads(printed)["seconds"]
        theirs.append({"featurize": told["featurize_train"] + told["featurize_val"],
                       "train": told["train"], "memory": memory,
                       "predict, write, score": told["predict_and_write"] + told["score"]})
        with tempfile.TemporaryDirectory() as folder:
            ours.append(run_ours(args.data, args.weights, folder))

    print("| stage (seconds; GB) | notebook | here | ratio |\n|---|--:|--:|--:|")
    for stage in ours[0]:
        pairs = [(their[stage], own[stage]) for their, own in zip(theirs, ours)]
        columns = [*zip(*pairs), [their / own for their, own in pairs]]
        cells = [f"{statistics.median(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in columns]
        print(f"| {stage} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
