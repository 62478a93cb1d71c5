"""Recursive rejection sampling (multi-candidate speculative decoding: Yang et al., 2024, arXiv:2401.06706): at each node try the children
in the order they were drawn.

A child x is accepted with probability min(1, P(x) / Q(x)). Where it is rejected, P becomes the residual max(P - Q, 0), and Q loses x if the
children were drawn without replacement. Where every child is rejected, the correction token comes from what is left of P. Exact for every
tree at any temperature.

The naive variant draws y from p and goes to the child that is y, or ends with y. It is exact however the children were chosen, and accepts
less where they were drawn.
"""

from __future__ import annotations

from typing import Literal

import torch

from drafttrain.core.rng import Rng, draw_one
from drafttrain.core.sampling import one_hot
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.verify.base import ANY, Rule, RuleConfig
from drafttrain.verify.residual import Residual


class RecursiveConfig(RuleConfig):
    """Which of the paper's two ways."""

    name: Literal["recursive"] = "recursive"
    naive: bool = False
    """Draw from the target and look for a child that matches."""


class Recursive(Rule):
    """Exact for any tree: tries siblings one after the other, each against what the ones before it left of the target's distribution."""

    Config = RecursiveConfig
    config: RecursiveConfig
    accepts = ANY

    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        return matched(tree, scored, rng) if self.config.naive else tried(tree, scored, rng)


def tried(tree: Tree, scored: Scored, rng: Rng) -> Verdict:
    """Level by level. How likely each child is to be the first to be accepted follows from the rejections before it: one draw tells which
    it is."""
    row = torch.arange(len(tree.tokens), device=tree.tokens.device)
    node = torch.zeros_like(row)  # [B] the deepest node that is accepted
    probs = scored.probs_at(node[:, None])[:, 0]  # [B, V] of the next token, should the walk end here
    going = torch.ones_like(row, dtype=torch.bool)  # [B] a child was accepted at every level so far
    for _ in range(tree.max_depth):
        children = tree.children[row, node]  # [B, C]
        there, child = (children >= 0) & going[:, None], children.clamp_min(0)
        Q = None if tree.draws == "deterministic" else tree.draft_probs_at(child[:, 0])[:, None]  # [B, 1, V]
        left = Residual(probs[:, None], Q, tree.draws, tree.tokens.gather(1, child)[:, None])
        ways, none_accepted = [], torch.ones_like(probs[:, 0], dtype=torch.float64)  # [B] probability that all before were rejected
        for real in there.split(1, 1):  # [B, 1]
            ratio, _ = left.reject(real)
            accepted = torch.where(real, ratio, 0.0).clamp_max(1.0)[:, 0]
            ways.append(none_accepted * accepted)
            none_accepted = none_accepted * (1 - accepted)
        way = draw_one(rng, torch.stack([*ways, none_accepted], 1))  # [B] which child; C: none
        moved = way < children.shape[1]
        node = torch.where(moved, torch.cat([child, node[:, None]], 1).gather(1, way[:, None])[:, 0], node)
        probs = torch.where(moved[:, None], scored.probs_at(node[:, None])[:, 0], torch.where(going[:, None], left.probs()[:, 0], probs))
        going = moved
    path, length = tree.path_to(node)
    return Verdict(path, length, draw_one(rng, probs))


def matched(tree: Tree, scored: Scored, rng: Rng) -> Verdict:
    """The walk of the naive variant."""
    row = torch.arange(len(tree.tokens), device=tree.tokens.device)
    node = next_token = torch.zeros_like(row)
    going = torch.ones_like(row, dtype=torch.bool)
    for _ in range(tree.max_depth + 1):
        done = one_hot(next_token, scored.logits.shape[-1])  # [B, V] no choice left
        probs = torch.where(going[:, None], scored.probs_at(node[:, None])[:, 0], done)
        next_token = draw_one(rng, probs)
        children = tree.children[row, node]  # [B, C]
        same = (children >= 0) & (tree.tokens.gather(1, children.clamp_min(0)) == next_token[:, None]) & going[:, None]
        going = same.any(1)
        node = torch.where(going, children.gather(1, same.long().argmax(1, keepdim=True))[:, 0], node)
    path, length = tree.path_to(node)
    return Verdict(path, length, next_token)
