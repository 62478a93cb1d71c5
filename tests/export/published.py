"""Tiny targets on disk, and drafters of them with random weights, to write in each format and read back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as Steps
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.files import save_drafter
from drafttrain.export.base import FormatConfig, Source
from drafttrain.export.reading import ImportTarget
from drafttrain.target.adapter import read_shape
from drafttrain.target.files import TargetConfig
from drafttrain.target.head import TargetHead

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 20000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that merges nothing, in a vocabulary too small for every byte."""
    letters = sorted(ByteLevel.alphabet())[: vocab_size - 2]
    vocab = {token: id for id, token in enumerate(["<s>", "<end>", *letters])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<s>"))
    tokenizer.pre_tokenizer = Steps([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<end>")


def save_target(folder: Path, model_type: str = "llama", rope: str = "default", **sizes: Any) -> TargetConfig:
    """A random target in fp32."""
    torch.manual_seed(0)
    defaults = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, rope_parameters=dict(ROPES[rope]), **{**defaults, **sizes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer(config.vocab_size).save_pretrained(folder)
    return TargetConfig(model=str(folder), dtype="float32", device="cpu")


def random_drafter(config: TargetConfig, family: str, aux_layers: tuple[int, ...] | None = None, **options: Any) -> Drafter:
    """Every weight random, also those that start at 0 or 1, and a draft vocabulary of random tokens."""
    shape = read_shape(config)
    if aux_layers is not None:
        shape = dataclasses.replace(shape, aux_layers=aux_layers)
    generator = torch.Generator().manual_seed(7)
    drafter = DRAFTERS[family](DRAFTERS[family].Config(name=family, **options), shape)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        for name, ids in drafter.named_buffers():
            if name == "vocab":
                ids.copy_(torch.randperm(shape.vocab_size, generator=generator)[: len(ids)].sort().values)
    return drafter.eval()


def source_of(drafter: Drafter, config: TargetConfig, folder: Path) -> Source:
    save_drafter(drafter, folder)
    return Source(drafter, folder, Path(config.model), config)


def import_target(config: TargetConfig) -> ImportTarget:
    return ImportTarget(read_shape(config), TargetHead.from_folder(Path(config.model)))


def written(form: FormatConfig, source: Source, folder: Path) -> Path:
    folder.mkdir()
    form.write(source, folder)
    return folder


def rounded(drafter: Drafter, dtype: torch.dtype) -> dict[str, Tensor]:
    """Its weights as a file of this precision holds them."""
    return {key: value.to(dtype).float() if value.is_floating_point() else value for key, value in drafter.state_dict().items()}
