"""A thousand of the hostile inputs of fuzz.py, and what it takes for wrong."""
import os
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from helpers import QUIET, ROOT


def test_hostile_inputs_are_refused_in_one_line_or_right(tmp_path):
    command = [sys.executable, ROOT / "tests/fuzz.py", "--count=1000", "--seed=12",
               f"--failures={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET})
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "FAILED 0" in line]
    counts = {name: (int(right[:-1]), int(refused[:-1])) for name, _, right, _, refused, *_ in rows}
    assert sum(counts.pop("all")) == 1000 and len(counts) == 6
    assert all(right > 5 and refused > 5 for right, refused in counts.values()), counts


@pytest.mark.parametrize("wrong", [lambda _: {}["x"], lambda _: os.unlink("letter")])
def test_what_is_wrong_is_seen(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz, "said", str)  # nothing
    Path("now").mkdir()
    Path("letter").write_text("dear")
    outcomes = [fuzz.judge(family, None) for family in (str, wrong)]
    assert outcomes[0] == "right" and outcomes[1] not in ("right", "refused")
