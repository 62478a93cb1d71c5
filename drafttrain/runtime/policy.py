"""Policies make each round's plan from what is known before it. A policy changes how much is drafted, never the law of what comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from pydantic import Field
from torch import Tensor

from drafttrain.core.config import Config
from drafttrain.core.plan import Plan
from drafttrain.core.sampling import Sampling
from drafttrain.runtime.decision import load_decision
from drafttrain.runtime.stats import Statistics


class PolicyConfig(Config):
    """Base of the policies' configurations; `name` is the key in `POLICIES`."""

    name: str

    def check(self, sampling: Sampling) -> None:
        """A `UserError` where the policy was made for other sampling, or what it reads is missing."""


class Policy(Protocol):
    """What a round may draft."""

    Config: ClassVar[type[PolicyConfig]]

    def __init__(self, plan: Plan, config: PolicyConfig) -> None: ...

    def plan(self, history: Statistics) -> Plan:
        """The next round's plan; `history` is the batch's statistics so far."""
        ...


class FixedConfig(PolicyConfig):
    """No options."""

    name: Literal["fixed"] = "fixed"


class Fixed:
    """The same plan every round."""

    Config: ClassVar[type[PolicyConfig]] = FixedConfig

    def __init__(self, plan: Plan, config: PolicyConfig | None = None) -> None:
        self._plan = plan

    def plan(self, history: Statistics) -> Plan:
        return self._plan


class DecisionConfig(PolicyConfig):
    """Higher thresholds draft less."""

    name: Literal["decision"] = "decision"
    path: str
    """Folder of a decision model, as `drafttrain decision` writes it."""
    threshold: float = Field(default=0.4, ge=0, le=1)
    """A row goes on while some node's score is above it. Below every score (0) the whole shape is drafted."""
    at_least: int = Field(default=1, ge=1)
    """Levels that are drafted whatever the scores."""

    def check(self, sampling: Sampling) -> None:
        load_decision(Path(self.path)).check(sampling)


class Decided:
    """Ends a tree before a level that a trained decision model expects to be rejected (see `runtime/decision.py`).

    The model reads the law that a level was drawn from, and only levels not drawn yet are given up: every lossless rule stays exact.
    It waits for the host once a level. Rows drafted together end together: sampled texts then depend on their batch, their law does not.
    """

    Config: ClassVar[type[PolicyConfig]] = DecisionConfig

    def __init__(self, plan: Plan, config: PolicyConfig) -> None:
        assert isinstance(config, DecisionConfig)
        self.config, self.model = config, load_decision(Path(config.path))
        self._plan = replace(plan, enough=self._enough)

    def plan(self, history: Statistics) -> Plan:
        return self._plan

    def _enough(self, level: int, logits: Tensor, states: Tensor | None) -> Tensor:
        """[B, W, Vd] logits and [B, W, D] states -> [B]."""
        hopeful = (self.model.score(logits, states) > self.config.threshold).any(1)
        return ~hopeful & (level + 1 >= self.config.at_least)


POLICIES: dict[str, type[Policy]] = {"fixed": Fixed, "decision": Decided}
