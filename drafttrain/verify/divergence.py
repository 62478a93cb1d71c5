"""The training-free baseline beside the judge (the KL threshold of arXiv:2601.04766): where target and drafter agree well enough about what
may come next, the drafted token stands. LOSSY.

p the target's law after a node's parent, q the drafter's that the node came from. A token stands where the inner lossless rule accepts it
OR KL(p || q) < bound (nats): the inner rule goes first, and where it stops, the child that the target finds likeliest stands if the laws
are close, and the inner rule goes on from there. Both laws are the softmax of raw logits where tokens were chosen (`point`) or the target
decodes greedily, else what the sampling options left. q is read as at least 1e-9: what a drafter cannot propose counts as a large, finite
divergence.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from drafttrain.core.chance import Chance
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Topology, Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.verify.base import ANY, Rule, RuleConfig
from drafttrain.verify.lossy import Inner, check_inner, chosen, drafter_laws, lossless_rule, plain_law, pushed

FLOOR = 1e-9


class DivergenceConfig(RuleConfig):
    """A higher bound accepts more."""

    name: Literal["divergence"] = "divergence"
    bound: float = Field(default=0.2, ge=0)
    """KL divergence in nats below which a drafted token stands. 0 turns the rule off: the inner rule decides alone."""
    inner: Inner = "auto"
    """The lossless rule that goes first."""


class Divergence(Rule):
    """Any tree that the inner rule takes, of a drafter that gives laws."""

    Config = DivergenceConfig
    config: DivergenceConfig
    lossless = False
    accepts = ANY

    @property
    def reads_laws(self) -> bool:
        return self.config.bound > 0

    def check(self, topology: Topology, draws: Draws, sampling: Sampling) -> None:
        super().check(topology, draws, sampling)
        check_inner(self.config.inner, topology, draws, sampling)

    def __call__(self, tree: Tree, scored: Scored, chance: Chance) -> Verdict:
        inner = lossless_rule(self.config.inner, tree, scored)
        if not self.reads_laws or tree.max_depth == 0:  # off, or nothing was drafted
            return inner(tree, scored, chance)
        p = plain_law(tree, scored, raw=tree.draws == "point")  # [B, N, V]
        laws, law_of = drafter_laws(tree, self.config.name)
        row = torch.arange(len(p), device=p.device)[:, None]
        apart = divergence(p[row, tree.parents], laws[row, law_of])  # [B, N]
        return pushed(inner, tree, scored, chance, apart < self.config.bound, chosen(tree, p))


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats: [..., V], [..., V] -> [...]."""
    return -(torch.special.entr(p) + p * q.clamp_min(FLOOR).log()).sum(-1)
