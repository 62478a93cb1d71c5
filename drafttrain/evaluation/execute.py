"""Runs a program that a model wrote, to see whether its tests pass (HumanEval's pass@1).

The program runs in a process of its own: an isolated Python (`-I`: no user site, no environment variables of Python), an empty
temporary folder, limits on processor time, memory, file size and open files, and an end by force after `seconds`. That holds
accidents, not attacks: NOTHING KEEPS IT FROM READING FILES OR FROM USING THE NETWORK. Run it in a container without either where
the model is not trusted. It is therefore off unless `evaluation.execute_code` says otherwise.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10.0
MEGABYTES = 1024
GUARDED = """
import os, resource, sys
path, seconds, size, word = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) << 20, sys.argv[4]
limits = {"CPU": seconds, "AS": size, "DATA": size, "FSIZE": 1 << 20, "NOFILE": 64, "CORE": 0}
for name, limit in limits.items():
    which = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(which)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    try:
        resource.setrlimit(which, (limit, limit))
    except (ValueError, OSError):
        pass  # a system that does not know this limit
del sys.argv[1:]
said = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
with open(path, encoding="utf-8") as file:
    exec(compile(file.read(), "program", "exec"), {"__name__": "program"})
os.write(said, word.encode())
"""
"""Sets the limits, runs the program with its output thrown away, and says the word only where it came to its end: leaving early is no
way to pass."""


def passes(program: str, seconds: float = SECONDS, megabytes: int = MEGABYTES) -> bool:
    """Whether the program runs to its end without an error. seconds: of the clock. POSIX systems only; see `can_execute`."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        command = [sys.executable, "-I", "-c", GUARDED, str(path), str(max(1, round(seconds))), str(megabytes), word]
        process = subprocess.Popen(
            command, cwd=folder, env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)
    return process.returncode == 0 and output == word.encode()


def can_execute() -> bool:
    """Whether this system has the limits and the process groups that `passes` relies on."""
    return os.name == "posix"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the program and whatever it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the group holds nothing else
    process.wait()
    if process.stdout:
        process.stdout.close()
