"""Typical acceptance (Medusa: Cai et al., 2024, arXiv:2401.10774, section 2.3.1): a draft token is accepted where the target finds it
typical. LOSSY.

p is the target's distribution after the node's parent, H its entropy in nats. Token x is accepted where p(x) > min(epsilon, delta exp(-H)):
where the target is undecided, less probability is enough. The longest accepted path is kept; of equally long ones the likeliest.

The paper accepts the first token of a round unchecked, so that a round always gains one. Here that token is the root: it is the `next` of
the round before, drawn from p at the last accepted node (the argmax at temperature 0), not from a residual. At temperature 0 the
distribution is one-hot and the rule decodes greedily.
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
from drafttrain.verify.lossy import after, chosen, longest, lossless_rule


class TypicalConfig(RuleConfig):
    """Lower values accept more."""

    name: Literal["typical"] = "typical"
    epsilon: float | None = Field(default=0.09, ge=0, lt=1)
    """A token of more probability than this is always accepted. None turns the rule off: the lossless rule decides."""
    delta: float = Field(default=0.3, ge=0, lt=1)
    """Times exp(-entropy): the share of a uniform distribution's probability that is enough where the target is undecided."""


class Typical(Rule):
    """Reads no drafter's distribution: any tree, however drawn."""

    Config = TypicalConfig
    config: TypicalConfig
    lossless = False
    accepts = ANY

    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        epsilon, delta = self.config.epsilon, self.config.delta
        if epsilon is None:
            return lossless_rule("auto", tree, scored)(tree, scored, rng)
        p = scored.target_probs[:, : tree.tokens.shape[1]]  # [B, N, V]
        likely = chosen(tree, p)  # [B, N]
        bar = threshold(p, epsilon, delta).gather(1, tree.parents)
        return after(tree, scored, longest(tree, likely > bar, likely), rng)


def threshold(p: Tensor, epsilon: float, delta: float) -> Tensor:
    """min(epsilon, delta * exp(-H(p))): [..., V] -> [...]."""
    return (delta * torch.exp(-torch.special.entr(p).sum(-1))).clamp_max(epsilon)
