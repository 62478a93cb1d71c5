"""Drafters turn positions as their target does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drafttrain.drafters.small_lm import SmallLM, SmallLMConfig
from drafttrain.target.rope import target_rotary
from tests.tiny import tiny_eagle3, tiny_target

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SCALED: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "llama3": LLAMA3,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
}
HEAD = 8  # the tiny target's head size, and that of a small_lm of its width


@pytest.mark.parametrize("kind", SCALED)
def test_drafters_turn_positions_by_the_targets_own_cosines_and_sines(kind: str) -> None:
    target = tiny_target(rope_parameters={**SCALED[kind], "rope_theta": 5e5})
    position = torch.arange(256)[None]
    theirs = target.model.model.rotary_emb(torch.zeros(1), position)
    for ours in (target_rotary(target.shape, HEAD), tiny_eagle3(target).rotary):
        for own, expected in zip(ours(position), theirs, strict=True):
            assert torch.equal(own[:, 0], expected)
    narrow = SmallLM(SmallLMConfig(layers=1, hidden_size=32), target.shape)
    assert torch.equal(narrow.lm.model.rotary_emb(torch.zeros(1), position)[0], theirs[0])


def test_of_layers_that_differ_those_of_full_attention_are_followed_and_scalings_by_length_are_not() -> None:
    plain = target_rotary(tiny_target(rope_parameters={"rope_type": "default", "rope_theta": 5e5}).shape, HEAD)
    nested = tiny_target().shape
    nested.text_config["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5, "partial_rotary_factor": 0.5},
    }
    torch.testing.assert_close(target_rotary(nested, HEAD).frequency, plain.frequency / 8)
    nested.text_config["rope_parameters"] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 5e5}
    assert torch.equal(target_rotary(nested, HEAD).frequency, plain.frequency)
    assert not any("frequency" in name for name in tiny_eagle3(tiny_target()).state_dict())  # older saved drafters load
