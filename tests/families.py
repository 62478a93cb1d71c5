"""Options with which tests build each family tiny. A new family adds its line here, and every contract test runs over it."""

from __future__ import annotations

from typing import Any

import torch

from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.base import Drafter
from drafttrain.target.adapter import Target
from tests.tiny import fitted

TINY: dict[str, dict[str, Any]] = {
    "eagle3": {"ttt_steps": 3, "draft_vocab_size": 40},
    "medusa": {"heads": 4, "root": True},
    "small_lm": {"layers": 1},
    "ngram": {"branches": 2},
}
TRAINABLE = sorted(name for name, family in DRAFTERS.items() if family.trainable)


def tiny_drafter(family: str, target: Target, seed: int = 0, **options: Any) -> Drafter:
    """A fresh one that starts from the target, in eval mode."""
    torch.manual_seed(seed)
    drafter = DRAFTERS[family](DRAFTERS[family].Config(name=family, **{**TINY[family], **options}), target.shape)
    if drafter.trainable:
        drafter.start_from(target.head, torch.arange(target.vocab_size))
    return drafter.eval()


def trained_drafter(family: str, target: Target, prompts: list[list[int]], new_tokens: int = 24, steps: int = 40) -> Drafter:
    """The same after some steps on the target's own greedy texts, so that something is accepted."""
    drafter = tiny_drafter(family, target)
    return fitted(drafter, target, prompts, new_tokens, steps) if drafter.trainable else drafter
