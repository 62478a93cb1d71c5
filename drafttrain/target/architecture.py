"""What models are like inside, as far as trees need it: attention kinds, context, cache shapes, and the masks that make them read a tree.

Used for the target and for small language models that draft. B rows, N nodes, W of them fed now, M cache slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drafttrain.core.errors import UserError
from drafttrain.target.cache import KVShape, TreeCache

ATTENTION_KINDS = ("full_attention", "sliding_attention")


def mask_windows(config: Any) -> dict[str, int | None]:
    """The attention kinds of a model's layers, as transformers names them in mask dictionaries, each with its window in tokens (None:
    everything is seen). Read once when a model is loaded: a configuration is slow to ask.

    Raises `UserError` for a layer whose state cannot be rolled back, by its number.
    """
    window = config.to_dict().get("sliding_window")
    kinds = getattr(config, "layer_types", None)  # no entry of its own in the models that work it out from other ones
    if kinds is None and not hasattr(config, "num_attention_heads"):
        kinds = [config.model_type] * config.num_hidden_layers
    elif kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    for index, kind in enumerate(kinds):
        if kind not in ATTENTION_KINDS:
            raise UserError(
                f"target layer {index} is of type '{kind}', whose state cannot be rolled back after a rejected draft; "
                f"only {' and '.join(ATTENTION_KINDS)} layers can be verified"
            )
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def context_of(config: Any) -> int:
    """Positions a model was made for.

    Raises `UserError` where it places tokens by their distance in the cache (ALiBi), or states no such number, as those models do.
    """
    if getattr(config, "alibi", False) or not hasattr(config, "max_position_embeddings"):
        stated = "places tokens by ALiBi" if hasattr(config, "max_position_embeddings") else "has no max_position_embeddings (ALiBi?)"
        raise UserError(
            f"a '{config.model_type}' target whose configuration {stated} does not follow position_ids, which the nodes of a tree need; "
            f"choose a model with rotary or learned positions"
        )
    return int(config.max_position_embeddings)


PROBED_WINDOW = 512
"""Local windows up to so many tokens are probed when a target is loaded; longer ones cost too much."""


def short_window(config: Any) -> int:
    """The longest local window of at most `PROBED_WINDOW` tokens that a configuration names, under whatever name; 0 where there is none."""
    named = {key: value for key, value in config.to_dict().items() if "window" in key or "local" in key or "chunk" in key}
    room = getattr(config, "max_position_embeddings", PROBED_WINDOW) - 8
    return max((value for value in named.values() if type(value) is int and 0 < value <= min(PROBED_WINDOW, room)), default=0)


def kv_shapes(cache: object, layers: int) -> list[KVShape]:
    """Head shapes read off a cache that transformers itself filled."""
    shapes = []
    held = list(getattr(cache, "layers", []))
    if len(held) != layers:
        raise UserError(f"target keeps {len(held)} cache layers for {layers} decoder layers; shared or recurrent states are not supported")
    for index, layer in enumerate(held):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            raise UserError(f"target layer {index} keeps no keys and values ({type(layer).__name__}); its state cannot be rolled back")
        shapes.append(KVShape(keys.shape[1], keys.shape[3], values.shape[3]))
    return shapes


def tree_mask(cache: TreeCache, slots: Tensor, mask: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """What nodes at `slots` [B, N] see: every committed token, and of each other what `mask` [B, W, N] says of the last W of them.

    depth: [B, N] below the first one. Returns [B, W, visible] bool, and the position each slot stands for [B, visible].
    """
    place = torch.arange(cache.visible, device=slots.device)
    B, W, N = mask.shape
    seen = (place < cache.lengths[:, None])[:, None, :].repeat(1, W, 1)
    seen.scatter_(2, slots[:, None, :].expand(B, W, N), mask)
    return seen, place.repeat(B, 1).scatter(1, slots, cache.lengths[:, None] + depth)


def layer_masks(
    windows: dict[str, int | None], dtype: torch.dtype, seen: Tensor, positions: Tensor, key_positions: Tensor | None
) -> Tensor | dict[str, Tensor]:
    """Additive [B, 1, N, M] masks from `seen` [B, N, M]: one, or one a layer type where the model mixes them.

    windows: see `mask_windows`; key_positions: [B, M] positions of the slots, for windows; None where slot s stands for position s.
    """
    masks = {}
    for kind, window in windows.items():
        near = seen
        if window is not None:
            keys = torch.arange(seen.shape[-1], device=seen.device)[None] if key_positions is None else key_positions
            near = seen & (positions[:, :, None] - keys[:, None, :] < window)
        lowest = torch.finfo(dtype).min
        masks[kind] = torch.zeros(near.shape, dtype=dtype, device=near.device).masked_fill_(~near, lowest)[:, None]
    return masks if len(masks) > 1 else next(iter(masks.values()))
