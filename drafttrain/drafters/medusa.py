"""Medusa: K residual heads on the target's last hidden state (Cai et al., 2024, arXiv:2401.10774).

Head k at token p predicts x[p + 2 + k]; the target's own head gives x[p + 1]. Heads don't see each other's tokens, so one call drafts a
whole round. B rows, T time, K heads, D hidden, V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.chance import Chance
from drafttrain.core.losses import LossMix, distill
from drafttrain.core.plan import Plan
from drafttrain.core.sampling import Sampling, likeliest
from drafttrain.core.tree import Tree
from drafttrain.core.types import Batch, Committed, Features
from drafttrain.core.vocab import draft_vocab
from drafttrain.drafters.base import Drafter, DrafterConfig, DrafterState, Loss, bare_forward
from drafttrain.drafters.grow import Frontier, grow
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class MedusaConfig(DrafterConfig):
    """Blocks are small; the output matrix is what a head costs."""

    name: Literal["medusa"] = "medusa"
    heads: int = Field(default=4, ge=1)
    """Tokens drafted ahead (K)."""
    layers: int = Field(default=1, ge=1)
    """Residual blocks a head."""
    own_heads: bool = False
    """Train an output matrix for each head, starting from the target's; otherwise all share the target's frozen one."""
    draft_vocab_size: int | None = Field(default=None, ge=2)
    """Tokens the heads can propose, the most frequent of the training answers; None: all of the target's."""
    head_decay: float = Field(default=0.8, gt=0, le=1)
    """Head k's loss weighs `head_decay ** k`."""
    loss: LossMix = LossMix()
    """What each head learns from the target's law."""
    loss_chunk: int = Field(default=1024, ge=1)
    """Labels whose [V] logits stand in memory at once."""


class ResidualBlock(nn.Module):
    """x + silu(W x + b). W starts at 0, so that a fresh head says what the target's own would."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


@dataclass
class MedusaState(DrafterState):
    """The target's state at the last token in its cache: all that heads read."""

    head: TargetHead
    last: Tensor  # [B, D]

    def select(self, rows: Tensor) -> MedusaState:
        return MedusaState(self.head, self.last[rows])

    def join(self, other: DrafterState) -> MedusaState:
        assert isinstance(other, MedusaState)
        return MedusaState(self.head, torch.cat([self.last, other.last]))


class Medusa(Drafter):
    """See the module."""

    Config = MedusaConfig
    config: MedusaConfig
    needs = frozenset({"last"})

    def __init__(self, config: MedusaConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        size, draft_size = target.hidden_size, min(config.draft_vocab_size or target.vocab_size, target.vocab_size)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(size) for _ in range(config.layers))) for _ in range(config.heads)
        )
        self.register_buffer("vocab", torch.arange(draft_size))  # [Vd] ascending target ids
        if config.own_heads:
            self.lm_heads = nn.ModuleList(nn.Linear(size, draft_size, bias=False) for _ in range(config.heads))
        self._borrowed: tuple[Tensor, Tensor] | None = None  # (the target's matrix, its rows of the draft vocabulary)

    @property
    def max_depth(self) -> int:
        return self.config.heads

    @property
    def draft_ids(self) -> Tensor | None:
        """[Vd] target ids of the draft vocabulary; None where it is the target's own."""
        return self.vocab if len(self.vocab) < self.target.vocab_size else None

    @torch.no_grad()
    def start_from(self, head: TargetHead, layers: list[dict[str, Tensor]], counts: Tensor) -> None:
        self.vocab.copy_(draft_vocab(counts, len(self.vocab), list(self.target.eos_ids)))
        if self.config.own_heads:
            for own in self.lm_heads:
                own.weight.copy_(head.output[self.vocab])

    def loss(self, batch: Batch, head: TargetHead) -> Loss:
        last = batch.features["last"].to(self.blocks[0][0].linear.weight.dtype)
        weights = [self.config.head_decay**index for index in range(self.config.heads)]
        total = last.new_zeros((), dtype=torch.float32)
        count, metrics = total, {}
        for index, block in enumerate(self.blocks):
            labels, supervised = batch.ahead(index + 2)
            rows = supervised.nonzero(as_tuple=True)
            teacher = batch.features["last"][rows[0], rows[1] + index + 1]  # the state that gives x[p + 2 + index]
            loss, hits = distill(
                block(last[rows]), self._matrix(index, head), teacher, head, labels[rows], self.config.loss, self.draft_ids,
                self.config.loss_chunk,
            )
            here = supervised.sum().float()
            total = total + loss * (weights[index] / sum(weights))
            count = here if index == 0 else count
            metrics |= {f"alpha_{index}": hits, f"alpha_{index}_count": here}
        return Loss(total, count, metrics)

    @torch.no_grad()
    def walk(self, batch: Batch, head: TargetHead, length: int) -> Tensor:
        last = batch.features["last"].to(self.blocks[0][0].linear.weight.dtype)
        guesses = torch.full((*batch.tokens.shape, length), -1, device=last.device)  # deeper than the heads: never right
        for row in range(len(last)):
            best = likeliest(self._logits(last[row], head)[:, :length])
            guesses[row, :, : best.shape[1]] = best if self.draft_ids is None else self.draft_ids[best]
        return guesses

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> MedusaState:
        row = torch.arange(len(prompts), device=prompts.device)
        return MedusaState(head, features["last"][row, lengths - 1])

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, chance: Chance) -> Tree:
        assert isinstance(state, MedusaState)
        self.calls += 1
        logits = self._logits(state.last, state.head)  # [B, K, Vd]

        def step(frontier: Frontier) -> Tensor:
            return logits[:, frontier.level, None].expand(-1, frontier.tokens.shape[1], -1)

        return grow(step, roots, plan, sampling, chance, self.draft_ids, self.target.vocab_size).tree

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, MedusaState)
        row = torch.arange(len(state.last), device=state.last.device)
        newest = committed.features["last"][row, (committed.count - 1).clamp_min(0)]
        state.last = torch.where((committed.count > 0)[:, None], newest, state.last)

    @bare_forward
    def _logits(self, last: Tensor, head: TargetHead) -> Tensor:
        """[..., D] -> [..., K, Vd]."""
        hidden = torch.stack([block(last) for block in self.blocks], -2)  # [..., K, D]
        if self.config.own_heads:
            return torch.stack([F.linear(hidden[..., index, :], own.weight) for index, own in enumerate(self.lm_heads)], -2)
        return head.finish(F.linear(hidden, self._matrix(0, head).to(hidden.dtype)))

    def _matrix(self, index: int, head: TargetHead) -> Tensor:
        """[Vd, D] head `index`'s output matrix."""
        if self.config.own_heads:
            return self.lm_heads[index].weight
        if self.draft_ids is None:
            return head.output
        if self._borrowed is None or self._borrowed[0] is not head.output:
            self._borrowed = (head.output, head.output[self.vocab])
        return self._borrowed[1]
