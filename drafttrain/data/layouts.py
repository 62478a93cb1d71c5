"""How people lay prompts out, a row: messages, ShareGPT, Alpaca, OpenAI's and TRL's files, columns of text. The table of docs/recipe.md.

Every layout comes out as the same: messages up to the last user turn, and the tools that the conversation may call.
"""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass
from typing import Any

from drafttrain.core.errors import UserError, nearest, refuse_halves

Messages = list[dict[str, Any]]

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    **{role: role for role in ("system", "developer", "function", "ipython")},
}
"""Names of roles in files -> the template's. Others are refused: most templates write them as nothing, or as another's words."""

COLUMNS = ("messages", "conversations", "conversation", "prompt", "instruction", "question", "query", "text", "input", "chosen")
"""Where a row may hold its prompt. The first that is not null counts."""

SYSTEM = ("system", "system_prompt")
"""Columns with the system turn's text."""


class UnfitRowError(UserError):
    """A row that cannot be a prompt. reason: in the words that rows of a kind are counted under."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Asked:
    """What a row asks."""

    prompt: str | Messages  # text that stands alone needs no chat template
    tools: list[Any] | None = None
    domain: str = ""


def asked(record: dict[str, Any], where: str, column: str | None = None) -> Asked:
    """A row's prompt. column: where it is; by default the first of `COLUMNS`. where: the row, which opens the `UserError`."""
    refuse_halves(record, where)
    name = column or next((name for name in COLUMNS if record.get(name) is not None), None)
    if isinstance(record.get(name or ""), str) and not record[name or ""].strip():
        raise UnfitRowError(f"{where}: the prompt is empty; give it some text, or remove it", "an empty prompt")
    if name is None:
        known = ", ".join(f"`{known}`" for known in COLUMNS)
        shown = "all null" if any(name in record for name in COLUMNS) else "not"
        columns = sorted(map(str, record))
        raise UnfitRowError(f"{where}: {known} are {shown} in {columns}; give one, text or a list of messages", "no prompt")
    value = parsed(record.get(name), where, name)
    if isinstance(value, dict):  # OpenAI's preference files: {"input": {"messages": ..., "tools": ...}}
        return asked({**record, name: None, **value}, where)
    if isinstance(value, list):
        turns = [_turn(message, where) for message in value]
    elif isinstance(value, str):
        words = _with_input(value, record) if name == "instruction" else value
        turns = [*_history(record, where), {"role": "user", "content": words}]
    else:
        raise UnfitRowError(f"{where}: `{name}` is {reprlib.repr(value)}; expected text or a list of messages", "no prompt")
    system = next((record[key] for key in SYSTEM if isinstance(record.get(key), str) and record[key].strip()), None)
    if system is not None and not any(turn["role"] in ("system", "developer") for turn in turns):
        turns = [{"role": "system", "content": system}, *turns]
    messages, tools, domain = _up_to_the_last_question(turns, where), _tools(record, where), record.get("domain")
    alone = isinstance(value, str) and len(messages) == 1
    return Asked(str(messages[0]["content"]) if alone else messages, tools, "" if domain is None else str(domain))


def parsed(value: Any, where: str, name: str) -> Any:
    """The value; messages that a table keeps as JSON text are read. Raises `UserError` for text that only looks like messages."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text.startswith(("[{", "{")) and name not in ("messages", "conversations"):
        return value
    try:
        inner = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if _looks_like_messages(text) or name in ("messages", "conversations"):
            said = f"{where}: `{name}` is text that is no JSON ({error}); give a list of messages"
            raise UnfitRowError(said, "messages that are no JSON") from error
        return value
    if isinstance(inner, list) and inner and all(isinstance(one, dict) and ("role" in one or "from" in one) for one in inner):
        return inner
    if name in ("messages", "conversations"):
        raise UnfitRowError(f"{where}: `{name}` is {reprlib.repr(value)}; expected a list of messages", "no prompt")
    return value  # a prompt that is about JSON


def _looks_like_messages(text: str) -> bool:
    """Python's notation, as a table writes a list that nobody turned into JSON."""
    return text.startswith("[{") and any(f"{quote}{key}{quote}:" in text for quote in "'\"" for key in ("role", "from"))


def _turn(message: Any, where: str) -> dict[str, Any]:
    """A message with `role` and `content`; what else it holds goes to the template as it is."""
    if isinstance(message, dict) and isinstance(message.get("from"), str) and "value" in message:
        role, content = message["from"], message["value"]
    elif isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message:
        role, content = message["role"], message["content"]
    else:
        raise UnfitRowError(f"{where}: a message without `role` and `content`: {str(message)[:80]}", "a message without role and content")
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise UnfitRowError(f"{where}: unknown role '{role[:40]}'{nearest(role, ROLES)}; the roles are {known}", "an unknown role")
    others = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content") and value is not None}
    return {"role": ROLES[role], "content": content, **others}


def _history(record: dict[str, Any], where: str) -> Messages:
    """Earlier turns of an Alpaca row: pairs of what was asked and answered."""
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise UnfitRowError(f"{where}: `history` is {reprlib.repr(pairs)}; expected pairs of texts", "a history that is no pairs")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


def _with_input(instruction: str, record: dict[str, Any]) -> str:
    """Alpaca: what to do, and below it what to do it with."""
    given = record.get("input")
    return f"{instruction}\n{given}" if isinstance(given, str) and given.strip() else instruction


def _up_to_the_last_question(turns: Messages, where: str) -> Messages:
    last = max((at for at, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    kept = [{**turn, "content": _text(turn, where)} for turn in turns[: last + 1]]
    if not kept or not kept[-1]["content"].strip():
        raise UnfitRowError(f"{where}: no user turn with text; the target would have nothing to answer", "no user turn with text")
    return kept


def _tools(record: dict[str, Any], where: str) -> list[Any] | None:
    """What the conversation may call, as templates take it: a list, also as JSON text; also under OpenAI's former name."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UnfitRowError(f"{where}: `tools` is text that is not JSON ({error}); give a list", "tools that are no list") from error
    if tools and not isinstance(tools, list):
        raise UnfitRowError(f"{where}: `tools` is {reprlib.repr(tools)}; expected a list of functions", "tools that are no list")
    if not tools and isinstance(record.get("functions"), list):
        tools = [{"type": "function", "function": function} for function in record["functions"]]
    return tools or None


def _text(turn: dict[str, Any], where: str) -> str:
    """The words of a turn: its content, or the text parts of it, one below the other."""
    content = turn["content"]
    if content is None and turn.get("tool_calls"):
        return ""  # the turn says nothing but its calls, which the template renders
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            shown = reprlib.repr(part if isinstance(content, list) else content)
            raise UnfitRowError(
                f"{where}: the turn of '{turn['role']}' holds {shown}, not text (a tool call, an image?), which a prompt cannot; "
                "leave the turn out, or the conversation", "a turn that is not text"
            )  # fmt: skip
    return "\n".join(part["text"] for part in parts)
