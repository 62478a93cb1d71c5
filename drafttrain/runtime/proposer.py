"""Who proposes a round's trees: nobody (plain decoding), one drafter, or one that drafts ahead of the verdict.

A proposer holds its drafter's state of the running rows, so that the loop need not know how many drafters there are, what a rule left
open, or what was drafted before the target answered. B rows, w candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from drafttrain.core.plan import Plan, Shape
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Tree, root_only
from drafttrain.core.types import Committed, Features, Groups, Scored
from drafttrain.drafters.base import Drafter, DrafterState
from drafttrain.runtime.prefetch import Prefetched, Prefetcher
from drafttrain.runtime.rows import CutVerdict, Rows
from drafttrain.runtime.stats import Statistics
from drafttrain.target.head import TargetHead


@dataclass
class Prompts:
    """Rows whose prompts stand in the target's cache."""

    tokens: Tensor  # [B, P] right-padded
    lengths: Tensor  # [B]
    features: Features  # name -> [B, P, ...]
    head: TargetHead
    capacity: int  # positions a row may reach at most
    groups: Groups
    streams: list[int] = field(default_factory=list)  # [B] number of each row's random stream


class Proposer(ABC):
    """Drafts for the rows that run. `fresh` gives an empty one for rows that enter later, and `join` takes these in."""

    needs: frozenset[str] = frozenset()
    """Features the target must hand over."""
    joins = True
    """Whether rows may enter while others run."""
    labels: tuple[str, ...] = ("drafter",)
    """What the arms are called: statistics tell them apart."""

    def __init__(self) -> None:
        self.counts = Statistics()  # what it counts itself, beside the loop's own

    @property
    def drafters(self) -> Sequence[Drafter]:
        """Those it drafts with."""
        return ()

    @property
    def calls(self) -> int:
        """Drafter forwards so far, by whoever decodes with these drafters."""
        return sum(drafter.calls for drafter in self.drafters)

    @property
    def drafts(self) -> bool:
        """Whether there is a drafter at all."""
        return bool(self.drafters)

    def slots(self, shape: Shape) -> int:
        """Positions that it may reach beyond a row's end, apart from a round's tree."""
        return 0

    @abstractmethod
    def fresh(self) -> Proposer:
        """One like this, without rows."""

    @abstractmethod
    def begin(self, prompts: Prompts) -> None:
        """Takes in the first rows."""

    @abstractmethod
    def propose(self, rows: Rows, plan: Plan, sampling: Sampling) -> Tree:
        """One tree a row, below `rows.roots`."""

    @abstractmethod
    def observe(self, committed: Committed, cut: CutVerdict, scored: Scored, tree: Tree) -> None:
        """Learns what the round committed."""

    def set_lengths(self, lengths: list[int]) -> None:  # noqa: B027
        """What the host has learnt of the rows' committed lengths."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Goes on with these rows alone ([R] int64)."""

    @abstractmethod
    def join(self, other: Proposer) -> None:
        """Takes in the other's rows, behind its own."""


class Plain(Proposer):
    """Nothing is drafted."""

    def fresh(self) -> Plain:
        return Plain()

    def begin(self, prompts: Prompts) -> None:
        pass

    def propose(self, rows: Rows, plan: Plan, sampling: Sampling) -> Tree:
        return root_only(rows.roots)

    def observe(self, committed: Committed, cut: CutVerdict, scored: Scored, tree: Tree) -> None:
        pass

    def select(self, rows: Tensor) -> None:
        pass

    def join(self, other: Proposer) -> None:
        pass


class Drafting(Proposer):
    """One drafter for all rows. Where a rule leaves the next token open, the drafter goes on below the target's candidates."""

    state: DrafterState

    def __init__(self, drafter: Drafter, treat_as: Draws | None = None, leaves_next_open: bool = False) -> None:
        super().__init__()
        self.drafter, self.treat_as = drafter, treat_as
        self.needs = drafter.needs
        self.joins = not leaves_next_open  # rows that enter have no candidates yet
        self.target_candidates: Tensor | None = None  # [B, w] the target's, for the next tree's first level

    @property
    def drafters(self) -> Sequence[Drafter]:
        return (self.drafter,)

    def fresh(self) -> Drafting:
        return Drafting(self.drafter, self.treat_as, not self.joins)

    def begin(self, prompts: Prompts) -> None:
        self.state, self.target_candidates = begun(self.drafter, prompts), None

    def propose(self, rows: Rows, plan: Plan, sampling: Sampling) -> Tree:
        if not plan.draft:
            return root_only(rows.roots, self.target_candidates)
        tree = self._drafted(rows, replace(plan, target_candidates=self.target_candidates, left=rows.left), sampling)
        return tree if self.treat_as is None else replace(tree, draws=self.treat_as)

    def _drafted(self, rows: Rows, plan: Plan, sampling: Sampling) -> Tree:
        return self.drafter.propose(self.state, rows.roots, plan, sampling, rows.rng)

    def observe(self, committed: Committed, cut: CutVerdict, scored: Scored, tree: Tree) -> None:
        self.drafter.observe(self.state, committed.only(self.needs))
        self.target_candidates = cut.verdict.target_candidates

    def set_lengths(self, lengths: list[int]) -> None:
        self.state.set_lengths(lengths)

    def select(self, rows: Tensor) -> None:
        self.state = self.state.select(rows)
        self.target_candidates = None if self.target_candidates is None else self.target_candidates[rows]

    def join(self, other: Proposer) -> None:
        assert isinstance(other, Drafting) and self.target_candidates is None
        self.state = self.state.join(other.state)


