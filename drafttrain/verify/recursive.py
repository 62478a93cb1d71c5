"""Multi-candidate speculative decoding (Yang et al., 2024, arXiv:2401.06706): at each node try the children in the order they were drawn.

A child x stands with probability min(1, P(x) / Q(x)); where it falls, P becomes the residual max(P - Q, 0), and Q, if children were drawn
without replacement, loses x. Where no child stands the next token comes from what is left of P. Exact for every tree at any temperature.

The naive variant draws y from p and goes to the child that is y, or ends with y: exact however the children were chosen, and weaker where
they were drawn.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from drafttrain.core.chance import Chance
from drafttrain.core.sampling import normalise
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.verify.base import Rule, RuleConfig


class RecursiveConfig(RuleConfig):
    """Which of the paper's two ways."""

    name: Literal["recursive"] = "recursive"
    naive: bool = False
    """Draw from the target and look for a child that matches."""


class Recursive(Rule):
    """P the target's law at the current node, or its residual; Q the law the next child was drawn from."""

    Config = RecursiveConfig
    config: RecursiveConfig
    accepts = frozenset((draws, shape) for draws in ("point", "iid", "without_replacement") for shape in ("chain", "tree"))

    def __call__(self, tree: Tree, scored: Scored, chance: Chance) -> Verdict:
        return self._matched(tree, scored, chance) if self.config.naive else self._tried(tree, scored, chance)

    @staticmethod
    def _matched(tree: Tree, scored: Scored, chance: Chance) -> Verdict:
        row = torch.arange(len(tree.tokens), device=tree.tokens.device)
        node = next_token = torch.zeros_like(row)
        going = torch.ones_like(row, dtype=torch.bool)
        for _ in range(tree.max_depth + 1):
            done = F.one_hot(next_token, scored.p.shape[-1])  # [B, V] no choice left
            law = torch.where(going[:, None], scored.p[row, node], done)
            next_token = chance.draw(law[:, None], 1, replace=True)[:, 0, 0]
            children = tree.children[row, node]  # [B, C]
            same = (children >= 0) & (tree.tokens.gather(1, children.clamp_min(0)) == next_token[:, None]) & going[:, None]
            going = same.any(1)
            node = torch.where(going, children.gather(1, same.long().argmax(1, keepdim=True))[:, 0], node)
        path, length = tree.path_to(node)
        return Verdict(path, length, next_token)

    def _tried(self, tree: Tree, scored: Scored, chance: Chance) -> Verdict:
        row = torch.arange(len(tree.tokens), device=tree.tokens.device)
        node = torch.zeros_like(row)  # [B] the deepest node that stands
        P = scored.p[row, node]  # [B, V]
        going = torch.ones_like(row, dtype=torch.bool)  # [B] a child stood at every level so far
        for _ in range(tree.max_depth):
            children = tree.children[row, node]  # [B, C]
            moved = torch.zeros_like(row, dtype=torch.bool)
            Q: Tensor | None = None
            for candidate in children.unbind(1):
                there = (candidate >= 0) & going & ~moved
                child = candidate.clamp_min(0)
                token = tree.tokens[row, child]
                Q = self._law(tree, child, token, P, Q)
                ratio = P[row, token] / Q[row, token].clamp_min(1e-38)
                stands = chance.bernoulli(torch.where(there, ratio, 0.0).clamp_max(1.0)) & there
                falls = there & ~stands
                P = torch.where(falls[:, None], normalise((P - Q).clamp_min(0)), P)
                Q = self._drawn(tree, Q, token, falls)
                node, moved = torch.where(stands, child, node), moved | stands
            P, going = torch.where(moved[:, None], scored.p[row, node], P), moved
        path, length = tree.path_to(node)
        return Verdict(path, length, chance.draw(P[:, None], 1, replace=True)[:, 0, 0])

    @staticmethod
    def _law(tree: Tree, child: Tensor, token: Tensor, P: Tensor, Q: Tensor | None) -> Tensor:
        """[B, V] the law this child was drawn from: its elder siblings' removals count when nothing is put back."""
        if tree.draws == "point":  # q = 1: chosen with certainty
            return torch.zeros_like(P).scatter_(1, token[:, None], 1.0)
        return Q if Q is not None and tree.draws == "without_replacement" else tree.law(child)

    @staticmethod
    def _drawn(tree: Tree, Q: Tensor, token: Tensor, falls: Tensor) -> Tensor:
        if tree.draws != "without_replacement":
            return Q
        left = normalise(Q.scatter(1, token[:, None], 0.0))
        return torch.where(falls[:, None], left, Q)
