"""Rejection sampling of a chain (speculative sampling: Leviathan et al., 2023, arXiv:2211.17192; Chen et al., 2023, arXiv:2302.01318).

Accept a draft token with probability min(1, p / q). At the first rejection draw the correction token from the residual distribution
max(p - q, 0); where every token is accepted draw the bonus token from p. Exact at any temperature.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from drafttrain.core.rng import Rng, draw_one
from drafttrain.core.sampling import normalise, one_hot
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.verify.base import Rule, RuleConfig


class RejectionConfig(RuleConfig):
    """No options."""

    name: Literal["rejection"] = "rejection"


class Rejection(Rule):
    """Chains, however drawn: with one child a node, all draws are alike but for q, which is one-hot where the token was chosen."""

    Config = RejectionConfig
    accepts = frozenset((draws, "chain") for draws in ("deterministic", "iid", "without_replacement"))

    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        B, N = tree.tokens.shape
        row = torch.arange(B, device=tree.tokens.device)
        p = scored.probs_at(slice(0, N))  # [B, K + 1, V], p[:, k] judges token k + 1
        drafted = tree.tokens[:, 1:]  # [B, K]
        ratio = p[row[:, None], torch.arange(N - 1, device=p.device), drafted] / self._drawn(tree).clamp_min(1e-38)  # [B, K]
        kept = rng.bernoulli(ratio.clamp_max(1.0)) & tree.live[:, 1:]
        length = kept.long().cumprod(1).sum(1)  # [B] tokens before the first rejection
        probs = p[row, length]  # [B, V]
        if N > 1:
            first = (length + 1).clamp_max(N - 1)  # [B] the token that was not kept, where there was one
            rejected = (length < N - 1) & tree.live[row, first]
            probs = torch.where(rejected[:, None], normalise((probs - self._probs(tree, first, p.shape[-1])).clamp_min(0)), probs)
        path = torch.arange(1, N, device=p.device).expand(B, -1)
        next_token = draw_one(rng, probs)
        if N == 1:  # plain decoding
            path = torch.zeros(B, 1, dtype=torch.long, device=p.device)
        return Verdict(path, length, next_token)

    @staticmethod
    def _drawn(tree: Tree) -> Tensor:
        """[B, K] how likely each token was where it was drawn."""
        if tree.draws == "deterministic":  # q = 1: chosen with certainty
            return torch.ones_like(tree.tokens[:, 1:], dtype=torch.float32)
        assert tree.draft_probs is not None and tree.probs_row is not None, f"a {tree.draws} tree recorded no distributions"
        row = torch.arange(len(tree.tokens), device=tree.tokens.device)[:, None]
        return tree.draft_probs[row, tree.probs_row[:, 1:], tree.tokens[:, 1:]]

    @staticmethod
    def _probs(tree: Tree, node: Tensor, vocab: int) -> Tensor:
        """[B, V] what the token at `node` [B] was drawn from."""
        if tree.draws == "deterministic":
            return one_hot(tree.tokens.gather(1, node[:, None])[:, 0], vocab)
        return tree.draft_probs_at(node)
