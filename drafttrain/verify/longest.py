"""The longest branch below the target's own candidates (Lu et al., 2024, arXiv:2409.10644: target-initialised multi-candidates). LOSSY.
(The exact form of the paper's idea, prefetched drafts, is in `runtime/prefetch.py`.)

p is the target's distribution at a node. The token after a round is left open: the rule gives w `target_candidates` for it. At temperature
0 they are the w likeliest tokens of p where the path ends; else w tokens drawn without replacement from the residual of p there. The next
tree's first level is these candidates, each with what the drafter drafts below it; that level is always accepted. Below it a node is
accepted where the target's own token after its parent (the argmax, or one drawn from p) is the node's. The longest accepted branch is kept;
of equally long ones the first candidate's, then the likeliest. A round commits its path, one token at least.

A round's first token is chosen by how well the draft goes on from it, not by p: that is what is lost. The first round of a text, which
has no candidates yet, verifies the drafter's own first level like any other, and may commit nothing. Candidates come from the target:
they count in the accepted length, but not in the acceptance rate. B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from drafttrain.core.rng import Rng
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.verify.base import ANY, Rule, RuleConfig
from drafttrain.verify.lossy import chosen, longest, lossless_rule, plain_probs


class LongestConfig(RuleConfig):
    """More candidates accept more."""

    name: Literal["longest"] = "longest"
    width: int = Field(default=4, ge=1)
    """Candidates of the target for a round's first token (w); the tree's shape says how many of them are drafted on. 1 turns the rule off:
    the lossless rule decides."""


class Longest(Rule):
    """Reads no drafter's distribution: any tree; what the target named was chosen, so that open rounds are of `deterministic` draws."""

    Config = LongestConfig
    config: LongestConfig
    lossless = False
    accepts = ANY

    @property
    def leaves_next_open(self) -> bool:
        return self.config.width > 1

    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        if not self.leaves_next_open:
            return lossless_rule("auto", tree, scored)(tree, scored, rng)
        N = tree.tokens.shape[1]
        own = scored.top[:, :N] if scored.sampling.greedy else rng.draw(scored.target_probs[:, :N], 1, replace=True)[..., 0]  # [B, N]
        good, likely = tree.tokens == own.gather(1, tree.parents), chosen(tree, plain_probs(tree, scored))
        if tree.from_target:
            first = (tree.parents == 0) & tree.live  # [B, N] the candidates, and the root, which comes first
            rank = first.cumsum(1) - 2
            good = torch.where(first, rank < self.config.width, good)
            likely = torch.where(first & (rank == 0), 1.0, likely)
        node = longest(tree, good, likely)
        return Verdict(*tree.path_to(node), next=None, target_candidates=self._target_candidates(tree, scored, node, rng))

    def _target_candidates(self, tree: Tree, scored: Scored, node: Tensor, rng: Rng) -> Tensor:
        """[B] where the path ends -> [B, w] the target's tokens for the place after it."""
        row = torch.arange(len(node), device=node.device)
        width = min(self.config.width, scored.logits.shape[-1])
        if scored.sampling.greedy:
            likeliest = scored.logits[row, node].topk(width, -1)
            return torch.where(likeliest.values > float("-inf"), likeliest.indices, likeliest.indices[:, :1])  # forbidden ones are none
        probs = scored.probs_at(node[:, None])[:, 0]  # [B, V]
        children = tree.children[row, node]  # [B, C] none of which is what the target drew here
        child_tokens = tree.tokens.gather(1, children.clamp_min(0))
        probs = probs.scatter_reduce(1, child_tokens, (children < 0).to(probs.dtype), "prod")
        drawn = rng.draw(probs[:, None], width, replace=False)[:, 0]
        real = torch.arange(width, device=node.device) < (probs > 0).sum(-1, keepdim=True)
        return torch.where(real, drawn, drawn[:, :1])  # a distribution of fewer tokens than candidates
