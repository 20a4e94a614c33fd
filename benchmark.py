"""Measure what the README claims, on this machine.

    python benchmark.py scores                                        # J and F a frame, on random blobs
    python benchmark.py scores --data DAVIS --predictions RESULTS/outputs   # on real masks

Each benchmark prints a table and, as its last line, one JSON object, and writes that object with the machine,
the versions, the command and every run to benchmarks/<date>-<name>.json. Compare only numbers of one file:
what is compared is timed in turns, in one process.
"""
import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import clips
import metrics
from cli import Parser, positive_int, run
from files import BadInput, write_json
from tests import reference_metrics

HEIGHT, WIDTH = 480, 854  # of the masks made here: DAVIS at 480p


# What every benchmark shares.

def machine() -> dict:
    """Return what the numbers depend on: processor, cores this process may use, accelerator, and how busy it was."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"cpu": model, "cores": cores, "accelerator": accelerator, "load_1min": load}


def spread(runs: list[float]) -> dict:
    """Return the median of some runs, the lowest and the highest, and the runs themselves."""
    return {"median": statistics.median(runs), "lowest": min(runs), "highest": max(runs), "runs": runs}


def time_in_turns(candidates: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return the seconds of each candidate, `repeats` each, taken in turns so that a busy spell hits all.

    Each is called once before the clock starts, to load code and memory. clock: `time.perf_counter` for wall
    seconds; `time.process_time` for what runs in one thread, so that waiting for a core does not count.
    """
    seconds = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, candidate in candidates.items():
            start = clock()
            candidate()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def write_result(out: Path, name: str, repeats: int, results: dict) -> Path:
    """Write benchmarks/<date>-<name>.json, print its results as the last line, and return its path."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    record = {"name": name, "date": today, "command": command, "machine": machine(), "versions": versions,
              "n": repeats, "results": results}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{today}-{name}.json"
    write_json(path, record)
    print(f"wrote {path}")
    print(json.dumps(results, allow_nan=False))
    return path


# scores: J and F a frame.

def blobs(frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions and masks, bool [N, 480, 854]: three wobbly blobs a frame, predicted a little off."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    predictions, masks = np.zeros((2, frames, HEIGHT, WIDTH), dtype=bool)
    for prediction, mask in zip(predictions, masks):
        centre = rng.uniform((HEIGHT * 0.3, WIDTH * 0.3), (HEIGHT * 0.7, WIDTH * 0.7))
        for cy, cx in centre + rng.normal(0, 40, (3, 2)):
            angle, radius, lobes = np.arctan2(y - cy, x - cx), rng.uniform(30, 90), rng.integers(3, 9)
            for canvas, error in ((mask, 0), (prediction, rng.normal(0, 6))):
                reach = radius * (1 + 0.2 * np.sin(lobes * angle + error / 20)) + error
                canvas |= np.hypot(y - cy, x - cx) < reach
    return predictions, masks


def read_pairs(data: Path, split: str, predictions: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions and masks, bool [N, H, W]: the images of one folder, in order, and a data root's annotations.

    Raises BadInput where they do not pair up, or where frames differ in size.
    """
    frames = clips.find_frames(data, split)
    if not predictions.is_dir():
        raise BadInput(f"{predictions}: no such folder; --predictions takes a folder of mask images, one a frame")
    images = clips.images_in(predictions)
    if len(images) != len(frames):
        raise BadInput(f"{predictions}: expected {len(frames)} images, one for each frame of {data}, found {len(images)}")
    pairs = []
    for image, frame in zip(images, frames):
        if frame.annotation is None:
            raise BadInput(f"{data}: {frame.clip} has no annotations to score against")
        pair = metrics.foreground(clips.decode(image, "L")), clips.read_mask(frame.annotation)
        expected = pairs[0][1].shape if pairs else pair[1].shape
        for path, mask in zip((image, frame.annotation), pair):
            if mask.shape != expected:
                raise BadInput(f"{path}: expected {expected[0]}x{expected[1]} pixels as in the frames before, "
                               f"found {mask.shape[0]}x{mask.shape[1]}")
        pairs.append(pair)
    first, second = zip(*pairs)
    return np.stack(first), np.stack(second)


def scores(args: argparse.Namespace) -> None:
    """Time J and F a frame in CPU time, on one thread: packed masks against the slow reference, same frames."""
    predictions, masks = read_pairs(args.data, args.split, args.predictions) if args.data else blobs(args.frames or 60, args.seed)
    if args.frames:
        chosen = np.linspace(0, len(masks) - 1, min(args.frames, len(masks))).round().astype(int)
        predictions, masks = predictions[chosen], masks[chosen]
    frames, height, width = masks.shape
    packed = metrics.pack(predictions), metrics.pack(masks)

    found = {}  # what each of them computed, to compare below

    def slow_reference():
        found["slow"] = [reference_metrics.frame_scores(p, m) for p, m in zip(predictions, masks)]

    candidates = {
        "ours, J and F": lambda: found.update(ours=metrics.score_frames(*packed, width)),
        "ours, contest IoU alone": lambda: metrics.contest_iou(*packed),
        "slow reference, J and F": slow_reference,
    }
    seconds = time_in_turns(candidates, args.repeats, time.process_time)
    ms = {name: spread([1000 * run / frames for run in runs]) for name, runs in seconds.items()}
    deviation = np.abs(np.stack(found["ours"][1:]) - np.array(found["slow"]).T[1:]).max()  # of J and F
    results = {"frames": frames, "height": height, "width": width, "source": "data" if args.data else "blobs",
               "ms_per_frame": ms,
               "ratio": ms["slow reference, J and F"]["median"] / ms["ours, J and F"]["median"], "max_deviation": float(deviation)}

    print(f"{frames} frames of {width} x {height}, one core, {args.repeats} runs; CPU milliseconds a frame")
    print(f"{'':28}{'median':>10}{'lowest':>10}{'highest':>10}")
    for name, figures in ms.items():
        print(f"{name:28}{figures['median']:10.3f}{figures['lowest']:10.3f}{figures['highest']:10.3f}")
    print(f"{results['ratio']:.0f} times the slow reference; the largest difference in J or F is {deviation:.1e}")
    write_result(args.out, args.name or "scores", args.repeats, results)


def parse() -> argparse.Namespace:
    """Return the command line's flags, checked; `benchmark` is the function to call."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, parser_class=argparse.ArgumentParser, metavar="benchmark")
    command = commands.add_parser("scores", help="milliseconds a frame of J and F", description=scores.__doc__, allow_abbrev=False)
    command.set_defaults(benchmark=scores)
    group = command.add_argument_group("data")
    group.add_argument("--data", type=Path, default=None, help="data root with annotations (default: random blobs, made here)")
    group.add_argument("--split", default="val", help="split of --data (default: val)")
    group.add_argument("--predictions", type=Path, default=None, help="folder of mask images, one a frame of --data, in order")
    group.add_argument("--frames", type=positive_int, default=None,
                       help="frames to time, evenly spread (default: all of --data, or 60 blobs)")
    group = command.add_argument_group("run")
    group.add_argument("--repeats", type=positive_int, default=5, help="timed runs of each (default: 5)")
    group.add_argument("--seed", type=int, default=0, help="seed of the blobs (default: 0)")
    group.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder to write the result to (default: benchmarks)")
    group.add_argument("--name", default=None, help="name in the result's file name (default: the benchmark's)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if (args.data is None) != (args.predictions is None):
        command.error("--data and --predictions go together: pass both, or neither for random blobs")
    return args


def main() -> None:
    args = parse()
    args.benchmark(args)


if __name__ == "__main__":
    sys.exit(run(main))
