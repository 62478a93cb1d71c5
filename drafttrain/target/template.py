"""The target's chat template: a program that came with the tokenizer, and may refuse what it is given, drop it, or write other words.

What it does to a conversation is checked here, for data and decoding alike: the user's words stand in the prompt, tool calls are rendered,
and the token that ends an answer is one that ends a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from drafttrain.core.errors import UserError

MARK = "Zebra 40317"
"""Words that no template writes by itself."""

SPOKEN = ("tool_calls", "tools")
"""Fields beyond the content that hold what was said: a template that drops them leaves a hole in the conversation."""


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], where: str, tools: Sequence[Any] | None = None) -> str:
    """The conversation as the template writes it, up to where the answer begins.

    messages: each with `role` and `content`, and whatever else the template reads. tools: what the template takes under that name. where:
    what they are, which opens the `UserError` that says what the template refuses or drops. Content goes in as text; where the template
    reads parts only, as one part of type `text`.
    """
    _refuse_images(messages, where)
    text = _applied(tokenizer, messages, where, tools)
    if not _holds_words(text, messages):
        in_parts = [_with_parts(message) for message in messages]
        text = _applied(tokenizer, in_parts, where, tools)
        if not _holds_words(text, messages):
            raise UserError(f"{where}: the target's chat template does not write the user's words into the prompt; it cannot be used here")
    _refuse_dropped(tokenizer, messages, where, tools, text)
    return text


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text for a target without a chat template: with the tokenizer's own first token, without an end token behind the text, which
    some tokenizers append and after which nothing would be left to write."""
    ids = list(tokenizer(text)["input_ids"])
    end = tokenizer.eos_token_id
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids and ids[-1] == end and (not bare or bare[-1] != end):
        ids.pop()
    return ids


def answer_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the template puts behind an answer; None where there is none, or the template writes no answers."""
    if not tokenizer.chat_template:
        return None
    conversation = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": MARK}]
    try:
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False))
    except Exception:  # a template may raise anything, and need not know answers
        return None
    behind = text.partition(MARK)[2]
    first = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"][:1] if behind.strip() else []
    special = special_tokens(tokenizer)
    return first[0] if first and first[0] in special.values() else None


def check_answer_end(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], name: str) -> None:
    """A `UserError` where answers end with a token that is no end id: they would run on behind it, and be trained on."""
    end = answer_end(tokenizer)
    if end is not None and end not in eos_ids:
        raise UserError(
            f"target '{name}': its chat template ends answers with {tokenizer.convert_ids_to_tokens(end)!r} ({end}), which is none of its "
            f"end tokens ({', '.join(map(str, eos_ids)) or 'it has none'}): answers would run on behind it. Add it to eos_token_id in "
            f"generation_config.json, or set target.extra_end_ids=[{end}]"
        )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text -> id of the tokens that a decoded text leaves out."""
    added = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def _applied(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], where: str, tools: Sequence[Any] | None) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools or None, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template may raise anything
        roles = ", ".join(str(message.get("role")) for message in messages if isinstance(message, dict))
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: the target's chat template refuses turns of {roles} ({reason}); change or remove them") from error


def _holds_words(text: str, messages: Sequence[Any]) -> bool:
    """Whether what users said stands in the text."""
    for message in messages:
        content = message.get("content") if isinstance(message, dict) and message.get("role") == "user" else None
        if isinstance(content, str) and content.strip() not in text:
            return False
    return True


def _refuse_images(messages: Sequence[Any], where: str) -> None:
    """A `UserError` for a part of a message that is no text: of a vision-language model the text model alone is served."""
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise UserError(f"{where}: a message holds a part of type {kind!r}; only text is served: give parts of type 'text'")


def _with_parts(message: Any) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _refuse_dropped(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], where: str, tools: Sequence[Any] | None, text: str
) -> None:
    """A `UserError` where the template wrote the same without what a field says."""
    for field in SPOKEN:
        given = bool(tools) if field == "tools" else any(isinstance(message, dict) and message.get(field) for message in messages)
        if not given:
            continue
        without = [{key: value for key, value in message.items() if key != field} for message in messages]
        if _applied(tokenizer, without, where, None if field == "tools" else tools) == text:
            raise UserError(f"{where}: the target's chat template leaves out `{field}`; remove them, or the conversation")
