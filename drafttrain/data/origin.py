"""Where data came from: which target, tokenizer and template, how features were taken, and a probe that proves it.

A head trained on one target's features drafts badly for another without any error: so stores carry this, and refuse
what does not fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drafttrain.core.config import Config, fingerprint
from drafttrain.core.errors import UserError
from drafttrain.core.types import Features
from drafttrain.target.adapter import Target, load_tokenizer
from drafttrain.target.files import (
    TargetConfig,
    default_aux_layers,
    load_config,
    resolve,
    target_fingerprint,
    text_config,
)
from drafttrain.target.head import TargetHead

PROBE_ROWS, PROBE_TOP = 32, 16
SAMPLE = "Zürich's 3 quick foxes wrote:\n\tif x != 42: return [x**2]  # 東京 🙂"
"""Tokenizers that agree on their vocabulary and on this text are taken to be the same."""


class Origin(Config):
    """What a store's tokens and features depend on."""

    target: str
    """Fingerprint of the target's weights."""
    name: str
    """The target as the recipe named it."""
    vocab_size: int
    """Rows of the target's output head."""
    tokenizer: str
    """Hash of the tokenizer."""
    template: str
    """Hash of the chat template."""
    aux_layers: tuple[int, ...]
    """Entries of `hidden_states` that make up the feature `aux_hidden_states`."""
    dtype: str
    """Precision the features were computed and stored in."""
    last_hidden_is_normed: bool = True
    """Whether the feature `last_hidden_state` stands after the target's final norm."""

    @classmethod
    def of_target(cls, target: Target) -> Origin:
        """A loaded target's."""
        return cls(
            target=target.fingerprint,
            name=target.name,
            vocab_size=target.vocab_size,
            tokenizer=tokenizer_hash(target.tokenizer),
            template=template_hash(target.tokenizer),
            aux_layers=tuple(target.aux_layers),
            dtype=dtype_name(target.dtype),
        )

    @classmethod
    def of_config(cls, config: TargetConfig) -> Origin:
        """Without loading the target: reads its configuration, its tokenizer and the ends of its weight files."""
        folder = resolve(config)
        text = text_config(load_config(folder, config.trust_remote_code))
        tokenizer = load_tokenizer(folder, config.trust_remote_code)
        return cls(
            target=target_fingerprint(folder),
            name=config.model,
            vocab_size=text.vocab_size,
            tokenizer=tokenizer_hash(tokenizer),
            template=template_hash(tokenizer),
            aux_layers=config.aux_layers or default_aux_layers(text.num_hidden_layers),
            dtype=dtype_name(config.torch_dtype()),
        )

    def require(self, other: Origin, features: tuple[str, ...], where: Path) -> None:
        """A `UserError` that names the first thing in which `other`, the target at hand, differs from this."""
        fields = ["target", "tokenizer", "template"]
        fields += ["dtype", "last_hidden_is_normed"] if features else []
        fields += ["aux_layers"] if "aux_hidden_states" in features else []
        for field in fields:
            ours, theirs = self.model_dump()[field], other.model_dump()[field]
            if ours != theirs:
                raise UserError(
                    f"store '{where}': its {field} is {_show(ours)} (target '{self.name}'), but the target at hand has "
                    f"{_show(theirs)}; use the target that made this data, or make new data in another output folder"
                )


def _show(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Of the vocabulary and of how a sample text is cut."""
    if tokenizer is None:
        return "none"
    return fingerprint(tokenizer.get_vocab(), tokenizer(SAMPLE, add_special_tokens=False)["input_ids"])


def template_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Of the chat template's source, so that one that prints today's date stays the same tomorrow."""
    return "none" if tokenizer is None or not tokenizer.chat_template else fingerprint(str(tokenizer.chat_template))


@torch.inference_mode()
def take_probe(target: Target, tokens: Tensor | None = None) -> Features:
    """Hidden states and what the target ITSELF makes of them: `last_hidden_state` [R, D], `top_ids` and `top_logits` [R, 16].

    tokens: [R] a text to take them at; by default some token ids.
    """
    if tokens is None:
        tokens = torch.arange(PROBE_ROWS) * 7919 % target.vocab_size
    row = tokens[None, :PROBE_ROWS].to(target.device)
    position = torch.arange(row.shape[1], device=target.device)[None]
    last = target.encode(row, position, torch.zeros_like(row), ("last_hidden_state",))["last_hidden_state"][0]
    top = target.model(row).logits[0].float().topk(min(PROBE_TOP, target.vocab_size))
    return {"last_hidden_state": last.clone(), "top_ids": top.indices.clone(), "top_logits": top.values.clone()}


def check_probe(probe: Features, head: TargetHead, where: Path) -> None:
    """A `UserError` unless head(last hidden) gives the target's own logits: catches a missing norm, another head."""
    last, ids, theirs = (probe[name].to(head.device) for name in ("last_hidden_state", "top_ids", "top_logits"))
    if last.shape[-1] != head.output.shape[-1]:
        raise UserError(
            f"store '{where}': hidden states of {last.shape[-1]} numbers, but the target's head reads "
            f"{head.output.shape[-1]}; use the target that made this data"
        )
    ours = head.logits(last).float().gather(-1, ids)
    gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    if not gap < (1e-3 if last.dtype == torch.float32 else 0.05):
        raise UserError(
            f"store '{where}': the output head gives other logits than the target did on the probe (relative gap "
            f"{gap:.1e}), so head or norm are not that target's; capture again with the target at hand"
        )
