"""JetSpec: a block whose slots see the slots before them alone, for best-first trees from per-depth distributions (2026).

A causal block gives position k without knowing how long the block is, so that its distributions are those of a prefix. Trees of budget
63 to 255 and width 7 are the published shape: `runtime.shape: {shape: dynamic, top_k: 7}`.
"""

from __future__ import annotations

from typing import Literal

from drafttrain.drafters.block import BlockConfig, BlockDrafter


class JetSpecConfig(BlockConfig):
    """A causal block."""

    name: Literal["jetspec"] = "jetspec"
    causal: bool = True
    """Slots see the slots before them alone, instead of the whole block."""
    anchor_predicts: bool = False
    """The anchor's own slot gives the first token; otherwise the first mask behind it does, which costs one slot more."""


class JetSpec(BlockDrafter):
    """The bare block, causal."""

    Config = JetSpecConfig
    config: JetSpecConfig
