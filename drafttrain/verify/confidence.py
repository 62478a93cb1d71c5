"""Confidence-modulated acceptance (Sen et al., 2025, arXiv:2508.15371), the relaxed mode: the drafter's confidence sets how much
probability a draft token needs. LOSSY. (The exact mode is the policy `confidence` in `runtime/policy.py`: it changes the length only.)

p is the target's distribution, q the drafter's, V the vocabulary. The paper does not print its exact formulas; these are ours for what it
describes:

    c   = w (1 - H(q) / log V) + (1 - w) (q_1 - q_2)        confidence, 0 to 1: entropy, and margin of the two likeliest tokens
    tau = clip(tau_base + gamma (1 - c), 0, 1)              a token x is accepted where p(x) / max p >= tau

The longest accepted path is kept; of equally long ones the likeliest. The token after it is drawn from p (the argmax at temperature 0).
p is the distribution after the sampling options; at temperature 0, where that is one-hot, the softmax of the target's logits. q is the
softmax of the drafter's logits where tokens were chosen (`deterministic`), and where they were drawn the distribution that drew them.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field
from torch import Tensor, special

from drafttrain.core.rng import Rng
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.verify.base import ANY, Rule, RuleConfig
from drafttrain.verify.lossy import after, chosen, drafter_probs, longest, lossless_rule, plain_probs


class ConfidenceConfig(RuleConfig):
    """Lower values accept more."""

    name: Literal["confidence"] = "confidence"
    tau_base: float = Field(default=0.5, ge=0, le=1)
    """Share of the likeliest token's probability that is enough where the drafter is certain. 1 turns the rule off: every threshold
    would be 1, and the lossless rule decides."""
    gamma: float = Field(default=0.5, ge=0)
    """How much stricter the rule is where the drafter is uncertain."""
    entropy_weight: float = Field(default=0.5, ge=0, le=1)
    """Of the entropy in the confidence (w); the rest is the margin's."""


class Confidence(Rule):
    """Any tree whose drafter gives distributions."""

    Config = ConfidenceConfig
    config: ConfidenceConfig
    lossless = False
    accepts = ANY

    @property
    def needs_draft_probs(self) -> bool:
        return self.config.tau_base < 1

    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        config = self.config
        if not self.needs_draft_probs or tree.max_depth == 0:  # off, or nothing was drafted
            return lossless_rule("auto", tree, scored)(tree, scored, rng)
        p = plain_probs(tree, scored)  # [B, N, V]
        likely = chosen(tree, p)  # [B, N]
        share = likely / p.amax(-1).gather(1, tree.parents)
        q, drawn_from = drafter_probs(tree, config.name)
        certain = confidence(q, config.entropy_weight).gather(1, drawn_from)  # [B, R] -> [B, N]
        tau = (config.tau_base + config.gamma * (1 - certain)).clamp(0, 1)
        return after(tree, scored, longest(tree, share >= tau, likely), rng)


def confidence(q: Tensor, entropy_weight: float) -> Tensor:
    """[..., V] distributions -> [...] in [0, 1]: certain is 1. Weighted mean of 1 - H(q) / log V and of the margin between the two
    likeliest."""
    entropy = special.entr(q).sum(-1) / math.log(q.shape[-1])
    best = q.topk(2, -1).values
    return entropy_weight * (1 - entropy) + (1 - entropy_weight) * (best[..., 0] - best[..., 1])
