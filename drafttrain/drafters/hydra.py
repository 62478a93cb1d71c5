"""Hydra: Medusa's heads, each of which reads the tokens drafted before it (Ankner et al., 2024, arXiv:2402.05109).

Head k at token p reads the target's last state there and the embeddings of x[p + 1] .. x[p + 1 + k], side by side, and guesses
x[p + 2 + k]. A tree's node is drafted from its own path, so that wide trees gain more than with heads that know the depth alone. D hidden,
K heads.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.drafters.last_state import LastStateConfig, SequentialHeads
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class HydraConfig(LastStateConfig):
    """A head's first layer grows with the tokens that it reads."""

    name: Literal["hydra"] = "hydra"
    layers: int = Field(default=1, ge=1, le=16)
    """Layers a head; from the second on they are residual blocks (Hydra++ has four)."""


class HydraHead(nn.Module):
    """state + silu(W [state, tokens] + b), then residual blocks. Starts at zero, so that a fresh head says what the target's own would."""

    def __init__(self, size: int, tokens: int, layers: int) -> None:
        super().__init__()
        widths = [size * (1 + tokens), *[size] * (layers - 1)]
        self.layers = nn.ModuleList(nn.Linear(width, size) for width in widths)
        for layer in self.layers:
            nn.init.zeros_(layer.get_parameter("weight"))
            nn.init.zeros_(layer.get_parameter("bias"))
        self.size = size

    def forward(self, read: Tensor) -> Tensor:
        """[..., (1 + tokens) D] -> [..., D]."""
        hidden = read[..., : self.size]
        for index, layer in enumerate(self.layers):
            hidden = hidden + F.silu(layer(read if index == 0 else hidden))
        return hidden


class Hydra(SequentialHeads):
    """Drafts with K heads, each called at every node of its level."""

    Config = HydraConfig
    config: HydraConfig

    def __init__(self, config: HydraConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        self.heads = nn.ModuleList(HydraHead(target.hidden_size, head + 1, config.layers) for head in range(config.heads))

    def handed_first(self, last: Tensor) -> Tensor:
        return last

    def advance(self, level: int, handed: Tensor, tokens: Tensor, head: TargetHead) -> tuple[Tensor, Tensor]:
        """What is handed on is all that was read: the state and the tokens' embeddings, [..., (2 + level) D]."""
        embedded = head.embed(tokens).to(handed.dtype)
        read = torch.cat([handed, F.rms_norm(embedded, embedded.shape[-1:])], -1)  # embeddings are far smaller than states
        return read, self.heads[level](read)
