"""Domino: a block whose positions read the tokens before them through a small recurrent net (2026, arXiv:2605.29707).

g_k is a GRU's state after the anchor and the k tokens drafted so far; position k says softmax(U h_k + W2 SiLU(W1 [h_k ; g_k])). Training
moves from the block's own distribution to the whole one: (1 - l) loss(whole) + l loss(block), l falling from 1 to 0 over the run.
N blocks, K positions, W nodes, G the GRU's width, r inner width, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.packed import linear
from drafttrain.core.types import gathered
from drafttrain.drafters.base import bare_forward
from drafttrain.drafters.block import BlockConfig, BlockDrafter, BlockLabels, BlockState
from drafttrain.drafters.grow import Frontier, Step
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class DominoConfig(BlockConfig):
    """A block and its recurrent head."""

    name: Literal["domino"] = "domino"
    anchor_predicts: bool = False
    """The anchor's own slot gives the first token; otherwise the first mask behind it does, which costs one slot more."""
    gru_size: int = Field(default=256, ge=1)
    """Width of the recurrent state."""
    inner_size: int = Field(default=256, ge=1)
    """Rank of what the tokens before a position add to its logits."""


class Domino(BlockDrafter):
    """Each position reads all drafted tokens before it."""

    Config = DominoConfig
    config: DominoConfig

    def __init__(self, config: DominoConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        self.extra_size = config.inner_size
        draft_size = target.vocab_size if self.draft_ids is None else len(self.draft_ids)
        self.prefix_gru = nn.GRU(target.hidden_size, config.gru_size, batch_first=True)
        self.inner = nn.Linear(target.hidden_size + config.gru_size, config.inner_size, bias=False)
        self.outer = nn.Linear(config.inner_size, draft_size, bias=False)
        nn.init.zeros_(self.outer.weight)  # a fresh head says what the block says

    def extra_of_text(self, hidden: Tensor, previous: Tensor, head: TargetHead) -> Tensor:
        prefix, _ = self.prefix_gru(head.embed(previous).to(hidden.dtype))  # [N, K, G]
        return self.extra(hidden, prefix)

    @bare_forward
    def extra(self, hidden: Tensor, prefix: Tensor) -> Tensor:
        """[..., D] and [..., G] -> [..., r]."""
        return F.silu(self.inner(torch.cat([hidden, prefix], -1)))

    @bare_forward
    def read(self, embedded: Tensor, prefix: Tensor) -> Tensor:
        """[B, W, D] tokens after prefixes [B, W, G] -> [B, W, G]."""
        out, _ = self.prefix_gru(embedded.flatten(0, 1)[:, None], prefix.flatten(0, 1)[None].contiguous())
        return out[:, 0].view_as(prefix)

    def extra_logits(self, extra: Tensor) -> Tensor:
        return linear(extra.to(self.outer.weight.dtype), self.outer.weight)

    def extra_parameters(self) -> list[nn.Parameter]:
        return list(self.outer.parameters())

    def mix_share(self, progress: float) -> float:
        return progress

    def more_loss(self, states: Tensor, base: Tensor, p: Tensor, log_q: Tensor, labels: BlockLabels, progress: float) -> Tensor | None:
        if progress >= 1:
            return None
        return (1 - progress) * self.config.loss.between(p, base.float().log_softmax(-1), labels.tokens, self.draft_ids)

    def step(self, base: Tensor, hidden: Tensor, states: list[Tensor], state: BlockState, roots: Tensor) -> Step:
        prefix = hidden.new_zeros(len(roots), 1, self.config.gru_size)  # [B, W, G] of the nodes fed last

        def step(frontier: Frontier) -> Tensor:
            nonlocal prefix
            before = gathered(prefix, frontier.parent) if frontier.level else prefix
            prefix = self.read(state.head.embed(frontier.tokens).to(hidden.dtype), before)
            own = hidden[:, frontier.level, None].expand(-1, prefix.shape[1], -1)
            extra = self.extra(own, prefix)
            states.append(torch.cat([own, extra], -1))
            return self.combined(base[:, frontier.level, None], extra)

        return step
