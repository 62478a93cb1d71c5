"""Policies make each round's plan from what is known before it. A policy changes how much is drafted, never the distribution of what comes
out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from drafttrain.core.config import Config
from drafttrain.core.disk import folder_fingerprint
from drafttrain.core.errors import UserError
from drafttrain.core.plan import Plan
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.base import Drafter
from drafttrain.runtime.decision import load_decision
from drafttrain.runtime.stats import History, PastRound
from drafttrain.verify.confidence import confidence


class PolicyConfig(Config):
    """Base of the policies' configurations; `name` is the key in `POLICIES`."""

    name: str

    def check(self, sampling: Sampling) -> None:
        """A `UserError` where the policy was made for other sampling, or what it reads is missing."""

    def check_drafter(self, drafter: Drafter) -> None:
        """A `UserError` where the policy was made for another drafter, as far as files tell: one made in memory passes."""


class Policy(Protocol):
    """What a round may draft."""

    Config: ClassVar[type[PolicyConfig]]

    def __init__(self, plan: Plan, config: PolicyConfig) -> None: ...

    def plan(self, history: History) -> Plan:
        """The next round's plan; `history` is the batch's so far. Asked once more before the prompts are read, for the cache's
        size."""
        ...


class FixedConfig(PolicyConfig):
    """No options."""

    name: Literal["fixed"] = "fixed"


