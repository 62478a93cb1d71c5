"""MTP: one multi-token-prediction module whose weights all depths share (DeepSeek-V3, 2024, arXiv:2412.19437; FastMTP, 2025,
arXiv:2509.18362).

A pair is the normed embedding of x[p+1] and the normed last state of the target at p; one projection joins them, a whole decoder layer
follows, and a norm before the target's frozen head. Step k >= 1 takes the layer's output as the state, with the same weights; its loss
weighs `step_decay ** k`. D hidden.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from drafttrain.core.layers import RMSNorm
from drafttrain.drafters.feature import LastFeatureConfig, LastFeatureDrafter
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class MTPConfig(LastFeatureConfig):
    """One module, used again at every depth."""

    name: Literal["mtp"] = "mtp"
    ttt_steps: int = Field(default=3, ge=1, le=64)
    """Depths unrolled in training."""


class MTP(LastFeatureDrafter):
    """Drafts with the module, fed its own output from the second step on."""

    Config = MTPConfig
    config: MTPConfig

    def __init__(self, config: MTPConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        size = target.hidden_size
        self.enorm, self.hnorm = RMSNorm(size, self.eps), RMSNorm(size, self.eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.norm = RMSNorm(size, self.eps)

    @torch.no_grad()
    def start_from(self, head: TargetHead, counts: Tensor) -> None:
        """Beside the layer: the final norm is the target's, and the state passes through the projection as it is."""
        super().start_from(head, counts)
        size = self.target.hidden_size
        self.eh_proj.weight[:, :size].mul_(0.5)
        self.eh_proj.weight[:, size:].copy_(torch.eye(size))
        head.start_norm(self.norm)

    def join(self, embedded: Tensor, feature: Tensor) -> Tensor:
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(feature)], -1))

    def last_norm(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)
