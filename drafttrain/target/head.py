"""The frozen embedding, final norm and output head alone, read from the safetensors without loading the target.

Training from captured features needs nothing more of the target than this.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.errors import UserError
from drafttrain.core.packed import linear
from drafttrain.target.files import load_config, text_config, weight_files
from drafttrain.target.language import parameter_name, skeleton


class TargetHead:
    """Borrowed weights. Drafters get it as an argument and never keep it in a state dict."""

    def __init__(
        self, embedding: Tensor, output: Tensor, bias: Tensor | None, norm: Tensor | None, config: object,
        layer_weights: Callable[[int], dict[str, Tensor]] = lambda index: {},
    ) -> None:
        """embedding, output: [V, D]; norm: [D] the final norm's weight; config: the target's text configuration.

        layer_weights: reads one decoder layer's weights by name (`self_attn.q_proj.weight`, ...) when drafters ask for it.
        """
        self.embedding, self.output, self.bias, self.norm = embedding, output, bias, norm
        self.finish = finisher(config)
        self.layer_weights = layer_weights

    @property
    def vocab_size(self) -> int:
        return self.output.shape[0]

    @property
    def device(self) -> torch.device:
        return self.output.device

    def embed(self, tokens: Tensor) -> Tensor:
        """[...] ids -> [..., D], without any multiplier of the target's own."""
        return F.embedding(tokens, self.embedding)

    def logits(self, last: Tensor, rows: Tensor | None = None) -> Tensor:
        """[..., D] normed hidden states -> [..., V] the target's logits, or only the vocabulary `rows`."""
        weight = self.output if rows is None else self.output[rows]
        bias = None if self.bias is None else (self.bias if rows is None else self.bias[rows])
        return self.finish(linear(last.to(weight.dtype), weight, bias))

    @torch.no_grad()
    def start_norm(self, norm: nn.Module) -> None:
        """Copies the final norm's weight, where the target has one of that size."""
        weight = norm.get_parameter("weight")
        if self.norm is not None and self.norm.shape == weight.shape:
            weight.copy_(self.norm)

    @torch.no_grad()
    def start_layer(self, layer: nn.Module, index: int) -> None:
        """Copies those of a decoder layer's weights that `layer` has under the same name and of the same size."""
        borrowed = self.layer_weights(index)
        for name, parameter in layer.named_parameters():
            if name in borrowed and borrowed[name].shape == parameter.shape:
                parameter.copy_(borrowed[name])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TargetHead:
        """The same head elsewhere; a tied head stays one tensor."""
        embedding = self.embedding.to(device, dtype)
        tied = self.output.data_ptr() == self.embedding.data_ptr()
        moved = object.__new__(TargetHead)
        moved.embedding, moved.output = embedding, embedding if tied else self.output.to(device, dtype)
        moved.bias = None if self.bias is None else self.bias.to(device, dtype)
        moved.norm = None if self.norm is None else self.norm.to(device, dtype)
        moved.finish, moved.layer_weights = self.finish, self.layer_weights
        return moved

    @classmethod
    def from_model(cls, model: Any) -> TargetHead:
        """Shares the tensors of a loaded causal LM."""
        output, backbone = model.get_output_embeddings(), model.base_model
        norm = final_norm(backbone)
        _, layers = layer_list(backbone)
        return cls(
            model.get_input_embeddings().weight,
            output.weight,
            output.bias,
            None if norm is None else norm.weight,
            text_config(model.config),
            lambda index: {name: p.detach() for name, p in layers[index].named_parameters()},
        )

    @classmethod
    def from_folder(
        cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, trust_remote_code: bool = False
    ) -> TargetHead:
        """Reads only the embedding, the head and the final norm; a layer's weights when asked for them.

        Raises `UserError` where a file is truncated or a tensor is missing.
        """
        config = load_config(folder, trust_remote_code)
        model = skeleton(config, trust_remote_code)
        names = {id(p): name for name, p in model.named_parameters()}
        output, norm = model.get_output_embeddings(), final_norm(model.base_model)
        files = SafetensorsFolder(folder)

        def read(parameter: Tensor) -> Tensor:
            return files.read(names[id(parameter)]).to(device, dtype)

        path, layers = layer_list(model.base_model)
        prefix = f"{model.base_model_prefix}.{path}"

        def layer(index: int) -> dict[str, Tensor]:  # experts are stored under other names than the model's, and left out
            stored = {name: f"{prefix}.{index % len(layers)}.{name}" for name, _ in layers[index].named_parameters()}
            return {name: files.read(there) for name, there in stored.items() if files.has(there)}

        embedding = read(model.get_input_embeddings().weight)
        tied = output.weight is model.get_input_embeddings().weight
        own = parameter_name(model, output)
        if tied and files.has(own):  # tuned apart under a flag that says tied: transformers keeps two that differ
            stored = files.read(own).to(device, dtype)
            output_weight = embedding if torch.equal(stored, embedding) else stored
        else:
            output_weight = embedding if tied else read(output.weight)
        return cls(
            embedding,
            output_weight,
            None if output.bias is None else read(output.bias),
            None if norm is None else read(norm.weight),
            text_config(config),
            layer,
        )


