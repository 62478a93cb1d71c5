"""Policies make each round's plan from what is known before it."""

from __future__ import annotations

from typing import Protocol

from drafttrain.core.plan import Plan
from drafttrain.runtime.stats import Statistics


class Policy(Protocol):
    """What a round may draft."""

    def plan(self, history: Statistics) -> Plan:
        """The next round's plan; `history` is the batch's statistics so far."""
        ...


class Fixed:
    """The same plan every round."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def plan(self, history: Statistics) -> Plan:
        return self._plan


POLICIES: dict[str, type[Fixed]] = {"fixed": Fixed}
