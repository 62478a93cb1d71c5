"""Train draft models for speculative decoding from a frozen target's own outputs, and decode with them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drafttrain.core.errors import UserError
    from drafttrain.core.plan import Chain, Dynamic, Static
    from drafttrain.drafters.files import save_drafter
    from drafttrain.export.load import load_drafter
    from drafttrain.recipe import Recipe, load_recipe
    from drafttrain.runtime.custom_generate import speculative
    from drafttrain.runtime.decoder import Generation, Piece, RuntimeConfig, SpeculativeDecoder
    from drafttrain.runtime.stats import Statistics
    from drafttrain.target.adapter import Target
    from drafttrain.target.files import TargetConfig

__version__ = "0.1.0"

PUBLIC = {
    "UserError": "drafttrain.core.errors",
    "Chain": "drafttrain.core.plan",
    "Dynamic": "drafttrain.core.plan",
    "Static": "drafttrain.core.plan",
    "load_drafter": "drafttrain.export.load",
    "save_drafter": "drafttrain.drafters.files",
    "Recipe": "drafttrain.recipe",
    "load_recipe": "drafttrain.recipe",
    "speculative": "drafttrain.runtime.custom_generate",
    "Generation": "drafttrain.runtime.decoder",
    "Piece": "drafttrain.runtime.decoder",
    "RuntimeConfig": "drafttrain.runtime.decoder",
    "Stream": "drafttrain.runtime.decoder",
    "Statistics": "drafttrain.runtime.stats",
    "SpeculativeDecoder": "drafttrain.runtime.decoder",
    "Target": "drafttrain.target.adapter",
    "TargetConfig": "drafttrain.target.files",
}
"""Public names and where they live; imported when first asked for, so that `drafttrain --help` needs no torch."""

__all__ = [  # noqa: RUF022
    "SpeculativeDecoder", "Generation", "Piece", "Stream", "Statistics", "RuntimeConfig", "Chain", "Static", "Dynamic",
    "Target", "TargetConfig", "Recipe", "load_recipe", "load_drafter", "save_drafter", "speculative", "UserError", "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'drafttrain' has no attribute '{name}'")
    return getattr(importlib.import_module(PUBLIC[name]), name)
