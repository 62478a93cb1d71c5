"""Words of earlier versions and what they are called now: old recipes, drafters and result rows are read, and one line says so.

The names of now are the field's own (docs/architecture.md, "Called elsewhere").
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

KEYS = {
    "unroll": "ttt_steps",
    "unroll_ramp": "ttt_ramp",
    "head_cost": "draft_cost",
    "head_gain": "draft_gain",
    "prices": "hybrid_costs",
    "bets": "prefetched",
    "hits": "prefetch_hits",
    "law_gap": "probs_gap",
}
"""Key of a recipe, a drafter's configuration or a result row -> its name now."""

DRAWS = {"point": "deterministic"}
"""Values of `draws` and `treat_as`."""

FEATURES = {"aux": "aux_hidden_states", "last": "last_hidden_state"}
"""Names of captured features."""

FORMATS = {"plain": "causal_lm"}
"""Export formats."""

_VALUES = {"draws": DRAWS, "treat_as": DRAWS, "capture": FEATURES, "formats": FORMATS}


class Renamed(UserWarning):
    """A word of an earlier version was read; the command line prints it as one line."""


def current_key(key: str, fields: Collection[str]) -> str:
    """`key`, or its name now where it is an old one and `fields` hold the new one."""
    new = KEYS.get(key, key)
    if key in fields or new not in fields:
        return key
    _say(key, new)
    return new


def current_value(key: str, value: Any) -> Any:
    """The value of `key` in the words of now: a word, or a list of words."""
    table = _VALUES.get(key, {})
    if isinstance(value, (list, tuple)):
        return type(value)(current_value(key, item) for item in value)
    if isinstance(value, str) and value in table:
        _say(value, table[value])
        return table[value]
    return value


def current_row(row: Any) -> Any:
    """A result row with every key and word of now, its nested parts too; says nothing, since old results stay as they are."""
    if isinstance(row, list):
        return [current_row(item) for item in row]
    if not isinstance(row, dict):
        return row
    current = {}
    for key, value in row.items():
        table = _VALUES.get(key, {})
        current[KEYS.get(key, key)] = table.get(value, value) if isinstance(value, str) else current_row(value)
    return current


def _say(old: str, new: str) -> None:
    warnings.warn(f"'{old}' is called '{new}' now; it was read as that", Renamed, stacklevel=2)
