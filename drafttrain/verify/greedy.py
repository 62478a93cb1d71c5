"""Greedy verification: a draft token is accepted where it is the target's argmax after its parent. Exact at temperature 0."""

from __future__ import annotations

from typing import Literal

import torch

from drafttrain.core.rng import Rng
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.verify.base import ANY, Rule, RuleConfig


class GreedyConfig(RuleConfig):
    """No options."""

    name: Literal["greedy"] = "greedy"


class Greedy(Rule):
    """Any tree, however drawn: only the argmax can be accepted, and equal siblings ("duplicates") are all descended into."""

    Config = GreedyConfig
    accepts = ANY
    temperatures = "zero"

    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        N = tree.tokens.shape[1]
        top = scored.top[:, :N]  # [B, N]
        right = tree.live & (tree.tokens == top.gather(1, tree.parents))
        right[:, 0] = True
        accepted = ~(tree.ancestors & ~right[:, None, :]).any(-1)  # right, and so is everything above it
        best = torch.where(accepted, tree.depth, -1).argmax(1)  # [B] the deepest; the first of equals
        path, length = tree.path_to(best)
        return Verdict(path, length, top.gather(1, best[:, None])[:, 0])
