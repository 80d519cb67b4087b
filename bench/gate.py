"""An op is timed only when its tests pass: a fast wrong kernel must not get a row."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"


def test_selection(op: str) -> list[str]:
    """pytest's arguments for the tests of an op: its own file and, for a family, the shared one's cases of it."""
    family = TESTS / f"test_{op.split('_')[0]}.py"
    own = TESTS / f"test_{op}.py"
    chosen = [str(own)] if own.is_file() else []
    if family.is_file() and family != own:
        # -k selects by substring: conv_dot, and in the family's file only; an own file has the op in its name anyway
        chosen += [str(family), "-k", op]
    return chosen


def refusal(op: str) -> str | None:
    """Why the op must not be timed, or None when its tests pass."""
    chosen = test_selection(op)
    if not chosen:
        return f"no tests found for {op} in {TESTS}; the benchmark times tested ops only"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", "-r", "f", *chosen]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    what = lines[0] if lines else (done.stdout or done.stderr).strip().splitlines()[-1:]
    return f"its tests fail, so it was not timed: {what}; run `python -m pytest {' '.join(command[9:])}`"
