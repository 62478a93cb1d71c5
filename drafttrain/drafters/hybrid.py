"""Two proposers, one tree: a trained drafter beside one that costs nothing, under one budget of nodes.

The free proposer goes first. Where what it found is worth more than what running the trained drafter would add for its price, the trained
one is not run; else both trees are merged, shared prefixes once. Of all nodes those stay whose chance of standing is worth their share of
the target's forward. What each proposer is worth is learnt in every row from what was committed. All of it is `point` draws, so greedy
and recursive verification stay exact whatever is chosen here. B rows, N nodes. Choosing and merging happen on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from drafttrain.core.chance import Chance
from drafttrain.core.config import Config
from drafttrain.core.plan import Plan
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Nodes, Tree, from_nodes
from drafttrain.core.types import Committed, Features
from drafttrain.drafters import DRAFTERS, build
from drafttrain.drafters.base import Around, Drafter, DrafterConfig, DrafterState
from drafttrain.drafters.ngram import NgramConfig
from drafttrain.target.head import TargetHead

if TYPE_CHECKING:
    AnyFree = DrafterConfig
else:
    _free = [family.Config for family in DRAFTERS.values() if not family.trainable]
    AnyFree = Annotated[reduce(or_, _free), Field(discriminator="name")] if len(_free) > 1 else _free[0]

TRAINED, FREE = 0, 1
"""Origins of nodes."""
MEMORY = 0.15  # weight of the newest round in what the trained drafter is thought to be worth
RETURN = 0.03  # how far that goes back to `head_gain` in each round in which it was not run


class HybridConfig(Config):
    """Prices are in target forwards of one token on this device; `drafttrain tune` measures them."""

    lookup: AnyFree = NgramConfig()
    """The proposer that costs nothing."""
    head_cost: float = Field(default=0.4, ge=0)
    """What a proposal of the trained drafter takes."""
    node_cost: float = Field(default=0.01, ge=0)
    """What one more node adds to the target's forward."""
    head_gain: float = Field(default=2.0, ge=0)
    """Tokens that the trained drafter is thought to add to a round before anything is known."""


class HybridFamily(DrafterConfig):
    """What result rows call it."""


@dataclass
class HybridState(DrafterState):
    """Both proposers' states and what the trained one was worth."""

    trained: DrafterState
    free: DrafterState
    gain: list[float]  # [B] tokens that the trained drafter adds to a round, a running mean
    drafted: list[list[bool]]  # [B][N] nodes of the last tree that the trained drafter proposed; empty for rows that did not want it

    def select(self, rows: Tensor) -> HybridState:
        kept = rows.tolist()
        gain, drafted = [self.gain[row] for row in kept], [self.drafted[row] for row in kept]
        return HybridState(self.trained.select(rows), self.free.select(rows), gain, drafted)

    def join(self, other: DrafterState) -> HybridState:
        assert isinstance(other, HybridState)
        gain, drafted = [*self.gain, *other.gain], [*self.drafted, *other.drafted]
        return HybridState(self.trained.join(other.trained), self.free.join(other.free), gain, drafted)

    def settle(self, lengths: list[int]) -> None:
        self.trained.settle(lengths)


