"""Where prompts come from: a JSONL file, a data set, or the target itself (`turns.py`); and how they are tokenized."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from drafttrain.core.config import Config
from drafttrain.core.console import SafeConsole
from drafttrain.core.errors import UserError, first_line, nearest
from drafttrain.target.template import plain_ids, render

if TYPE_CHECKING:
    from datasets import Dataset

DOMAINS = ("chat", "code", "math", "qa", "translation", "summarization", "rag")

Messages = list[dict[str, Any]]


class JsonlPrompts(Config):
    """A file of one JSON object a line, with `prompt` (text) or `messages`, and optionally `domain`.

    What follows the last user turn of `messages` is dropped, what stands before it is context. Parts of type `text` are joined; a line with
    anything but text before its end (a tool call, an image) is refused, as is every line that cannot be used.
    """

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """The file."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts to take at most."""


class DatasetPrompts(Config):
    """A data set by its Hub name or local folder. Rows that cannot be prompts are left out and counted."""

    kind: Literal["dataset"] = "dataset"
    name: str
    """What `datasets.load_dataset` takes, or a folder that its `save_to_disk` wrote."""
    subset: str | None = None
    """The data set's configuration, where it has several."""
    split: str = "train"
    """Which split. A saved folder may hold a single one, which is then taken."""
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
class DataPrompt:
    """A rendered and tokenized prompt."""

    tokens: list[int]
    domain: str = ""


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, where: str, tools: list[Any] | None = None
) -> list[int]:
    """A prompt's ids: messages through the chat template, text as a user turn (or plainly, where there is no template).

    Special tokens come from the template alone: adding the tokenizer's would double the first (pitfall P6).
    """
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise UserError(f"{where}: the prompt is empty; give it some text, or remove it")
    if not tokenizer.chat_template:
        if isinstance(prompt, str):
            return plain_ids(tokenizer, prompt)
        raise UserError(f"{where}: `messages` need a chat template, which this target lacks; give `prompt` texts")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return list(tokenizer(render(tokenizer, messages, where, tools), add_special_tokens=False)["input_ids"])


def read_prompts(source: JsonlPrompts | DatasetPrompts, tokenizer: PreTrainedTokenizerBase) -> list[DataPrompt]:
    """All prompts of a file or data set.

    Raises `UserError` for a line of a file that cannot be used. Such rows of a data set, which others wrote, are left out; a line on stderr
    says how many, and why the first. Raises too where no prompt is left.
    """
    records = jsonl_records(Path(source.path)) if isinstance(source, JsonlPrompts) else dataset_records(source)
    out: list[DataPrompt] = []
    unfit: list[str] = []
    for where, record in records:
        if source.limit is not None and len(out) == source.limit:
            break
        try:
            tokens = tokenize(tokenizer, _content(record, where), where, _tools(record, where))
            out.append(DataPrompt(tokens, str(record.get("domain", ""))))
        except UserError as error:
            if isinstance(source, JsonlPrompts):
                raise
            unfit.append(str(error))
    if not out:
        found = f"no prompts ({len(unfit):,} rows cannot be used, the first: {unfit[0]})" if unfit else "no prompts"
        raise UserError(f"prompt source '{source.kind}' holds {found}; give at least one")
    if unfit:
        said = f"{len(unfit):,} of {len(out) + len(unfit):,} rows left out, the first: {unfit[0]}"
        SafeConsole(stderr=True).print(said, soft_wrap=True)
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
    """(`data set, row n`, {prompt or messages}) for each row."""
    rows = dataset_rows(source)
    if source.column not in rows.column_names:
        hint = nearest(source.column, rows.column_names)
        names = ", ".join(rows.column_names)
        raise UserError(f"data set '{source.name}': no column '{source.column}'{hint}; it has {names}")
    for number, value in enumerate(rows[source.column]):
        yield f"data set '{source.name}', row {number}", {"messages": value} if isinstance(value, list) else {"prompt": value or ""}


def dataset_rows(source: DatasetPrompts) -> Dataset:
    """One split of a data set, or a `UserError`."""
    from datasets import load_dataset, load_from_disk

    saved = any((Path(source.name) / file).is_file() for file in ("state.json", "dataset_dict.json"))  # by `save_to_disk`
    if saved and source.subset is not None:
        raise UserError(f"data set '{source.name}' was saved by `save_to_disk`, which knows no subsets; leave `subset` out")
    try:
        rows = load_from_disk(source.name) if saved else load_dataset(source.name, source.subset, split=source.split)
    except Exception as error:  # the library raises errors of many kinds
        raise UserError(f"data set '{source.name}': cannot be loaded ({first_line(error)}); check its name and split") from error
    if not saved or (not isinstance(rows, dict) and source.split == "train"):  # a lone split is what the default means
        return rows
    splits = dict(rows) if isinstance(rows, dict) else {str(rows.split or "train"): rows}
    if source.split not in splits:
        hint, known = nearest(source.split, splits), ", ".join(splits)
        raise UserError(f"data set '{source.name}': no split '{source.split}'{hint}; it has {known} (`limit` takes the first rows)")
    return splits[source.split]


def _content(record: dict[str, Any], where: str) -> str | Messages:
    if isinstance(record.get("prompt"), str):
        return str(record["prompt"])
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise UserError(f"{where}: neither `prompt` (text) nor `messages` (a list) in {sorted(record)}; give one")
    turns = [_turn(message, where) for message in messages]
    last = max((at for at, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    asked = [{**turn, "content": _text(turn, where)} for turn in turns[: last + 1]]
    if not asked or not asked[-1]["content"].strip():
        raise UserError(f"{where}: no user turn with text in `messages`; the target would have nothing to answer")
    return asked


def _tools(record: dict[str, Any], where: str) -> list[Any] | None:
    """What the conversation may call, as templates take it: a list, also as JSON text."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: `tools` is text that is not JSON ({error}); give a list") from error
    if tools and not isinstance(tools, list):
        raise UserError(f"{where}: `tools` is {reprlib.repr(tools)}; expected a list of functions")
    return tools or None


def _turn(message: Any, where: str) -> dict[str, Any]:
    """A message with `role` and `content`; what else it holds goes to the template as it is."""
    names = {"human": "user", "gpt": "assistant"}
    if isinstance(message, dict) and isinstance(message.get("from"), str) and "value" in message:
        others = {key: value for key, value in message.items() if key not in ("from", "value")}
        return {**others, "role": names.get(message["from"], message["from"]), "content": message["value"]}
    if isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message:
        return {key: value for key, value in message.items() if value is not None or key == "content"}
    raise UserError(f"{where}: a message without `role` and `content`: {str(message)[:80]}")


def _text(turn: dict[str, Any], where: str) -> str:
    """The words of a turn: its content, or the text parts of it, one below the other."""
    content = turn["content"]
    if content is None and turn.get("tool_calls"):
        return ""  # the turn says nothing but its calls, which the template renders
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            shown = reprlib.repr(part if isinstance(content, list) else content)
            raise UserError(
                f"{where}: the turn of '{turn['role']}' holds {shown}, not text (a tool call, an image?), which a prompt cannot; "
                "leave the turn out, or the conversation"
            )
    return "\n".join(part["text"] for part in parts)