OLDER_NAMES = {"lm_head.weight": "embed_out.weight"}
"""Tensors that files still keep under a name that the model class has given up (GPT-NeoX)."""


TEXT_PARTS = ("language_model", "text_model")
"""What vision-language models call the language model within them."""


class SafetensorsFolder:
    """Tensors by name from the shards of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where: dict[str, Path] = {}
        for shard in weight_files(folder):
            try:
                with safe_open(shard, "pt") as file:
                    self.where.update(dict.fromkeys(file.keys(), shard))
            except SafetensorError as error:
                raise UserError(f"{shard}: truncated or corrupt ({error}); download or write it again") from error

    def has(self, name: str) -> bool:
        """Whether a language model's tensor is there."""
        return self._stored(name) in self.where

    def _stored(self, name: str) -> str:
        """The name in the files: vision-language checkpoints keep their text model below another one."""
        if name in self.where:
            return name
        if OLDER_NAMES.get(name) in self.where:
            return OLDER_NAMES[name]
        inner = "." + name.partition(".")[2] if not name.startswith("lm_head.") else "." + name
        below = [known for known in self.where if known.endswith(inner) and any(part in TEXT_PARTS for part in known.split("."))]
        return below[0] if len(below) == 1 else name

    def read(self, name: str) -> Tensor:
        name = self._stored(name)
        if name not in self.where:
            raise UserError(f"target '{self.folder}': tensor '{name}' is missing from its safetensors; is the model complete?")
        with safe_open(self.where[name], "pt") as file:
            return file.get_tensor(name)


def finisher(config: object) -> Callable[[Tensor], Tensor]:
    """What a model family does to its logits after the output matrix (Cohere, Granite: a scale; Gemma: a soft cap)."""
    known = config.to_dict()  # type: ignore[attr-defined]
    scale = known.get("logit_scale") or 1.0
    divisor = known.get("logits_scaling") or 1.0
    cap = known.get("final_logit_softcapping")
    factor = scale / divisor

    def finish(logits: Tensor) -> Tensor:
        if factor != 1.0:
            logits = logits * factor
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return finish


def layer_list(backbone: nn.Module) -> tuple[str, nn.ModuleList]:
    """The backbone's list of decoder layers and the attribute that holds it."""
    depth = text_config(backbone.config).num_hidden_layers
    for name, child in backbone.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return name, child
    raise UserError(f"{type(backbone).__name__}: found no list of {depth} decoder layers; this architecture is not supported")


def final_norm(backbone: nn.Module) -> Any:
    """The norm after the last layer: the backbone's own child with a weight of one dimension."""
    found = None
    for child in backbone.children():
        weight = dict(child.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.dim() == 1:
            found = child
    return found