class Hybrid(Around):
    """Drafts with a lookup and, where that pays, with the trained drafter inside, in one tree of `point` draws."""

    draws = frozenset({"point"})

    def __init__(self, options: HybridConfig, trained: Drafter) -> None:
        name = f"{trained.config.name}+{options.lookup.name}"
        super().__init__(HybridFamily(name=name), trained)
        self.options, self.free = options, build(options.lookup, trained.target)
        self.needs, self.gives_laws = trained.needs | self.free.needs, False

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> HybridState:
        given = (prompts, lengths, features, head, capacity)
        gain: list[float] = [self.options.head_gain] * len(prompts)
        return HybridState(self.inner.begin(*given), self.free.begin(*given), gain, [[]] * len(prompts))

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, chance: Chance) -> Tree:
        assert isinstance(state, HybridState)
        found = as_nodes(self.free.propose(state.free, roots, plan, sampling, chance), FREE)
        wanted = [self.wants_head(nodes, gain, plan.shape.nodes) for nodes, gain in zip(found, state.gain, strict=True)]
        rows = found
        if any(wanted):
            drafted = as_nodes(self.inner_tree(state.trained, roots, replace(plan, reach=True), sampling, chance), TRAINED)
            rows = [merged(two, one) if wants else one for one, two, wants in zip(found, drafted, wanted, strict=True)]
        chosen = [self.worth(nodes, wants, plan.shape.nodes) for nodes, wants in zip(rows, wanted, strict=True)]
        state.drafted = [
            [True, *(origin == TRAINED for origin in nodes.origin)] if wants else [] for nodes, wants in zip(chosen, wanted, strict=True)
        ]
        size = plan.shape.nodes
        static = None if sampling.greedy else (size, size)  # what a row draws later must not depend on the others
        return from_nodes(roots, chosen, None if static is None else size, static)

    def wants_head(self, found: Nodes, gain: float, budget: int) -> bool:
        """Whether tokens per cost are higher with the trained drafter than with what was found alone."""
        alone = self.worth(found, False, budget)
        expected, size = sum(alone.reach), len(alone.tokens)
        first = max(found.reach, default=0.0)  # where the likeliest first token stands, the trained drafter adds little
        without = (1 + expected) / (1 + self.options.node_cost * size)
        with_head = (1 + expected + (1 - first) * gain) / (1 + self.options.head_cost + self.options.node_cost * (size + budget) / 2)
        return with_head > without

    def worth(self, nodes: Nodes, headed: bool, budget: int) -> Nodes:
        """The likeliest nodes, as long as each adds more tokens than its cost adds time; parents stay before their children."""
        tokens, cost = 1.0, 1.0 + self.options.head_cost * headed
        kept: list[int] = []
        for place in nodes.likeliest()[:budget]:
            if nodes.reach[place] * cost <= self.options.node_cost * tokens:
                break
            tokens, cost = tokens + nodes.reach[place], cost + self.options.node_cost
            kept.append(place)
        return nodes.only(kept)

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, HybridState)
        counts = committed.count.tolist()
        nodes = [[]] * len(counts) if committed.nodes is None else committed.nodes.tolist()
        for row, count in enumerate(counts):
            if count and state.drafted[row]:
                run = [state.drafted[row][node] for node in nodes[row][1:count]]
                gained = next((place for place, theirs in enumerate(run) if not theirs), len(run))
                state.gain[row] += MEMORY * (gained - state.gain[row])
            elif count:
                state.gain[row] += RETURN * (self.options.head_gain - state.gain[row])
        state.drafted = [[]] * len(counts)
        longest = max(*counts, 1)
        committed = replace(
            committed, tokens=committed.tokens[:, :longest], nodes=None,
            features={name: value[:, :longest] for name, value in committed.features.items()},
        )  # fmt: skip
        self.inner.observe(state.trained, committed)
        self.free.observe(state.free, committed)


def as_nodes(tree: Tree, origin: int) -> list[Nodes]:
    """A tree on the host, dead nodes left out (they stand last, or have dead descendants only)."""
    reach = torch.ones_like(tree.tokens, dtype=torch.float32) if tree.reach is None else tree.reach
    out = []
    for tokens, parents, live, chances in zip(
        tree.tokens.tolist(), tree.parents.tolist(), tree.live.tolist(), reach.tolist(), strict=True
    ):
        nodes, number = Nodes([], [], [], []), {0: 0}
        for node in range(1, len(tokens)):
            if live[node] and parents[node] in number:
                nodes.tokens.append(tokens[node])
                nodes.parents.append(number[parents[node]])
                nodes.reach.append(chances[node])
                nodes.origin.append(origin)
                number[node] = len(nodes.tokens)
        out.append(nodes)
    return out


def merged(first: Nodes, second: Nodes) -> Nodes:
    """One row's two trees as one: a node of both keeps the first's origin and the higher chance."""
    out = Nodes([*first.tokens], [*first.parents], [*first.reach], [*first.origin])
    known = {(parent, token): node for node, (parent, token) in enumerate(zip(first.parents, first.tokens, strict=True), 1)}
    number = {0: 0}
    for node, (parent, token) in enumerate(zip(second.parents, second.tokens, strict=True), 1):
        key = number[parent], token
        if key not in known:
            out.tokens.append(token)
            out.parents.append(key[0])
            out.reach.append(second.reach[node - 1])
            out.origin.append(second.origin[node - 1])
            known[key] = len(out.tokens)
        number[node] = known[key]
        out.reach[number[node] - 1] = max(out.reach[number[node] - 1], second.reach[node - 1])
    return out
