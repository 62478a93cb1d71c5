"""MLP speculators, as vLLM read them before 0.32 (IBM's accelerators on the Hub). Tied parts stand in the file once, under the index 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from drafttrain.drafters.base import Drafter, DrafterConfig
from drafttrain.drafters.mlp_speculator import MLPSpeculator, MLPSpeculatorConfig
from drafttrain.export.base import FormatConfig, Precision, Source, shell
from drafttrain.export.reading import ImportTarget
from drafttrain.export.tensors import CONFIG, Values, Weights, in_dtype, read_tensors, write_folder
from drafttrain.target.files import TargetShape

PREFIX = "speculator."
"""Which published files have before every key."""


class MLPSpeculatorFormat(FormatConfig):
    """An MLP speculator over the target's whole vocabulary."""

    name: Literal["mlp_speculator"] = "mlp_speculator"
    dtype: Precision = "auto"
    """Of the weights; `auto`: the target's."""

    def check(self, drafter: DrafterConfig, target: TargetShape) -> None:
        self.only(drafter, ["mlp_speculator"], "it is no recurrent net over a state and tokens")
        assert isinstance(drafter, MLPSpeculatorConfig)
        if drafter.draft_vocab_size is not None and drafter.draft_vocab_size < target.vocab_size:
            reason = f"drafter.draft_vocab_size {drafter.draft_vocab_size}: the format has no map of a reduced vocabulary"
            raise self.refuse(reason, "train without draft_vocab_size")
        if drafter.tie_weights and drafter.heads == 1:
            raise self.refuse("drafter.tie_weights with drafter.heads 1: vLLM ties only several heads", "train with tie_weights: false")

    def write(self, source: Source, folder: Path) -> None:
        drafter = source.drafter
        assert isinstance(drafter, MLPSpeculator)
        dtype = source.dtype(self.dtype)
        weights = {stored_key(key): value for key, value in drafter.state_dict().items() if key != "vocab"}
        write_folder(folder, stored_config(drafter, str(dtype).removeprefix("torch.")), in_dtype(weights, dtype))

    def use(self, target: str) -> str:
        inline = f'{{"model": "PATH/OF/THIS/FOLDER", "num_speculative_tokens": {self.draft_length}}}'
        return "vLLM before 0.32 (later versions read no MLP speculator); `num_speculative_tokens` is the number of heads:\n\n" + shell(
            f"vllm serve {target} --speculative-config '{inline}'"
        )


def stored_config(drafter: MLPSpeculator, dtype: str) -> dict[str, Any]:
    config = drafter.config
    return {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "vocab_size": drafter.target.vocab_size,
        "emb_dim": drafter.target.hidden_size,
        "inner_dim": drafter.state_size,
        "n_predict": config.heads,
        "top_k_tokens_per_head": [5, *[3] * (config.heads - 1)],
        "n_candidates": 5,
        "tie_weights": config.tie_weights,
        "scale_input": config.scale_input,
        "torch_dtype": dtype,
    }


def stored_key(key: str) -> str:
    """`lm_heads.0.weight` -> `head.0.weight`; the others have the format's names."""
    return key.replace("lm_heads.", "head.")


def recognises(folder: Path, config: dict[str, Any]) -> bool:
    return config.get("model_type") == "mlp_speculator"


def read(folder: Path, config: dict[str, Any], target: ImportTarget) -> Drafter:
    values = Values(folder / CONFIG, config)
    for key, own in {"emb_dim": target.shape.hidden_size, "vocab_size": target.shape.vocab_size}.items():
        if values.number(key) != own:
            raise values.unfit(key, f"the target's {own}")
    inner = values.number("inner_dim") if config.get("inner_dim") else target.shape.hidden_size  # 0 is the format's word for that
    options = MLPSpeculatorConfig(
        heads=values.number("n_predict"), inner_size=inner, tie_weights=values.flag("tie_weights", False),
        scale_input=values.flag("scale_input", False),
    )  # fmt: skip
    drafter = MLPSpeculator(options, target.shape)
    weights = Weights(folder, {key.removeprefix(PREFIX): value for key, value in read_tensors(folder).items()})
    own_keys = [key for key in drafter.state_dict() if key != "vocab"]
    state = {key: weights.take(stored_key(key), drafter.state_dict()[key].shape) for key in own_keys}
    if options.tie_weights:  # published files repeat what is tied
        for level in range(1, options.heads):
            weights.skip(f"emb.{level}.weight", f"ln.{level}.weight", f"ln.{level}.bias", f"head.{level}.weight")
        for level in range(2, options.heads):
            weights.skip(f"proj.{level}.weight")
    weights.end()
    drafter.load_state_dict({**state, "vocab": drafter.vocab})
    return drafter.eval()
