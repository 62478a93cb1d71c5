"""Counters that each thread has of its own, so that decoding in several threads with one target counts apart."""

from __future__ import annotations

from threading import get_ident
from typing import Any


class ThreadCount:
    """An attribute that is a number of its own for each thread, 0 at first."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.place = f"_{name}_by_thread"

    def __get__(self, holder: Any, owner: type) -> int:
        counts: dict[int, int] = holder.__dict__.get(self.place, {})
        return counts.get(get_ident(), 0)

    def __set__(self, holder: Any, value: int) -> None:
        holder.__dict__.setdefault(self.place, {})[get_ident()] = value
