"""Several processes write one store: each a share of the ids, in a part of its own, which joins the store when the share is done.

No process talks to another. A part is a small store in `part-I-of-N` beside the shards; whoever holds the store's lock moves the shards of
finished parts, and of parts whose process died, under the store's one index. Wherever a process is killed, a conversation lies in a part or
in the store, or is written again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from drafttrain.core.disk import locked, writable
from drafttrain.core.errors import UserError
from drafttrain.data.server import ANSWERS
from drafttrain.data.shards import INDEX, read_index
from drafttrain.data.store import Store, StoreWriter


@dataclass(frozen=True)
class Share:
    """Which of the ids a process writes: those that leave `index` when divided by `count`."""

    index: int = 0
    count: int = 1
    waits: bool = False  # for the others to end, as processes of one launcher do

    def mine(self, id: int) -> bool:
        return id % self.count == self.index

    @property
    def whole(self) -> bool:
        return self.count == 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """`0/4` is the first of four."""
        index, found, count = text.partition("/")
        if not (found and index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise UserError(f"--shard '{text}': expected I/N with I from 0 to N - 1, such as 0/4 for the first of four")
        return cls(int(index), int(count))

    @classmethod
    def of_launcher(cls) -> Share:
        """This process's share among those that `accelerate launch` started."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(int(os.environ.get("RANK", "0")), count, count > 1)


ALL = Share()


@contextmanager
def part_of(folder: Path, share: Share) -> Iterator[Path]:
    """The folder of a share's part, which no other process writes meanwhile."""
    part = folder / f"part-{share.index}-of-{share.count}"
    with writable(part):
        part.mkdir(parents=True, exist_ok=True)
    with locked(lock_of(part), part):
        yield part


def lock_of(part: Path) -> Path:
    return part.with_name(f".{part.name}.lock")


def refuse_others(folder: Path, share: Share) -> None:
    """A `UserError` where processes of another division of the ids are at work."""
    for part in parts(folder):
        if not part.name.endswith(f"-of-{share.count}") and _busy(part):
            raise UserError(f"'{part}' is being written, by processes of another number of shares; wait until they end")


def parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("part-*-of-*") if path.is_dir())


def _busy(part: Path) -> bool:
    lock = FileLock(lock_of(part), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False


@contextmanager
def joined(folder: Path, share: Share, store: Callable[[], StoreWriter]) -> Iterator[StoreWriter]:
    """The store itself, with what idle parts held, while nobody else changes it.

    Raises `UserError` where processes of another division are at work: theirs and ours would write the same conversations.
    """
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", folder, wait=True):
        refuse_others(folder, share)
        writer = store()
        take_up(folder, writer)
        yield writer


def take_up(folder: Path, writer: StoreWriter) -> None:
    """What idle parts hold goes into the store."""
    for part in parts(folder):
        if not _busy(part):
            adopt(writer, part)


def adopt(writer: StoreWriter, part: Path) -> None:
    """Moves a part's shards under the store's index. A server's answers stay, for who takes up this share again."""
    if (part / INDEX).exists():
        writer.take(Store.open(part))
        (part / INDEX).unlink()  # first: what it lists goes now
    for path in part.iterdir():
        if path.name != ANSWERS:
            path.unlink()


def sweep(folder: Path) -> None:
    """Removes the parts of a store that is complete."""
    for part in parts(folder):
        if not _busy(part):
            shutil.rmtree(part)


def completed(folder: Path, share: Share) -> Store | None:
    """The store, where it is complete; processes of a launcher wait for each other."""
    while not read_index(folder).complete:
        if not share.waits:
            return None
        time.sleep(0.2)
    return Store.open(folder, verify=False)
