"""Ways in which an engine reads an EAGLE-3 folder otherwise than it was meant, each as a change of the drafter or of what it is fed.

A fault that makes our own rounds equal the engine's is the likely cause of a difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from drafttrain.core.layers import Rotary
from drafttrain.drafters.eagle3 import Eagle3
from drafttrain.target.adapter import Target

OTHER_BASES = (10000.0, 500000.0, 1000000.0)
"""Rotary bases that readers fall back to, or that other targets have."""


@dataclass(frozen=True)
class Fault:
    """One misreading."""

    tensor: str  # the first that it changes
    cause: str
    apply: Callable[[Eagle3, Target], None]


def shifted_layers(by: int) -> Callable[[Eagle3, Target], None]:
    """Other states are captured: layer ids read in the other convention."""

    def apply(drafter: Eagle3, target: Target) -> None:
        depth = drafter.target.num_layers
        layers = tuple(min(max(layer + by, 0), depth) for layer in drafter.target.aux_layers)
        drafter.target = dataclasses.replace(drafter.target, aux_layers=layers)
        target.aux_layers = layers

    return apply


def norm_before_residual(drafter: Eagle3, target: Target) -> None:
    layer, finish = drafter.midlayer, drafter.midlayer.finish

    def normed(feature: Tensor, mixed: Tensor) -> Tensor:
        return finish(layer.hidden_norm(feature), mixed)

    layer.finish = normed  # type: ignore[method-assign]


def rope_base(base: float) -> Callable[[Eagle3, Target], None]:
    def apply(drafter: Eagle3, target: Target) -> None:
        config = LlamaConfig(
            head_dim=drafter.head_dim, max_position_embeddings=drafter.target.max_context,
            rope_parameters={"rope_type": "default", "rope_theta": base},
        )  # fmt: skip
        drafter.rotary = Rotary(LlamaRotaryEmbedding(config).inv_freq)

    return apply


def identity_map(drafter: Eagle3, target: Target) -> None:
    drafter.vocab.copy_(torch.arange(len(drafter.vocab)))


def rolled_map(drafter: Eagle3, target: Target) -> None:
    drafter.lm_head.weight.data = drafter.lm_head.weight.data.roll(1, 0)


def reversed_fusing(drafter: Eagle3, target: Target) -> None:
    parts = drafter.fc.weight.data.chunk(len(drafter.target.aux_layers), 1)
    drafter.fc.weight.data = torch.cat(parts[::-1], 1)


FAULTS: dict[str, Fault] = {
    "layers_later": Fault("features", "layer ids one later (read as HS - 1, and one added)", shifted_layers(1)),
    "layers_earlier": Fault("features", "layer ids one earlier (HS - 1 read as HS)", shifted_layers(-1)),
    "fc_order": Fault("fused feature", "the captured layers are joined in another order than fc was trained on", reversed_fusing),
    "norm_before_residual": Fault("layer output", "norm_before_residual is taken to be true", norm_before_residual),
    **{f"rope_{base:.0f}": Fault("layer output", f"rotary base {base:.0f}, not the target's", rope_base(base)) for base in OTHER_BASES},
    "map_missing": Fault("drafted tokens", "the vocabulary map is not read: draft ids are taken for target ids", identity_map),
    "map_permuted": Fault("drafted tokens", "the vocabulary map is shifted by one place", rolled_map),
}
