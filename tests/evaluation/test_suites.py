"""Suites: what a line may hold, what is selected, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drafttrain.core.errors import UserError
from drafttrain.evaluation.check import AnswerCheck
from drafttrain.evaluation.suites import Item, Suite, load_suite, read_item

BUILTIN = load_suite("builtin")


def test_the_builtin_suite_has_ten_different_prompts_of_each_of_six_tasks() -> None:
    count = {task: sum(item.task == task for item in BUILTIN.items) for task in BUILTIN.tasks}
    assert count == dict.fromkeys(("chat", "code", "math", "qa", "summarization", "translation"), 10)
    assert len({item.turns for item in BUILTIN.items}) == 60


def test_every_builtin_question_of_math_and_qa_can_be_checked() -> None:
    assert {item.task for item in BUILTIN.items if item.check is not None} == {"math", "qa"}
    assert {item.task for item in BUILTIN.items if item.check and item.check.kind == "number"} == {"math"}


def test_builtin_passages_to_summarize_have_80_to_150_words() -> None:
    passages = [item.turns[0].split("\n\n", 1)[1] for item in BUILTIN.items if item.task == "summarization"]
    assert all(80 <= len(passage.split()) <= 150 for passage in passages)


def test_a_spec_bench_line_gives_its_turns_and_its_other_keys_are_let_be() -> None:
    line = {"id": 84, "task": "mt_bench", "category": "writing", "turns": ["Write.", "Now again."]}
    assert read_item(json.dumps(line), "here") == Item("84", "mt_bench", ("Write.", "Now again."))


def test_messages_before_the_last_one_stand_before_the_first_turn() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    item = read_item(json.dumps({"id": "x", "task": "chat", "messages": messages}), "here")
    assert item.turns == ("Hello?",)
    assert item.opening() == messages


def test_a_later_turn_is_asked_behind_the_answers_given_so_far() -> None:
    roles = [(message["role"], message["content"]) for message in Item("x", "chat", ("One?", "Two?")).asked(1, ["1."])]
    assert roles == [("user", "One?"), ("assistant", "1."), ("user", "Two?")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: not JSON"),
        ('{"id": 1, "prompt": "Hi"}', "line 2: an object with 'id', 'task'"),
        ('["id", "task"]', "line 2: an object is needed"),
        ('{"id": 1, "task": "t"}', "line 2: exactly one of prompt, turns, messages is needed, got none"),
        ('{"id": 1, "task": "t", "prompt": "a", "turns": ["b"]}', "exactly one of"),
        ('{"id": 1, "task": "t", "prompt": "  "}', "'prompt' holds an empty prompt"),
        ('{"id": 1, "task": "t", "turns": []}', "'turns' holds an empty prompt"),
        ('{"id": 1, "task": "t", "turns": "a"}', "'turns' is a list, got str"),
        ('{"id": 1, "task": "t", "messages": [{"role": "assistant", "content": "a"}]}', "must be the user's"),
        ('{"id": 1, "task": "t", "messages": ["a"]}', "has 'role' and 'content'"),
        ('{"id": 1, "task": "t", "prompt": "a", "answer": "b", "check": "words"}', "'check' 'words' .did you mean 'word'"),
        ('{"id": 1, "task": "t", "prompt": "a", "answer": []}', "'answer' is empty"),
        ('{"id": 1, "task": "t", "prompt": "a", "answer": "b", "check": "option"}', "'options' lists the words"),
        ('{"id": "a", "task": "t", "prompt": "b"}', "two items have the id 'a'"),
        ('{"id": 1, "task": "all", "prompt": "a"}', "'task' 'all' cannot be one task's name"),
        ('{"id": 1, "task": " ", "prompt": "a"}', "'task' ' ' cannot be one task's name"),
    ],
)
def test_a_broken_line_is_refused_by_its_number_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": "a", "task": "t", "prompt": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match=reason):
        load_suite(str(path))


@pytest.mark.parametrize(("content", "reason"), [(None, "no such file"), ("\n", "is empty")])
def test_a_missing_or_empty_file_is_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "mine.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=reason):
        load_suite(str(path))


@pytest.mark.parametrize("name", ["{}", "gsm8k:{}"])
def test_a_line_may_hold_every_character_that_json_strings_may(tmp_path: Path, name: str) -> None:
    questions = [f"one{separator}two" for separator in ("\u2028", "\u2029", "\x85")]
    common = {"task": "t", "answer": "#### 1"}
    key = "question" if name.startswith("gsm8k") else "prompt"
    lines = [json.dumps({"id": str(at), **common, key: question}, ensure_ascii=False) for at, question in enumerate(questions)]
    path = tmp_path / "mine.jsonl"
    path.write_bytes("\r\n".join(lines).encode())
    assert all(question in item.turns[0] for item, question in zip(load_suite(name.format(path)).items, questions, strict=True))


def test_a_misspelt_suite_or_task_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean 'builtin'"):
        load_suite("buildin")
    with pytest.raises(UserError, match="did you mean 'translation'"):
        BUILTIN.select(tasks=("translations",))


def test_a_selection_keeps_the_first_items_of_each_task_and_the_first_turns() -> None:
    items = [Item(str(place), "ab"[place % 2], ("one", "two")) for place in range(6)]
    chosen = Suite("mine", tuple(items)).select(limit=2, turns=1)
    assert [(item.id, item.turns) for item in chosen.items] == [(id, ("one",)) for id in "0123"]
    assert [item.id for item in Suite("mine", tuple(items)).select(tasks=("b",)).items] == ["1", "3", "5"]


def test_an_answer_belongs_to_the_last_turn_and_goes_where_that_is_not_asked() -> None:
    suite = Suite("mine", (Item("a", "t", ("one", "two"), check=AnswerCheck("word", ("yes",))),))
    assert suite.select(turns=1).items[0].check is None
    assert suite.select(turns=2).items[0].check == suite.select().items[0].check == suite.items[0].check


def test_how_an_answer_is_checked_follows_from_the_answer_unless_it_is_said() -> None:
    def read(**more: Any) -> AnswerCheck | None:
        return read_item(json.dumps({"id": "x", "task": "t", "prompt": "p", **more}), "here").check

    assert read() is None
    assert read(answer="1,200") == AnswerCheck("number", ("1,200",))
    assert read(answer=26) == AnswerCheck("number", ("26",))
    assert read(answer="carbon dioxide") == AnswerCheck("word", ("carbon dioxide",))
    assert read(answer="32", check="word") == AnswerCheck("word", ("32",))
    assert read(answer=["Leonardo", "da Vinci"]) == AnswerCheck("word", ("Leonardo", "da Vinci"))
    assert read(answer="yes", check="option", options=["yes", "no"]) == AnswerCheck("option", ("yes",), ("yes", "no"))


@pytest.mark.parametrize(
    "change", [{"turns": ("other",)}, {"task": "other"}, {"before": (("system", "other"),)}, {"check": AnswerCheck("word", ("other",))}]
)
def test_suites_that_ask_something_else_or_accept_other_answers_have_another_hash(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"id": "a", "task": "t", "turns": ("one",), "check": AnswerCheck("word", ("one",))}
    assert Suite("x", (Item(**fields),)).hash == Suite("y", (Item(**fields),)).hash
    assert Suite("x", (Item(**fields),)).hash != Suite("x", (Item(**{**fields, **change}),)).hash
