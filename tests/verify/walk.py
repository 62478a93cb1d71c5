"""Every branch of a rule on a whole batch at once: the exact distribution of what it says of each tree, through its own call.

B rows, N nodes, D depth, V vocabulary, S outcomes of one choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.rng import next_script
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.verify.base import Rule

LEAST = 1e-12
"""Branches that no row takes with more than this probability are not walked."""


class Together:
    """All rows make the same choices, each with its own probability, `weight` [B]."""

    def __init__(self, script: list[int], rows: int) -> None:
        self.script, self.taken = script, list[tuple[int, int]]()
        self.weight = torch.ones(rows, dtype=torch.float64)

    def substream(self, number: int) -> None:
        pass

    def bernoulli(self, p: Tensor) -> Tensor:
        shares = p.double().clamp(0, 1).reshape(len(p), -1)  # [B, S]
        kept = [self._choose(torch.stack([1 - share, share], 1)) for share in shares.unbind(1)]
        return torch.tensor(kept, dtype=torch.bool).view(1, *p.shape[1:]).expand(p.shape)

    def draw(self, probs: Tensor, k: int, replace: bool) -> Tensor:
        assert k == 1
        rows = probs.double().flatten(1, -2).unbind(1)  # W of [B, V]
        drawn = [self._choose(row / row.sum(-1, keepdim=True)) for row in rows]
        return torch.tensor(drawn).view(1, *probs.shape[1:-1], 1).expand(*probs.shape[:-1], 1)

    def _choose(self, weights: Tensor) -> int:
        """[B, S]."""
        step, possible = len(self.taken), ((self.weight[:, None] * weights).amax(0) > LEAST).nonzero()[:, 0].tolist()
        outcome = self.script[step] if step < len(self.script) else possible[0]
        self.taken.append((outcome, next((other for other in possible if other > outcome), -1)))
        self.weight = self.weight * weights[:, outcome]
        return outcome


def walked(rule: Rule, tree: Tree, scored: Scored) -> Iterator[tuple[Tensor, Verdict]]:
    """Each branch: its probability in each row [B], and the verdict."""
    script: list[int] | None = []
    while script is not None:
        rng = Together(script, len(tree.tokens))
        verdict = rule(tree, scored, rng)
        yield rng.weight, verdict
        script = next_script(rng.taken)


@dataclass
class Said:
    """What comes out of a rule, row by row."""

    standing: Tensor  # [B, N] the probability that a node is the last one that stands
    next: Tensor  # [B, N, V] and that this token follows it
    length: Tensor  # [B] expected accepted length


def probs_row(rule: Rule, tree: Tree, scored: Scored) -> Said:
    """The exact distribution of the verdict on each tree."""
    B, N = tree.tokens.shape
    row, following = torch.arange(B), torch.zeros(B, N, scored.logits.shape[-1], dtype=torch.float64)
    for weight, verdict in walked(rule, tree, scored):
        assert verdict.next is not None
        last = torch.cat([torch.zeros(B, 1).long(), verdict.path], 1)[row, verdict.length]
        following.index_put_((row, last, verdict.next), weight, accumulate=True)
    standing = following.sum(-1)
    assert (standing.sum(1) - 1).abs().max() < 1e-6  # all branches were walked
    return Said(standing, following, (standing * tree.depth).sum(1))


def first_tokens(said: Said, tree: Tree, weight: Tensor) -> Tensor:
    """[V] the distribution of the first token that comes out, over all trees of probability `weight` [B]."""
    out = (weight[:, None] * said.next[:, 0]).sum(0)
    for node in range(1, tree.tokens.shape[1]):
        path, _ = tree.path_to(torch.full((len(weight),), node))
        out = out.index_add(0, tree.tokens.gather(1, path[:, :1])[:, 0], weight * said.standing[:, node])
    return out
