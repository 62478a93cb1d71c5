"""Lines of JSON on disk that survive being killed: a journal that grows unit by unit, and a results file that gains a
run's rows at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drafttrain.core.disk import lock_beside, locked, writable, write_whole
from drafttrain.core.errors import UserError

MEND = "restore the file or move it away and run again"


class ResultJournal:
    """Appends whole lines; a line torn by a kill or a full disk is left out when it is read, and dropped before anything is appended."""

    def __init__(self, path: Path) -> None:
        self.path, self.whole = path, False  # whether its last line is known to be no torn one
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.entries = parse_lines(_text(self._whole(), path), path)
        """What stood in it when it was opened."""

    def append(self, entry: dict[str, Any]) -> None:
        """Stands on the disk when this returns."""
        with writable(self.path), self.path.open("ab") as file:
            if not self.whole:
                file.truncate(len(self._whole()))
                self.whole = True
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this is entered no other process adds to the journal, and `entries` are what all before it left; a `UserError` where one
        adds to it now."""
        with locked(lock_beside(self.path), self.path):
            self.entries, self.whole = parse_lines(_text(self._whole(), self.path), self.path), False
            yield

    def _whole(self) -> bytes:
        """Its lines but one that was torn."""
        data = self.path.read_bytes() if self.path.exists() else b""
        return data[: data.rfind(b"\n") + 1]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file's JSON objects, one a line, or a `UserError` that names it."""
    return parse_lines(_text(path.read_bytes(), path), path)


def parse_lines(text: str, path: Path) -> list[dict[str, Any]]:
    """JSON objects, one a line; `path` is what an error names."""
    entries = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):  # `splitlines` would cut within strings
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"'{path}', line {number}: not JSON; {MEND}") from error
        if not isinstance(entry, dict):
            raise UserError(f"'{path}', line {number}: {type(entry).__name__}, not an object; {MEND}")
        entries.append(entry)
    return entries


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}': not UTF-8 ({error}); {MEND}") from error


def append_whole(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Adds lines to a file: all of them or none, whatever happens in between; processes that do so at once wait for each other."""
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_beside(path), path, wait=True), writable(path):
        before = path.read_bytes() if path.exists() else b""
        write_whole(path, lambda partial: partial.write_bytes(before + lines_of(entries)))


def lines_of(entries: Sequence[dict[str, Any]]) -> bytes:
    """What a file of these entries holds."""
    return b"".join(map(_line, entries))


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
