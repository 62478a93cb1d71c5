"""The `speculators` format (package speculators, vLLM): an EAGLE-3 folder that names its target, so `vllm serve FOLDER` works."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from drafttrain.core.errors import UserError
from drafttrain.drafters.base import Drafter, DrafterConfig
from drafttrain.drafters.eagle3 import Eagle3
from drafttrain.export.base import FormatConfig, Precision, Source, shell
from drafttrain.export.eagle3 import TOP_IDS, check_eagle3, layer_config, own_weights, read_eagle3, vocabulary_maps
from drafttrain.export.reading import EMBEDDING, ImportTarget
from drafttrain.export.tensors import Values, Weights, in_dtype, read_tensors, write_folder
from drafttrain.target.files import DEMO, TargetShape, load_config

LAYER = "layers.0"
VERSION = "0.9.0"
"""Of the package whose own class loads what is written here."""
REFUSED = {
    "norm_before_residual": "the layer would add its input after the norm",
    "norm_before_fc": "the captured layers would be normed together",
    "norm_output": "the normed state would be fed to the next step",
}
"""Flags of the format that change the function and no tensor's shape. Written as false always: readers' defaults differ."""


class Speculators(FormatConfig):
    """EAGLE-3, with any number of captured layers."""

    name: Literal["speculators"] = "speculators"
    dtype: Precision = "auto"
    """Of the weights; `auto`: the target's."""
    embedding: bool = True
    """Write the target's embedding too; vLLM shares the target's where it is missing."""
    verifier: str | None = None
    """How the folder names its target (Hub id or path); by default as the recipe does."""

    def check(self, drafter: DrafterConfig, target: TargetShape) -> None:
        check_eagle3(self, drafter)

    def write(self, source: Source, folder: Path) -> None:
        drafter = source.drafter
        assert isinstance(drafter, Eagle3)
        tensors = own_weights(drafter, LAYER)
        if len(drafter.vocab) < drafter.target.vocab_size:
            tensors |= vocabulary_maps(drafter)
        if self.embedding:
            tensors[EMBEDDING] = source.head.embedding
        write_folder(folder, self._config(drafter, source), in_dtype(tensors, source.dtype(self.dtype)))

    def _config(self, drafter: Eagle3, source: Source) -> dict[str, Any]:
        named: Any = load_config(source.home, source.target.trust_remote_code)
        name = self.verifier or (str(source.home) if source.target.model == DEMO else source.target.model)
        proposal = {"proposal_type": "greedy", "speculative_tokens": self.draft_length, "verifier_accept_k": 1, "accept_tolerance": 0.0}
        return {
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": "eagle3",
            "speculators_version": VERSION,
            "draft_vocab_size": len(drafter.vocab),
            **dict.fromkeys(REFUSED, False),
            "fc_norm": drafter.config.norm_features,
            "embed_requires_grad": False,
            "target_hidden_size": drafter.target.hidden_size,
            TOP_IDS: list(drafter.target.aux_layers),
            "tie_word_embeddings": False,
            "torch_dtype": str(source.dtype(self.dtype)).removeprefix("torch."),
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [proposal],
                "verifier": {"name_or_path": name, "architectures": list(named.architectures or [])},
            },
            "transformer_layer_config": layer_config(drafter),
        }

    def use(self, target: str) -> str:
        inline = f'{{"model": "PATH/OF/THIS/FOLDER", "method": "eagle3", "num_speculative_tokens": {self.draft_length}}}'
        return "vLLM finds the target inside the folder, or is given both:\n\n" + shell(
            "vllm serve PATH/OF/THIS/FOLDER", f"vllm serve {target} --speculative-config '{inline}'"
        )


def recognises(folder: Path, config: dict[str, Any]) -> bool:
    return "speculators_model_type" in config


def verifier_of(config: dict[str, Any]) -> str | None:
    """The target that the folder names."""
    inner = config.get("speculators_config")
    verifier = inner.get("verifier") if isinstance(inner, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    return name if isinstance(name, str) else None


def read(folder: Path, config: dict[str, Any], target: ImportTarget) -> Drafter:
    """An EAGLE-3 folder of the speculators package as a drafter of ours."""
    values = Values(folder / "config.json", config)
    kind = config["speculators_model_type"]
    if kind != "eagle3":
        raise UserError(f"'{values.path}': key 'speculators_model_type' is {kind!r}; only 'eagle3' has a family here")
    for key, meaning in REFUSED.items():
        if key == "norm_before_residual" and key not in config:
            raise values.unfit(key, "false (readers' defaults differ, so it must be said)")
        if values.flag(key, False):
            raise values.unfit(key, f"false: {meaning}, which EAGLE-3 here does not")
    weights = Weights(folder, read_tensors(folder))
    return read_eagle3(values, values.inside("transformer_layer_config"), weights, LAYER, target)
