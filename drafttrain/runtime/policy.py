"""Policies make each round's plan from what is known before it. A policy changes how much is drafted, never the law of what comes out."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from drafttrain.core.config import Config
from drafttrain.core.plan import Plan
from drafttrain.runtime.stats import Statistics
from drafttrain.verify.confidence import confidence


class PolicyConfig(Config):
    """Base of the policies' configurations; `name` is the key in `POLICIES`."""

    name: str


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


class ConfidentConfig(PolicyConfig):
    """Higher floors draft less."""

    name: Literal["confidence"] = "confidence"
    floor: float = Field(default=0.3, ge=0, le=1)
    """A row draws nothing more once the confidences of its levels multiply to less. 0 always drafts the whole shape."""
    at_least: int = Field(default=1, ge=0)
    """Levels that are drafted whatever the confidence (k_min)."""
    entropy_weight: float = Field(default=0.5, ge=0, le=1)
    """Of the entropy in the confidence; the rest is the margin's."""


class Confident:
    """The exact mode of confidence-modulated speculation (see `verify/confidence.py`): only the draft's length follows the drafter.

    A level's confidence is that of its most confident node. It is read from the drafter's law before a token is drawn from it, so every
    lossless rule stays exact.
    """

    Config: ClassVar[type[PolicyConfig]] = ConfidentConfig

    def __init__(self, plan: Plan, config: PolicyConfig) -> None:
        assert isinstance(config, ConfidentConfig)
        self.config, self._plan = config, replace(plan, stop=self._stop)
        self._reached = torch.empty(0)  # [B] product of the confidences of this round's levels

    def plan(self, history: Statistics) -> Plan:
        return self._plan

    def _stop(self, level: int, logits: Tensor) -> Tensor:
        """[B, W, Vd] -> [B]; raw logits: temperature and cuts would make every law look confident."""
        here = confidence(logits.float().softmax(-1), self.config.entropy_weight).amax(1)
        self._reached = here if level == 0 else self._reached * here
        return (self._reached < self.config.floor) & (level >= self.config.at_least)


POLICIES: dict[str, type[Policy]] = {"fixed": Fixed, "confidence": Confident}
