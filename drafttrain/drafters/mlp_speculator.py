"""MLP speculator: a small recurrent net over the target's state and the tokens drafted so far (Wertheimer et al., 2024, arXiv:2404.19124).

    s[0] is the target's last state at p;   z = embedding[k](x[p + 1 + k]) * w_e * sqrt(r / 2)
    s[k + 1] = gelu(norm[k](projection[k] s[k] * w_s + z)),   whose head k gives the distribution of x[p + 2 + k]

norm is a root-mean-square norm with a scale and a shift, as the published code and vLLM have it, so that of the two weights only their
ratio counts. w_s = 0.5 ** (1 / 2K) and w_e = sqrt(1 - w_s ** 2), so that half of what the last head reads is still the target's state.
r inner width, K heads, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.drafters.last_state import LastStateConfig, SequentialHeads
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead

EPS = 1e-6
"""Of the norms, as in the published code."""


class MLPSpeculatorConfig(LastStateConfig):
    """Its embeddings and heads are its own; tied, there is one of each kind for all heads."""

    name: Literal["mlp_speculator"] = "mlp_speculator"
    heads: int = Field(default=3, ge=1, le=64)
    """Tokens drafted ahead (K)."""
    own_heads: bool = True
    """It has output matrices of its own: its states are not the target's."""
    inner_size: int | None = Field(default=None, ge=2, le=65536)
    """Width of its states (r); None: the target's hidden size."""
    tie_weights: bool = True
    """One embedding, one norm, one head, and one projection from the second head on, instead of one for each head."""
    scale_input: bool = False
    """Norm the target's state first (no weights), and divide it by sqrt(2)."""

    @model_validator(mode="after")
    def _own_output(self) -> MLPSpeculatorConfig:
        if not self.own_heads or self.output is not None:
            raise ValueError("an mlp_speculator has output matrices of its own; leave own_heads and output out")
        return self


class ShiftedNorm(nn.Module):
    """Root-mean-square norm with a scale and a shift."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), EPS) + self.bias.to(x.dtype)


class MLPSpeculator(SequentialHeads):
    """Drafts with one small step a level."""

    Config = MLPSpeculatorConfig
    config: MLPSpeculatorConfig

    def __init__(self, config: MLPSpeculatorConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        K, r, D = config.heads, self.state_size, target.hidden_size
        matrices = self.matrices
        widths = [D, *[r] * (K - 1)][: 2 if config.tie_weights else K]
        self.emb = nn.ModuleList(nn.Embedding(target.vocab_size, r) for _ in range(matrices))
        self.proj = nn.ModuleList(nn.Linear(width, r, bias=False) for width in widths)
        self.ln = nn.ModuleList(ShiftedNorm(r) for _ in range(matrices))
        self.state_weight = 0.5 ** (0.5 / K)
        self.token_weight = math.sqrt((1 - self.state_weight**2) * r / 2)
        for module in (*self.lm_heads, *self.emb, *self.proj):
            nn.init.trunc_normal_(module.get_parameter("weight"), std=1 / math.sqrt(r))

    @property
    def matrices(self) -> int:
        return 1 if self.config.tie_weights else self.config.heads

    @property
    def state_size(self) -> int:
        return self.config.inner_size or self.target.hidden_size

    def handed_first(self, last: Tensor) -> Tensor:
        if not self.config.scale_input:
            return last
        return F.rms_norm(last, last.shape[-1:], None, EPS) / math.sqrt(2)

    def advance(self, level: int, handed: Tensor, tokens: Tensor, head: TargetHead) -> tuple[Tensor, Tensor]:
        """What is handed on is the state itself, [..., r]."""
        at = 0 if self.config.tie_weights else level
        projection = self.proj[min(level, len(self.proj) - 1)]
        token = self.emb[at](tokens).to(handed.dtype) * (self.token_weight / self.state_weight)
        state = F.gelu(self.ln[at](projection(handed) + token))
        return state, state
