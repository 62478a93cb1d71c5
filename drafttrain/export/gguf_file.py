"""GGUF files (llama.cpp): a causal LM with its tokenizer, and the pieces that every file shares.

llama.cpp turns neighbouring pairs of a head's numbers where transformers turns its halves, so the rows of query and key are put in pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.errors import UserError
from drafttrain.export.tensors import in_numpy
from drafttrain.target.rope import rope_parameters

Quantization = Literal["f32", "f16", "bf16", "q8_0"]
KINDS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
BLOCK = 32
"""Numbers that q8_0 packs together."""

LLAMA_KEYS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "hidden_norm": "attn_norm_2",
}  # fmt: skip
"""What GGUF calls the parts of a decoder layer."""

PAIRED = {"llama": True, "qwen2": False, "qwen3": False}
"""Architectures that can be written, and whether llama.cpp turns neighbouring pairs in them."""

WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {WORD + "{1,3}" + REST: "llama-bpe", WORD + REST: "qwen2"}
"""How a tokenizer splits text before merging: its pattern, and llama.cpp's name for it."""


def packages() -> Any:
    """The module `gguf`, or a `UserError` that names the extra."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("export format 'gguf' needs the package gguf: pip install 'drafttrain[gguf]'") from error
    return gguf


def paired(weight: Tensor, heads: int) -> Tensor:
    """[heads * d, D] rows of halves -> rows of pairs."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def unpaired(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `paired`."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def new_writer(path: Path, architecture: str, quantization: Quantization) -> Any:
    gguf = packages()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[quantization]])
    return writer


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_weight(writer: Any, name: str, weight: Tensor, quantization: Quantization) -> None:
    """Matrices in the file's precision; vectors, and rows that q8_0 cannot pack, stay fp32."""
    gguf = packages()
    values = in_numpy(weight)
    matrix = weight.dim() > 1 and (quantization != "q8_0" or weight.shape[-1] % BLOCK == 0)
    kind = gguf.GGMLQuantizationType[KINDS[quantization] if matrix else "F32"]
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        writer.add_tensor(name, values.astype(np.float16 if kind == gguf.GGMLQuantizationType.F16 else np.float32))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def layer_sizes(writer: Any, config: Mapping[str, Any], layers: int) -> None:
    """Numbers that llama.cpp reads of every architecture."""
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_size(config))


def head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def add_rope(writer: Any, config: Mapping[str, Any]) -> None:
    """The rotary base and its scaling; llama3's as one factor for each frequency."""
    parameters = rope_parameters(dict(config))
    writer.add_rope_freq_base(parameters["rope_theta"])
    kind = parameters["rope_type"]
    gguf = packages()
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", in_numpy(llama3_factors(parameters, head_size(config))))


def llama3_factors(parameters: Mapping[str, Any], head_dim: int) -> Tensor:
    """[d / 2] by how much each frequency is divided (Llama 3.1's scaling)."""
    frequency = parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    length = 2 * math.pi / frequency
    context, low, high = (parameters[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    share = (context / length - low) / (high - low)
    smooth = 1 / ((1 - share) / parameters["factor"] + share)
    smooth = torch.where(length < context / high, torch.ones_like(smooth), smooth)
    return torch.where(length > context / low, torch.full_like(smooth, parameters["factor"]), smooth).float()


def write_causal_lm(
    path: Path, config: Mapping[str, Any], weights: Callable[[str], Tensor], tokenizer: Path, quantization: Quantization,
    pre_tokenizer: str | None = None,
) -> None:
    """A Llama-like model whose weights are read by transformers' names.

    Raises `UserError` for another architecture, and for a tokenizer that is no byte-level BPE.
    """
    kind = config["model_type"]
    if kind not in PAIRED:
        known = ", ".join(PAIRED)
        raise UserError(f"export format 'gguf': a '{kind}' model is not written here ({known} are); use llama.cpp's own converter")
    writer = new_writer(path, kind, quantization)
    layer_sizes(writer, config, config["num_hidden_layers"])
    add_rope(writer, config)
    add_tokenizer(writer, tokenizer, config["vocab_size"], pre_tokenizer)
    add_weight(writer, "token_embd.weight", weights("model.embed_tokens.weight"), quantization)
    for layer in range(config["num_hidden_layers"]):
        _add_layer(writer, config, weights, layer, quantization)
    add_weight(writer, "output_norm.weight", weights("model.norm.weight"), quantization)
    if not config.get("tie_word_embeddings"):
        add_weight(writer, "output.weight", weights("lm_head.weight"), quantization)
    finish(writer)


def _add_layer(writer: Any, config: Mapping[str, Any], weights: Callable[[str], Tensor], layer: int, quantization: Quantization) -> None:
    kind = config["model_type"]
    biased = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") if kind == "qwen2" else ()
    absent = {"hidden_norm"} | (set() if kind == "qwen3" else {"self_attn.q_norm", "self_attn.k_norm"})
    for name, own in LLAMA_KEYS.items():
        if name in absent:
            continue
        for end in ("weight", "bias") if name in biased else ("weight",):
            weight = weights(f"model.layers.{layer}.{name}.{end}")
            if PAIRED[kind]:
                weight = pair_rows(name, weight, config)
            add_weight(writer, f"blk.{layer}.{own}.{end}", weight, quantization)


def pair_rows(name: str, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Query's and key's rows in pairs, others as they are."""
    if name.endswith("q_proj"):
        return paired(weight, config["num_attention_heads"])
    return paired(weight, config["num_key_value_heads"]) if name.endswith("k_proj") else weight


def add_tokenizer(writer: Any, folder: Path, vocab_size: int, pre_tokenizer: str | None) -> None:
    """Tokens, merges, special tokens and chat template of a byte-level BPE tokenizer."""
    gguf = packages()
    try:
        described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"export format 'gguf': '{folder / 'tokenizer.json'}' cannot be read; only fast tokenizers are written") from error
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer or split_name(described, folder))
    by_id = {id: token for token, id in described["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in described.get("added_tokens", [])}
    tokens, kinds = [], []
    for id in range(vocab_size):
        entry = added.get(id)
        if entry is not None:
            tokens.append(entry["content"])
            kinds.append(gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED)
        else:
            tokens.append(by_id.get(id, f"[PAD{id}]"))
            kinds.append(gguf.TokenType.NORMAL if id in by_id else gguf.TokenType.UNUSED)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)
    writer.add_add_bos_token(False)  # prompts come rendered, with whatever begins them


def split_name(described: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's name of how the tokenizer splits text, or a `UserError`: a wrong one gives other tokens silently."""
    before = described.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0].get("pattern", {}).get("Regex", "")
        if pattern in SPLITS:
            return SPLITS[pattern]
    if kinds == ["ByteLevel"] and described["model"].get("type") == "BPE":
        return "gpt-2"
    raise UserError(
        f"export format 'gguf': how '{folder / 'tokenizer.json'}' splits text ({' + '.join(map(str, kinds))}) has no name known here; "
        f"give llama.cpp's as pre_tokenizer, or use its own converter"
    )
