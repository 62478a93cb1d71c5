"""Speculative sampling on a chain (Chen et al., 2023, arXiv:2302.01318): keep a drafted token with probability min(1, p / q); at the first
one rejected draw from the residual max(p - q, 0); after the last one kept draw a bonus token from p. Exact at any temperature.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from drafttrain.core.chance import Chance
from drafttrain.core.sampling import normalise
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.verify.base import Rule, RuleConfig


class RejectionConfig(RuleConfig):
    """No options."""

    name: Literal["rejection"] = "rejection"


class Rejection(Rule):
    """Chains, however drawn: with one child a node, all draws are alike but for q, which is one-hot where the token was chosen."""

    Config = RejectionConfig
    accepts = frozenset((draws, "chain") for draws in ("point", "iid", "without_replacement"))

    def __call__(self, tree: Tree, scored: Scored, chance: Chance) -> Verdict:
        B, N = tree.tokens.shape
        p = scored.p[:, :N]  # [B, K + 1, V], p[:, k] judges token k + 1
        drafted = tree.tokens[:, 1:, None]  # [B, K, 1]
        q = self._laws(tree, p)  # [B, K, V]
        ratio = (p[:, :-1].gather(-1, drafted) / q.gather(-1, drafted).clamp_min(1e-38))[..., 0]  # [B, K]
        kept = chance.bernoulli(ratio.clamp_max(1.0)) & tree.live[:, 1:]
        length = kept.long().cumprod(1).sum(1)  # [B] tokens before the first rejection
        row = torch.arange(B, device=p.device)
        tried = torch.cat([tree.live[:, 1:], torch.zeros_like(tree.live[:, :1])], 1)[row, length]  # a token was there and fell
        law = p[row, length]  # [B, V]
        q_here = torch.cat([q, torch.zeros_like(p[:, :1])], 1)[row, length]
        residual = normalise((law - q_here).clamp_min(0))
        law = torch.where(tried[:, None], residual, law)
        path = torch.arange(1, N, device=p.device).expand(B, -1)
        next_token = chance.draw(law[:, None], 1, replace=True)[:, 0, 0]
        if N == 1:  # plain decoding
            path = torch.zeros(B, 1, dtype=torch.long, device=p.device)
        return Verdict(path, length, next_token)

    @staticmethod
    def _laws(tree: Tree, p: Tensor) -> Tensor:
        """[B, K, V]: what each token was drawn from."""
        if tree.draws == "point":  # q = 1: chosen with certainty
            return torch.zeros_like(p[:, 1:]).scatter_(-1, tree.tokens[:, 1:, None], 1.0)
        assert tree.law_rows is not None and tree.law_of is not None, f"a {tree.draws} tree recorded no laws"
        return tree.law_rows.gather(1, tree.law_of[:, 1:, None].expand(-1, -1, p.shape[-1]))
