"""Routers without models: arms whose draft tokens are accepted with a fixed probability, to see how much a router loses on the way.

Regret is counted in tokens: what rounds of the best arm would have given, less what those of the chosen arms give, in expectation. Where
arms cost differently, it is tokens for the cost of a plain forward. `python -m drafttrain.runtime.simulate FILE` writes the rows of
docs/routers.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drafttrain.runtime.router import ROUTERS, RoundOutcome, Router, Trail

ARMS = (4, 16, 64)
ROUNDS, SEEDS, LENGTH = 400, 20, 4


@dataclass(frozen=True)
class Regret:
    """What a router lost."""

    total: float
    early: float  # in the first third of the rounds
    late: float  # in the last third
    shares: list[float]  # of rounds, by arm


def expected_length(rate: float, depth: int) -> float:
    """Accepted length of a chain whose tokens are accepted with probability `rate` each, the bonus token included."""
    return sum(rate**level for level in range(depth + 1))


def regret(router: Router, rates: Sequence[float], rounds: int, seed: int) -> Regret:
    """Plays rounds. rates: of each arm. A round commits what its draft gave; every arm is scored there, as a router may ask for."""
    rng, trail, depth = np.random.default_rng([seed, 1]), Trail(), router.depth
    worth = [expected_length(rate, depth) / cost for rate, cost in zip(rates, router.costs, strict=True)]
    lost, chosen = np.zeros(rounds), np.zeros(len(rates))
    for number in range(rounds):
        arm = router.choose()
        lost[number] = max(worth) - worth[arm]
        chosen[arm] += 1
        stands = rng.random(depth) < rates[arm]
        accepted = depth if stands.all() else int(stands.argmin())
        router.learn(RoundOutcome(arm, accepted, float(np.clip(rates[arm] + 0.1 * rng.standard_normal(), 0, 1))))
        for _ in range(accepted + 1):
            accept = np.clip(np.array(rates) + 0.1 * rng.standard_normal(len(rates)), 0, 1).tolist()
            router.reveal(trail, accept, accept)
    third = rounds // 3
    return Regret(float(lost.sum()), float(lost[:third].sum()), float(lost[-third:].sum()), (chosen / rounds).tolist())


def simulated() -> list[dict[str, object]]:
    """Mean regret of every router that learns, at several numbers of arms; one arm is best, the others lie evenly below it."""
    rows: list[dict[str, object]] = []
    for name in ("ucb", "exp3", "halving", "hedge"):
        for arms in ARMS:
            rates = [*np.linspace(0.3, 0.6, arms - 1).tolist(), 0.8]
            totals = []
            for seed in range(SEEDS):
                kind = ROUTERS[name]
                router = kind(kind.Config(name=name), [1.0] * arms, LENGTH, np.random.default_rng(seed))
                totals.append(regret(router, rates, ROUNDS, seed).total)
            row = {"router": name, "arms": arms, "rounds": ROUNDS, "seeds": SEEDS, "draft_length": LENGTH}
            rows.append(row | {"regret": round(float(np.mean(totals)), 2), "sd": round(float(np.std(totals)), 2)})
    return rows


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in simulated()))
