"""Routers choose which drafter proposes a row's next tree. They change speed, never what the text is distributed as: a choice hangs on
rounds that are over, and on random numbers of its own.

`ucb`, `exp3` and `halving` learn from the drafter they chose (MetaSD: Kim et al., 2026, arXiv:2604.05417). `hedge` scores every drafter on
the committed tokens, without a further target forward (HedgeSpec: Liu et al., 2025, arXiv:2510.20064). A = arms: the drafters in order and,
where `plain` is set, plain decoding. K = draft length.

Symbols on committed tokens: g is the probability that a draft token is accepted there before the token is known, sum min(p, q); w the
probability that the token x that did come would have been drafted and accepted, min(1, q(x) / p(x)).
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from drafttrain.core.config import Config
from drafttrain.core.errors import UserError, first_line
from drafttrain.runtime.classifier import load_classifier


class RouterConfig(Config):
    """Base of the routers' configurations; `name` is the key in `ROUTERS`."""

    name: str
    plain: bool = False
    """Plain decoding (no drafter) is an arm too, the last one."""
    costs: tuple[float, ...] | Literal["auto"] | None = None
    """What a round with each drafter takes, in plain target forwards, in the pool's order; plain decoding takes 1. `auto` measures it when
    a decoder is made: as with every measured time, the same seed may then give another sample. None: rounds take the same."""
    remember: bool = False
    """What was learnt goes on from request to request; else each request begins anew."""
    scores: str | None = None
    """JSON file of what was learnt: read if it is there, written after each `generate`. Needs `remember`."""

    @model_validator(mode="after")
    def _scores_are_remembered(self) -> RouterConfig:
        if self.scores is not None and not self.remember:
            raise ValueError("scores is a file of what was learnt over requests; set remember to true, or leave scores out")
        return self

    def check_arms(self, drafters: int) -> None:
        """A `UserError` where there is nothing to choose, or the costs are of another pool."""
        if drafters + self.plain < 2:
            raise UserError(
                f"runtime.router '{self.name}': a pool of one drafter leaves nothing to choose; name more in runtime.drafters, set plain "
                f"to true, or leave the router out"
            )
        if isinstance(self.costs, tuple) and (len(self.costs) != drafters or min(self.costs) <= 0):
            raise UserError(f"runtime.router.costs {list(self.costs)}: give one number above 0 for each of the {drafters} drafters")


    def check_target(self, fingerprint: str) -> None:
        """A `UserError` where what the router reads was made for another target."""


@dataclass(frozen=True)
class RoundOutcome:
    """What a round of the arm that was chosen showed."""

    arm: int
    accepted: int  # drafted nodes accepted, before anything was cut
    divergence: float  # mean over the draft's levels of sum min(p, q): MetaSD's block divergence, 0 for plain decoding


@dataclass
class Trail:
    """One row's committed tokens whose score is not complete yet: K positions must be known from the first one on."""

    accept: deque[list[float]] = field(default_factory=deque)  # g of each arm, position by position
    realised: deque[list[float]] = field(default_factory=deque)  # w of each arm
    weights: deque[list[float]] = field(default_factory=deque)  # the router's, when the position was committed


