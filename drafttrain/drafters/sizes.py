"""Sizes of a drafter's decoder layers: the target's, where a configuration gives none."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from drafttrain.core.errors import UserError
from drafttrain.target.files import TargetShape


class SizesConfig(Protocol):
    """What a configuration may say of them."""

    @property
    def intermediate_size(self) -> int | None: ...

    @property
    def num_attention_heads(self) -> int | None: ...

    @property
    def num_key_value_heads(self) -> int | None: ...


class LayerSizes(NamedTuple):
    query_heads: int
    kv_heads: int
    head_dim: int
    inner: int  # of the gated MLP
    eps: float  # of the norms

    @classmethod
    def of(cls, config: SizesConfig, target: TargetShape) -> LayerSizes:
        """A `UserError` where they do not fit together."""
        size, known = target.hidden_size, target.text_config
        query_heads = config.num_attention_heads or int(known["num_attention_heads"])
        kv_heads = config.num_key_value_heads or int(known.get("num_key_value_heads") or query_heads)
        head_dim = int(known.get("head_dim") or size // query_heads)
        if query_heads % kv_heads or head_dim < 2 or head_dim % 2:
            raise UserError(
                f"drafter.num_attention_heads {query_heads}, num_key_value_heads {kv_heads}, {head_dim} numbers a head: queries must "
                f"be a multiple of keys, and a head's numbers even; set both so that they fit the hidden size {size}, or leave both out"
            )
        inner = config.intermediate_size or int(known.get("intermediate_size") or 4 * size)
        return cls(query_heads, kv_heads, head_dim, inner, float(known.get("rms_norm_eps") or 1e-5))
