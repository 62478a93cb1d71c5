"""Where prompts come from: a JSONL file, a data set, or the target itself (`turns.py`); and how they are tokenized."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from drafttrain.core.config import Config
from drafttrain.core.errors import UserError, nearest

DOMAINS = ("chat", "code", "math", "qa", "translation", "summarization", "rag")

Messages = list[dict[str, Any]]


class JsonlPrompts(Config):
    """A file of one JSON object a line, with `prompt` (text) or `messages`, and optionally `domain`.

    What follows the last user turn of `messages` is dropped, what stands before it is context.
    """

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """The file."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts to take at most."""


class DatasetPrompts(Config):
    """A data set by its Hub name or local folder."""

    kind: Literal["dataset"] = "dataset"
    name: str
    """What `datasets.load_dataset` takes."""
    subset: str | None = None
    """The data set's configuration, where it has several."""
    split: str = "train"
    """Which split."""
    column: str = "messages"
    """Column with the prompt: text, or a list of messages with `role` and `content` (also `from` and `value`)."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts to take at most."""


class SelfPrompts(Config):
    """The target writes the user turns. Turns that it doesn't end, empty ones and repetitions are dropped."""

    kind: Literal["self"] = "self"
    count: int = Field(default=512, ge=1)
    """Turns to write; some will be dropped."""
    domains: tuple[str, ...] = DOMAINS
    """Domains to go through in turn, each with its openings."""
    openings: str | None = None
    """A JSONL file with `domain` and `opening` (may be empty) a line, in place of those that come with the package."""
    temperature: float = Field(default=0.9, gt=0, allow_inf_nan=False)
    """At which the turns are drawn."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus from which they are drawn."""
    max_tokens: int = Field(default=160, ge=1)
    """Longest turn."""


Source = Annotated[JsonlPrompts | DatasetPrompts | SelfPrompts, Field(discriminator="kind")]


@dataclass
class Prompt:
    """A rendered and tokenized prompt."""

    tokens: list[int]
    domain: str = ""


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, where: str) -> list[int]:
    """A prompt's ids: messages through the chat template, text as a user turn (or plainly, where there is no template).

    Special tokens come from the template alone: adding the tokenizer's would double the first (pitfall P6).
    """
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise UserError(f"{where}: the prompt is empty; give it some text, or remove it")
    if not tokenizer.chat_template:
        if isinstance(prompt, str):
            return list(tokenizer(prompt)["input_ids"])
        raise UserError(f"{where}: `messages` need a chat template, which this target lacks; give `prompt` texts")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def read_prompts(source: JsonlPrompts | DatasetPrompts, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """All prompts of a file or data set. Raises `UserError` naming the line or row that cannot be used."""
    records = jsonl_records(Path(source.path)) if isinstance(source, JsonlPrompts) else dataset_records(source)
    out: list[Prompt] = []
    for where, record in records:
        if source.limit is not None and len(out) == source.limit:
            break
        out.append(Prompt(tokenize(tokenizer, _content(record, where), where), str(record.get("domain", ""))))
    if not out:
        raise UserError(f"prompt source '{source.kind}' holds no prompts; give at least one")
    return out


def jsonl_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file, line n`, object) for each line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON strings may hold what `splitlines` takes for a line's end
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts '{path}': cannot be read ({error}); give a JSONL file in UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"prompts '{path}', line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error}); expected one object a line") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: a {type(record).__name__}; expected an object with `prompt` or `messages`")
        yield where, record


def dataset_records(source: DatasetPrompts) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`data set, row n`, {prompt or messages}) for each row; rows that hold no text are passed over."""
    from datasets import load_dataset

    try:
        rows = load_dataset(source.name, source.subset, split=source.split)
    except Exception as error:  # the library raises errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"data set '{source.name}': cannot be loaded ({reason}); check its name and split") from error
    if source.column not in rows.column_names:
        hint = nearest(source.column, rows.column_names)
        names = ", ".join(rows.column_names)
        raise UserError(f"data set '{source.name}': no column '{source.column}'{hint}; it has {names}")
    for number, value in enumerate(rows[source.column]):
        if value:
            yield f"data set '{source.name}', row {number}", {"prompt" if isinstance(value, str) else "messages": value}


def _content(record: dict[str, Any], where: str) -> str | Messages:
    if isinstance(record.get("prompt"), str):
        return str(record["prompt"])
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise UserError(f"{where}: neither `prompt` (text) nor `messages` (a list) in {sorted(record)}; give one")
    turns = [_turn(message, where) for message in messages]
    last = max((at for at, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    if last < 0 or not str(turns[last]["content"]).strip():
        raise UserError(f"{where}: no user turn with text in `messages`; the target would have nothing to answer")
    return turns[: last + 1]


def _turn(message: Any, where: str) -> dict[str, Any]:
    names = {"human": "user", "gpt": "assistant"}
    if isinstance(message, dict) and "from" in message and "value" in message:
        return {"role": names.get(message["from"], message["from"]), "content": message["value"]}
    if isinstance(message, dict) and "role" in message and "content" in message:
        return {"role": message["role"], "content": message["content"]}
    raise UserError(f"{where}: a message without `role` and `content`: {str(message)[:80]}")