class Router(ABC):
    """One stream of choices."""

    Config: ClassVar[type[RouterConfig]]
    counterfactual: ClassVar[bool] = False  # every drafter is scored on every committed token
    reads_prompt: ClassVar[bool] = False  # `read` is called with each row's prompt

    def __init__(self, config: RouterConfig, costs: Sequence[float], depth: int, rng: np.random.Generator) -> None:
        """costs: of a round with each arm; depth: K."""
        self.config, self.costs, self.depth, self.rng = config, list(costs), depth, rng

    @property
    def arms(self) -> int:
        return len(self.costs)

    @abstractmethod
    def choose(self) -> int:
        """The next round's arm."""

    def read(self, state: Tensor) -> None:  # noqa: B027
        """The row's prompt: the target's mean last hidden state over it, [D]."""

    def learn(self, outcome: RoundOutcome) -> None:  # noqa: B027
        """A round of one's own choice is over."""

    def reveal(self, trail: Trail, accept: list[float], realised: list[float]) -> None:  # noqa: B027
        """The next committed token of a row, with g and w of every arm."""

    def scaled(self, length: float, arm: int) -> float:
        """Tokens of a round for what it takes, as a share of the most there could be."""
        return (length / self.costs[arm]) / ((self.depth + 1) / min(self.costs))

    def state(self) -> dict[str, Any]:
        """What was learnt, as JSON holds it."""
        return {}

    def load(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Goes on from there."""


class FixedRouterConfig(RouterConfig):
    """No choice."""

    name: Literal["fixed"] = "fixed"
    arm: int = Field(default=0, ge=0)
    """Which drafter, counted from 0."""

    def check_arms(self, drafters: int) -> None:
        if self.arm >= drafters + self.plain:
            raise UserError(f"runtime.router.arm {self.arm}: the pool's arms are 0 to {drafters + self.plain - 1}")


class FixedRouter(Router):
    """Always the same."""

    Config = FixedRouterConfig
    config: FixedRouterConfig

    def choose(self) -> int:
        return self.config.arm


class TaskRouterConfig(RouterConfig):
    """A prompt classifier that picks once a request (TaskSpec: Ge et al., 2025, arXiv:2505.08600)."""

    name: Literal["task"] = "task"
    classifier: str = Field(min_length=1)
    """File that `drafttrain router` wrote."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Where the likeliest drafter is less likely than this, the first one drafts."""

    @model_validator(mode="after")
    def _chooses_by_prompt(self) -> TaskRouterConfig:
        if self.remember:
            raise ValueError("router 'task' learns nothing while decoding; leave remember and scores out (classifier is what it learnt)")
        return self

    def check_arms(self, drafters: int) -> None:
        super().check_arms(drafters)
        arms = load_classifier(Path(self.classifier)).arms
        if max(arms) >= drafters + self.plain:
            raise UserError(
                f"runtime.router.classifier '{self.classifier}' chooses arm {max(arms)}, but the pool's arms are 0 to "
                f"{drafters + self.plain - 1}; name all its drafters in runtime.drafters, in its order"
            )

    def check_target(self, fingerprint: str) -> None:
        made_for = load_classifier(Path(self.classifier)).target
        if made_for != fingerprint:
            raise UserError(
                f"runtime.router.classifier '{self.classifier}' was trained on states of target {made_for}, but this target is "
                f"{fingerprint}; train it again with `drafttrain router`"
            )


class TaskRouter(Router):
    """One drafter for a whole request, chosen by its prompt."""

    Config = TaskRouterConfig
    config: TaskRouterConfig
    reads_prompt = True

    def __init__(self, config: RouterConfig, costs: Sequence[float], depth: int, rng: np.random.Generator) -> None:
        super().__init__(config, costs, depth, rng)
        self.classifier = load_classifier(Path(self.config.classifier))
        self.chosen = 0

    def read(self, state: Tensor) -> None:
        probabilities = self.classifier.probabilities(state[None])[0]
        sure, place = probabilities.max(0)
        self.chosen = self.classifier.arms[int(place)] if float(sure) >= self.config.threshold else 0

    def choose(self) -> int:
        return self.chosen


class BanditConfig(RouterConfig):
    """What routers learn from the drafter they chose."""

    reward: Literal["divergence", "efficiency"] = "divergence"
    """`divergence`: sum min(p, q), averaged over the draft's levels; `efficiency`: accepted nodes over K. The first says more a round."""


class Bandit(Router):
    """A router that learns from its own rounds alone."""

    config: BanditConfig

    def reward(self, outcome: RoundOutcome) -> float:
        """In [0, 1]. Where arms differ in cost, or one is plain decoding, it is tokens for what the round took."""
        share = outcome.divergence if self.config.reward == "divergence" else outcome.accepted / self.depth
        if not self.config.plain and len(set(self.costs)) == 1:
            return min(1.0, share)
        return min(1.0, self.scaled(1 + self.depth * share, outcome.arm))


class UcbConfig(BanditConfig):
    """Upper confidence bounds."""

    name: Literal["ucb"] = "ucb"
    exploration: float = Field(default=0.3, ge=0)
    """beta: how much an arm that was seldom tried is favoured. 1 is the theory's, for rewards that may be anything in [0, 1]."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """What a reward's weight is multiplied with in each later round; below 1 old rounds are forgotten."""
    window: int | None = Field(default=None, ge=2)
    """Rounds that are remembered; None: all."""


class Ucb(Bandit):
    """argmax of mean + beta sqrt(2 ln t / n) (MetaSD-UCB), plain, discounted or over a sliding window."""

    Config = UcbConfig
    config: UcbConfig

    def __init__(self, config: RouterConfig, costs: Sequence[float], depth: int, rng: np.random.Generator) -> None:
        super().__init__(config, costs, depth, rng)
        self.count, self.total = [0.0] * self.arms, [0.0] * self.arms
        self.seen: deque[tuple[int, float]] = deque()

    def choose(self) -> int:
        untried = [arm for arm, count in enumerate(self.count) if count < 1e-9]
        if untried:
            return untried[0]
        spread = 2 * math.log(max(math.e, sum(self.count)))
        bounds = [
            total / count + self.config.exploration * math.sqrt(spread / count) for total, count in zip(self.total, self.count, strict=True)
        ]
        return bounds.index(max(bounds))

    def learn(self, outcome: RoundOutcome) -> None:
        reward = self.reward(outcome)
        self.count = [count * self.config.discount for count in self.count]
        self.total = [total * self.config.discount for total in self.total]
        self.count[outcome.arm] += 1
        self.total[outcome.arm] += reward
        if self.config.window is not None:
            self._slide(outcome.arm, reward)

    def _slide(self, arm: int, reward: float) -> None:
        """Takes the oldest round out of the window; it has been discounted since."""
        assert self.config.window is not None
        self.seen.append((arm, reward))
        if len(self.seen) > self.config.window:
            old_arm, old_reward = self.seen.popleft()
            left = self.config.discount**self.config.window
            self.count[old_arm] -= left
            self.total[old_arm] -= left * old_reward

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "total": self.total, "seen": list(self.seen)}

    def load(self, state: dict[str, Any]) -> None:
        self.count, self.total = list(state["count"]), list(state["total"])
        self.seen = deque((int(arm), float(reward)) for arm, reward in state["seen"])


