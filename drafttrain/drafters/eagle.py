"""EAGLE-1: one decoder layer that predicts the target's next last state (Li et al., 2024, arXiv:2401.15077).

A pair is the embedding of x[p+1] and the target's last state f[p] after its final norm, as the engines feed it; `fc` of both is the layer's
residual stream. Its output stands for f[p+1], which the target's frozen head turns into the distribution of x[p+2]. The loss is a smooth L1
distance between the two states, and a little of the distributions'. EAGLE-2 (2024, arXiv:2406.16858) is the same weights with
`runtime.shape: dynamic`. R labels, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from drafttrain.core.losses import LossMix
from drafttrain.core.rng import SeededRng
from drafttrain.core.types import TrainingBatch
from drafttrain.drafters.base import Loss, state_distance
from drafttrain.drafters.feature import LastFeatureConfig, LastFeatureDrafter
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class EagleConfig(LastFeatureConfig):
    """The paper trains on the target's own states alone (`ttt_steps: 1`); more steps train on the drafter's own too, as HASS does."""

    name: Literal["eagle"] = "eagle"
    ttt_steps: int = Field(default=1, ge=1, le=64)
    """Draft steps unrolled in training."""
    regression: float = Field(default=1.0, ge=0)
    """Weight of the distance between predicted and true states."""
    loss: LossMix = LossMix(forward_kl=0.1)
    """What each step learns from the target's distribution."""


class Eagle(LastFeatureDrafter):
    """Drafts states, and reads tokens from them with the target's head."""

    Config = EagleConfig
    config: EagleConfig

    def __init__(self, config: EagleConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        self.fc = nn.Linear(2 * target.hidden_size, target.hidden_size)
        self.layer.input_layernorm = nn.Identity()  # as in the published drafters

    @torch.no_grad()
    def start_from(self, head: TargetHead, counts: Tensor) -> None:
        """Beside the layer: the state passes through `fc` as it is."""
        super().start_from(head, counts)
        size = self.target.hidden_size
        self.fc.bias.zero_()
        self.fc.weight[:, :size].mul_(0.5)
        self.fc.weight[:, size:].copy_(torch.eye(size))

    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        labels = batch.labels()
        hidden = self.unrolled_at(batch, labels, head)
        loss = self.distilled_steps(batch, labels, hidden, head)
        distance = state_distance(batch, labels, hidden, decay=self.config.step_decay)
        return replace(loss, sum=loss.sum + self.config.regression * distance)

    def join(self, embedded: Tensor, feature: Tensor) -> Tensor:
        return self.fc(torch.cat([embedded, feature], -1))

    def last_norm(self, hidden: Tensor) -> Tensor:
        return hidden  # it stands for a state that is normed already
