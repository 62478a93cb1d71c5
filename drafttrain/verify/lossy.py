"""What the lossy rules share: the lossless rule they fall back to, the longest accepted path, and a step past a rejection.

B rows, N nodes, C children at most, V vocabulary; p the target's distribution.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from drafttrain.core.errors import UserError
from drafttrain.core.rng import Rng, draw_one
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Topology, Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.verify.base import Rule
from drafttrain.verify.greedy import Greedy, GreedyConfig
from drafttrain.verify.recursive import Recursive, RecursiveConfig
from drafttrain.verify.rejection import Rejection, RejectionConfig

Inner = Literal["auto", "greedy", "rejection", "recursive"]
"""A lossless rule by name; `auto`: what the runtime's `auto` means."""

INNER: dict[str, Rule] = {
    "greedy": Greedy(GreedyConfig()), "rejection": Rejection(RejectionConfig()), "recursive": Recursive(RecursiveConfig()),
}  # fmt: skip


def lossless_rule(name: Inner, tree: Tree, scored: Scored) -> Rule:
    """The rule of that name; `auto`: `greedy` at temperature 0, else `rejection` for chains and `recursive` for trees."""
    if name != "auto":
        return INNER[name]
    if scored.sampling.greedy:
        return INNER["greedy"]
    return INNER["rejection" if tree.topology == "chain" else "recursive"]


def check_inner(name: Inner, topology: Topology, draws: Draws, sampling: Sampling) -> None:
    """A `UserError` where the inner rule does not take such trees; `auto` takes all."""
    if name != "auto":
        INNER[name].check(topology, draws, sampling)


def plain_probs(tree: Tree, scored: Scored, raw: bool = False) -> Tensor:
    """[B, N, V] the target's distribution at the tree's nodes; at temperature 0, where it is one-hot, and if `raw`, the softmax of its
    logits."""
    N = tree.tokens.shape[1]
    return scored.logits[:, :N].float().softmax(-1) if raw or scored.sampling.greedy else scored.target_probs[:, :N]


def drafter_probs(tree: Tree, rule: str) -> tuple[Tensor, Tensor]:
    """[B, R, V] the drafter's distributions and [B, N] which of them each node came from, or a `UserError` where the drafter has none."""
    if tree.draft_probs is None or tree.probs_row is None:
        raise UserError(f"rule '{rule}' reads the drafter's distributions, but this drafter gives none; choose another rule or drafter")
    return tree.draft_probs, tree.probs_row


def chosen(tree: Tree, probs: Tensor) -> Tensor:
    """[B, N, V] a distribution at each node -> [B, N] what it gives to a node's token, read at the node's parent; the root's is 1."""
    row = torch.arange(len(probs), device=probs.device)[:, None]
    out = probs[row, tree.parents, tree.tokens]
    out[:, 0] = 1.0
    return out


def longest(tree: Tree, good: Tensor, likely: Tensor) -> Tensor:
    """[B] the deepest node that is `good` ([B, N] bool) with everything above it; of equals the one whose path is likeliest.

    likely: [B, N] probability of each node's token after its parent.
    """
    good = (good & tree.live).index_fill(1, torch.zeros(1, dtype=torch.long, device=good.device), True)  # the root is always accepted
    accepted = ~(tree.ancestors & ~good[:, None, :]).any(-1)
    depth = torch.where(accepted, tree.depth, -1)
    path = (tree.ancestors * likely.clamp_min(1e-38).log()[:, None, :]).sum(-1)  # [B, N] log probability
    return torch.where(depth == depth.amax(1, keepdim=True), path, float("-inf")).argmax(1)


def after(tree: Tree, scored: Scored, node: Tensor, rng: Rng) -> Verdict:
    """The path to `node` ([B]) is accepted, and the token after it is the target's own: drawn from p there, the argmax at temperature 0."""
    path, length = tree.path_to(node)
    if scored.sampling.greedy:
        return Verdict(path, length, scored.top.gather(1, node[:, None])[:, 0])
    row = torch.arange(len(node), device=node.device)
    return Verdict(path, length, draw_one(rng, scored.target_probs[row, node]))


def pushed(inner: Rule, tree: Tree, scored: Scored, rng: Rng, good: Tensor, score: Tensor) -> Verdict:
    """`inner`'s verdict, carried on: where it stops, a `good` child ([B, N] bool) of the last node is accepted too, and `inner` goes on
    there.

    score: [B, N]; of several good children the one that scores highest is accepted. What loosens (more nodes are good) makes no path
    shorter.
    """
    row = torch.arange(len(tree.tokens), device=tree.tokens.device)
    verdict = inner(tree, scored, rng)
    last = verdict.path.gather(1, (verdict.length - 1).clamp_min(0)[:, None])[:, 0]
    node = torch.where(verdict.length > 0, last, 0)
    assert verdict.next is not None, f"rule '{inner.config.name}' leaves the next token open; it cannot be an inner rule"
    next_token, going = verdict.next, torch.ones_like(row, dtype=torch.bool)
    step = torch.full_like(row, -1)  # [B] the child that `inner` takes at `node`
    score = torch.where(good, score, float("-inf"))
    for _ in range(tree.max_depth):
        children = tree.children[row, node]  # [B, C]
        scores = torch.where(children >= 0, score.gather(1, children.clamp_min(0)), float("-inf"))
        best, rank = scores.max(1)
        push = torch.where(best > float("-inf"), children.gather(1, rank[:, None])[:, 0], -1)
        step = torch.where(step >= 0, step, push)
        going = going & (step >= 0)
        node = torch.where(going, step, node)
        step, following = _at_one_node(inner, tree, scored, rng, node)
        next_token = torch.where(going, following, next_token)
    path, length = tree.path_to(node)
    return Verdict(path, length, next_token)


def _at_one_node(inner: Rule, tree: Tree, scored: Scored, rng: Rng, node: Tensor) -> tuple[Tensor, Tensor]:
    """What `inner` decides at `node` ([B]), seeing its children and no deeper: [B] the child that is accepted or -1, [B] the token if
    none."""
    row = torch.arange(len(node), device=node.device)
    children = tree.children[row, node]  # [B, C]
    nodes = torch.cat([node[:, None], children.clamp_min(0)], 1)  # [B, C + 1]
    live = torch.cat([torch.ones_like(node[:, None], dtype=torch.bool), children >= 0], 1)
    star = Tree(
        tree.tokens.gather(1, nodes), torch.zeros_like(nodes), live, tree.draws, max_depth=1, max_children=tree.max_children,
        draft_probs=tree.draft_probs, probs_row=None if tree.probs_row is None else tree.probs_row.gather(1, nodes),
    )
    verdict = inner(star, scored.at(nodes), rng)
    assert verdict.next is not None
    taken = nodes.gather(1, verdict.path[:, :1])[:, 0]
    return torch.where(verdict.length > 0, taken, -1), verdict.next
