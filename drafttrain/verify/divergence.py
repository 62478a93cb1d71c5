"""The training-free baseline beside the judge (the KL threshold of arXiv:2601.04766): where target and drafter agree well enough about
the next token, the draft token is accepted. LOSSY.

p is the target's distribution after a node's parent, q the draft distribution that the node came from. A token is accepted where the inner
lossless rule accepts it OR KL(p || q) < bound (nats). The inner rule goes first. Where it stops, the child that the target finds likeliest
is accepted if the distributions are close, and the inner rule goes on from there. Both distributions are the softmax of raw logits where
tokens were chosen (`deterministic`) or the target decodes greedily, else what the sampling options left. q counts as at least 1e-9: what a
drafter cannot propose is a large, finite divergence.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from drafttrain.core.rng import Rng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Topology, Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.verify.base import ANY, Rule, RuleConfig
from drafttrain.verify.lossy import Inner, check_inner, chosen, drafter_probs, lossless_rule, plain_probs, pushed

FLOOR = 1e-9


class DivergenceConfig(RuleConfig):
    """A higher bound accepts more."""

    name: Literal["divergence"] = "divergence"
    bound: float = Field(default=0.2, ge=0)
    """KL divergence in nats below which a draft token is accepted. 0 turns the rule off: the inner rule decides alone."""
    inner: Inner = "auto"
    """The lossless rule that goes first."""


class Divergence(Rule):
    """Any tree that the inner rule takes, of a drafter that gives distributions."""

    Config = DivergenceConfig
    config: DivergenceConfig
    lossless = False
    accepts = ANY

    @property
    def needs_draft_probs(self) -> bool:
        return self.config.bound > 0

    def check(self, topology: Topology, draws: Draws, sampling: Sampling) -> None:
        super().check(topology, draws, sampling)
        check_inner(self.config.inner, topology, draws, sampling)

    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        inner = lossless_rule(self.config.inner, tree, scored)
        if not self.needs_draft_probs or tree.max_depth == 0:  # off, or nothing was drafted
            return inner(tree, scored, rng)
        p = plain_probs(tree, scored, raw=tree.draws == "deterministic")  # [B, N, V]
        draft_probs, probs_row = drafter_probs(tree, self.config.name)
        row = torch.arange(len(p), device=p.device)[:, None]
        apart = divergence(p[row, tree.parents], draft_probs[row, probs_row])  # [B, N]
        return pushed(inner, tree, scored, rng, apart < self.config.bound, chosen(tree, p))


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats: [..., V], [..., V] -> [...]."""
    return -(torch.special.entr(p) + p * q.clamp_min(FLOOR).log()).sum(-1)
