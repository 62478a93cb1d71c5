"""Programs of a model, in a process of their own: what passes, what does not, and what cannot harm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from drafttrain.evaluation.execute import can_execute, passes

pytestmark = pytest.mark.skipif(not can_execute(), reason="limits are POSIX's")


@pytest.mark.parametrize("program", ["assert 1 + 1 == 2", "from math import sqrt\nprint(sqrt(4))", "print('x' * 100000)"])
def test_a_program_that_comes_to_its_end_passes(program: str) -> None:
    assert passes(program)


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3", "raise SystemExit(0)", "import os\nos._exit(0)", "def broken(", "while True: pass",
        "import time\ntime.sleep(60)", "x = bytearray(1 << 30)", "open('big', 'wb').write(bytes(1 << 22))",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "input()",
    ],
)  # fmt: skip
def test_a_program_that_fails_leaves_early_or_takes_too_much_does_not_pass(program: str) -> None:
    assert not passes(program, seconds=2, megabytes=512)


def test_a_program_runs_in_an_empty_folder_of_its_own_without_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "x")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    assert passes("import os\nassert os.listdir() == ['program.py'] and 'A_SECRET' not in os.environ")
    assert passes(f"import os, sys\nassert {os.getcwd()!r} not in sys.path and os.getcwd() != {os.getcwd()!r}")


def test_what_a_program_leaves_running_ends_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).write_text('alive')"
    program = f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.DEVNULL)\n"
    assert passes(program)
    assert passes("import time\ntime.sleep(2.5)")
    assert not mark.exists()
