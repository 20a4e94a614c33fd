"""Measure what the README claims, on this machine.

    python benchmark.py train                                         # how fast this machine trains and predicts
    python benchmark.py scores --data DAVIS --predictions RESULTS/outputs   # milliseconds a frame of J and F
    python benchmark.py scale                                         # cost at 1,000 to 100,000 frames
    python benchmark.py peer --peer NOTEBOOK.py --data DAVIS --weights FILE   # beside the contest notebook's pipeline
    python benchmark.py table                                         # the README's table, from benchmarks/*.json

Each benchmark prints a table and, as its last line, one JSON object, and writes that object with the machine,
the versions, the command and every run to benchmarks/<date>-<name>.json. Compare only numbers of one file:
what is compared is timed in turns.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np

import benchmark_peer
import benchmark_synthetic
import clips
import measure
import metrics
from cli import Parser, positive_int, run
from files import BadInput
from measure import spread
from resident import RESIDENT
from tests import reference_metrics

HEIGHT, WIDTH = 480, 854  # of the masks made here: DAVIS at 480p


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
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
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
    before = measure.machine()
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
    seconds = measure.time_in_turns(candidates, args.repeats, time.process_time)
    ms = {name: spread([1000 * run / frames for run in runs]) for name, runs in seconds.items()}
    deviation = np.abs(np.stack(found["ours"][1:]) - np.array(found["slow"]).T[1:]).max()  # of J and F
    results = {"frames": frames, "height": height, "width": width, "source": "data" if args.data else "blobs",
               "ms_per_frame": ms,
               "ratio": ms["slow reference, J and F"]["median"] / ms["ours, J and F"]["median"], "max_deviation": float(deviation)}

    of = "real masks" if args.data else "blobs"
    rows = [measure.row(f"J and F of {of} (peer: slow reference)", "CPU ms a frame", ms["ours, J and F"],
                        ms["slow reference, J and F"], results["ratio"]),
            measure.row(f"contest IoU alone of {of}", "CPU ms a frame", ms["ours, contest IoU alone"])]
    print(f"{frames} frames of {width} x {height}, one core; the largest difference in J or F is {deviation:.1e}")
    measure.write_result(args.out, args.name or "scores", args.repeats, results, rows, before)


def table(args: argparse.Namespace) -> None:
    """Put the newest result of each name into the README's table; with --check only say whether it is there."""
    same = measure.write_table(args.readme, args.out, args.check)
    if args.check and not same:
        raise BadInput(f"{args.readme}: its table is not what {args.out} gives; run `python benchmark.py table`")
    print(f"{args.readme}: {'as it was' if same else 'written'}")


# The command line.

