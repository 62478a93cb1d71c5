"""Strict configuration base: an unknown key stops the run and names the nearest known one."""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from drafttrain.core.errors import UserError, nearest

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every configuration class. The docstring under a field is its description in the schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    known = ", ".join(cls.model_fields)
                    raise ValueError(f"unknown key '{key}'{nearest(str(key), cls.model_fields)}; known keys: {known}")
        return data


def parse(cls: type[C], data: Any, where: str) -> C:
    """`data` as `cls`; a violation becomes a `UserError` whose one line names the key, the value and the reason.

    where: what the user would look for, such as a file's path; it opens the message.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(top level)"
        reason = first["msg"].removeprefix("Value error, ")
        value = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        raise UserError(f"{where}: {key}: {reason}{value}") from error


def fingerprint(*parts: Any) -> str:
    """16 hex digits over the canonical JSON of `parts`; equal content gives an equal fingerprint on any machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(value)
