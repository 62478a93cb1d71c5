"""Rotary positions of drafters: the target's base and its long-context scaling, at whatever head size the drafter has."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from drafttrain.core.layers import Rotary
from drafttrain.target.files import TargetShape

FOLLOWED = ("linear", "llama3", "yarn")
"""Scalings that are the same at every length. Of those that are not (`dynamic`, `longrope`), and of others, the base alone is taken."""
OF_THE_HEAD = ("type", "partial_rotary_factor")
"""What is not taken over: an older name, and how much of the target's own head is turned."""


def rope_parameters(text_config: dict[str, Any]) -> dict[str, Any]:
    """transformers' `rope_parameters` for a drafter that turns whole heads; of layers that differ those of full attention."""
    given = text_config.get("rope_parameters") or text_config.get("rope_scaling") or {}
    own = given.get("full_attention") or given
    theta = float(own.get("rope_theta") or text_config.get("rope_theta") or 10000.0)
    kind = own.get("rope_type") or own.get("type")
    scaling = {name: value for name, value in own.items() if name not in OF_THE_HEAD} if kind in FOLLOWED else {"rope_type": "default"}
    return {"rope_type": kind, **scaling, "rope_theta": theta}


def target_rotary(target: TargetShape, head_dim: int) -> Rotary:
    """Positions turned as the target's are."""
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=target.max_context, rope_parameters=rope_parameters(target.text_config))
    made = LlamaRotaryEmbedding(config)
    return Rotary(made.inv_freq, made.attention_scaling)
