"""Programs of a model, in a process of their own: what passes, what does not, and what cannot harm."""

from __future__ import annotations

import os
import resource
import secrets
import socket
from pathlib import Path

import psutil
import pytest

from drafttrain.evaluation.execute import can_execute, guarded, passes

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


FORGERIES = {
    "main": "import __main__, os\nos.write(__main__.said, __main__.word)",
    "descriptors": "import os\nfor n in range(64):\n try: os.write(n, os.read(n, 64))\n except OSError: pass\nos._exit(0)",
    "command line": "import os\nword = open('/proc/self/cmdline', 'rb').read().split(b'\\0')[-2]\nos.write(3, word)\nos._exit(0)",
    "frames": "import sys\nsys._current_frames()",
    "collector": "import gc\ngc.get_objects()",
    "lock": "import sys, time\ndone = sys._getframe().f_back.f_locals['done']\ndone.release()\ntime.sleep(9)",
    "lock from beside": (
        "import sys, threading, time\ndone = sys._getframe().f_back.f_locals['done']\n"
        "threading.Thread(target=done.release).start()\ntime.sleep(9)"
    ),
    "jump": "import sys\nsys.settrace(lambda *_: None)",
    "exit": "import os\nos._exit(0)",
    "memory": "open('/proc/self/mem', 'rb').read(1)",
    "native": "import ctypes",
    "caught": "try:\n raise SystemExit(0)\nfinally:\n import os; os._exit(0)",
}


@pytest.mark.parametrize("how", FORGERIES)
def test_a_pass_is_not_forged(how: str) -> None:
    assert not passes(f"{FORGERIES[how]}\nassert False", seconds=4)


guarded_only = pytest.mark.skipif(not guarded(), reason="this system lets nobody make namespaces")


@guarded_only
def test_a_program_sees_no_process_of_ours_and_none_of_our_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("A_SECRET", "x")
    secret = tmp_path / "token"
    secret.write_text("x")
    pids = [os.getpid(), os.getppid()]
    assert passes(f"import os\nassert not any(os.path.exists(f'/proc/{{pid}}') for pid in {pids})\nassert os.listdir('/proc') == []")
    assert passes(f"import os\nassert not os.path.exists({str(secret)!r}) and not os.path.exists('/etc/passwd')")
    assert not passes("open('/usr/mark', 'w')")
    assert not passes(f"open({str(tmp_path / 'mark')!r}, 'w')")


@guarded_only
def test_a_program_sends_no_signal_to_us() -> None:
    program = "import os\ntry: os.kill(-1, 9)\nexcept OSError: pass"  # all that it may send signals to
    assert passes(program)


@guarded_only
def test_a_program_has_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert passes(
            f"import socket\ntry: socket.create_connection(('127.0.0.1', {port}), 2)\nexcept OSError: pass\nelse: raise SystemExit"
        )
        socket.create_connection(("127.0.0.1", port), 2).close()  # from here it can be reached


@guarded_only
def test_what_a_program_leaves_running_ends_with_it_even_in_a_session_of_its_own() -> None:
    marker = secrets.token_hex(8)
    child = f"import os, time; os.setsid(); time.sleep(60); {marker!r}"
    program = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(0.5)"
    assert passes(program)
    lines = [" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])]
    assert not any(f"time.sleep(60); {marker!r}" in line for line in lines)


@pytest.mark.parametrize("way", ["output", "children", "processes", "files"])
def test_what_a_program_takes_is_bounded(way: str) -> None:
    """Children: their memory counts together. Output: what it says does not fill our memory."""
    programs = {
        "output": "import os\nfor n in range(64):\n try:\n  while True: os.write(n, bytes(1 << 20))\n except OSError: pass",
        "children": (
            "import os, time\nfor _ in range(6):\n if not os.fork():\n  x = bytearray(b'x' * (60 << 20)); time.sleep(30)\ntime.sleep(2)"
        ),
        "processes": "import os, time\nfor _ in range(90):\n if not os.fork(): time.sleep(30)\ntime.sleep(2)",
        "files": "for n in range(40): open(f'f{n}', 'wb').write(bytes(1 << 20))",
    }
    if way == "files" and not guarded():
        pytest.skip("the room's size bounds files")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not passes(programs[way], seconds=6, megabytes=256)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_ordinary_modules_work_where_programs_are_watched() -> None:
    names = "collections, dataclasses, typing, itertools, math, random, re, string, heapq, functools, datetime, decimal, json, uuid"
    assert passes(f"import {names}\nP = collections.namedtuple('P', 'a b')\nassert P(1, 2).b == 2\nopen('file', 'w').write('x')")