class Exp3Config(BanditConfig):
    """Exponential weights on importance-weighted rewards (Auer et al., 2002)."""

    name: Literal["exp3"] = "exp3"
    exploration: float = Field(default=0.1, gt=0, le=1)
    """gamma: share of rounds whose arm is drawn evenly."""


class Exp3(Bandit):
    """Draws an arm; assumes nothing about how rewards come about."""

    Config = Exp3Config
    config: Exp3Config

    def __init__(self, config: RouterConfig, costs: Sequence[float], depth: int, rng: np.random.Generator) -> None:
        super().__init__(config, costs, depth, rng)
        self.log_weight = [0.0] * self.arms

    def shares(self) -> np.ndarray:
        """[A] probability of each arm."""
        logs = np.array(self.log_weight)
        weights = np.exp(logs - logs.max())
        even = self.config.exploration / self.arms
        return (1 - self.config.exploration) * weights / weights.sum() + even

    def choose(self) -> int:
        return int(self.rng.choice(self.arms, p=self.shares()))

    def learn(self, outcome: RoundOutcome) -> None:
        estimate = self.reward(outcome) / self.shares()[outcome.arm]
        self.log_weight[outcome.arm] += self.config.exploration * estimate / self.arms

    def state(self) -> dict[str, Any]:
        return {"log_weight": self.log_weight}

    def load(self, state: dict[str, Any]) -> None:
        self.log_weight = list(state["log_weight"])


class HalvingConfig(BanditConfig):
    """Sequential halving (Karnin et al., 2013)."""

    name: Literal["halving"] = "halving"
    budget: int = Field(default=64, ge=1)
    """Rounds spent on finding the best arm."""


