"""DFlash: a block of independent positions, drafted in one pass that sees itself in both directions (2026).

The first mask behind the anchor gives the first token. Positions don't see each other's tokens: every path of a tree shares a level's
distribution, and siblings of any draws are exact.
"""

from __future__ import annotations

from typing import Literal

from drafttrain.drafters.block import BlockConfig, BlockDrafter


class DFlashConfig(BlockConfig):
    """The published shape: 5 layers; small targets do with 2."""

    name: Literal["dflash"] = "dflash"
    anchor_predicts: bool = False
    """The anchor's own slot gives the first token; otherwise the first mask behind it does, which costs one slot more."""


class DFlash(BlockDrafter):
    """The bare block."""

    Config = DFlashConfig
    config: DFlashConfig
