"""Traversal verification (Weng et al., 2025, arXiv:2505.12398): leaves first, so that a strong child can make up for a weak parent.
On a chain this is block verification (Sun et al., 2024, arXiv:2403.10444).

A node is tried after all its children were rejected: the leftmost leaf first, the root (always accepted) last. With a[root] = 1, a child m
with token t of node n starts at a[m] = min(1, a[n] P_n[t] / Q_n[t]). Where m is rejected,

    R = max(a[n] P_n - Q_n, 0),  S = sum R,  a[n] = S / (S + 1 - a[n]),  P_n = R / S,  and without replacement Q_n loses t.

The first accepted node gives the path, and the next token comes from its P. None of these numbers depends on which draws are rejected: they
are computed for all nodes, level by level, and the accepted node is drawn at once. In a tree of deterministic draws this equals following
the target's own draw down the tree, so that is what is done there. B rows, N nodes, W of them side by side, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from drafttrain.core.rng import Rng, draw_one
from drafttrain.core.sampling import normalise
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.verify.base import ANY, Rule, RuleConfig
from drafttrain.verify.recursive import matched
from drafttrain.verify.residual import Residual, what_is_left


class TraversalConfig(RuleConfig):
    """No options."""

    name: Literal["traversal"] = "traversal"


class Traversal(Rule):
    """Exact for any tree: tries nodes from the leaves up, so that a strong child makes up for a weak parent."""

    Config = TraversalConfig
    accepts = ANY

    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        if tree.draws == "deterministic":
            return matched(tree, scored, rng)
        swept = sweep(tree, scored)
        node = draw_one(rng, standing(tree, swept.a))
        path, length = tree.path_to(node)
        return Verdict(path, length, draw_one(rng, left_at(tree, scored, swept, node)))


@dataclass
class Swept:
    """What each node comes to once all its children have failed."""

    a: Tensor  # [B, N] fp64: the probability that it is accepted then
    c: Tensor  # [B, N] fp64: of its residual
    kept: Tensor  # [B, N] what its own token kept of its parent's P when it failed, drawn without replacement


def sweep(tree: Tree, scored: Scored) -> Swept:
    """All nodes' chances, parents before children."""
    assert tree.draft_probs is not None, f"a {tree.draws} tree recorded no distributions"
    a = torch.zeros(tree.tokens.shape, dtype=torch.float64, device=tree.tokens.device)
    a[:, 0] = 1.0
    c, kept = torch.zeros_like(a), torch.zeros_like(a, dtype=torch.float32)
    for family in tree.sibling_groups:
        left = Residual(scored.probs_at(family.parents), tree.draft_probs[:, family.probs_rows], tree.draws, tree.tokens[:, family.table])
        weight = a[:, family.parents]  # [B, W]
        for child in family.children:  # of the first n parents
            live = tree.live[:, child]  # [B, n]
            w = weight[:, : live.shape[1]]
            ratio, S = left.reject(live, w)
            a[:, child] = torch.where(live, (w * ratio).clamp_max(1.0), 0.0)
            weight = torch.cat([torch.where(live, S / (S + 1 - w).clamp_min(1e-300), w), weight[:, live.shape[1] :]], 1)
        a[:, family.parents], c[:, family.parents] = weight, left.c
        if tree.draws == "without_replacement":
            kept[:, family.table] = left.kept.float()
    a[:, 0] = 1.0
    return Swept(a, c, kept)


def left_at(tree: Tree, scored: Scored, swept: Swept, node: Tensor) -> Tensor:
    """[B, V]: the distribution of the token after `node` [B], all of whose children failed."""
    row = torch.arange(len(node), device=node.device)
    children = tree.children[row, node]  # [B, C]
    real, child = children >= 0, children.clamp_min(0)
    rejected_tokens = tree.tokens.gather(1, child)[:, None], torch.where(real, swept.kept.gather(1, child), 0.0)[:, None]
    P, Q, c = scored.probs_at(node[:, None]), tree.draft_probs_at(child[:, 0])[:, None], swept.c[row, node][:, None]
    return normalise(what_is_left(P, Q, c, None if tree.draws == "iid" else rejected_tokens))[:, 0]


def standing(tree: Tree, a: Tensor) -> Tensor:
    """[B, N] the probability that each node is the first to be accepted, children before parents, elder branches before younger ones."""
    order = postorder(tree).argsort(1)
    accepted = a.gather(1, order)
    failed = torch.cat([torch.ones_like(accepted[:, :1]), (1 - accepted).cumprod(1)[:, :-1]], 1)
    return torch.zeros_like(a).scatter(1, order, accepted * failed)


def postorder(tree: Tree) -> Tensor:
    """[B, N] when each node's turn comes; dead ones, which are never accepted, may share a turn."""
    nodes = torch.arange(tree.tokens.shape[1], device=tree.tokens.device)
    below = (tree.ancestors & tree.live[:, :, None]).sum(1)  # [B, N] live nodes of the subtree, itself among them
    elder = (tree.parents[:, :, None] == tree.parents[:, None, :]) & (nodes[:, None] > nodes) & (nodes > 0)
    before = (elder * below[:, None, :]).sum(-1)  # [B, N] nodes in elder siblings' subtrees
    start = (tree.ancestors * before[:, None, :]).sum(-1)  # along the whole path
    return start + below - 1