class Fixed:
    """The same plan every round."""

    Config: ClassVar[type[PolicyConfig]] = FixedConfig

    def __init__(self, plan: Plan, config: PolicyConfig | None = None) -> None:
        self._plan = plan

    def plan(self, history: History) -> Plan:
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

    A level's confidence is that of its most confident node. It is read from the drafter's distribution before a token is drawn from it, so
    every lossless rule stays exact.
    """

    Config: ClassVar[type[PolicyConfig]] = ConfidentConfig

    def __init__(self, plan: Plan, config: PolicyConfig) -> None:
        assert isinstance(config, ConfidentConfig)
        self.config, self._plan = config, replace(plan, stop=self._stop)
        self._reached = torch.empty(0)  # [B] product of the confidences of this round's levels

    def plan(self, history: History) -> Plan:
        return self._plan

    def _stop(self, level: int, logits: Tensor) -> Tensor:
        """[B, W, Vd] -> [B]; raw logits: temperature and cuts would make every distribution look confident."""
        here = confidence(logits.float().softmax(-1), self.config.entropy_weight).amax(1)
        self._reached = here if level == 0 else self._reached * here
        return (self._reached < self.config.floor) & (level >= self.config.at_least)


PROBE = 8
"""Drafted rounds after which drafting is judged."""
WINDOW = 32
"""Drafted rounds, the latest ones, that a judgement rests on."""
PLAIN_PROBE = 2
"""Plain rounds in a row that tell what a plain round takes."""
RENEW = 128
"""Drafted rounds after which plain ones are timed again: texts grow, and machines get busy."""
PAUSE, LONGEST_PAUSE = 16, 512
"""Plain rounds before drafting is tried again; they double with every try in vain, until drafting has won over a whole window."""


@dataclass
class Evidence:
    """What is known of batches of one number of rows, whose rounds are comparable."""

    drafted: deque[PastRound] = field(default_factory=lambda: deque(maxlen=WINDOW))
    plain: deque[PastRound] = field(default_factory=lambda: deque(maxlen=2 * PLAIN_PROBE))
    drafted_since: int = 0  # rounds since plain ones were timed
    plain_left: int = 0  # rounds to go before drafting is tried again
    pause: int = PAUSE  # the next one's length

    @property
    def gain(self) -> float:
        """Tokens a second of drafting over those of plain decoding: tau x seconds of a plain round / seconds of a drafted one."""
        tau = sum(one.tokens for one in self.drafted) / max(1, sum(one.going for one in self.drafted))
        drafted = _seconds(self.drafted)
        return tau * _seconds(self.plain) / drafted if drafted else float("inf")


class AdaptiveConfig(PolicyConfig):
    """No options."""

    name: Literal["adaptive"] = "adaptive"


class Adaptive:
    """Drafts while that pays, by the accepted length and the median times of the rounds so far; else decodes plainly, and tries again
    now and then.

    Counts and times of past rounds say nothing about the tokens to come, so that every rule stays exact. A batch is judged as a whole. What
    was learnt serves the decoder's next batches too.
    """

    Config: ClassVar[type[PolicyConfig]] = AdaptiveConfig

    def __init__(self, plan: Plan, config: PolicyConfig | None = None) -> None:
        self._plan, self._plainly = plan, replace(plan, draft=False)
        self._known: dict[int, Evidence] = {}  # by number of rows
        self._rows = 0  # of the last round seen

    def plan(self, history: History) -> Plan:
        if history.latest is not None:
            self._learn(history.latest)
        return self._plan if self._drafts(self._known.setdefault(self._rows, Evidence())) else self._plainly

    def _learn(self, last: PastRound) -> None:
        known = self._known.setdefault(last.rows, Evidence())
        self._rows = last.rows
        (known.drafted if last.drafted else known.plain).append(last)
        if last.drafted:
            known.drafted_since += 1
        else:
            known.plain_left -= 1

    @staticmethod
    def _drafts(known: Evidence) -> bool:
        """Whether the next round drafts; changes nothing but which phase it is in."""
        if known.plain_left > 0:
            return False
        if len(known.drafted) < PROBE:
            return True
        if len(known.plain) < PLAIN_PROBE or known.drafted_since >= RENEW:
            known.drafted_since, known.plain_left = 0, PLAIN_PROBE
            return False
        if known.gain >= 1:
            if len(known.drafted) == WINDOW:  # not by a lucky try
                known.pause = PAUSE
            return True
        known.plain_left, known.pause = known.pause, min(2 * known.pause, LONGEST_PAUSE)
        known.drafted.clear()  # the next try is judged by itself
        return False


def _seconds(rounds: Iterable[PastRound]) -> float:
    return median(one.seconds for one in rounds)


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

    def check_drafter(self, drafter: Drafter) -> None:
        learnt_from = load_decision(Path(self.path)).shape.drafter
        given = None if drafter.files is None else folder_fingerprint(drafter.files)
        if given not in (None, learnt_from):
            raise UserError(
                f"decision model '{self.path}': it learnt from rounds of drafter {learnt_from}, but '{drafter.files}' is {given}; "
                f"decode with the drafter it belongs to, or train one for this drafter with `drafttrain decision`"
            )


class Decided:
    """Ends a tree before a level that a trained decision model expects to be rejected (see `runtime/decision.py`).

    The model reads the distribution that a level was drawn from, and only levels not drawn yet are given up: every lossless rule stays
    exact.
    It waits for the host once a level. Rows drafted together end together: sampled texts then depend on their batch, their distribution
    does not.
    """

    Config: ClassVar[type[PolicyConfig]] = DecisionConfig

    def __init__(self, plan: Plan, config: PolicyConfig) -> None:
        assert isinstance(config, DecisionConfig)
        self.config, self.model = config, load_decision(Path(config.path))
        self._plan = replace(plan, enough=self._enough)

    def plan(self, history: History) -> Plan:
        return self._plan

    def _enough(self, level: int, logits: Tensor, states: Tensor | None) -> Tensor:
        """[B, W, Vd] logits and [B, W, D] states -> [B]."""
        hopeful = (self.model.score(logits, states) > self.config.threshold).any(1)
        return ~hopeful & (level + 1 >= self.config.at_least)


POLICIES: dict[str, type[Policy]] = {"fixed": Fixed, "confidence": Confident, "adaptive": Adaptive, "decision": Decided}
