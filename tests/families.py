"""THE table of options with which tests build each family tiny: a new family adds one line here, and no other file of tests names it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.base import Drafter
from drafttrain.target.adapter import Target
from tests.tiny import fitted

TINY: dict[str, dict[str, Any]] = {
    "eagle3": {"ttt_steps": 3, "draft_vocab_size": 40},
    "eagle": {"ttt_steps": 2, "output": {"kind": "subset", "size": 40}},
    "mtp": {"ttt_steps": 2},
    "medusa": {"heads": 4, "root": True},
    "hydra": {"heads": 4, "draft_vocab_size": 40},
    "mlp_speculator": {"heads": 3, "inner_size": 24},
    "small_lm": {"layers": 1},
    "ngram": {"branches": 2},
    "consensus": {"branches": 2},
    "dflash": {"block": 4, "layers": 1},
    "dspark": {"block": 4, "layers": 1, "markov_rank": 8, "output": {"kind": "subset", "size": 40}},
    "domino": {"block": 4, "layers": 1, "gru_size": 8, "inner_size": 8},
    "dflash2": {"block": 4, "layers": 1, "conv_group": 8, "selector_rank": 8, "selector_candidates": 6},
    "specdiff": {"block": 4, "layers": 1},
    "jetspec": {"block": 4, "layers": 2, "qk_norm": True, "dpace": True},
    "hidden_ar": {"steps": 4, "rank": 8},
    "p_eagle": {"block": 4, "layers": 2},
    "ctc": {"block": 4, "frames": 6, "layers": 1},
}
FAMILIES = sorted(DRAFTERS)
TRAINABLE = sorted(name for name, family in DRAFTERS.items() if family.trainable)
GIVES_STATES = sorted(name for name, family in DRAFTERS.items() if family.readout is not Drafter.readout)
"""Families whose distributions can be computed again from states."""
REPRESENTATIVES = ("eagle3", "jetspec", "medusa", "ngram", "small_lm")
"""One of each way of drafting: what tests outside of contract/ run on in the fast suite; all others are `slow` there."""
DEMO_VOCAB = 4096
"""Tokens of a reduced draft vocabulary on the demo target."""


def slow_beyond(names: Iterable[str], fast: Iterable[str] = REPRESENTATIVES) -> list[Any]:
    """Parameters of a test: all of them, those that are not among `fast` marked `slow`."""
    marks = {True: (), False: (pytest.mark.slow,)}
    return [pytest.param(name, marks=marks[name in set(fast)]) for name in names]


def tiny_drafter(family: str, target: Target, seed: int = 0, **options: Any) -> Drafter:
    """A fresh one that starts from the target, in eval mode."""
    return started({**TINY[family], **options}, family, target, seed)


def demo_drafter(family: str, target: Target) -> Drafter:
    """The same for the demo target, whose vocabulary is larger."""
    options = dict(TINY[family])
    if "draft_vocab_size" in options:
        options["draft_vocab_size"] = DEMO_VOCAB
    if "size" in options.get("output", {}):
        options["output"] = {**options["output"], "size": DEMO_VOCAB}
    return started(options, family, target, 0)


def started(options: dict[str, Any], family: str, target: Target, seed: int) -> Drafter:
    drafter = bare_drafter(family, target, seed, **options)
    if drafter.trainable:
        drafter.start_from(target.head, torch.arange(target.vocab_size))
    return drafter.eval()


def bare_drafter(family: str, target: Target, seed: int = 0, **options: Any) -> Drafter:
    """A random one, before training begins."""
    torch.manual_seed(seed)
    return DRAFTERS[family](DRAFTERS[family].Config(name=family, **options), target.shape)


def stirred_drafter(family: str, target: Target, **options: Any) -> Drafter:
    """A random one none of whose weights is at its start, for formulas written out; in eval mode."""
    drafter = bare_drafter(family, target, 1, **options)
    torch.manual_seed(2)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter.eval()


def trained_drafter(family: str, target: Target, prompts: list[list[int]], new_tokens: int = 24, steps: int = 40) -> Drafter:
    """The same after some steps on the target's own greedy texts, so that something is accepted."""
    drafter = tiny_drafter(family, target)
    return fitted(drafter, target, prompts, new_tokens, steps) if drafter.trainable else drafter
