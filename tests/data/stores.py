"""A tiny random target with a word tokenizer and a chat template, and stores of random conversations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drafttrain.core.types import Features
from drafttrain.data.origin import Origin, take_probe
from drafttrain.data.store import Conversation, Store, StoreWriter, feature_widths
from drafttrain.target.adapter import Target

V = 64
TEMPLATE = (
    "{{ '<s> ' }}{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "<end>", "<user>", "<assistant>", "<system>"]
    words = special + [f"w{index}" for index in range(V - len(special))]
    plain = Tokenizer(WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="<end>",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_target(seed: int = 0, fingerprint: str = "tiny", eos: int | None = 2) -> Target:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, eos_token_id=eos, bos_token_id=1, initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # ends turns now and then, and never writes the other special tokens
        model.lm_head.weight[[0, 1, 3, 4, 5]] *= 0.0
        model.lm_head.weight[2] *= 1.5
    tokenizer = make_tokenizer()
    if eos is None:
        tokenizer.eos_token = None
    return Target(model, tokenizer, fingerprint=fingerprint)


def conversation(id: int, generator: np.random.Generator) -> Conversation:
    T = int(generator.integers(4, 20))
    tokens = generator.integers(6, V, T)
    return Conversation.answered(tokens, int(generator.integers(1, T - 2)), {"domain": f"d{id % 3}"}, id)


def numbered(conversation: Conversation, widths: dict[str, int]) -> Features:
    """Features that tell conversation, token and place apart."""
    T = len(conversation.tokens)
    base = 100.0 * conversation.id + torch.arange(T, dtype=torch.float32)[:, None]
    return {name: base + torch.arange(width) / 1000 + len(name) for name, width in widths.items()}


def make_store(
    folder: Path, target: Target, count: int = 24, features: tuple[str, ...] = (), per_shard: int = 7
) -> Store:
    """Random conversations, appended in a mixed order."""
    widths = feature_widths(features, 32, 3)
    writer = StoreWriter(folder, Origin.of_target(target), widths, "test", take_probe(target))
    generator = np.random.default_rng(1)
    made = [conversation(id, generator) for id in range(count)]
    for number, one in enumerate(made[1::2] + made[::2]):
        writer.append(one, numbered(one, widths))
        if number % per_shard == per_shard - 1:
            writer.flush()
    return writer.finish()
