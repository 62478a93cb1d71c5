"""DFlash 2: a block with convolutions inside, and a selector among each position's best candidates (2026).

Around each layer's attention and MLP a causal two-tap depthwise convolution runs along the block, its kernels predicted from the states,
one a group of channels. Each position keeps the 16 likeliest tokens by U h_k; token b after token a then scores
U h_k(b) + <A(a) * P h_k, B(b)>. The selector is a distribution over these 16 and no other token: it reads 16 rows of a table where a
Markov head reads all of them. N blocks, K positions, W nodes, r rank, c candidates, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.drafters.base import bare_forward
from drafttrain.drafters.block import BlockConfig, BlockDrafter, BlockLabels, BlockState
from drafttrain.drafters.grow import Frontier, Step
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class DFlash2Config(BlockConfig):
    """A block, its convolutions and its selector."""

    name: Literal["dflash2"] = "dflash2"
    anchor_predicts: bool = False
    """The anchor's own slot gives the first token; otherwise the first mask behind it does, which costs one slot more."""
    conv_group: int | None = Field(default=16, ge=1)
    """Channels that share a convolution's kernel, a divisor of the hidden size; None: no convolutions."""
    selector_rank: int = Field(default=256, ge=1)
    """Rank of how well two tokens follow each other."""
    selector_candidates: int = Field(default=16, ge=1)
    """Tokens that each position chooses from."""
    selector: float = Field(default=1.0, gt=0)
    """Weight of the selector's cross entropy beside `loss`, which the block's own distribution learns by."""


class DFlash2(BlockDrafter):
    """Each position chooses among its candidates by the token before it."""

    Config = DFlash2Config
    config: DFlash2Config
    learns_base = True

    def __init__(self, config: DFlash2Config, target: TargetShape) -> None:
        super().__init__(config, target)
        self.extra_size = config.selector_rank
        draft_size = target.vocab_size if self.draft_ids is None else len(self.draft_ids)
        self.predecessor = nn.Embedding(target.vocab_size, config.selector_rank)
        self.successor = nn.Embedding(draft_size, config.selector_rank)
        self.hidden_projection = nn.Linear(target.hidden_size, config.selector_rank, bias=False)
        nn.init.normal_(self.predecessor.weight, std=0.1)
        nn.init.zeros_(self.successor.weight)  # a fresh selector says what the block says

    def extra_of_text(self, hidden: Tensor, previous: Tensor, head: TargetHead) -> Tensor:
        return self.extra(hidden, previous)

    @bare_forward
    def extra(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """[..., D] and the tokens before [...] -> [..., r]."""
        return self.predecessor(previous).to(hidden.dtype) * self.hidden_projection(hidden)

    def extra_parameters(self) -> list[nn.Parameter]:
        return list(self.successor.parameters())

    def combined(self, base: Tensor, extra: Tensor) -> Tensor:
        """Logits of the candidates alone; those of all other tokens are -inf."""
        base = base.expand(*extra.shape[:-1], -1)
        best = base.detach().topk(min(self.config.selector_candidates, base.shape[-1]), -1).indices  # [..., c]
        following = F.embedding(best, self.successor.weight)  # [..., c, r]
        scores = base.gather(-1, best) + (following @ extra.to(following.dtype)[..., None])[..., 0].to(base.dtype)
        return torch.full_like(base, float("-inf")).scatter(-1, best, scores)

    def more_loss(self, states: Tensor, base: Tensor, p: Tensor, log_q: Tensor, labels: BlockLabels, progress: float) -> Tensor | None:
        index, inside = self.output.index(labels.tokens)
        chosen = log_q.gather(-1, index[..., None])[..., 0]
        known = inside & chosen.isfinite()  # a label that is no candidate teaches the selector nothing
        return -self.config.selector * torch.where(known, chosen, 0.0)

    def step(self, base: Tensor, hidden: Tensor, states: list[Tensor], state: BlockState, roots: Tensor) -> Step:
        def step(frontier: Frontier) -> Tensor:
            own = hidden[:, frontier.level, None].expand(-1, frontier.tokens.shape[1], -1)
            extra = self.extra(own, frontier.tokens)
            states.append(torch.cat([own, extra], -1))
            return self.combined(base[:, frontier.level, None], extra)

        return step
