"""What the EAGLE-3 formats share: one drafter as numbers and named tensors, and back.

`HS[k]` is entry k of transformers' `hidden_states`: 0 the embeddings, k the output of layer k - 1. Layer ids stand in files in two ways,
HS ids and HS ids - 1; both are written from the one list that the drafter was trained on. V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.errors import UserError
from drafttrain.core.vocab import d2t, t2d
from drafttrain.drafters.base import DrafterConfig
from drafttrain.drafters.eagle3 import Eagle3, Eagle3Config
from drafttrain.export.base import FormatConfig
from drafttrain.export.reading import ImportTarget
from drafttrain.export.tensors import Values, Weights
from drafttrain.target.files import TargetShape
from drafttrain.target.rope import rope_parameters

TOP_IDS = "eagle_aux_hidden_state_layer_ids"
"""HS ids at the top of a configuration (vLLM, speculators, llama.cpp), HS ids - 1 inside `eagle_config` (SGLang, SpecForge)."""
OFFSETS = "offsets (target id = i + d2t[i])"
ENGINE_LAYERS = 3
"""Captured layers that llama.cpp and OpenVINO read: exactly these many."""


def layer_ids(aux_layers: Sequence[int]) -> dict[str, Any]:
    """Both conventions, and the count that vLLM sizes `fc` by."""
    nested = {TOP_IDS: [layer - 1 for layer in aux_layers], "use_aux_hidden_state": True}
    return {TOP_IDS: list(aux_layers), "eagle_config": nested, "num_aux_hidden_states": len(aux_layers)}


def read_layer_ids(values: Values, target: TargetShape) -> tuple[int, ...]:
    """HS ids: the top-level list, else the nested one + 1, else the default that all engines assume."""
    top = values.numbers(TOP_IDS)
    if top is not None:
        return top
    if isinstance(values.values.get("eagle_config"), dict):
        nested = values.inside("eagle_config").numbers(TOP_IDS)
        if nested is not None:
            return tuple(layer + 1 for layer in nested)
    return (2, target.num_layers // 2, target.num_layers - 3)


def rope_entries(target: TargetShape) -> dict[str, Any]:
    """Rotary positions under the names of transformers 5 and of before: a reader of either finds them."""
    parameters = rope_parameters(target.text_config)
    theta = parameters["rope_theta"]
    kind = parameters["rope_type"] or "default"
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    plain = kind == "default"
    return {
        "rope_theta": theta,
        "rope_scaling": None if plain else scaling,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta} if plain else parameters,
    }


def layer_config(drafter: Eagle3) -> dict[str, Any]:
    """The one decoder layer as a Llama configuration."""
    layer, target = drafter.midlayer, drafter.target
    return {
        "model_type": "llama",
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": layer.mlp.gate_proj.out_features,
        "num_hidden_layers": 1,
        "num_attention_heads": layer.query_heads,
        "num_key_value_heads": layer.kv_heads,
        "head_dim": drafter.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": drafter.norm.eps,
        "max_position_embeddings": target.max_context,
        **rope_entries(target),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "num_aux_hidden_states": len(target.aux_layers),
    }


def own_weights(drafter: Eagle3, layer: str) -> dict[str, Tensor]:
    """Weights under the engines' names. layer: what the one decoder layer is called, `midlayer` or `layers.0`."""
    weights = {key: value for key, value in drafter.state_dict().items() if key != "vocab"}
    return {foreign_key(key, layer): value for key, value in weights.items()}


def foreign_key(key: str, layer: str) -> str:
    return key.replace("midlayer.", f"{layer}.", 1)


def vocabulary_maps(drafter: Eagle3) -> dict[str, Tensor]:
    """`d2t` [Vd] offsets and `t2d` [V] bool."""
    return {"d2t": d2t(drafter.vocab), "t2d": t2d(drafter.vocab, drafter.target.vocab_size)}


def check_eagle3(form: FormatConfig, drafter: DrafterConfig) -> Eagle3Config:
    """The configuration, or a `UserError` for another family."""
    form.only(drafter, ["eagle3"], "other families have other formats")
    assert isinstance(drafter, Eagle3Config)
    check_output(form, drafter)
    return drafter


def check_output(form: FormatConfig, config: Eagle3Config) -> None:
    """A `UserError` where the output is no matrix of its own."""
    if config.output is not None:
        raise form.refuse("drafter.output: no engine's EAGLE-3 reads a low-rank output", "use 'native', or train with draft_vocab_size")


def check_three_layers(form: FormatConfig, config: Eagle3Config, target: TargetShape, engine: str) -> None:
    """A `UserError` for what llama.cpp and OpenVINO have no words for."""
    if config.norm_features:
        raise form.refuse(f"drafter.norm_features: {engine} has no norm for each captured layer", "use 'speculators' or 'sglang'")
    if len(target.aux_layers) != ENGINE_LAYERS:
        layers = list(target.aux_layers)
        raise form.refuse(f"target.aux_layers {layers}: {engine} reads exactly three captured layers", "use 'speculators' or 'sglang'")


