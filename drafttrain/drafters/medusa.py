"""Medusa: K residual heads on the target's last hidden state (Cai et al., 2024, arXiv:2401.10774).

Head k at token p predicts x[p + 2 + k]; the target's own head gives x[p + 1]. Heads don't see each other's tokens, so one call drafts a
whole round. B rows, T time, K heads, D hidden, V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.plan import Plan
from drafttrain.core.rng import Rng, SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import TrainingBatch
from drafttrain.drafters.base import DrafterState, Loss, bare_forward
from drafttrain.drafters.grow import Parallel, grow
from drafttrain.drafters.last_state import LastState, LastStateConfig, LastStateDrafter
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class MedusaConfig(LastStateConfig):
    """Residual blocks are small; an output matrix of its own is what a head costs."""

    name: Literal["medusa"] = "medusa"
    layers: int = Field(default=1, ge=1)
    """Residual blocks a head."""
    root: bool = False
    """The heads read the embedding of the round's first token, x[p + 1], beside the last state; the paper's read the state alone."""


class ResidualBlock(nn.Module):
    """x + silu(W [x, more] + b). W starts at 0, so that a fresh head says what the target's own would."""

    def __init__(self, size: int, more: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(size + more, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D + more] -> [..., D]."""
        return x[..., : self.linear.out_features] + F.silu(self.linear(x))


class Medusa(LastStateDrafter):
    """Drafts with K heads that each guess one token further ahead from the same state; see the module for the alignment."""

    Config = MedusaConfig
    config: MedusaConfig

    def __init__(self, config: MedusaConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        size = target.hidden_size
        beside = [size * config.root, *[0] * (config.layers - 1)]  # the first block alone reads the root
        self.blocks = nn.ModuleList(nn.Sequential(*(ResidualBlock(size, more) for more in beside)) for _ in range(config.heads))

    # -- training ---------------------------------------------------------------------------------------------------------------------

    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        labels, read = batch.labels(), self._read_text(batch, head)
        hidden = [block(labels.before(read, index + 2)) for index, block in enumerate(self.blocks)]  # of labels alone
        return self._distilled(batch, labels, hidden, head)

    def teacher_forced_states(self, batch: TrainingBatch, head: TargetHead, steps: int) -> Iterator[Tensor]:
        read = self._read_text(batch, head)
        for block in self.blocks[:steps]:
            yield block(read)

    def first_hidden(self, last: Tensor, tokens: Tensor, head: TargetHead) -> Tensor:
        return self.blocks[0](self._read(last, tokens, head))

    # -- decoding ---------------------------------------------------------------------------------------------------------------------

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        assert isinstance(state, LastState)
        self.calls += 1
        hidden = self._hidden(state, roots, plan.shape.depth)  # [B, K, D]
        logits = self._logits(hidden, state.head)  # [B, K, Vd]
        states: list[Tensor] = []
        step = Parallel(logits, hidden, states)
        return grow(step, roots, plan, sampling, rng, self.draft_ids, self.target.vocab_size, states).tree

    def _read_text(self, batch: TrainingBatch, head: TargetHead) -> Tensor:
        """`_read` at every token of a text, which says what came next."""
        return self._read(batch.features["last_hidden_state"], batch.ahead(1)[0], head)

    def _read(self, last: Tensor, roots: Tensor, head: TargetHead) -> Tensor:
        """States [..., D] and the tokens after them [...] -> [..., D], or [..., 2 D] with the tokens' normed embeddings."""
        last = last.to(self._dtype)
        if not self.config.root:
            return last
        embedded = head.embed(roots).to(last.dtype)
        return torch.cat([last, F.rms_norm(embedded, embedded.shape[-1:])], -1)

    @bare_forward
    def _hidden(self, state: LastState, roots: Tensor, depth: int) -> Tensor:
        """[B, depth, D] of the first heads."""
        read = self._read(state.last, roots, state.head)
        return torch.stack([block(read) for block in self.blocks[:depth]], 1)

    @bare_forward
    def _logits(self, hidden: Tensor, head: TargetHead) -> Tensor:
        """[B, depth, D] -> [B, depth, Vd]; a shared output matrix is read once."""
        if not self.config.own_heads:
            return self._output_layer(0, head).logits(hidden)
        return torch.stack([self._output_layer(index, head).logits(hidden[:, index]) for index in range(hidden.shape[1])], 1)
