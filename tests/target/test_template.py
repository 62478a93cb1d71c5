"""What a chat template does to a conversation: words survive, calls are rendered or refused, answers end with an end token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from drafttrain.core.errors import UserError
from drafttrain.data.prompts import JsonlPrompts, read_prompts, tokenize
from drafttrain.target.template import answer_end, check_answer_end, plain_ids, render

TURNS = (
    "{% for m in messages %}<start>{{ m['role'] }} {{ m['content'] }}<end> {% endfor %}"
    "{% if add_generation_prompt %}<start>assistant {% endif %}"
)
PARTS = TURNS.replace("{{ m['content'] }}", "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}")
CALLS = TURNS.replace(
    "{{ m['content'] }}", "{{ m['content'] or '' }}{% for c in m.tool_calls or [] %} call {{ c.function.name }}{% endfor %}"
)
WITH_TOOLS = "{% for t in tools or [] %}tool {{ t.function.name }} {% endfor %}" + CALLS
DEAF = TURNS.replace("{{ m['content'] }}", "")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def words(template: str | None) -> PreTrainedTokenizerFast:
    known = ["<none>", "<start>", "<end>", "user", "assistant", "tool", "call", "weather", "hello", "there", "Zebra", "40317", "Hello"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<none>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<none>", additional_special_tokens=["<start>", "<end>"])
    tokenizer.chat_template = template
    return tokenizer


def conversation(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "", **fields}, {"role": "user", "content": "there"}]


def test_a_template_that_reads_parts_gets_parts_and_the_words_survive() -> None:
    ids = tokenize(words(PARTS), "hello there", "prompt")
    assert ids == tokenize(words(TURNS), "hello there", "prompt")


def test_a_template_that_drops_the_users_words_is_refused() -> None:
    with pytest.raises(UserError, match="does not write the user's words"):
        tokenize(words(DEAF), "hello there", "line 3")


def test_tool_calls_and_tools_are_rendered_as_the_template_does() -> None:
    text = render(words(WITH_TOOLS), conversation(tool_calls=[CALL]), "prompt", [CALL])
    assert text == words(WITH_TOOLS).apply_chat_template(
        conversation(tool_calls=[CALL]), tools=[CALL], add_generation_prompt=True, tokenize=False
    )
    assert "tool weather" in text and "call weather" in text


@pytest.mark.parametrize(("template", "tools", "named"), [(TURNS, None, "tool_calls"), (CALLS, [CALL], "tools")])
def test_tool_calls_and_tools_that_the_template_drops_are_refused(template: str, tools: list[Any] | None, named: str) -> None:
    with pytest.raises(UserError, match=f"line 3: .*leaves out `{named}`"):
        render(words(template), conversation(tool_calls=[CALL]), "line 3", tools)


def test_a_line_of_data_hands_its_tools_calls_and_other_fields_to_the_template(tmp_path: Path) -> None:
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps({"messages": conversation(content=None, tool_calls=[CALL]), "tools": [CALL]}) + "\n")
    tokenizer = words(WITH_TOOLS)
    (prompt,) = read_prompts(JsonlPrompts(path=str(path)), tokenizer)
    assert "call weather" in tokenizer.decode(prompt.tokens)
    with pytest.raises(UserError, match=r"line 1: .*leaves out `tool_calls`"):
        read_prompts(JsonlPrompts(path=str(path)), words(TURNS))


def test_answers_that_end_with_no_end_token_are_refused_and_the_token_named() -> None:
    tokenizer = words(TURNS)
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert answer_end(tokenizer) == end
    check_answer_end(tokenizer, (end,), "toy")
    with pytest.raises(UserError, match=rf"'<end>' \({end}\).*extra_end_ids=\[{end}\]"):
        check_answer_end(tokenizer, (0,), "toy")


@pytest.mark.parametrize("template", [None, TURNS.replace("<end>", ""), "{{ raise_exception('no answers') }}"])
def test_a_template_without_a_token_behind_answers_is_no_complaint(template: str | None) -> None:
    check_answer_end(words(template), (0,), "toy")


def test_an_end_token_that_a_tokenizer_appends_is_not_part_of_a_prompt() -> None:
    tokenizer = words(None)
    tokenizer.eos_token = "<end>"
    end = tokenizer.eos_token_id
    bare = tokenizer("hello there")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", end)])
    assert tokenizer("hello there")["input_ids"] == [*bare, end]
    assert plain_ids(tokenizer, "hello there") == bare
    assert plain_ids(tokenizer, "hello <end>")[-1] == end  # the user's own
