"""Files and folders that are there whole or not at all, whenever the process dies; and one writer at a time.

A file is written beside its name, synced and renamed, and its folder is synced. A folder is filled beside its name, synced and exchanged
with the older one in one step, so that readers always find a whole one. The next writer removes what a killed process left half done.
This is the only file of `core/` that touches the disk.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafttrain.core.errors import UserError, first_line

CONFIG, WEIGHTS = "config.json", "model.safetensors"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM)
EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2): two names swap what they stand for, at once
HERE = -100  # AT_FDCWD: paths are relative to the working directory


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """The file appears whole or not at all, and survives a power cut after this call. `write` gets the path of the file to fill.

    A link stays a link (the file it points to is replaced); a device or a pipe stays one (it is written to). A folder is a `UserError`.
    """
    final = _followed(path)
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    _sweep_files(final)
    try:
        write(partial)
        set_usual_mode(partial)
        if final.exists() and not final.is_file():
            final.open("wb", buffering=0).write(partial.read_bytes())
            return
        sync(partial)
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)
    sync(final.parent)


def write_text(path: Path, text: str) -> None:
    """`write_whole` of a text in UTF-8; lone surrogates, which UTF-8 cannot hold, become question marks."""
    data = text.encode("utf-8", errors="replace")
    write_whole(path, lambda partial: partial.write_bytes(data))


def cache_root() -> Path:
    """Where converted models and what was measured of this machine are kept: $DRAFTTRAIN_CACHE, or ~/.cache/drafttrain."""
    return Path(os.environ.get("DRAFTTRAIN_CACHE") or Path.home() / ".cache" / "drafttrain")


def remembered(name: str) -> dict[str, Any]:
    """What `remember` kept of this machine under `name`; nothing where it is missing or damaged."""
    try:
        values = json.loads((cache_root() / "measured" / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def remember(name: str, values: Mapping[str, Any]) -> None:
    """Adds what was measured of this machine to what is known under `name`; where it cannot be written, the next process measures again."""
    path = cache_root() / "measured" / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**remembered(name), **values}, indent=1))
    except OSError:
        return


def processor() -> str:
    """Its name; on Linux as the kernel knows it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def check_file_name(path: Path) -> None:
    """A `UserError` unless a file can be written at `path`: asked before long work whose result goes there."""
    final = _followed(path)
    folder = final.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"'{path}' cannot be written: '{folder}' is a file, not a folder; choose another name")
    place = final if final.exists() else folder
    if not os.access(place, os.W_OK):
        raise UserError(f"'{path}' cannot be written: no permission to write '{place}'; choose another name")


def _followed(path: Path) -> Path:
    """The file that a name stands for, behind links."""
    final = Path(os.path.realpath(path))
    if final.is_symlink():
        raise UserError(f"'{path}' is a link that leads to itself; choose another name")
    if final.is_dir():
        raise UserError(f"'{path}' is a folder; give the name of a file")
    return final


def _sweep_files(final: Path) -> None:
    """Removes what killed writers of this file left."""
    head, tail = f".{final.name}.", ".partial"
    for leftover in _beside(final, head, tail):
        writer = leftover.name[len(head) : -len(tail)]
        if writer.isdigit() and not psutil.pid_exists(int(writer)):
            leftover.unlink(missing_ok=True)


def _beside(path: Path, head: str, tail: str) -> list[Path]:
    """What lies in the same folder under names that begin and end so."""
    if not path.parent.is_dir():
        return []
    return [path.with_name(name) for name in os.listdir(path.parent) if name.startswith(head) and name.endswith(tail)]


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of `folder`; an older one stands until that moment.

    Raises `UserError` where another process fills the same one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_beside(folder), folder):
        sweep_folder(folder)
        partial = _partial_folder(folder)
        partial.mkdir()
        try:
            yield partial
            sync_tree(partial)
            replace_folder(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, old: Path) -> None:
    """`new` takes the place of `old`, which is removed. At any moment one of them stands whole at `standing(old)`."""
    if not old.exists():
        os.replace(new, old)
    elif _exchanged(new, old):
        shutil.rmtree(new)
    else:
        aside = _aside(old)
        os.replace(old, aside)
        os.replace(new, old)
        sync(old.parent)
        shutil.rmtree(aside)
    sync(old.parent)


def standing(folder: Path) -> Path:
    """Where a folder's content is now: at its own place, or, while a system without exchange replaces it, beside it."""
    return _aside(folder) if not folder.exists() and _aside(folder).exists() else folder


def sweep_folder(folder: Path) -> None:
    """Removes what killed writers of this folder left; the only whole copy goes back to its place. Only for who holds the folder's lock."""
    earlier = [*_beside(folder, f".old-{folder.name}-", ""), *_beside(folder, f".{folder.name}-", "")]  # names that older versions used
    for aside in (_aside(folder), *(path / "folder" for path in earlier)):
        if aside.exists() and not folder.exists():
            os.replace(aside, folder)
    for leftover in (_aside(folder), _partial_folder(folder), *earlier):
        shutil.rmtree(leftover, ignore_errors=True)


def _partial_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _exchanged(left: Path, right: Path) -> bool:
    """Whether the two names swapped in one step; False where the system cannot do that."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    return bool(libc.renameat2(HERE, os.fsencode(left), HERE, os.fsencode(right), EXCHANGE) == 0)


def set_usual_mode(path: Path) -> None:
    """The mode that any new file or folder has under the user's umask; some libraries make files that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~umask)


def sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, survive a power cut after this call."""
    if path.is_dir() and os.name != "posix":
        return  # only POSIX opens folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync` of everything below a folder and of itself; their modes follow the umask."""
    for path in (*folder.rglob("*"), folder):
        set_usual_mode(path)
        sync(path)


@contextmanager
def locked(path: Path, output: Path, wait: bool = False) -> Iterator[None]:
    """Held by one at a time, and given back by a killed process; `path` is the lock's file.

    wait: for the other process to end, instead of a `UserError` that names `output`.
    """
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"'{output}': another process writes it now; wait until it ends, or choose another output") from error
    try:
        yield
    finally:
        lock.release()


def lock_beside(path: Path) -> Path:
    """The lock of a file, or of a folder that is replaced as a whole."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """While this is entered no other process writes in `folder`, which is made where it is missing; a `UserError` where one does."""
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", folder):
        yield


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission into a `UserError` that says what is safe."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"'{path}': {write_reason(error)}; make room or choose another output, then run the same command again: what was finished "
            f"before is kept"
        ) from error


def write_reason(error: Exception) -> str:
    """Why something could not be written, in words."""
    if (isinstance(error, OSError) and error.errno in DISK_FULL) or "os error 28" in str(error):  # safetensors wraps the system's error
        return "the disk is full"
    return f"cannot be written ({reason(error)})"


def reason(error: Exception) -> str:
    """What the system or a library says, without numbers and paths."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def unreadable(error: Exception) -> bool:
    """Whether a file is not damaged, but closed to this user."""
    return isinstance(error, OSError) and error.errno in FORBIDDEN


def reachable(path: Path, what: str) -> bool:
    """Whether something is there; a `UserError` where this user may not know."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise read_refusal(what, error, "") from error
    except (OSError, ValueError):
        return False
    return True


def read_refusal(what: str, error: Exception, mend: str) -> UserError:
    """The `UserError` for a file that cannot be read. mend: what to do where it is damaged, not where it is closed to us."""
    if unreadable(error):
        return UserError(f"{what}: cannot be read (permission denied: another user's?); ask its owner for the right to read it")
    return UserError(f"{what}: missing, truncated or corrupt ({reason(error)}); {mend}")


def read_bytes(path: Path, what: str, mend: str) -> bytes:
    """A file's content, or a `UserError` that `what` opens."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise read_refusal(what, error, mend) from error


def read_json(path: Path, what: str, mend: str) -> dict[str, Any]:
    """The object in a JSON file, or a `UserError` that `what` opens and `mend` (what to do) closes."""
    data = read_bytes(path, what, mend)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: {path.name} is corrupt ({first_line(error)}); {mend}") from error
    if not isinstance(value, dict):
        raise UserError(f"{what}: {path.name} is corrupt (an object is needed, it holds {type(value).__name__}); {mend}")
    return value


def check_format(data: Mapping[str, Any], known: int, what: str, mend: str) -> None:
    """A `UserError` where a file says that it was written in another format."""
    found = data.get("format")
    if found != known or isinstance(found, bool):
        raise UserError(f"{what}: format {found!r}, but this drafttrain reads {known}; {mend}")


def open_tensors(path: Path, what: str, mend: str) -> Any:
    """The tensors of a safetensors file, read when asked for; or a `UserError`."""
    try:
        path.open("rb").close()  # safetensors tells every failure to open as a missing file
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise read_refusal(what, error, mend) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
    """A safetensors file, whole or not at all, and the folders to it; a `UserError` where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writable(path.parent):
        write_whole(path, lambda partial: save_file(dict(tensors), partial, about))


def load_tensors(path: Path, what: str, mend: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or a `UserError`."""
    try:
        path.open("rb").close()
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise read_refusal(what, error, mend) from error
    return tensors


def save_configured(folder: Path, config: Callable[[str], Mapping[str, Any]], weights: dict[str, Tensor]) -> Path:
    """A folder of config.json and model.safetensors, whole or not at all. config: makes the configuration from the weights' hash."""
    with whole_folder(folder) as partial:
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(config(sha256(partial / WEIGHTS)), indent=2, default=str)
        (partial / CONFIG).write_text(text + "\n", encoding="utf-8")
    return folder


def load_weights(folder: Path, digest: str | None, what: str, mend: str) -> dict[str, Tensor]:
    """The tensors of such a folder. digest: the hash in its configuration; None where an earlier version wrote none."""
    path = folder / WEIGHTS
    weights = load_tensors(path, f"{what}: {WEIGHTS}", mend)
    if digest is not None and sha256(path) != digest:
        raise UserError(f"{what}: {WEIGHTS} is damaged or not its own: the content differs from the hash in {CONFIG}; {mend}")
    return weights


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    for block in blocks(path):
        digest.update(block)
    return digest.hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """16 hex digits over the names and bytes of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + str(path.stat().st_size).encode() + b"\0")
        for block in blocks(path):
            digest.update(block)
    return digest.hexdigest()[:16]


def blocks(path: Path) -> Iterator[bytes]:
    """A file's content, a few MiB at a time."""
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            yield block
