"""Prefetch: the next round's draft, made before the target has answered (Lu et al., 2024, arXiv:2409.10644, their target-initialised roots
in a form that keeps the target's distribution).

While the target scores a tree, the drafter goes on under the tokens it thinks likeliest to come out of it: a prefetched draft is a node of
the tree's first chain where acceptance ends, and the token that follows there. If what comes out is a prefetched draft, its draft is the
next round's tree and nothing is drafted; every other prefetched draft is thrown away. Which prefetched draft is kept depends on the
target's own token alone, never on the drafts:
exact. (The paper drafts under several of the target's tokens and keeps the longest branch, which is not.)

In one process nothing runs at the same time, so a prefetched draft costs what it costs and a hit saves the next round's drafter calls: what
this reports is what a second device would gain. B rows, w prefetched drafts a row, K depth, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.plan import Plan, Static
from drafttrain.core.rng import Rng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Verdict
from drafttrain.drafters.base import Drafter, DrafterState
from drafttrain.drafters.grow import widen
from drafttrain.target.head import TargetHead


@dataclass
class Prefetched:
    """w guesses a row at what a round will commit, each with the draft that would follow: row b's stand at b * w .. b * w + w - 1."""

    state: DrafterState  # B * w rows
    tree: Tree  # B * w rows
    path: Tensor  # [B, K] nodes of the tree's first chain
    length: Tensor  # [B, w] how many of them stand
    token: Tensor  # [B, w] the token after them
    saved: int  # drafter calls that a hit saves

    def hits(self, verdict: Verdict) -> Tensor:
        """[B] which of a row's prefetched drafts came true, -1 for none."""
        if verdict.next is None:
            return torch.full_like(verdict.length, -1)
        depth = torch.arange(self.path.shape[1], device=self.path.device)
        beyond = depth >= self.length[..., None]  # [B, w, K]
        same = ((verdict.path == self.path)[:, None] | beyond).all(-1)
        right = same & (verdict.length[:, None] == self.length) & (verdict.next[:, None] == self.token)
        return torch.where(right.any(1), right.long().argmax(1), -1)


@dataclass
class Prefetcher:
    """Places the prefetched drafts. The drafter must read nothing of the target: its features at the tokens prefetched draft on are not
    known yet."""

    drafter: Drafter
    head: TargetHead
    width: int  # prefetched drafts a row

    def draft(self, state: DrafterState, tree: Tree, plan: Plan, sampling: Sampling, rng: Rng) -> Prefetched:
        """After `tree` was proposed from `state`, which stays as it is. chance: for rows b * w + j, at the numbers of the next round."""
        own = sampling if plan.temperature is None else sampling._replace(temperature=plan.temperature)
        B, device = len(tree.tokens), tree.tokens.device
        chain, live = tree.first_born()  # [B, K + 1]
        tokens = tree.tokens.gather(1, chain)
        belief = self._beliefs(state, tree, chain, tokens, live, own)  # [B, K + 1, V]
        place = belief.flatten(1).topk(self.width, -1).indices  # [B, w]
        leaf = live.sum(1) - 1  # [B] where the row's first chain ends, which may be above the tree's deepest level
        length, token = place // belief.shape[-1], place % belief.shape[-1]
        length = torch.minimum(length, leaf[:, None])  # wider than there are ways out: a guess of no weight stays on the chain
        rows = torch.arange(B, device=device).repeat_interleave(self.width)
        copies = state.select(rows)
        self.drafter.observe(copies, Committed(tokens[rows], length.flatten() + 1, nodes=chain[rows]))
        before = self.drafter.calls
        following = self.drafter.propose(copies, token.flatten(), plan, sampling, rng)
        return Prefetched(copies, following, chain[:, 1:], length, token, self.drafter.calls - before)

    def _beliefs(self, state: DrafterState, tree: Tree, chain: Tensor, tokens: Tensor, live: Tensor, own: Sampling) -> Tensor:
        """[B, K + 1, V] how likely the drafter finds it that the text follows the chain to a node and leaves the tree there by a token."""
        assert tree.draft_states is not None and tree.probs_row is not None
        row = torch.arange(len(chain), device=chain.device)
        logits = []
        for level in range(tree.max_depth):
            source = tree.probs_row.gather(1, chain[:, level + 1 : level + 2])[:, 0]
            logits.append(self.drafter.readout(tree.draft_states[row, source], level, self.head))
        leaf = live.sum(1) - 1
        at_leaf = self._leaf(state, chain, tokens, leaf)
        by_node = torch.stack([*logits, at_leaf], 1)  # [B, K + 1, Vd]
        by_node[row, leaf] = at_leaf
        draft_probs = own.probs(by_node) if not own.greedy else by_node.float().softmax(-1)
        if self.drafter.draft_ids is not None:
            draft_probs = widen(draft_probs, self.drafter.draft_ids, self.head.vocab_size)
        step = draft_probs[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0] * live[:, 1:]  # [B, K]
        reached = torch.cat([torch.ones_like(step[:, :1]), step.cumprod(1)], 1)
        children = tree.children[row[:, None], chain]  # [B, K + 1, C]
        taken = tree.tokens[row[:, None, None], children.clamp_min(0)]
        leaving = draft_probs.scatter_reduce(-1, taken, (children < 0).float(), "prod")  # children's tokens do not leave the tree
        return leaving * reached[..., None]

    def _leaf(self, state: DrafterState, chain: Tensor, tokens: Tensor, leaf: Tensor) -> Tensor:
        """[B, Vd] logits at each chain's last node, place `leaf` [B] of it, which was never fed: one call on a copy."""
        copy = state.select(torch.arange(len(chain), device=chain.device))
        self.drafter.observe(copy, Committed(tokens[:, :-1], leaf, nodes=chain[:, :-1]))
        plan = Plan(Static(children=(1,)), "deterministic", keep_states=True)
        told = self.drafter.propose(copy, tokens.gather(1, leaf[:, None])[:, 0], plan, Sampling(), _NoChance()).draft_states
        assert told is not None
        return self.drafter.readout(told[:, 0], chain.shape[1] - 1, self.head)


class _NoChance:
    """Deterministic draws ask for nothing."""

    def bernoulli(self, p: Tensor) -> Tensor:
        raise AssertionError("deterministic draws need no chance")

    def draw(self, probs: Tensor, k: int, replace: bool) -> Tensor:
        raise AssertionError("deterministic draws need no chance")

    def substream(self, number: int | Tensor) -> None:
        raise AssertionError("deterministic draws need no chance")