def read_eagle3(values: Values, layer: Values, weights: Weights, name: str, target: ImportTarget) -> Eagle3:
    """The drafter in a folder of either layout.

    values: the whole configuration; layer: the part that describes the decoder layer; name: what the weights call that layer.
    Raises `UserError` for what our EAGLE-3 does not compute, by its key.
    """
    shape = dataclasses.replace(target.shape, aux_layers=read_layer_ids(values, target.shape))
    size = values.values.get("draft_vocab_size")
    draft_size = shape.vocab_size if size is None else values.number("draft_vocab_size")
    config = Eagle3Config(
        draft_vocab_size=draft_size if draft_size < shape.vocab_size else None,
        intermediate_size=layer.number("intermediate_size"),
        num_attention_heads=layer.number("num_attention_heads"),
        num_key_value_heads=layer.number("num_key_value_heads", layer.number("num_attention_heads")),
        norm_features=values.flag("fc_norm", False),
    )
    _check_sizes(values, layer, shape)
    drafter = Eagle3(config, shape)
    _check_layer(layer, drafter)
    ids = _draft_ids(weights, draft_size, shape.vocab_size)
    order = ids.argsort()  # ours stand in ascending order
    if "lm_head.weight" not in weights.tensors and size is None:
        weights.tensors["lm_head.weight"] = target.head.output  # SGLang: no draft vocabulary, the target's own head
    state = {key: weights.take(foreign_key(key, name), value.shape) for key, value in drafter.state_dict().items() if key != "vocab"}
    state["lm_head.weight"] = state["lm_head.weight"][order]
    target.check_embedding(weights)
    weights.end()
    drafter.load_state_dict({**state, "vocab": ids[order]})
    return drafter.eval()


def _check_sizes(values: Values, layer: Values, shape: TargetShape) -> None:
    for key, own in {"hidden_size": shape.hidden_size, "vocab_size": shape.vocab_size}.items():
        if layer.number(key) != own:
            raise values.unfit(key, f"the target's {own}") if key in values.values else layer.unfit(key, f"the target's {own}")
    if layer.number("num_hidden_layers", 1) != 1:
        raise layer.unfit("num_hidden_layers", "1: more layers are another method")


def _check_layer(layer: Values, drafter: Eagle3) -> None:
    """A `UserError` where the layer turns or norms otherwise than ours would for this target."""
    own = layer_config(drafter)
    head_dim = layer.number("head_dim", layer.number("hidden_size") // layer.number("num_attention_heads"))
    if head_dim != own["head_dim"]:
        raise layer.unfit("head_dim", f"{own['head_dim']}, which follows from this target")
    if layer.real("rms_norm_eps") != own["rms_norm_eps"]:
        raise layer.unfit("rms_norm_eps", f"{own['rms_norm_eps']}, the target's")
    for key in ("attention_bias", "mlp_bias", "bias"):
        if layer.flag(key, False):
            raise layer.unfit(key, "false: there are no biases in EAGLE-3 here")
    found = {**layer.values, "rope_scaling": layer.values.get("rope_scaling")}
    theirs, ours = rope_parameters(found), rope_parameters(own)
    theirs["rope_type"], ours["rope_type"] = theirs["rope_type"] or "default", ours["rope_type"] or "default"
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            raise UserError(
                f"'{layer.path}': rotary positions: '{key}' is {theirs.get(key)!r}, the target's is {ours.get(key)!r}, which ours follows; "
                f"a drafter with positions of its own cannot be read"
            )


def _draft_ids(weights: Weights, size: int, vocab_size: int) -> Tensor:
    """[Vd] target ids in the file's order. Raises `UserError` for a map that is missing, or names a token twice or outside."""
    if size > vocab_size:
        raise UserError(
            f"'{weights.path}': a draft vocabulary of {size} for a target of {vocab_size} tokens; give the drafter's own target"
        )
    if size == vocab_size and "d2t" not in weights.tensors:
        weights.skip("t2d")
        return torch.arange(size)
    ids = weights.take_ids("d2t", size) + torch.arange(size)
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError(f"'{weights.path}': tensor 'd2t' names tokens outside of 0..{vocab_size - 1}; expected {OFFSETS}")
    if len(ids.unique()) != size:
        raise UserError(f"'{weights.path}': tensor 'd2t' names a token twice; expected {OFFSETS}")
    mask = weights.tensors.pop("t2d", None)
    if mask is not None and not torch.equal(mask.bool(), t2d(ids.sort().values, vocab_size)):
        raise UserError(f"'{weights.path}': tensor 't2d' is not the mask of the tokens that 'd2t' names; the folder is damaged")
    return ids
