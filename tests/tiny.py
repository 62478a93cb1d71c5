"""Tiny random targets and drafters that tests build in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from drafttrain.core.types import TrainingBatch
from drafttrain.drafters.base import Drafter, Loss
from drafttrain.drafters.eagle3 import Eagle3, Eagle3Config
from drafttrain.target.adapter import Target
from drafttrain.target.head import TargetHead

VOCAB = 64


def tiny_llama(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random Llama of 3 layers; weights are large enough that its greedy text does not fall into one token."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**sizes, **changes})).eval()


def tiny_target(seed: int = 0, **changes: Any) -> Target:
    """`tiny_llama` as a target in fp32."""
    return Target(tiny_llama(seed, **changes))


def tiny_eagle3(target: Target, seed: int = 0, **options: Any) -> Drafter:
    """A random EAGLE-3 drafter that starts from the target's head, so that it is right now and then."""
    torch.manual_seed(seed)
    drafter = Eagle3(Eagle3Config(**options), target.shape)
    drafter.start_from(target.head, torch.arange(target.vocab_size))
    return drafter.eval()


def fitted(drafter: Drafter, target: Target, prompts: list[list[int]], new_tokens: int = 28, steps: int = 60) -> Drafter:
    """The drafter after a few steps on the target's own greedy texts: right often enough that much is accepted."""
    texts = [prompt + greedy_text(target.model, prompt, new_tokens) for prompt in prompts]
    batch = packed(target, texts, [0] * len(texts))
    taught(drafter.train(), batch, target.head, steps, torch.optim.AdamW(drafter.parameters(), lr=5e-3))
    return drafter.eval()


def taught(drafter: Drafter, batch: TrainingBatch, head: TargetHead, steps: int, optimizer: torch.optim.Optimizer) -> Loss:
    """The last loss of some steps on one batch."""
    for _ in range(steps):
        loss = drafter.loss(batch, head)
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss


def packed(target: Target, documents: Sequence[list[int]], answers_from: Sequence[int]) -> TrainingBatch:
    """One row of documents, each answered from the given token on, with the target's features."""
    tokens = torch.tensor([[token for document in documents for token in document]])
    number = torch.tensor([[index for index, document in enumerate(documents) for _ in document]])
    position = torch.tensor([[place for document in documents for place in range(len(document))]])
    starts = torch.tensor([[start for document, start in zip(documents, answers_from, strict=True) for _ in document]])
    return TrainingBatch(
        tokens, position >= starts, number, position, target.encode(tokens, position, number, {"aux_hidden_states", "last_hidden_state"})
    )


def greedy_text(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> list[int]:
    """What the model itself writes: one plain forward over everything for each token."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
