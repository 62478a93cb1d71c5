"""Suites: prompts by task, from those that ship with the package, a public benchmark (`layouts.py`) or any JSONL file.

A line holds `id`, `task`, one of `prompt` (a user's message), `turns` (several, asked one after another) or `messages`
(a conversation whose last message is the user's), and optionally `answer` (one, or a list of accepted ones) to the last
turn, which a program can check, with `check` (how: `number`, `choice`, `option` with `options`, `word`, `code` with
`header`; by default `number` where the answer is one, else `word`). Other keys are let be.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from drafttrain.core.config import fingerprint
from drafttrain.core.errors import UserError, nearest, refuse_halves
from drafttrain.evaluation.check import KINDS, NUMBER, AnswerCheck
from drafttrain.evaluation.layouts import LAYOUTS, layout_lines

Message = dict[str, str]
PROMPTS = Path(__file__).parent / "prompts"
SUITES = {"builtin": PROMPTS / "builtin.jsonl", "checkable": PROMPTS / "checkable.jsonl"}
FORMS = ("prompt", "turns", "messages")
ALL = "all"
"""What result rows call all tasks together."""


@dataclass(frozen=True)
class Item:
    """One conversation to be held."""

    id: str
    task: str
    turns: tuple[str, ...]  # what the user says, turn by turn
    before: tuple[tuple[str, str], ...] = ()  # (role, content) of messages that stand before the first turn
    check: AnswerCheck | None = None  # of the answer to the last turn

    def opening(self) -> str | list[Message]:
        """The first prompt: a lone message as a string, so that targets without a chat template can read it too."""
        return self.turns[0] if not self.before else self.asked(0, [])

    def asked(self, turn: int, answers: Sequence[str]) -> list[Message]:
        """The conversation up to the question of `turn`, the target's own `answers` in between."""
        messages = [{"role": role, "content": content} for role, content in self.before]
        for question, answer in zip(self.turns[:turn], answers, strict=True):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": self.turns[turn]}]


@dataclass(frozen=True)
class Suite:
    """Items in the order in which they are run."""

    name: str
    items: tuple[Item, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """In order of first appearance."""
        return tuple(dict.fromkeys(item.task for item in self.items))

    @property
    def hash(self) -> str:
        """Of everything that is asked, in order, and how answers are checked: equal hashes, equal questions, equal marks."""
        marks = [[] if item.check is None else [asdict(item.check)] for item in self.items]
        return fingerprint([[item.id, item.task, item.turns, item.before, *mark] for item, mark in zip(self.items, marks, strict=True)])

    def select(self, tasks: Sequence[str] = (), limit: int | None = None, turns: int | None = None) -> Suite:
        """Only these tasks (none named: all), at most `limit` items of each and `turns` turns of every item."""
        for task in tasks:
            if task not in self.tasks:
                hint, known = nearest(task, self.tasks), ", ".join(self.tasks)
                raise UserError(f"suite '{self.name}' has no task '{task}'{hint}; its tasks: {known}")
        left = {task: len(self.items) if limit is None else limit for task in tasks or self.tasks}
        kept = []
        for item in self.items:
            if left.get(item.task, 0) > 0:
                left[item.task] -= 1
                check = item.check if turns is None or turns >= len(item.turns) else None  # it belongs to the last turn
                kept.append(replace(item, turns=item.turns[:turns], check=check))
        return replace(self, items=tuple(kept))


def load_suite(name: str) -> Suite:
    """A suite by name (`builtin`, `checkable`), a public benchmark (`gsm8k`, `gsm8k:PATH`; see `layouts.py`), or the path
    of a JSONL file.

    Raises `UserError` where it is none of them, or a line is broken: the message gives the line's number.
    """
    layout, given, source = name.partition(":")
    if layout in LAYOUTS:
        read = layout_lines(layout, source if given else None)
        title, items = layout, [item_of(line, where) for where, line in read]
    else:
        path = SUITES.get(name) or Path(name)
        if not path.is_file():
            known = [*SUITES, *LAYOUTS]
            near = nearest(layout if given else name, known)
            raise UserError(
                f"suite '{name}'{near}: no such file; give {', '.join(known)}, `LAYOUT:PATH` or the path of a JSONL file"
            )
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # JSON strings may hold what `splitlines` takes for a line's end
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"suite '{path}': cannot be read ({error}); give a JSONL file in UTF-8") from error
        title = name if name in SUITES else path.stem
        items = [read_item(line, f"suite '{name}', line {place}") for place, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise UserError(f"suite '{name}' is empty; every line holds an id, a task and a prompt")
    twice = _first_repeated(item.id for item in items)
    if twice is not None:
        raise UserError(f"suite '{name}': two items have the id '{twice}'; give every item its own")
    return Suite(title, tuple(items))


def read_item(line: str, where: str) -> Item:
    """One line of a suite; `where` opens the error messages."""
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}); write one object a line") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: a number is too long, or values are nested too deeply; write a plain object a line") from error
    refuse_halves(data, where)
    if not isinstance(data, dict):
        raise UserError(f"{where}: an object is needed, got {line[:60]!r}")
    return item_of(data, where)


