"""The SGLang and SpecForge layout of EAGLE-3: the one folder that SGLang, vLLM, llama.cpp's converter and optimum-intel all read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from drafttrain.drafters.base import Drafter, DrafterConfig
from drafttrain.drafters.eagle3 import Eagle3
from drafttrain.export.base import FormatConfig, Precision, Source, shell
from drafttrain.export.eagle3 import check_eagle3, layer_config, layer_ids, own_weights, read_eagle3, vocabulary_maps
from drafttrain.export.reading import EMBEDDING, ImportTarget
from drafttrain.export.tensors import Values, Weights, in_dtype, read_tensors, write_folder
from drafttrain.target.files import TargetShape

LAYER = "midlayer"
ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
REFUSED = ("norm_before_residual", "norm_before_fc", "norm_output")


class SGLang(FormatConfig):
    """EAGLE-3, with any number of captured layers."""

    name: Literal["sglang"] = "sglang"
    dtype: Precision = "auto"
    """Of the weights; `auto`: the target's."""
    embedding: bool = False
    """Write the target's embedding too; every engine shares the target's where it is missing."""

    def check(self, drafter: DrafterConfig, target: TargetShape) -> None:
        check_eagle3(self, drafter)

    def write(self, source: Source, folder: Path) -> None:
        drafter = source.drafter
        assert isinstance(drafter, Eagle3)
        tensors = own_weights(drafter, LAYER) | vocabulary_maps(drafter)
        if self.embedding:
            tensors[EMBEDDING] = source.head.embedding
        dtype = source.dtype(self.dtype)
        write_folder(folder, sglang_config(drafter, str(dtype).removeprefix("torch.")), in_dtype(tensors, dtype))

    def use(self, target: str) -> str:
        k = self.draft_length
        inline = f'{{"model": "PATH/OF/THIS/FOLDER", "method": "eagle3", "num_speculative_tokens": {k}}}'
        serve = f"python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE3 --speculative-draft-model-path"
        return shell(
            f"{serve} PATH/OF/THIS/FOLDER --speculative-num-steps {k} --speculative-eagle-topk 1 --speculative-num-draft-tokens {k + 1}",
            f"vllm serve {target} --speculative-config '{inline}'",
        )


def sglang_config(drafter: Eagle3, dtype: str) -> dict[str, Any]:
    """`draft_vocab_size` is always written: SGLang reads it unguarded, and llama.cpp knows EAGLE-3 by it."""
    flags = dict.fromkeys(REFUSED, False)
    ends = drafter.target.eos_ids
    return {
        "architectures": [ARCHITECTURES[0]],
        **layer_config(drafter),
        **layer_ids(drafter.target.aux_layers),
        "draft_vocab_size": len(drafter.vocab),
        "target_hidden_size": drafter.target.hidden_size,
        "fc_norm": drafter.config.norm_features,
        **flags,
        "torch_dtype": dtype,
        "bos_token_id": drafter.target.text_config.get("bos_token_id"),
        "eos_token_id": ends[0] if ends else None,
        "pad_token_id": drafter.target.text_config.get("pad_token_id"),
    }


def recognises(folder: Path, config: dict[str, Any]) -> bool:
    named = set(config.get("architectures") or []) & set(ARCHITECTURES)
    return bool(named) or "draft_vocab_size" in config


def read(folder: Path, config: dict[str, Any], target: ImportTarget) -> Drafter:
    """Such a folder as a drafter of ours; SGLang's older names of the norms before fusing are read too."""
    values = Values(folder / "config.json", config)
    for key in REFUSED:
        if values.flag(key, False):
            raise values.unfit(key, "false: EAGLE-3 here computes no such thing")
    tensors = read_tensors(folder)
    for index, old in enumerate(("low", "mid", "high")):
        if f"aux_norm_{old}.weight" in tensors:
            tensors[f"fc_norm.{index}.weight"] = tensors.pop(f"aux_norm_{old}.weight")
    return read_eagle3(values, values, Weights(folder, tensors), LAYER, target)
