"""Runs a program that a model wrote, to see whether its tests pass (HumanEval's pass@1).

The program runs in namespaces of its own (`unshare`): it sees neither the caller's processes nor their environment, no network, no file but
Python's own (read only), and a small empty folder; when it ends, all that it started ends. Its time, its memory (of all its processes
together), its output and its files are bounded. Leaving early, or writing what the guard would write, is no way to pass.

Where the system has no such namespaces only the bounds hold. `evaluation.execute_code` is refused then, unless
`evaluation.execute_unguarded` says that a program may do what `OPEN` names.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import psutil

SECONDS = 10.0
MEGABYTES = 1024
PROCESSES = 64
"""How many may run at once."""
LOOK = 0.02
"""Seconds between two looks at what runs."""
OPEN = "it can read files and the environment of your processes, use the network, end your processes, and leave processes behind"
"""What nothing stops where there are no namespaces."""
SEARCH = "/usr/sbin:/usr/bin:/sbin:/bin"

ROOM = r"""
set -e
IFS='
'
root=$1; program=$2; shift 2
mount --make-rprivate /
mount -t tmpfs -o size=16m,mode=0755,nosuid,nodev,noexec tmpfs "$root"
mkdir -p "$root/box" "$root/dev" "$root/old" "$root/proc"
for place in $PLACES; do
  mkdir -p "$(dirname "$root$place")"
  if [ -L "$place" ]; then ln -s "$(readlink "$place")" "$root$place"; continue; fi
  if [ -d "$place" ]; then mkdir -p "$root$place"; else touch "$root$place"; fi
  mount --bind "$place" "$root$place"
  mount -o remount,bind,ro,nosuid,nodev "$root$place"
done
for name in null zero urandom; do touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"; done
cp "$program" "$root/box/program.py"
cd "$root"
pivot_root . old
cd /box
mount -t proc proc /proc
umount -l /old
umount -l /proc
rmdir /old
unset PLACES
setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""
"""A room with nothing in it but Python, read only, and an empty folder in memory. The shell stays the first process of the room: when it
ends, the kernel ends all others."""

GUARD = """
def main():
    import _thread, os, resource, sys, time
    path, seconds, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) << 20
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
    with open(path, encoding="utf-8") as file:
        code = compile(file.read(), "program", "exec")
    home, begun, done = _thread.get_ident(), _thread.allocate_lock(), _thread.allocate_lock()
    begun.acquire()
    done.acquire()
    here, ident, real, leave = sys._getframe(), _thread.get_ident, os.path.realpath, os._exit

    def keep():
        # the word lies in a thread to which no name of the program's leads; it is said only when the program's own thread is behind its end
        word, frames, write, leave, said, place = sys.stdin.buffer.read(), sys._current_frames, os.write, os._exit, os.dup(1), here
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        begun.release()
        done.acquire()
        if frames()[home] is place and place.f_lineno == LAST:
            write(said, word)
            leave(0)
        leave(1)

    keeper = _thread.start_new_thread(keep, ())
    begun.acquire()
    closed = {"sys._current_frames", "sys._current_exceptions", "gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys.settrace",
              "sys.setprofile", "sys.monitoring.register_callback"}
    native = {"ctypes", "_ctypes", "_testcapi", "_testinternalcapi", "_xxsubinterpreters", "_interpreters"}

    def watch(event, arguments):
        if event in closed and ident() != keeper:
            leave(1)
        if event == "import" and arguments[0] in native:
            raise ImportError(arguments[0])
        if event == "open" and isinstance(arguments[0], (str, bytes)) and real(os.fsdecode(arguments[0])).startswith("/proc"):
            raise PermissionError(arguments[0])

    sys.addaudithook(watch)
    try:
        exec(code, {"__name__": "program"})
    except BaseException:
        leave(1)
    else:
        done.release(), time.sleep(60)
main()
"""
"""Sets the limits, runs the program with its output thrown away, and says the word only where it came to its end."""
GUARD = GUARD.replace("LAST", str(next(number for number, line in enumerate(GUARD.splitlines(), 1) if "done.release()" in line)))


def passes(program: str, seconds: float = SECONDS, megabytes: int = MEGABYTES) -> bool:
    """Whether the program runs to its end without an error. seconds: of the clock; megabytes: of all its processes together. POSIX only."""
    return _passes(program, seconds, megabytes, guarded())


def can_execute() -> bool:
    """Whether this system has the limits and the process groups that `passes` relies on."""
    return os.name == "posix"


@cache
def guarded() -> bool:
    """Whether programs run in namespaces of their own here: tried once, with a program that does nothing."""
    tools = ("unshare", "mount", "umount", "pivot_root", "setpriv", "sh")
    found = all(shutil.which(tool, path=SEARCH) for tool in tools)
    return found and sys.platform == "linux" and _passes("", SECONDS, MEGABYTES, guard=True)


def _passes(program: str, seconds: float, megabytes: int, guard: bool) -> bool:
    word = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path, room = Path(folder) / "program.py", Path(folder) / "room"
        path.write_text(program, encoding="utf-8", errors="replace")
        room.mkdir()
        limits = [str(max(1, round(seconds))), str(megabytes)]
        home = "/box" if guard else folder
        python = [sys.executable, "-I", "-c", GUARD, f"{home}/program.py", *limits]
        environment = {"PATH": SEARCH, "HOME": home, "TMPDIR": home}
        if guard:
            spaces = ["--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
            python = ["unshare", *spaces, "sh", "-c", ROOM, "room", str(room), str(path), *python]
            environment["PLACES"] = "\n".join(_places())
        else:
            room.rmdir()
        process = subprocess.Popen(
            python, cwd=folder, env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            return _said(process, word, time.monotonic() + seconds, megabytes << 20) == word
        finally:
            _end(process)


def _places() -> list[str]:
    """The folders that Python lies in, and the system's libraries, none within another."""
    executable = Path(sys.executable)
    needed = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", sys.prefix, sys.base_prefix, str(executable.resolve().parent)]
    there = [place for place in dict.fromkeys(needed) if os.path.exists(place) and place != "/"]
    return [place for place in there if not any(place != other and place.startswith(f"{other}/") for other in there)]


def _said(process: subprocess.Popen[bytes], word: bytes, end: float, room: int) -> bytes:
    """What the guard said, a little more than the word at most; nothing where the program took too long or too much."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(word)
        process.stdin.close()
    os.set_blocking(process.stdout.fileno(), False)
    said = b""
    while time.monotonic() < end and len(said) <= len(word):
        over = process.poll() is not None
        said += process.stdout.read(len(word) + 1 - len(said)) or b""
        if over:
            return said if process.returncode == 0 else b""
        if _too_much(process.pid, room):
            return b""
        time.sleep(LOOK)
    return b""


def _too_much(first: int, room: int) -> bool:
    """Whether the process and all that it started hold more memory than `room`, or are too many."""
    try:
        running = [psutil.Process(first), *psutil.Process(first).children(recursive=True)]
    except psutil.NoSuchProcess:
        return False
    total = 0
    for one in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += one.memory_info().rss
    return total > room or len(running) > PROCESSES


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the program and whatever it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the group holds nothing else
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
