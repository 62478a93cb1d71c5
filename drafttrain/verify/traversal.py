"""Traversal verification (Weng et al., 2025, arXiv:2505.12398): leaves first, so that a strong child can make up for a weak parent.

A node is tried after all its children failed, the leftmost leaf first and the root, which always stands, last. With a[root] = 1, a child m
with token t of node n starts at a[m] = min(1, a[n] P_n[t] / Q_n[t]); where m fails,

    R = max(a[n] P_n - Q_n, 0),  S = sum R,  a[n] = S / (S + 1 - a[n]),  P_n = R / S,  and without replacement Q_n loses t.

The first node that stands gives the path, and the next token comes from its P. On a chain this is block verification (Sun et al., 2024,
arXiv:2403.10444). None of these numbers depends on which draws of chance fail: they are computed for all nodes in one sweep, parents before
children, and the node that stands is drawn at once. B rows, N nodes, V vocabulary.
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


class TraversalConfig(RuleConfig):
    """No options."""

    name: Literal["traversal"] = "traversal"


class Traversal(Rule):
    """See the module."""

    Config = TraversalConfig
    accepts = frozenset((draws, shape) for draws in ("point", "iid", "without_replacement") for shape in ("chain", "tree"))

    def __call__(self, tree: Tree, scored: Scored, chance: Chance) -> Verdict:
        N = tree.tokens.shape[1]
        a, P = residuals(tree, scored.p[:, :N])
        node = chance.draw(standing(tree, a)[:, None], 1, replace=True)[:, 0, 0]
        path, length = tree.path_to(node)
        law = P[torch.arange(len(node), device=node.device), node]
        return Verdict(path, length, chance.draw(law[:, None], 1, replace=True)[:, 0, 0])


def residuals(tree: Tree, p: Tensor) -> tuple[Tensor, Tensor]:
    """What each node comes to once all its children have failed: a [B, N] in fp64, and P [B, N, V]."""
    B, N, V = p.shape
    row = torch.arange(B, device=p.device)
    a, P = torch.zeros(B, N, dtype=torch.float64, device=p.device), p.clone()
    a[:, 0] = 1.0
    left = None if tree.draws != "without_replacement" or tree.law_rows is None else tree.law_rows.clone()  # loses what was drawn
    for child in range(1, N):
        token, parent, live = tree.tokens[:, child], tree.parents[:, child], tree.live[:, child]
        P_n, a_n, Q_n = P[row, parent], a[row, parent], _drawn_from(tree, child, left, V)
        ratio = P_n[row, token].double() / Q_n[row, token].double().clamp_min(1e-38)
        a[:, child] = torch.where(live, (a_n * ratio).clamp_max(1.0), 0.0)
        R = (P_n * a_n[:, None].to(P_n.dtype)).sub_(Q_n).clamp_min_(0)
        S = R.sum(-1, dtype=torch.float64)
        after = torch.where(parent == 0, 1.0, S / (S + 1 - a_n).clamp_min(1e-300))
        a[row, parent] = torch.where(live, after, a_n)
        P[row, parent] = torch.where((live & (S > 0))[:, None], R.div_(S.clamp_min(1e-38)[:, None].to(R.dtype)), P_n)
        if left is not None and tree.law_of is not None:
            left[row, tree.law_of[:, child], token] = 0.0
    return a, P


def _drawn_from(tree: Tree, child: int, left: Tensor | None, vocab: int) -> Tensor:
    """[B, V] the law that this node was drawn from, elder siblings taken out where nothing is put back."""
    if tree.draws == "point":  # q = 1: chosen with certainty
        return F.one_hot(tree.tokens[:, child], vocab).float()
    assert tree.law_rows is not None and tree.law_of is not None, f"a {tree.draws} tree recorded no laws"
    row = torch.arange(len(tree.tokens), device=tree.tokens.device)
    if left is None:
        return tree.law_rows[row, tree.law_of[:, child]]
    return normalise(left[row, tree.law_of[:, child]])


def standing(tree: Tree, a: Tensor) -> Tensor:
    """[B, N] the probability that each node is the first to stand, children before parents, elder branches before younger ones."""
    order = postorder(tree).argsort(1)
    stands = a.gather(1, order)
    failed = torch.cat([torch.ones_like(stands[:, :1]), (1 - stands).cumprod(1)[:, :-1]], 1)
    return torch.zeros_like(a).scatter(1, order, stands * failed)


def postorder(tree: Tree) -> Tensor:
    """[B, N] when each node's turn comes; dead ones, which never stand, may share a turn."""
    nodes = torch.arange(tree.tokens.shape[1], device=tree.tokens.device)
    below = (tree.ancestors & tree.live[:, :, None]).sum(1)  # [B, N] live nodes of the subtree, itself among them
    elder = (tree.parents[:, :, None] == tree.parents[:, None, :]) & (nodes[:, None] > nodes) & (nodes > 0)
    before = (elder * below[:, None, :]).sum(-1)  # [B, N] nodes in elder siblings' subtrees
    start = (tree.ancestors * before[:, None, :]).sum(-1)  # along the whole path
    return start + below - 1