class Prefetching(Drafting):
    """Drafts the next round's trees before the target has answered this one's (see `runtime/prefetch.py`)."""

    def __init__(self, drafter: Drafter, head: TargetHead, width: int, treat_as: Draws | None = None) -> None:
        """width: drafts a row."""
        super().__init__(drafter, treat_as)
        self.joins = False  # what was drafted ahead hangs on the rows that were there
        self.prefetcher = Prefetcher(drafter, head, width)
        self.ahead: Prefetched | None = None  # what was drafted for the next round
        self.ready: Tree | None = None  # the next round's tree, where it was among that

    def fresh(self) -> Prefetching:
        return Prefetching(self.drafter, self.prefetcher.head, self.prefetcher.width, self.treat_as)

    def slots(self, shape: Shape) -> int:
        return shape.depth + 1  # drafts ahead may run past a row's end

    def begin(self, prompts: Prompts) -> None:
        super().begin(prompts)
        self.ahead = self.ready = None

    def propose(self, rows: Rows, plan: Plan, sampling: Sampling) -> Tree:
        tree = super().propose(rows, plan, sampling)
        self.ahead = self._draft_ahead(tree, rows, plan, sampling)
        return tree

    def _drafted(self, rows: Rows, plan: Plan, sampling: Sampling) -> Tree:
        tree, self.ready = self.ready, None
        return super()._drafted(rows, replace(plan, keep_states=True), sampling) if tree is None else tree

    def _draft_ahead(self, tree: Tree, rows: Rows, plan: Plan, sampling: Sampling) -> Prefetched:
        before = self.drafter.calls
        width = self.prefetcher.width
        copies = torch.arange(len(rows), device=rows.roots.device).repeat_interleave(width)
        rng = rows.rng.select(copies)
        rng.substream(2 * rows.rounds[copies] + 3)  # the numbers that the next round would draft with
        ahead = self.prefetcher.draft(self.state, tree, replace(plan, keep_states=True), sampling, rng)
        self.counts.prefetch_calls += self.drafter.calls - before
        return ahead

    def observe(self, committed: Committed, cut: CutVerdict, scored: Scored, tree: Tree) -> None:
        ahead, self.ahead = self.ahead, None
        if ahead is None or not self._take(ahead, cut):
            super().observe(committed, cut, scored, tree)

    def _take(self, ahead: Prefetched, cut: CutVerdict) -> bool:
        """Goes on with what was drafted ahead, where every row that goes on has a draft of what came out."""
        hits = ahead.hits(cut.verdict)
        self.counts.syncs += 1
        going = [hit for hit, alive in zip(hits.tolist(), cut.alive.tolist(), strict=True) if alive]
        self.counts.prefetched += len(going)
        self.counts.prefetch_hits += sum(hit >= 0 for hit in going)
        if not going or min(going) < 0:
            return False
        width = ahead.token.shape[1]
        rows = torch.arange(len(hits), device=hits.device) * width + hits.clamp_min(0)
        self.state, self.ready = ahead.state.select(rows), ahead.tree.select(rows)
        self.counts.calls_saved += ahead.saved
        return True

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.ready = None if self.ready is None else self.ready.select(rows)


def begun(drafter: Drafter, prompts: Prompts) -> DrafterState:
    """The drafter's state of fresh rows."""
    features = {name: prompts.features[name] for name in drafter.needs}
    state = drafter.begin(prompts.tokens, prompts.lengths, features, prompts.head, prompts.capacity)
    state.set_groups(prompts.groups)
    return state


def proposer_of(drafter: Drafter | Proposer | None, leaves_next_open: bool = False) -> Proposer:
    """A bare drafter as a proposer; None is plain decoding."""
    if isinstance(drafter, Proposer):
        return drafter
    return Plain() if drafter is None else Drafting(drafter, leaves_next_open=leaves_next_open)
