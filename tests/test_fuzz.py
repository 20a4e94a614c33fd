"""A few hundred of the damaged inputs of fuzz.py; `python tests/fuzz.py` reads ten thousand."""
import signal
import subprocess
import sys

import fuzz
from files import BadInput
from helpers import QUIET, ROOT


def test_damaged_inputs_are_refused_or_read_right(tmp_path):
    flags = "--count", "400", "--seed", "12", "--failures", str(tmp_path / "failures")
    done = subprocess.run([sys.executable, str(ROOT / "tests/fuzz.py"), *flags],
                          capture_output=True, text=True, env={**fuzz.os.environ, **QUIET}, timeout=500)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    total = next(line.split() for line in done.stdout.splitlines() if line.startswith("all "))
    inputs, refused, read, failed = map(int, total[1:])
    assert inputs > 400 and refused > 100 and read > 50 and failed == 0  # damage that is never read, or never seen, shows nothing


def test_what_is_wrong_is_seen(tmp_path, monkeypatch):
    """Readers that do what none should: each is told from a refusal."""
    (tmp_path / "work").mkdir()
    (tmp_path / "outside").write_text("")
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)

    def refuse():
        raise BadInput("why")

    def crash():
        raise KeyError("x")
    guard = fuzz.Guard(tmp_path / "work")
    try:
        assert guard.watch(refuse) == "refused"
        assert guard.watch(lambda: None) == "read"
        assert "KeyError" in guard.watch(crash)
        assert "TimeoutError" in guard.watch(lambda: fuzz.time.sleep(2))
        assert "reached out" in guard.watch(lambda: (tmp_path / "outside").read_text())
        assert "reached out" in guard.watch(lambda: fuzz.os.system("true"))
        assert "standard error" in guard.watch(lambda: fuzz.os.write(2, b"a warning"))
        monkeypatch.setattr(fuzz, "MEMORY", -1)
        assert "MB" in guard.watch(lambda: None)
    finally:
        signal.signal(signal.SIGALRM, before)
