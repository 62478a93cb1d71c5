"""A drafter spoilt on purpose: drafted tokens are swapped for random ones. The control for lossy rules, which must not let them through
(after the checks of arXiv:2501.19309 and arXiv:2505.18629).

Every drafted token is swapped, with the given probability, for one drawn evenly from the target's vocabulary. The token came from no
distribution that the tree knows: `deterministic` draws only. B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from drafttrain.core.plan import Plan
from drafttrain.core.rng import Rng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Features
from drafttrain.drafters.base import Drafter, DrafterState, WrappedDrafter
from drafttrain.drafters.hybrid import Hybrid
from drafttrain.target.head import TargetHead


class Corrupt(WrappedDrafter):
    """Drafts with the drafter inside and swaps some of its tokens for random ones."""

    draws = frozenset({"deterministic"})

    def __init__(self, probability: float, inner: Drafter) -> None:
        super().__init__(inner.config, inner)
        self.probability = probability

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> DrafterState:
        return self.inner.begin(prompts, lengths, features, head, capacity)

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        assert plan.draws == "deterministic", plan.draws
        tree = self.inner_tree(state, roots, plan, sampling, rng)
        swapped = rng.bernoulli(torch.full(tree.tokens.shape, self.probability, device=roots.device))  # [B, N]
        swapped[:, 0] = False  # the root is committed text
        even = torch.ones(len(roots), 1, self.target.vocab_size, device=roots.device)
        random = rng.draw(even, tree.tokens.shape[1], replace=True)[:, 0]  # [B, N]
        return replace(tree, tokens=torch.where(swapped, random, tree.tokens))

    def observe(self, state: DrafterState, committed: Committed) -> None:
        nodes = committed.nodes if isinstance(self.inner, Hybrid) else None  # a cache holds the keys of the tokens that were swapped away
        self.inner.observe(state, replace(committed, nodes=nodes))
