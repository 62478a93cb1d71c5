"""What a running loop counts: time by phase, tokens and acceptances by row and drafter, forwards, waits. B rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from drafttrain.core.plan import Plan
from drafttrain.core.tree import Tree
from drafttrain.runtime.proposer import Proposer
from drafttrain.runtime.rows import CutVerdict, Emission, Rows
from drafttrain.runtime.stats import Clock, History, PastRound, Statistics, Tally
from drafttrain.target.adapter import Target


class Accounting:
    """The counts of one loop."""

    def __init__(self, target: Target, proposer: Proposer) -> None:
        self.target, self.proposer = target, proposer
        self.history, self.clock = History(), Clock(target.device)
        self.tally = Tally(0, target.device, len(proposer.labels))
        self.now: Callable[[], float] = time.perf_counter  # what policies are told of time
        self.calls = [0, 0]  # of target and drafters, by this loop alone

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Forwards and drafter calls inside belong to this loop."""
        before = self._calls_of_all()
        try:
            yield
        finally:
            after = self._calls_of_all()
            self.calls = [mine + now - then for mine, now, then in zip(self.calls, after, before, strict=True)]

    def _calls_of_all(self) -> tuple[int, int]:
        return self.target.forwards, self.proposer.calls

    def count(self, rows: Rows, tree: Tree, cut: CutVerdict) -> None:
        """One round."""
        accepted, tried = cut.verdict.length, tried_depths(tree, cut)
        numbers = torch.tensor(rows.numbers, device=accepted.device)
        arms = torch.tensor(rows.arms, device=accepted.device)
        self.tally.add(numbers, rows.alive, cut.count, accepted, tried, tree.max_depth, tree.from_target, arms)

    def remember(self, rows: Rows, plan: Plan, gained: Sequence[Emission], begun: float) -> None:
        """What the next plan may be made from."""
        going = [row for row, emission in enumerate(gained) if emission.tokens or not emission.done]
        tokens = tuple(len(gained[row].tokens) for row in going)
        arms = tuple(rows.arms[row] for row in going)
        drafted = plan.draft and self.proposer.drafts
        self.history.add(PastRound(len(gained), len(going), sum(tokens), drafted, self.now() - begun, arms, tokens))

    def statistics(self) -> list[Statistics]:
        """Each request's counts; times and calls, which rows share, stand with the first."""
        out = [self.tally.row(index, self.proposer.labels) for index in range(len(self.tally))]
        shared = self.proposer.counts + Statistics(syncs=self.history.syncs, seconds=self.clock.seconds())
        shared.target_forwards, shared.drafter_calls = self.calls
        if out:
            out[0] = out[0] + shared
        return out


def tried_depths(tree: Tree, cut: CutVerdict) -> Tensor:
    """[B] alpha's attempts in a round: every depth reached, and one more where the last node had a child that could have been accepted,
    and was not."""
    accepted = cut.verdict.length
    tip = cut.verdict.path.gather(1, (accepted - 1).clamp_min(0)[:, None])
    tip = torch.where(accepted[:, None] > 0, tip, 0)
    below = (tree.parents == tip) & tree.live
    below[:, 0] = False
    uncut = cut.count > accepted if cut.verdict.next is not None else cut.alive
    return accepted + (below.any(1) & uncut)