class Halving(Bandit):
    """Tries all arms equally often, drops the worse half, and so on; few switches, and none once one arm is left."""

    Config = HalvingConfig
    config: HalvingConfig

    def __init__(self, config: RouterConfig, costs: Sequence[float], depth: int, rng: np.random.Generator) -> None:
        super().__init__(config, costs, depth, rng)
        self.left = list(range(self.arms))
        self.total = [0.0] * self.arms
        self.tried = [0] * self.arms

    @property
    def pulls(self) -> int:
        """Rounds of each arm in this phase."""
        phases = max(1, math.ceil(math.log2(self.arms)))
        return max(1, self.config.budget // (phases * len(self.left)))

    def choose(self) -> int:
        return next((arm for arm in self.left if self.tried[arm] < self.pulls), self.left[0])

    def learn(self, outcome: RoundOutcome) -> None:
        if len(self.left) == 1 or outcome.arm not in self.left:
            return
        self.total[outcome.arm] += self.reward(outcome)
        self.tried[outcome.arm] += 1
        if all(self.tried[arm] >= self.pulls for arm in self.left):
            ranked = sorted(self.left, key=lambda arm: -self.total[arm] / self.tried[arm])
            self.left = ranked[: (len(ranked) + 1) // 2]
            self.total, self.tried = [0.0] * self.arms, [0] * self.arms

    def state(self) -> dict[str, Any]:
        return {"left": self.left, "total": self.total, "tried": self.tried}

    def load(self, state: dict[str, Any]) -> None:
        self.left, self.total, self.tried = list(state["left"]), list(state["total"]), list(state["tried"])


class HedgeConfig(RouterConfig):
    """NormalHedge (Chaudhuri et al., 2009): no learning rate."""

    name: Literal["hedge"] = "hedge"
    estimator: Literal["unbiased", "product"] = "unbiased"
    """Accepted length at a token: `unbiased` is 1 + g1 + w1 g2 + w1 w2 g3 + ...; `product` is 1 + g1 + g1 g2 + ..., the paper's, which is
    off where acceptance hangs on which token came."""


class Hedge(Router):
    """Full information: each drafter's expected accepted length from each committed token on, whichever drafter proposed there.

    Feedback is delayed: a position counts once K tokens from it on are known, against the weights of when it was committed. What a
    request's end leaves incomplete is censored, and counts nowhere.
    """

    Config = HedgeConfig
    config: HedgeConfig
    counterfactual = True

    def __init__(self, config: RouterConfig, costs: Sequence[float], depth: int, rng: np.random.Generator) -> None:
        super().__init__(config, costs, depth, rng)
        self.regret = [0.0] * self.arms
        self._weights: list[float] | None = None  # of the regrets as they are

    def weights(self) -> list[float]:
        """[A] that add up to 1."""
        if self._weights is None:
            self._weights = normal_hedge(self.regret)
        return self._weights

    def choose(self) -> int:
        return int(self.rng.choice(self.arms, p=self.weights()))

    def reveal(self, trail: Trail, accept: list[float], realised: list[float]) -> None:
        trail.accept.append(accept)
        trail.realised.append(realised)
        trail.weights.append(self.weights())
        if len(trail.accept) < self.depth:
            return
        losses = [1 - self.scaled(self._length(trail, arm), arm) for arm in range(self.arms)]
        own = sum(weight * loss for weight, loss in zip(trail.weights[0], losses, strict=True))
        self.regret = [regret + own - loss for regret, loss in zip(self.regret, losses, strict=True)]
        self._weights = None
        for known in (trail.accept, trail.realised, trail.weights):
            known.popleft()

    def _length(self, trail: Trail, arm: int) -> float:
        """Expected accepted length of a round that begins at the trail's first position."""
        length, reached = 1.0, 1.0
        for accept, realised in zip(trail.accept, trail.realised, strict=True):
            length += reached * accept[arm]
            reached *= realised[arm] if self.config.estimator == "unbiased" else accept[arm]
        return length

    def state(self) -> dict[str, Any]:
        return {"regret": self.regret}

    def load(self, state: dict[str, Any]) -> None:
        self.regret, self._weights = list(state["regret"]), None


def normal_hedge(regrets: Sequence[float]) -> list[float]:
    """Weights for cumulative regrets R: with c > 0 such that mean exp([R]+^2 / 2c) = e, w ~ [R]+ / c exp([R]+^2 / 2c)."""
    positive = np.maximum(np.array(regrets, dtype=float), 0.0)
    if positive.max() <= 0:
        return [1 / len(positive)] * len(positive)
    squares = positive**2
    # Newton on u = 1 / 2c. mean exp(R^2 u) is convex and rises with u, and is above e where the largest term alone is: from there the
    # steps go down to the root and never past it.
    u = (1 + math.log(len(positive))) / squares.max()
    for _ in range(100):
        terms = np.exp(squares * u)
        step = (terms.mean() - math.e) / (squares * terms).mean()
        u -= step
        if step <= 1e-12 * u:
            break
    weights = positive * np.exp(squares * u)
    shares: list[float] = (weights / weights.sum()).tolist()
    return shares


ROUTERS: dict[str, type[Router]] = {"fixed": FixedRouter, "task": TaskRouter, "ucb": Ucb, "exp3": Exp3, "halving": Halving, "hedge": Hedge}


def save_scores(router: Router, labels: Sequence[str], path: Path) -> None:
    """What a router has learnt, in one JSON file, written whole."""
    text = json.dumps({"router": router.config.name, "arms": list(labels), "state": router.state()}, indent=1)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        reason = first_line(error)
        raise UserError(f"runtime.router.scores '{path}': cannot be written ({reason}); name a file in a folder that exists") from error


def load_scores(router: Router, labels: Sequence[str], path: Path) -> None:
    """A `UserError` where the file is damaged, or of another router or pool."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        kind, arms = data["router"], list(data["arms"])
        if (kind, arms) == (router.config.name, list(labels)):
            router.load(data["state"])
            return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"runtime.router.scores '{path}': damaged ({first_line(error)}); delete it to begin anew") from error
    raise UserError(
        f"runtime.router.scores '{path}' is of router '{kind}' over {', '.join(arms)}, but this one is '{router.config.name}' over "
        f"{', '.join(labels)}; name another file"
    )
