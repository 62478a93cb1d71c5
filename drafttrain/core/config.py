"""Strict configuration base: an unknown key stops the run and names the nearest known one."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from drafttrain.core.errors import UserError, nearest
from drafttrain.core.renamed import current_key, current_value

NAMES: dict[type, str] = {bool: "a switch (true or false)", int: "a number", float: "a number", str: "a text"}
C = TypeVar("C", bound="Config")

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What torch's generators and the 64-bit counters of `core/rng.py` take alike."""


class Config(BaseModel):
    """Base of every configuration class: its numbers are finite, the docstring under a field is its description in the schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        current: dict[str, Any] = {}
        for old in data:
            key = current_key(str(old), cls.model_fields)
            if key not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                raise ValueError(f"unknown key '{key}'{nearest(key, cls.model_fields)}; known keys: {known}")
            if key != old and key in data:
                raise ValueError(f"'{old}' is the old name of '{key}', and both are given; keep '{key}'")
            current[key] = current_value(key, data[old])
            _check_kind(key, cls.model_fields[key].annotation, current[key])
        return current


def _check_kind(key: str, annotation: Any, value: Any) -> None:
    """A `ValueError` for a value of another kind (a text or a switch where a number belongs), which pydantic would convert."""
    if isinstance(value, (list, tuple)):
        for inner in value:
            _check_kind(key, annotation, inner)
        return
    kinds = _kinds(annotation)
    if not kinds or not isinstance(value, (bool, str, int, float)) or type(value) in kinds:
        return
    if (type(value) is int and float in kinds) or (type(value) is float and int in kinds):
        return
    if isinstance(value, str) and not value.strip().isdigit() and (bool not in kinds or not value.isalpha()):
        return  # pydantic says what is wrong with other words; `5e-4` is a number that YAML takes for a text
    wanted = " or ".join(sorted({NAMES[kind] for kind in kinds}))
    raise ValueError(f"{key}: {NAMES[type(value)]} {value!r} where {wanted} belongs")


def _kinds(annotation: Any) -> set[type]:
    """The plain kinds of value that a field takes; none where it takes anything else too, which pydantic judges alone."""
    if annotation in NAMES:
        return {annotation}
    if annotation is type(None) or annotation is Ellipsis:
        return set()
    origin = get_origin(annotation)
    if origin is Literal:
        return {type(value) for value in get_args(annotation) if type(value) in NAMES}
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType, tuple, list):
        parts = [part for part in get_args(annotation) if part is not type(None) and part is not Ellipsis]
        kinds = [_kinds(part) for part in parts]
        return set[type]().union(*kinds) if all(kinds) else set()
    return set()


def parse(cls: type[C], data: Any, where: str) -> C:
    """`data` as `cls`; a violation becomes a `UserError` whose one line names the key, the value and the reason.

    where: what the user would look for, such as a file's path; it opens the message.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union's members, the one that the value meant
        key = ".".join(_written_keys(first["loc"], data)) or "(top level)"
        raise UserError(f"{where}: {key}: {_reason(first)}") from error


def _written_keys(location: tuple[int | str, ...], data: Any) -> list[str]:
    """The keys as they stand in `data`: pydantic's path also names the chosen member of a union (`drafter.eagle3.ttt_steps`)."""
    keys, place = [], data
    for part in location:
        chosen = isinstance(place, dict) and part not in place and part in place.values()
        if chosen or "[" in str(part):
            continue
        keys.append(str(part))
        if isinstance(place, dict):
            place = place.get(part)
        else:
            place = place[part] if isinstance(place, (list, tuple)) and isinstance(part, int) else None
    return keys


def _reason(error: Any) -> str:
    """What is wrong, with the nearest allowed word where words are allowed, and the value."""
    given, context = error["input"], error.get("ctx", {})
    if error["type"] == "union_tag_invalid":
        known = re.findall(r"'([^']+)'", context["expected_tags"])
        return f"{context['discriminator'][1:-1]} '{context['tag']}' is unknown{nearest(context['tag'], known)}; known: {', '.join(known)}"
    if error["type"] == "union_tag_not_found":
        return f"the key {context['discriminator']} is missing"
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "literal_error":
        reason += nearest(str(given), re.findall(r"'([^']+)'", context["expected"]))
    return reason if isinstance(given, dict) else f"{reason} (got {reprlib.repr(given)})"


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
