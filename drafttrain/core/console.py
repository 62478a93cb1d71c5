"""What is shown in a terminal: the words of users and models as they are, never taken for markup, and without control of the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

CONTROL = re.compile("\x1b\\[[0-?]*[ -/]*[@-~]|\x1b[\\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Sequences that move the cursor, colour or rename the terminal (ECMA-48), and all other control characters but tab and line feed."""


def printable(text: str) -> str:
    """The text without control characters; halves of a character that no file or terminal can hold become question marks."""
    return CONTROL.sub("", text).encode("utf-8", errors="replace").decode("utf-8")


class SafeConsole(Console):
    """A console that applies styles given as `Text`, and nothing that stands in a text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
