"""Two proposers, one tree: a trained drafter beside one that costs nothing, under one budget of nodes.

The free proposer goes first. Where what it found is worth more than what running the trained drafter would add for its price, the trained
one is not run; else both trees are merged, shared prefixes once. Of all nodes those stay whose chance of standing is worth their share of
the target's forward. What each proposer is worth is learnt in every row from what was committed. All of it is `deterministic` draws, so
greedy and recursive verification stay exact whatever is chosen here. B rows, N nodes. Choosing and merging happen on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from torch import Tensor

from drafttrain.core.config import Config
from drafttrain.core.nodes import Nodes, from_nodes, to_nodes
from drafttrain.core.plan import Plan
from drafttrain.core.rng import Rng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Features, Groups
from drafttrain.drafters import DRAFTERS, build
from drafttrain.drafters.base import Drafter, DrafterConfig, DrafterState, WrappedDrafter
from drafttrain.drafters.ngram import NgramConfig
from drafttrain.target.head import TargetHead

if TYPE_CHECKING:
    AnyFree = DrafterConfig
else:
    _free = [family.Config for family in DRAFTERS.values() if not family.trainable]
    AnyFree = Annotated[reduce(or_, _free), Field(discriminator="name")] if len(_free) > 1 else _free[0]

TRAINED, FREE = 0, 1
"""Origins of nodes; 0 is also what a lone proposer's have."""
MEMORY = 0.15  # weight of the newest round in what the trained drafter is thought to be worth
RETURN = 0.03  # how far that goes back to `draft_gain` in each round in which it was not run
PRIOR = 8.0  # the trained drafter's own chances are trusted as if so many tokens had stood as they said


Cost = Annotated[float, Field(ge=0)] | Literal["auto"]


class HybridConfig(Config):
    """Prices are in target forwards of one token on this device. `auto` measures them when a decoder is made, in a few seconds; greedy
    texts are the same at any price, but sampled ones may be other samples of the same distribution."""

    lookup: AnyFree = NgramConfig()
    """The proposer that costs nothing."""
    draft_cost: Cost = 0.4
    """What a proposal of the trained drafter takes."""
    node_cost: Cost = 0.01
    """What one more node adds to the target's forward."""
    draft_gain: float = Field(default=2.0, ge=0)
    """Tokens that the trained drafter is thought to add to a round before anything is known."""

    @property
    def unmeasured(self) -> list[str]:
        """The costs that are `auto`."""
        return [name for name in ("draft_cost", "node_cost") if getattr(self, name) == "auto"]


class HybridFamily(DrafterConfig):
    """What result rows call it."""


@dataclass(frozen=True)
class Worth:
    """What the trained drafter turned out to be worth in one row."""

    gain: float  # tokens that it adds to a round, a running mean
    said: float = 0.0  # its tokens that should have stood, by its own chances, of those that could
    stood: float = 0.0  # that did

    @property
    def trust(self) -> float:
        """What its chances are multiplied with, level by level."""
        return (self.stood + PRIOR) / (self.said + PRIOR)


@dataclass(frozen=True)
class Part:
    """The trained drafter's part in one row's tree; node 0 is the root."""

    parents: list[int]  # [N]
    chances: list[float]  # [N] of each of its nodes after the parent, as it said itself; 0 for the lookup's own

    def gained(self, path: Sequence[int]) -> int:
        """How many nodes of a path below the root are its own, from the first on."""
        return next((place for place, node in enumerate(path) if not self.chances[node]), len(path))

    def outcome(self, path: Sequence[int]) -> tuple[float, float]:
        """Of a path that stood, below the root: how many of its tokens should have stood along it, and how many did."""
        passed = {0, *path}
        said = sum(rng for rng, parent in zip(self.chances[1:], self.parents[1:], strict=True) if parent in passed)
        return said, sum(self.chances[node] > 0 for node in path)


@dataclass
class HybridState(DrafterState):
    """Both proposers' states and what the trained one was worth."""

    trained: DrafterState
    free: DrafterState
    worth: list[Worth]  # [B]
    parts: list[Part | None]  # [B] of the last tree; None for rows that did not want the trained drafter

    def select(self, rows: Tensor) -> HybridState:
        kept = rows.tolist()
        worth, parts = [self.worth[row] for row in kept], [self.parts[row] for row in kept]
        return HybridState(self.trained.select(rows), self.free.select(rows), worth, parts)

    def join(self, other: DrafterState) -> HybridState:
        assert isinstance(other, HybridState)
        worth, parts = [*self.worth, *other.worth], [*self.parts, *other.parts]
        return HybridState(self.trained.join(other.trained), self.free.join(other.free), worth, parts)

    def set_lengths(self, lengths: list[int]) -> None:
        self.trained.set_lengths(lengths)

    def set_groups(self, groups: Groups) -> None:
        self.trained.set_groups(groups)
        self.free.set_groups(groups)


