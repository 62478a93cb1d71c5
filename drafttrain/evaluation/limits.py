"""How likely a rule accepts one of a node's children, and the limit of that for every rule, P* (Khisti et al., 2024, arXiv:2410.18234).

Of siblings drawn iid, over all that could have been drawn. C trees, N nodes, K levels (at a node: children), M nodes at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.sampling import normalise
from drafttrain.core.tree import Tree
from drafttrain.verify.base import RuleConfig
from drafttrain.verify.multidraft import MultidraftConfig, acceptance, limit
from drafttrain.verify.recursive import RecursiveConfig

TOGETHER = 16
"""Nodes whose distributions are sorted at once."""
VISITS, LIMIT = "visits", "limit"


@dataclass
class Tried:
    """What a group of rounds gives to `Levels`: [C, K] each, the last by the rule's label."""

    visits: Tensor
    limit: Tensor
    accepted: dict[str, Tensor]


def tries(tree: Tree, p: Tensor, visits: Tensor, asked: Mapping[str, RuleConfig]) -> Tried:
    """P* and each rule's acceptance at the visited nodes that have children, summed up by level, weighted by `visits` [C, N].

    tree: of iid draws; p: [C, N, V] the target's distributions; asked: rules of `ACCEPTANCE` by label.
    """
    assert tree.draws == "iid" and tree.draft_probs is not None and tree.probs_row is not None
    children = (tree.children >= 0).sum(-1)  # [C, N]
    shape = (len(visits), tree.max_depth)
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in (VISITS, LIMIT, *asked)}
    for K in range(1, tree.max_children + 1):
        rows, nodes = ((children == K) & (visits > 0)).nonzero(as_tuple=True)
        for row, node in zip(rows.split(TOGETHER), nodes.split(TOGETHER), strict=True):
            child = tree.children[row, node, 0]
            target, drafted = p[row, node], tree.draft_probs[row, tree.probs_row[row, child]]  # [M, V]
            weight, level = visits[row, node].double().cpu(), tree.depth[row, node].cpu()
            values = {VISITS: torch.ones_like(weight), LIMIT: limit(target, drafted, K).cpu()}
            for label, config in asked.items():
                values[label] = ACCEPTANCE[config.name](config, target, drafted, K).cpu()
            for name, value in values.items():
                sums[name].index_put_((row.cpu(), level), weight * value, accumulate=True)
    return Tried(sums.pop(VISITS), sums.pop(LIMIT), sums)


def one_by_one(config: RuleConfig, p: Tensor, q: Tensor, K: int) -> Tensor:
    """The probability that `recursive` accepts one of K iid drafts, or `rejection` its only one: [M, V] distributions -> [M], fp64."""
    if isinstance(config, RecursiveConfig) and config.naive:  # the token drawn from p is among the drafts
        return (p.double() * (1 - (1 - q.double()) ** K)).sum(-1)
    P, q, falls = p.double(), q.double(), torch.ones(len(p), dtype=torch.float64, device=p.device)
    for _ in range(K):
        falls = falls * (1 - torch.minimum(P, q).sum(-1))
        P = normalise((P - q).clamp_min(0))
    return 1 - falls


def chosen_one(config: RuleConfig, p: Tensor, q: Tensor, K: int) -> Tensor:
    """The probability that `multidraft` accepts the draft it chooses: [M, V] distributions -> [M], fp64."""
    assert isinstance(config, MultidraftConfig)
    return acceptance(p, q, K, config)


ACCEPTANCE: dict[str, Callable[[RuleConfig, Tensor, Tensor, int], Tensor]] = {
    "recursive": one_by_one, "rejection": one_by_one, "multidraft": chosen_one,
}  # fmt: skip
"""Rules that go from the root down, so that which nodes they reach says nothing about the tokens below; `traversal` does not."""