def parse() -> argparse.Namespace:
    """Return the command line's flags, checked; `benchmark` is the function to call."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, parser_class=argparse.ArgumentParser, metavar="benchmark")
    for add in (add_scores, add_peer, add_scale, add_train, add_table):
        command = add(commands)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.benchmark is scores and (args.data is None) != (args.predictions is None):
        parser.error("--data and --predictions go together: pass both, or neither for random blobs")
    if args.benchmark is benchmark_peer.peer and args.reference and args.limit:
        parser.error("--reference has the losses of the whole split: leave out --limit")
    return args


def new_command(commands, name: str, benchmark, summary: str, repeats: int) -> argparse.ArgumentParser:
    """Add a command with the flags that every measuring one has."""
    command = commands.add_parser(name, help=summary, description=benchmark.__doc__, allow_abbrev=False)
    command.set_defaults(benchmark=benchmark)
    group = command.add_argument_group("run")
    group.add_argument("--repeats", type=positive_int, default=repeats, help=f"timed runs of each (default: {repeats})")
    group.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder to write the result to (default: benchmarks)")
    group.add_argument("--name", default=None, help="name in the result's file name (default: the benchmark's)")
    group.add_argument("--seed", type=int, default=0, help="seed of what is made up (default: 0)")
    return command


def add_scores(commands) -> argparse.ArgumentParser:
    command = new_command(commands, "scores", scores, "milliseconds a frame of J and F", 5)
    group = command.add_argument_group("data")
    group.add_argument("--data", type=Path, default=None, help="data root with annotations (default: random blobs, made here)")
    group.add_argument("--split", default="val", help="split of --data (default: val)")
    group.add_argument("--predictions", type=Path, default=None, help="folder of mask images, one a frame of --data, in order")
    group.add_argument("--frames", type=positive_int, default=None,
                       help="frames to time, evenly spread (default: all of --data, or 60 blobs)")
    return command


def add_peer(commands) -> argparse.ArgumentParser:
    command = new_command(commands, "peer", benchmark_peer.peer, "beside the contest notebook's pipeline, stage by stage", 1)
    group = command.add_argument_group("data")
    group.add_argument("--peer", type=Path, required=True, help="the notebook's pipeline as a script that prints one JSON object")
    group.add_argument("--data", type=Path, required=True, help="DAVIS root with the splits train and val")
    group.add_argument("--weights", type=Path, required=True, help="AlexNet's weights, a state dict of its features.* keys")
    group.add_argument("--reference", type=Path, default=None, help="JSON with the notebook's losses, to compare ours with")
    group.add_argument("--limit", type=positive_int, default=None, help="only the first N frames of each split (default: all)")
    group.add_argument("--steps", type=at_least_2, default=101, help="training steps, at least 2 (default: 101)")
    group.add_argument("--compute", choices=["auto", "float32", "bfloat16"], default="auto", help="as featurize.py's (default: auto)")
    group.add_argument("--threads", type=positive_int, default=None, help="threads of either (default: one a core)")
    return command


def add_scale(commands) -> argparse.ArgumentParser:
    command = new_command(commands, "scale", benchmark_synthetic.scale, "cost of training and scoring as frames grow", 1)
    group = command.add_argument_group("made-up features")
    group.add_argument("--frames", type=positive_int, nargs="+", default=[1_000, 10_000, 100_000], help="(default: 1000 10000 100000)")
    group.add_argument("--shape", type=sizes(3), default=(64, 14, 25), metavar="CxHxW", help="of a feature map (default: 64x14x25)")
    group.add_argument("--size", type=sizes(2), default=(120, 216), metavar="HxW", help="of a mask (default: 120x216)")
    group.add_argument("--steps", type=at_least_2, default=300, help="training steps, at least 2 (default: 300)")
    group.add_argument("--resident", choices=RESIDENT, nargs="+", default=list(RESIDENT), help="where features are kept (default: all)")
    group.add_argument("--score", action=argparse.BooleanOptionalAction, default=True, help="predict, write and score every frame as well")
    group.add_argument("--folder", type=Path, default=None, help="where to make temporary files (default: the system's choice)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    group.add_argument("--threads", type=positive_int, default=None, help="CPU threads (default: one a core)")
    return command


def add_train(commands) -> argparse.ArgumentParser:
    command = new_command(commands, "train", benchmark_synthetic.train, "how fast this machine trains and predicts", 5)
    group = command.add_argument_group("made-up features")
    group.add_argument("--featurizer", default="efficientnet_lite0", help="its maps' shapes are trained on (default: efficientnet_lite0)")
    group.add_argument("--size", type=sizes(2), default=(HEIGHT, WIDTH), metavar="HxW", help="of a frame (default: 480x854)")
    group.add_argument("--frames", type=positive_int, default=256, help="frames of features on the device (default: 256)")
    group.add_argument("--steps", type=positive_int, default=30, help="training steps a run (default: 30)")
    group.add_argument("--batch-size", type=positive_int, default=8, help="frames at a time from frame to mask (default: 8)")
    group.add_argument("--amp", action="store_true", help="train in bfloat16 autocast")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    group.add_argument("--threads", type=positive_int, default=None, help="CPU threads (default: PyTorch's choice)")
    return command


def add_table(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("table", help="regenerate the README's table", description=table.__doc__, allow_abbrev=False)
    command.set_defaults(benchmark=table)
    command.add_argument("--readme", type=Path, default=Path("README.md"), help="file with the markers (default: README.md)")
    command.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the results (default: benchmarks)")
    command.add_argument("--check", action="store_true", help="write nothing; fail when the table is not what the results give")
    return command


def at_least_2(text: str) -> int:
    """Parse a whole number of at least 2 (argparse type): a step's time is what comes after the first."""
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 2, found {text}")
    return int(text)


def sizes(count: int):
    """Return a parser of `count` whole numbers above 0 such as 480x854 (argparse type)."""
    def parse_sizes(text: str) -> tuple[int, ...]:
        parts = text.lower().split("x")
        if len(parts) != count or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise argparse.ArgumentTypeError(f"expected {count} whole numbers with an x between, found {text}")
        return tuple(map(int, parts))
    return parse_sizes


def main() -> None:
    args = parse()
    args.benchmark(args)


if __name__ == "__main__":
    sys.exit(run(main))
