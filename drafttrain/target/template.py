"""The target's chat template: a program that came with the tokenizer, and may refuse what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from drafttrain.core.errors import UserError


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], where: str) -> str:
    """The conversation as the template writes it, up to where the answer begins.

    messages: each with `role` and `content`. where: what they are, which opens the `UserError` that gives the template's own sentence where
    it refuses them.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template may raise anything
        roles = ", ".join(str(message.get("role")) for message in messages if isinstance(message, dict))
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: the target's chat template refuses turns of {roles} ({reason}); change or remove them") from error
