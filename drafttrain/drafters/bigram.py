"""A bigram drafter: the next token from the one before it alone, a residual block between the target's embedding and its output matrix.

It reads no state of the target and keeps none. B rows, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.losses import LossMix, OutputLayer
from drafttrain.core.plan import Plan
from drafttrain.core.rng import Rng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Features, TrainingBatch
from drafttrain.drafters.base import Drafter, DrafterConfig, DrafterState, Loss, bare_forward, distilled
from drafttrain.drafters.grow import Frontier, grow
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class BigramConfig(DrafterConfig):
    """One matrix of the target's width."""

    name: Literal["bigram"] = "bigram"
    loss: LossMix = LossMix()
    """What it learns from the target's distribution."""
    loss_chunk: int = Field(default=1024, ge=1)
    """Labels whose [V] logits stand in memory at once."""


class BigramState(DrafterState):
    """Nothing but how many rows there are."""

    def __init__(self, head: TargetHead, rows: Tensor) -> None:
        self.head, self.rows = head, rows  # rows: [B]

    def select(self, rows: Tensor) -> BigramState:
        return BigramState(self.head, self.rows[rows])

    def join(self, other: DrafterState) -> BigramState:
        assert isinstance(other, BigramState)
        return BigramState(self.head, torch.cat([self.rows, other.rows]))


class Bigram(Drafter):
    """Drafts each token from its parent in the tree alone."""

    Config = BigramConfig
    config: BigramConfig
    first_label = 1

    def __init__(self, config: BigramConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        self.linear = nn.Linear(target.hidden_size, target.hidden_size)

    def loss(self, batch: TrainingBatch, head: TargetHead) -> Loss:
        labels = batch.labels()
        hidden = labels.before(self._states(batch.tokens, head), 1)
        return distilled(batch, labels, [hidden], [self._layer(head)], head, self.config.loss, None, self.config.loss_chunk, 1)

    @torch.no_grad()
    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> Tensor:
        states = self.teacher_forced_states(batch, head, length)
        return torch.stack([self._layer(head).guesses(part, None, self.config.loss_chunk) for part in states], -1)

    def teacher_forced_states(self, batch: TrainingBatch, head: TargetHead, steps: int) -> Iterator[Tensor]:
        for step in range(steps):
            yield self._states(batch.ahead(step + 1)[0], head)

    def readout(self, states: Tensor, level: int, head: TargetHead) -> Tensor:
        return self._layer(head).logits(states)

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> BigramState:
        return BigramState(head, lengths)

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        assert isinstance(state, BigramState)
        states: list[Tensor] = []

        def step(frontier: Frontier) -> Tensor:
            self.calls += 1
            states.append(self._states(frontier.tokens, state.head))
            return self._layer(state.head).logits(states[-1])

        return grow(step, roots, plan, sampling, rng, states=states).tree

    def observe(self, state: DrafterState, committed: Committed) -> None:
        """Nothing is remembered."""

    @bare_forward
    def _states(self, tokens: Tensor, head: TargetHead) -> Tensor:
        """[...] -> [..., D]."""
        embedded = head.embed(tokens).to(self.linear.weight.dtype)
        return F.rms_norm(embedded + F.silu(self.linear(embedded)), embedded.shape[-1:])

    def _layer(self, head: TargetHead) -> OutputLayer:
        return OutputLayer(head.output, head.bias, head.finish)