class Hybrid(WrappedDrafter):
    """Drafts with a lookup and, where that pays, with the trained drafter inside, in one tree of `deterministic` draws."""

    draws = frozenset({"deterministic"})

    def __init__(self, options: HybridConfig, trained: Drafter) -> None:
        name = f"{trained.config.name}+{options.lookup.name}"
        super().__init__(HybridFamily(name=name), trained)
        assert options.draft_cost != "auto" and options.node_cost != "auto"
        self.options, self.free = options, build(options.lookup, trained.target)
        self.draft_cost, self.node_cost = options.draft_cost, options.node_cost
        self.needs, self.gives_draft_probs = trained.needs | self.free.needs, False

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> HybridState:
        given = (prompts, lengths, features, head, capacity)
        worth = [Worth(self.options.draft_gain)] * len(prompts)
        return HybridState(self.inner.begin(*given), self.free.begin(*given), worth, [None] * len(prompts))

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        assert isinstance(state, HybridState)
        free = self.free.nodes(state.free, roots, plan, sampling, rng)
        found = [replace(nodes, proposer=[FREE] * len(nodes.tokens)) for nodes in free]
        wanted = [self.wants_head(nodes, worth.gain, plan.shape.nodes) for nodes, worth in zip(found, state.worth, strict=True)]
        rows, drafted = found, found
        if any(wanted):
            drafted = to_nodes(self.inner_tree(state.trained, roots, replace(plan, path_prob=True), sampling, rng))
            trusted = [believed(two, worth.trust) for two, worth in zip(drafted, state.worth, strict=True)]
            rows = [merged(two, one) if wants else one for one, two, wants in zip(found, trusted, wanted, strict=True)]
        chosen = [self.worth(nodes, wants, plan.shape.nodes) for nodes, wants in zip(rows, wanted, strict=True)]
        state.parts = [part_of(nodes, two) if wants else None for nodes, two, wants in zip(chosen, drafted, wanted, strict=True)]
        size = plan.shape.nodes
        return from_nodes(roots, chosen, None if sampling.greedy else (size, size))

    def wants_head(self, found: Nodes, gain: float, budget: int) -> bool:
        """Whether tokens per cost are higher with the trained drafter than with what was found alone."""
        alone = self.worth(found, False, budget)
        expected, size = sum(alone.path_prob), len(alone.tokens)
        first = max(found.path_prob, default=0.0)  # where the likeliest first token stands, the trained drafter adds little
        without = (1 + expected) / (1 + self.node_cost * size)
        with_head = (1 + expected + (1 - first) * gain) / (1 + self.draft_cost + self.node_cost * (size + budget) / 2)
        return with_head > without

    def worth(self, nodes: Nodes, headed: bool, budget: int) -> Nodes:
        """The likeliest nodes, as long as each adds more tokens than its cost adds time; parents stay before their children."""
        tokens, cost = 1.0, 1.0 + self.draft_cost * headed
        kept: list[int] = []
        for place in nodes.likeliest()[:budget]:
            if nodes.path_prob[place] * cost <= self.node_cost * tokens:
                break
            tokens, cost = tokens + nodes.path_prob[place], cost + self.node_cost
            kept.append(place)
        return nodes.only(kept)

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, HybridState)
        counts = committed.count.tolist()
        nodes = [[]] * len(counts) if committed.nodes is None else committed.nodes.tolist()
        for row, (count, before, part) in enumerate(zip(counts, state.worth, state.parts, strict=True)):
            if count and part is not None:
                path = nodes[row][1:count]
                said, stood = part.outcome(path)
                gain = before.gain + MEMORY * (part.gained(path) - before.gain)
                state.worth[row] = Worth(gain, before.said + said, before.stood + stood)
            elif count:
                state.worth[row] = replace(before, gain=before.gain + RETURN * (self.options.draft_gain - before.gain))
        state.parts = [None] * len(counts)
        longest = max(*counts, 1)
        committed = replace(
            committed, tokens=committed.tokens[:, :longest], nodes=None,
            features={name: value[:, :longest] for name, value in committed.features.items()},
        )  # fmt: skip
        self.inner.observe(state.trained, committed)
        self.free.observe(state.free, committed)


def believed(nodes: Nodes, trust: float) -> Nodes:
    """The same nodes with the chance of each after its parent times `trust`, 1 at most."""
    said, path_prob = [1.0, *nodes.path_prob], [1.0]
    for node, parent in enumerate(nodes.parents, 1):
        path_prob.append(path_prob[parent] * min(1.0, trust * said[node] / max(said[parent], 1e-30)))
    return Nodes(nodes.tokens, nodes.parents, path_prob[1:], nodes.proposer)


def part_of(chosen: Nodes, drafted: Nodes) -> Part:
    """What of `chosen` stands among what the trained drafter `drafted`."""
    path_prob = [1.0, *drafted.path_prob]
    said = {
        path: path_prob[node] / max(path_prob[parent], 1e-30)
        for node, (path, parent) in enumerate(zip(_paths(drafted), drafted.parents, strict=True), 1)
    }
    chances = [said.get(path, 0.0) for path in _paths(chosen)]
    return Part([0, *chosen.parents], [0.0, *chances])


def _paths(nodes: Nodes) -> list[tuple[int, ...]]:
    """Of each node the tokens down to it."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(nodes.tokens, nodes.parents, strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


def merged(first: Nodes, second: Nodes) -> Nodes:
    """One row's two trees as one: a node of both keeps the first's origin and the higher chance."""
    out = Nodes([*first.tokens], [*first.parents], [*first.path_prob], [*first.proposer])
    known = {(parent, token): node for node, (parent, token) in enumerate(zip(first.parents, first.tokens, strict=True), 1)}
    number = {0: 0}
    for node, (parent, token) in enumerate(zip(second.parents, second.tokens, strict=True), 1):
        key = number[parent], token
        if key not in known:
            known[key] = out.add(token, key[0], second.path_prob[node - 1], second.proposer[node - 1])
        number[node] = known[key]
        out.path_prob[number[node] - 1] = max(out.path_prob[number[node] - 1], second.path_prob[node - 1])
    return out
