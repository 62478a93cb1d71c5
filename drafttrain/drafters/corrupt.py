"""A drafter spoilt on purpose: drafted tokens are swapped for random ones. The control for lossy rules, which must not let them through
(after the checks of arXiv:2501.19309 and arXiv:2505.18629).

Every drafted token is swapped, with the given probability, for one drawn evenly from the target's vocabulary. The token came from no law
that the tree knows: `point` draws only. B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from drafttrain.core.chance import Chance
from drafttrain.core.plan import Plan
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Batch, Committed, Features
from drafttrain.drafters.base import Drafter, DrafterState, Loss
from drafttrain.target.head import TargetHead


class Corrupt(Drafter):
    """See the module."""

    draws = frozenset({"point"})

    def __init__(self, probability: float, inner: Drafter) -> None:
        super().__init__(inner.config, inner.target)
        self.probability, self.inner, self.needs = probability, inner, inner.needs

    @property
    def max_depth(self) -> int | None:
        return self.inner.max_depth

    @property
    def watcher(self) -> Callable[[Callable[[], object]], None] | None:
        return self.inner.watcher

    @watcher.setter
    def watcher(self, watcher: Callable[[Callable[[], object]], None] | None) -> None:
        self.inner.watcher = watcher

    def loss(self, batch: Batch, head: TargetHead) -> Loss:
        return self.inner.loss(batch, head)

    def walk(self, batch: Batch, head: TargetHead, length: int) -> Tensor:
        return self.inner.walk(batch, head, length)

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> DrafterState:
        return self.inner.begin(prompts, lengths, features, head, capacity)

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, chance: Chance) -> Tree:
        assert plan.draws == "point", plan.draws
        before = self.inner.calls
        tree = self.inner.propose(state, roots, plan, sampling, chance)
        self.calls += self.inner.calls - before
        swapped = chance.bernoulli(torch.full(tree.tokens.shape, self.probability, device=roots.device))  # [B, N]
        swapped[:, 0] = False  # the root is committed text
        even = torch.ones(len(roots), 1, self.target.vocab_size, device=roots.device)
        random = chance.draw(even, tree.tokens.shape[1], replace=True)[:, 0]  # [B, N]
        return replace(tree, tokens=torch.where(swapped, random, tree.tokens))

    def observe(self, state: DrafterState, committed: Committed) -> None:
        self.inner.observe(state, committed)
