"""The house cannot outgrow itself unseen: its numbers, each counted and held to its limit."""
import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import QUIET, ROOT, write_features

NAMES = ("featurize", "train", "evaluate", "package", "data", "models")
TOP = [ROOT / f"{name}.py" for name in NAMES]
ROOMS = sorted((ROOT / "vos").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CODE = [*sorted(ROOT.glob("*.py")), *ROOMS, *BENCHMARKS]  # Python without tests


def read_lines(files: list[Path]) -> list[str]:
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def count_loaded(folder: Path) -> int:
    """Count the lines of the project's files that a training loads, with logging off."""
    write_features(folder / "features", {"cat": 3})
    flags = ["--features", "features", "--steps", "2", "--out", "run"]
    code = (f"import json, runpy, sys; sys.argv = ['train.py', *{flags}]\n"
            f"try: runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
            "except SystemExit as stop: assert not stop.code, stop\n"
            "files = [getattr(module, '__file__', None) for module in sys.modules.values()]\n"
            "print(json.dumps(sorted(set(filter(None, files)))))")
    env = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    loaded = [Path(file) for file in json.loads(done.stdout.splitlines()[-1])]
    return len(read_lines([file for file in CODE if file in loaded or file == TOP[1]]))


def count_loop(_: Path) -> int:
    """Count the statements in the body of the training loop, however deep; not its comments."""
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    fit = next(node for node in tree.body if getattr(node, "name", "") == "fit")
    loop = next(node for node in ast.walk(fit) if isinstance(node, ast.For))
    return sum(isinstance(node, ast.stmt) for part in loop.body for node in ast.walk(part))


def flags_of(name: str) -> Callable[[Path], int]:
    def count(_: Path) -> int:
        """Count the flags that --help lists, but for --help itself."""
        done = subprocess.run([sys.executable, ROOT / f"{name}.py", "--help"], capture_output=True,
                              text=True, env={**os.environ, **QUIET, "COLUMNS": "200"}, check=True)
        starts = {line.split()[0].rstrip(",") for line in done.stdout.splitlines()
                  if line.startswith("  --")}
        return len(starts)
    return count


LIMITS = {  # what: (how it is counted, the most that it may be)
    "lines of the scripts and of vos/": (lambda _: len(read_lines([*TOP, *ROOMS])), 4000),
    "lines of benchmarks/": (lambda _: len(read_lines(BENCHMARKS)), 350),
    "columns of the longest line": (lambda _: max(map(len, read_lines([*CODE, *TESTS]))), 100),
    "lines of the six files on top": (lambda _: len(read_lines(TOP)), 1500),
    "lines of the longest file": (lambda _: max(len(read_lines([file])) for file in CODE), 350),
    "lines that a training loads": (count_loaded, 1900),
    "statements in the training loop": (count_loop, 30),
    "flags of featurize.py": (flags_of("featurize"), 18),
    "flags of train.py": (flags_of("train"), 28),
    "flags of evaluate.py": (flags_of("evaluate"), 22),
    "flags of package.py": (flags_of("package"), 8),
    "lines of tests": (lambda _: len(read_lines(TESTS)), 5500),
}


@pytest.mark.parametrize("what", LIMITS)
def test_a_number_of_the_house(what, tmp_path):
    count, most = LIMITS[what]
    found = count(tmp_path)
    print(f"{what}: {found:,} of at most {most:,}")
    assert 0 < found <= most


def imports_of(file: Path) -> set[str]:
    """Return the first names of all modules that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_nothing_but_the_six_files_is_on_top():
    assert sorted(ROOT.glob("*.py")) == sorted(TOP)


def test_the_rooms_import_nothing_of_the_top_and_scripts_not_one_another():
    scripts = {file.stem for file in TOP[:4]}
    for file in ROOMS:
        assert not imports_of(file) & {file.stem for file in TOP}, file
    for file in TOP:
        assert not imports_of(file) & scripts, file
    assert "models" not in imports_of(ROOT / "data.py")
