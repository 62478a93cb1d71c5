"""Shapes that say nothing, or two things, are refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from drafttrain.core.plan import Static


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give children"),
        ({"children": [0]}, "greater than or equal to 1"),
        ({"children": [2], "choices": [[0]]}, "one of them"),
        ({"choices": [[-1]]}, "ranks count from 0"),
    ],
)
def test_a_static_shape_names_its_nodes_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Static.model_validate(options)
