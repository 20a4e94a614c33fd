"""What every benchmark shares: the machine, clocks, processes measured from outside, results and the README's table.

Parted from benchmark.py, which is left with its command line and the benchmarks of the scores.
"""
import datetime
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from files import BadInput, read_json, write_json, write_text

ROOT = Path(__file__).resolve().parent
MARKERS = "<!-- benchmarks -->", "<!-- /benchmarks -->"  # around the README's table


# --- clocks ------------------------------------------------------------------------------------


def spread(runs: list[float]) -> dict:
    """Return the median of some runs, the lowest and the highest, and the runs themselves."""
    return {"median": statistics.median(runs), "lowest": min(runs), "highest": max(runs), "runs": runs}


def time_in_turns(candidates: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return the seconds of each candidate, `repeats` each, taken in turns so that a busy spell hits all.

    Each is called once before the clock starts, to load code and memory. clock: `time.perf_counter` for wall
    seconds; `time.process_time` for what runs in one thread, so that waiting for a core does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, candidate in candidates.items():
            start = clock()
            candidate()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


# --- processes ---------------------------------------------------------------------------------


class Child(NamedTuple):
    """A process that ended."""

    status: int
    out: str
    err: str
    seconds: float  # from its start to its end, imports included
    peak: int  # bytes: the most memory it had resident at once

    def stage(self) -> float:
        """Return the seconds that a script of ours printed for its main stage, imports and model building left out."""
        return float(re.findall(r"^seconds: .*? ([\d.]+) \(", self.out, re.MULTILINE)[-1])


LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
measured = [os.waitstatus_to_exitcode(status), time.perf_counter() - started, usage.ru_maxrss]
json.dump(measured, open(sys.argv[1], "w"))
"""


def run_child(*command, may_fail: bool = False) -> Child:
    """Run a command to its end and measure it. Raises BadInput with its last line when it fails, unless it may.

    A launcher of a few MB starts it: a process's peak counts from what its parent has had resident, and we hold torch.
    """
    with tempfile.NamedTemporaryFile("r") as note, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        launcher = subprocess.Popen([sys.executable, "-S", "-c", LAUNCHER, note.name, *map(str, command)], stdout=out, stderr=err,
                                    start_new_session=True)
        try:
            launcher.wait()
        except BaseException:
            os.killpg(launcher.pid, signal.SIGKILL)
            raise
        status, seconds, peak = json.load(note)
        out.seek(0)
        err.seek(0)
        child = Child(status, out.read(), err.read(), seconds, peak * (1 if sys.platform == "darwin" else 1024))
    if child.status and not may_fail:
        reason = (child.err.strip().splitlines() or ["nothing on standard error"])[-1]
        raise BadInput(f"{shlex.join(Path(part).name for part in map(str, command[:2]))} ended with status {child.status}: {reason}")
    return child


def lines_of(file: Path) -> list[dict]:
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run_script(name: str, *flags, may_fail: bool = False) -> Child:
    """Run one of our scripts as its user would."""
    return run_child(sys.executable, ROOT / name, *flags, may_fail=may_fail)


# --- results -----------------------------------------------------------------------------------


def machine() -> dict:
    """Return what the numbers depend on: processor, cores this process may use, accelerator, and how busy it was."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"cpu": model, "cores": cores(), "accelerator": accelerator, "load_1min": load}


def cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def row(what: str, unit: str, ours: dict, peer: dict | None = None, ratio: float | None = None, goal: str | None = None) -> dict:
    """Return one line of the README's table. ours, peer: what `spread` gives; ratio: how many times better ours is."""
    return {"what": what, "unit": unit, "ours": ours, "peer": peer, "ratio": ratio, "goal": goal}


def write_result(out: Path, name: str, repeats: int, results: dict, rows: list[dict], before: dict) -> Path:
    """Write benchmarks/<date>-<name>.json, print its rows, its path, and its results as the last line.

    before: `machine()` as it was before the benchmark began, whose load is not the benchmark's own.
    """
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    record = {"name": name, "date": today, "command": command, "machine": before, "versions": versions,
              "n": repeats, "rows": rows, "results": results}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{today}-{name}.json"
    write_json(path, record)
    print_rows(rows)
    print(f"wrote {path}")
    print(json.dumps(results, allow_nan=False))
    return path


def print_rows(rows: list[dict]) -> None:
    """Print rows as a table."""
    print(f"{'':64}{'peer':>20}{'ours':>20}{'ratio':>9}  goal")
    for line in rows:
        print(f"{line['what'] + ', ' + line['unit']:64}{figures(line['peer']):>20}{figures(line['ours']):>20}"
              f"{times(line['ratio']):>9}  {line['goal'] or ''}")


# --- the README's table ------------------------------------------------------------------------


def write_table(readme: Path, folder: Path, check: bool) -> bool:
    """Put the table of `folder`'s results between the markers of `readme`; return whether it was there already.

    check: leave the file as it is. Raises BadInput when the markers are not there, once each and in order.
    """
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    first, last = (text.find(marker) for marker in MARKERS)
    if not 0 <= first < last or any(text.count(marker) != 1 for marker in MARKERS):
        raise BadInput(f"{readme}: expected the lines {MARKERS[0]} and {MARKERS[1]}, once each, to put the table between")
    new = text[:first] + MARKERS[0] + "\n" + make_table(folder) + text[last:]
    if new != text and not check:
        write_text(readme, new)
    return new == text


def make_table(folder: Path) -> str:
    """Return the newest results of each name as Markdown tables, and below them where each was measured.

    What is named "<case>: <figure>" and has no peer goes into a table of its own, a line for each case and a column for each figure.
    """
    lines = ["| measured | peer | ours | ratio | goal | runs |", "|---|--:|--:|--:|--:|--:|"]
    cases: dict[str, dict[str, str]] = {}
    notes = []
    for record in newest(folder):
        for line in record["rows"]:
            what = f"{line['what']}, {line['unit']}"
            case, _, figure = what.rpartition(": ")
            if case and line["peer"] is None:
                cases.setdefault(case, {"runs": str(record["n"])})[figure] = figures(line["ours"])
                continue
            cells = [what, figures(line["peer"]), figures(line["ours"]), times(line["ratio"]), line["goal"] or "", str(record["n"])]
            lines.append(f"| {' | '.join(cells)} |")
        on = record["machine"]
        device = ", ".join(filter(None, [on["cpu"], f"{on['cores']} cores", on["accelerator"]]))
        notes.append(f"- `{record['command']}`: {record['date']}, {device}, load {on['load_1min']} before it began, "
                     f"torch {record['versions']['torch']}")
    if cases:
        columns = sorted(dict.fromkeys(column for cells in cases.values() for column in cells), key="runs".__eq__)  # runs last
        lines += ["", f"| | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
        lines += [f"| {case} | {' | '.join(cells.get(column, '') for column in columns)} |" for case, cells in cases.items()]
    return "\n".join([*lines, "", "Median of the runs (lowest to highest). Measured by:", "", *notes]) + "\n"


def newest(folder: Path) -> list[dict]:
    """Return the newest record of each name in a folder of results, in the order of their names. Raises BadInput for none."""
    records = {}
    for file in sorted(folder.glob("*.json")):  # names begin with the date
        record = read_json(file)
        if not isinstance(record, dict) or not {"name", "date", "command", "machine", "versions", "n", "rows"} <= record.keys():
            raise BadInput(f"{file}: expected a result of benchmark.py; measure it anew with benchmark.py, or delete it")
        records[record["name"]] = record
    if not records:
        raise BadInput(f"{folder}: holds no results; benchmark.py writes them")
    return [records[name] for name in sorted(records)]


def figures(runs: dict | None) -> str:
    """A median with its range: "10.3 (9.8 to 10.6)", without the range of a single run."""
    if runs is None:
        return ""
    if runs["lowest"] == runs["highest"]:
        return number(runs["median"])
    return f"{number(runs['median'])} ({number(runs['lowest'])} to {number(runs['highest'])})"


def times(ratio: float | None) -> str:
    """A ratio: "13x"."""
    return "" if ratio is None else f"{number(ratio)}x"


def number(value: float) -> str:
    """A figure with three significant digits, thousands apart, never as a power of ten."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")
