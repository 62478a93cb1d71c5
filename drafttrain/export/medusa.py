"""Medusa heads, as vLLM up to 0.32 reads them, or under the original's keys (in safetensors: a pickle is never written)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from drafttrain.drafters.base import Drafter, DrafterConfig
from drafttrain.drafters.medusa import Medusa, MedusaConfig
from drafttrain.export.base import FormatConfig, Precision, Source, shell
from drafttrain.export.reading import ImportTarget
from drafttrain.export.tensors import CONFIG, Values, Weights, in_dtype, read_file, read_tensors, write_folder
from drafttrain.target.files import TargetShape

ORIGINAL_WEIGHTS = "medusa_lm_head.safetensors"


class MedusaFormat(FormatConfig):
    """Medusa over the target's whole vocabulary."""

    name: Literal["medusa"] = "medusa"
    layout: Literal["vllm", "original"] = "vllm"
    """Whose keys: vLLM's (up to 0.32; later ones read no Medusa), or those of the paper's own code."""
    dtype: Precision = "auto"
    """Of the weights; `auto`: the target's."""

    def check(self, drafter: DrafterConfig, target: TargetShape) -> None:
        self.only(drafter, ["medusa"], "it is no set of residual heads")
        assert isinstance(drafter, MedusaConfig)
        if drafter.root:
            raise self.refuse("drafter.root: no engine's Medusa reads the embedding of the round's first token", "train with root: false")
        if drafter.output is not None:
            raise self.refuse("drafter.output: no engine's Medusa reads a low-rank output", "use 'native', or train without it")
        if drafter.draft_vocab_size is not None and drafter.draft_vocab_size < target.vocab_size:
            reason = f"drafter.draft_vocab_size {drafter.draft_vocab_size}: vLLM's loader stops at the map that a reduced vocabulary needs"
            raise self.refuse(reason, "train without draft_vocab_size")
        if self.layout == "original" and not drafter.own_heads:
            raise self.refuse("layout 'original' keeps an output matrix for each head, and these share the target's", "use layout 'vllm'")

    def write(self, source: Source, folder: Path) -> None:
        drafter = source.drafter
        assert isinstance(drafter, Medusa)
        dtype = source.dtype(self.dtype)
        if self.layout == "original":
            self._write_original(drafter, folder, source, in_dtype(original_weights(drafter), dtype))
            return
        weights = vllm_weights(drafter)
        if not drafter.config.own_heads:
            if source.head.bias is not None:
                raise self.refuse("the target's output matrix has a bias, which Medusa's heads have no place for", "train with own_heads")
            weights["lm_head.weight"] = source.head.output
        write_folder(folder, vllm_config(drafter, str(dtype).removeprefix("torch.")), in_dtype(weights, dtype))

    def _write_original(self, drafter: Medusa, folder: Path, source: Source, weights: dict[str, Tensor]) -> None:
        config = {
            "medusa_num_heads": drafter.config.heads,
            "medusa_num_layers": drafter.config.layers,
            "base_model_name_or_path": source.target.model,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file({key: value.contiguous().clone() for key, value in weights.items()}, folder / ORIGINAL_WEIGHTS, {"format": "pt"})

    def use(self, target: str) -> str:
        if self.layout == "original":
            return "The keys of the paper's own code (`medusa_head`), in safetensors: `torch.nn.ModuleList.load_state_dict` takes them."
        inline = f'{{"model": "PATH/OF/THIS/FOLDER", "method": "medusa", "num_speculative_tokens": {self.draft_length}}}'
        return "vLLM up to 0.32 (later versions read no Medusa); `num_speculative_tokens` is the number of heads:\n\n" + shell(
            f"vllm serve {target} --speculative-config '{inline}'"
        )


def vllm_config(drafter: Medusa, dtype: str) -> dict[str, Any]:
    """`medusa_fc_bias` is always written: without it vLLM drops the biases silently."""
    target = drafter.target
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "truncated_vocab_size": target.vocab_size,
        "num_heads": drafter.config.heads,
        "num_hidden_layers": drafter.config.layers,
        "max_paths": 64,
        "topk": 10,
        "medusa_fc_bias": True,
        "original_lm_head": not drafter.config.own_heads,
        "torch_dtype": dtype,
    }


def vllm_weights(drafter: Medusa) -> dict[str, Tensor]:
    """Without the head that all share."""
    state = drafter.state_dict()
    return {vllm_key(key): value for key, value in state.items() if key != "vocab"}


def vllm_key(key: str) -> str:
    """`blocks.0.1.linear.weight` -> `blocks.0.layers.1.weight`; `lm_heads.0.weight` stays."""
    if key.startswith("lm_heads."):
        return key
    _, head, layer, _, kind = key.split(".")
    return f"blocks.{head}.layers.{layer}.{kind}"


def original_weights(drafter: Medusa) -> dict[str, Tensor]:
    return {original_key(key, drafter.config.layers): value for key, value in drafter.state_dict().items() if key != "vocab"}


def original_key(key: str, layers: int) -> str:
    """`blocks.0.1.linear.weight` -> `0.1.linear.weight`; `lm_heads.0.weight` -> `0.LAYERS.weight`."""
    if key.startswith("lm_heads."):
        return f"{key.split('.')[1]}.{layers}.weight"
    return key.removeprefix("blocks.")


def recognises(folder: Path, config: dict[str, Any]) -> bool:
    return config.get("model_type") == "medusa" or "medusa_num_heads" in config


def read(folder: Path, config: dict[str, Any], target: ImportTarget) -> Drafter:
    """Either layout as a drafter of ours."""
    values = Values(folder / CONFIG, config)
    if "medusa_num_heads" in config:
        return _read_original(folder, values, target)
    for key, own in {"hidden_size": target.shape.hidden_size, "vocab_size": target.shape.vocab_size}.items():
        if values.number(key) != own:
            raise values.unfit(key, f"the target's {own}")
    if values.number("truncated_vocab_size", target.shape.vocab_size) != target.shape.vocab_size:
        raise values.unfit("truncated_vocab_size", "the target's whole vocabulary")
    if not values.flag("medusa_fc_bias", False):
        raise values.unfit("medusa_fc_bias", "true: the blocks here have biases")
    shared = values.flag("original_lm_head", False)
    options = MedusaConfig(heads=values.number("num_heads"), layers=values.number("num_hidden_layers", 1), own_heads=not shared)
    drafter, weights = Medusa(options, target.shape), Weights(folder, _without_prefix(read_tensors(folder)))
    state = {key: weights.take(vllm_key(key), value.shape) for key, value in drafter.state_dict().items() if key != "vocab"}
    if shared:
        weights.skip("lm_head.weight", "lm_heads.0.weight")  # the target's own, which is borrowed here
    return _loaded(drafter, state, weights)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("medusa_heads."): value for key, value in tensors.items()}


def _read_original(folder: Path, values: Values, target: ImportTarget) -> Drafter:
    layers = values.number("medusa_num_layers")
    options = MedusaConfig(heads=values.number("medusa_num_heads"), layers=layers, own_heads=True)
    drafter, weights = Medusa(options, target.shape), Weights(folder, read_file(folder / ORIGINAL_WEIGHTS), ORIGINAL_WEIGHTS)
    state = {key: weights.take(original_key(key, layers), value.shape) for key, value in drafter.state_dict().items() if key != "vocab"}
    return _loaded(drafter, state, weights)


def _loaded(drafter: Medusa, state: dict[str, Tensor], weights: Weights) -> Drafter:
    weights.end()
    drafter.load_state_dict({**state, "vocab": drafter.vocab})
    return drafter.eval()
