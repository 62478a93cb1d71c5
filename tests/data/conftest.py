"""The tiny target that the data tests share."""

from __future__ import annotations

import pytest

from drafttrain.target.adapter import Target
from tests.data.stores import make_target


@pytest.fixture(scope="session")
def target() -> Target:
    return make_target()
