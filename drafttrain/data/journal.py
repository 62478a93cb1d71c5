"""Appends to a store under a progress bar, and sees that what is finished is safe."""

from __future__ import annotations

import time

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from drafttrain.core.console import SafeConsole
from drafttrain.core.types import Features
from drafttrain.data.store import Conversation, StoreWriter

FLUSH_SECONDS = 30.0  # a killed run loses what it finished since the last flush


class StoreJournal:
    """Appends to a store with a progress bar, and flushes every few seconds, on Ctrl-C and on errors."""

    def __init__(self, writer: StoreWriter, what: str, goal: int, done: int, unit: str, flush_seconds: float) -> None:
        self.writer, self.flush_seconds = writer, flush_seconds
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(f"{{task.completed:,}}/{{task.total:,}} {unit}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=SafeConsole(stderr=True),
        )
        self.task = self.bar.add_task(what, total=goal, completed=done, speed=0.0)
        self.begun = self.flushed = time.monotonic()
        self.worked = 0  # tokens of this run, for the speed

    def __enter__(self) -> StoreJournal:
        self.bar.start()
        return self

    def add(self, conversation: Conversation, features: Features | None, worked: int) -> None:
        """worked: the tokens this took, for the speed that is shown."""
        self.writer.append(conversation, features)
        self.worked += worked
        if time.monotonic() - self.flushed >= self.flush_seconds:
            self.writer.flush()
            self.flushed = time.monotonic()

    def show(self, done: int) -> None:
        self.bar.update(self.task, completed=done, speed=self.worked / (time.monotonic() - self.begun))

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.writer.flush()
        finally:
            self.bar.stop()  # fails where the terminal was closed