def item_of(data: dict[str, Any], where: str) -> Item:
    """An item from a line's object."""
    if "id" not in data or "task" not in data:
        needed = f"an object with 'id', 'task' and one of {', '.join(FORMS)} is needed"
        raise UserError(f"{where}: {needed}, got {json.dumps(data)[:60]}")
    if str(data["task"]).strip() in ("", ALL):
        raise UserError(f"{where}: 'task' {data['task']!r} cannot be one task's name ('{ALL}' means all of them together); give another")
    given = [form for form in FORMS if form in data]
    if len(given) != 1:
        raise UserError(f"{where}: exactly one of {', '.join(FORMS)} is needed, got {given or 'none'}")
    before, turns = _conversation(data, given[0], where)
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UserError(f"{where}: '{given[0]}' holds an empty prompt; every turn is a text")
    return Item(str(data["id"]), str(data["task"]), tuple(turns), before, _check(data, where))


def _check(data: dict[str, Any], where: str) -> AnswerCheck | None:
    """How the answer is judged; None without one."""
    given = data.get("answer")
    if given is None:
        return None
    answers = tuple(str(answer) for answer in (given if isinstance(given, list) else [given]))
    if not answers or not all(answer.strip() for answer in answers):
        raise UserError(f"{where}: 'answer' is empty; give an answer, or leave the key out")
    kind = data.get("check", "number" if all(NUMBER.fullmatch(answer.strip()) for answer in answers) else "word")
    if kind not in KINDS:
        raise UserError(f"{where}: 'check' {kind!r}{nearest(str(kind), KINDS)} is not one of {', '.join(KINDS)}")
    listed = data.get("options")
    if not isinstance(listed, (list, tuple, type(None))):
        raise UserError(f"{where}: 'options' is a list of words, got {type(listed).__name__}")
    options = tuple(str(option) for option in listed or ())
    if kind == "option" and not set(answers) <= set(options):
        raise UserError(f"{where}: 'options' lists the words to choose from, the answer among them; got {list(options)}")
    return AnswerCheck(kind, answers, options, str(data.get("header") or ""))


def _conversation(data: dict[str, Any], form: str, where: str) -> tuple[tuple[tuple[str, str], ...], list[Any]]:
    """What stands before the first turn, and the turns."""
    value = data[form]
    if form == "prompt":
        return (), [value]
    if not isinstance(value, list):
        raise UserError(f"{where}: '{form}' is a list, got {type(value).__name__}")
    if form == "turns":
        return (), value
    if not all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in value):
        raise UserError(f"{where}: every message has 'role' and 'content'")
    if not value or value[-1]["role"] != "user":
        raise UserError(f"{where}: the last message must be the user's; the target writes what follows it")
    if not all(isinstance(message["role"], str) and isinstance(message["content"], str) for message in value):
        raise UserError(f"{where}: 'role' and 'content' of every message are texts")
    return tuple((message["role"], message["content"]) for message in value[:-1]), [value[-1]["content"]]


def _first_repeated(ids: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            return id
        seen.add(id)
    return None
