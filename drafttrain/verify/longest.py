"""The longest branch (Lu et al., 2024, arXiv:2409.10644): a round's first token is whichever of the target's candidates the draft goes on
from best. LOSSY. (The paper's candidates as prefetched drafts, which keep the law, are in `runtime/prefetch.py`.)

p the target's law at a node. At the root the target names w candidates: its w likeliest tokens at temperature 0, else w drawn from p
without replacement. Below the root it names one token a node: the argmax, or one drawn from p. A node stands where its token was named at
its parent, and of all branches that stand the longest is kept. The token after it is the one named at its end, where the paper leaves the
place open for the next round's candidates. Of equally long branches the target's first candidate goes before the others, then the
likeliest stands; and where nothing follows another candidate, the first one is the round's only token.

The first token is chosen by how well the draft continues it, not by p: that is what is lost. One candidate is match sampling, which is
exact. The paper drafts under the candidates themselves; here they count where the drafter drafted them, so that any drafter will do.
B rows, N nodes.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from drafttrain.core.chance import Chance
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.verify.base import ANY, Rule, RuleConfig
from drafttrain.verify.lossy import chosen, longest, lossless_rule, plain_law


class LongestConfig(RuleConfig):
    """More candidates accept more."""

    name: Literal["longest"] = "longest"
    width: int = Field(default=4, ge=1)
    """Candidates of the target for a round's first token (w). 1 turns the rule off: the lossless rule decides."""


class Longest(Rule):
    """Reads no drafter's law: any tree, however drawn."""

    Config = LongestConfig
    config: LongestConfig
    lossless = False
    accepts = ANY

    def __call__(self, tree: Tree, scored: Scored, chance: Chance) -> Verdict:
        if self.config.width == 1:
            return lossless_rule("auto", tree, scored)(tree, scored, chance)
        N = tree.tokens.shape[1]
        width = min(self.config.width, scored.logits.shape[-1])
        if scored.sampling.greedy:
            named = scored.top[:, :N]  # [B, N]
            candidates = scored.logits[:, 0].topk(width, -1).indices  # [B, w]
            ours = torch.cat([named[:, :1], candidates], 1)
        else:
            named = chance.draw(scored.p[:, :N], 1, replace=True)[..., 0]
            ours = chance.draw(scored.p[:, :1], width, replace=False)[:, 0]
            named = torch.cat([ours[:, :1], named[:, 1:]], 1)
        below_root = tree.parents == 0  # the root's own entry is forced to stand by `longest`
        same = tree.tokens == named.gather(1, tree.parents)
        good = same | (below_root & (tree.tokens[..., None] == ours[:, None]).any(-1))
        likely = torch.where(same & below_root, 1.0, chosen(tree, plain_law(tree, scored)))
        node = longest(tree, good, likely)[:, None]
        lone = below_root.gather(1, node) & ~same.gather(1, node)
        node = torch.where(lone, 0, node)
        return Verdict(*tree.path_to(node[:, 0]), named.gather(1, node)[:, 0])
