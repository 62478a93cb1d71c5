"""The one exception for mistakes a user can mend; the CLI prints it as one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Names the value, what was expected and what to do."""


def first_line(error: Exception) -> str:
    """Of a library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def refuse_halves(value: Any, where: str) -> None:
    """A `UserError` where a text anywhere within `value` holds half a character (a lone surrogate, as of an emoji that was cut in two)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            refuse_halves(key, where)
            refuse_halves(inner, where)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            refuse_halves(inner, where)
    elif isinstance(value, str):
        half = next((letter for letter in value if "\ud800" <= letter <= "\udfff"), None)
        if half is not None:
            raise UserError(f"{where}: the text holds U+{ord(half):04X}, half of a character; write it whole, in UTF-8")
