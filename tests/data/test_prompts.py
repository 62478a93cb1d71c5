"""Prompt sources, the template around them, and turns the target writes itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Split

from drafttrain.core.config import parse
from drafttrain.core.errors import UserError
from drafttrain.data.prompts import DOMAINS, DatasetPrompts, JsonlPrompts, SelfPrompts, read_prompts, tokenize
from drafttrain.data.regenerate import DataConfig
from drafttrain.data.turns import Turn, frame, kept_prompts, openings, turn_ends, turn_jobs
from drafttrain.target.adapter import Target
from tests.data.stores import make_tokenizer

TOKENIZER = make_tokenizer()
ASKED = {"role": "user", "content": "w1"}
USER = "<s> <user> {} <end> <assistant>"


def jsonl(folder: Path, *records: object) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return str(path)


def text(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens)


def test_prompts_and_messages_are_rendered_by_the_template_with_one_first_token(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}]
    path = jsonl(tmp_path, {"prompt": "w7 w8", "domain": "d"}, "", {"messages": chat})
    first, second = read_prompts(JsonlPrompts(path=path), TOKENIZER)
    assert text(first.tokens) == USER.format("w7 w8")
    assert first.domain == "d"
    assert text(second.tokens) == "<s> <system> w1 <end> <user> w2 w3 <end> <assistant>"
    assert first.tokens.count(TOKENIZER.bos_token_id) == 1


def test_turns_before_the_last_user_turn_are_context_and_later_ones_are_dropped(tmp_path: Path) -> None:
    turns = ["user", "assistant", "user", "assistant"]
    chat = [{"role": role, "content": f"w{at}"} for at, role in enumerate(turns)]
    [prompt] = read_prompts(JsonlPrompts(path=jsonl(tmp_path, {"messages": chat})), TOKENIZER)
    assert text(prompt.tokens) == "<s> <user> w0 <end> <assistant> w1 <end> <user> w2 <end> <assistant>"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_may_hold_every_character_that_json_strings_may(tmp_path: Path, end: str) -> None:
    path = tmp_path / "prompts.jsonl"
    words = [f"w1{separator}w2" for separator in ("\u2028", "\u2029", "\x85")]
    path.write_bytes(end.join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in [*words, "w3"]).encode())
    prompts = read_prompts(JsonlPrompts(path=str(path)), TOKENIZER)
    assert [text(prompt.tokens) for prompt in prompts] == [USER.format("w1 w2")] * 3 + [USER.format("w3")]


def test_a_limit_takes_the_first_prompts(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *[{"prompt": f"w{at}"} for at in range(9)])
    prompts = read_prompts(JsonlPrompts(path=path, limit=3), TOKENIZER)
    assert [text(prompt.tokens) for prompt in prompts] == [USER.format(f"w{at}") for at in range(3)]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "  "}, "line 2: the prompt is empty"),
        ({"messages": []}, "line 2: no user turn with text"),
        ({"messages": [{"role": "user", "content": " "}]}, "line 2: no user turn with text"),
        ({"messages": [{"role": "user"}]}, "line 2: a message without `role` and `content`"),
        ({"messages": [{"role": 5, "content": "w1"}]}, "line 2: a message without `role` and `content`"),
        ({"messages": [{"role": "user", "content": None}]}, "line 2: the turn of 'user' holds None, not text"),
        ({"messages": [{"role": "user", "content": 7}]}, "line 2: the turn of 'user' holds 7, not text"),
        ({"messages": [{"role": "assistant", "content": None}, ASKED]}, "line 2: the turn of 'assistant' holds None, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "line 2: the turn of 'user' holds {'type': 'image'}, not text"),
        ({"messages": [{"role": "user", "content": []}]}, "line 2: no user turn with text"),
        ({"answer": "w1"}, r"line 2: `messages`, .* are not in \['answer'\]; give one"),
        ({"prompt": None, "domain": "d"}, r"line 2: .* are all null in \['domain', 'prompt'\]"),
        ({"messages": [{"role": "users", "content": "w1"}]}, r"line 2: unknown role 'users' \(did you mean 'user'\?\)"),
        ({"messages": "[{'role': 'user', 'content': 'w1'}]"}, "line 2: `messages` is text that is no JSON"),
        ({"prompt": "[{'role': 'user', 'content': 'w1'}]"}, "line 2: `prompt` is text that is no JSON"),
        ({"messages": '"w1"'}, "line 2: `messages` is .* expected a list of messages"),
        ({"instruction": 7}, "line 2: `instruction` is 7; expected text or a list"),
        ({"prompt": "w1 \ud83d"}, r"line 2: the text holds U\+D83D, half of a character"),
        ({"instruction": "w1", "history": ["w2"]}, "line 2: `history` is .*expected pairs of texts"),
        ("{", "line 2: not JSON"),
        ([1], "line 2: a list; expected an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, record: object, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_prompts(JsonlPrompts(path=jsonl(tmp_path, {"prompt": "w1"}, record)), TOKENIZER)
    assert "\n" not in str(caught.value)


def test_text_parts_are_joined_and_what_stands_behind_the_last_user_turn_is_not_read(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": word} for word in ("w1", "w2")]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    [prompt] = read_prompts(JsonlPrompts(path=jsonl(tmp_path, {"messages": chat})), TOKENIZER)
    assert text(prompt.tokens) == USER.format("w1 w2")


def test_what_a_template_says_when_it_refuses_a_prompt_is_said_with_the_line(tmp_path: Path) -> None:
    strict = make_tokenizer()
    strict.chat_template = "{{ raise_exception('Roles must\nalternate') if messages[0]['role'] == 'system' }}{{ messages[0]['content'] }}"
    chat = [{"role": "system", "content": "w1"}, ASKED]
    path = jsonl(tmp_path, {"prompt": "w1"}, {"messages": chat})
    with pytest.raises(UserError, match=r"line 2: .*template refuses turns of system, user \(Roles must alternate\)"):
        read_prompts(JsonlPrompts(path=path), strict)
    strict.chat_template = "{{ nothing.at.all }}"
    with pytest.raises(UserError, match=r"line 1: .*template refuses turns of user \('nothing' is undefined\)"):
        read_prompts(JsonlPrompts(path=path), strict)
    with pytest.raises(UserError, match=r"'self': .*template refuses turns of user \('nothing' is undefined\)"):
        frame(strict)


def test_a_missing_or_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(JsonlPrompts(path=str(tmp_path / "no")), TOKENIZER)
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(JsonlPrompts(path=jsonl(tmp_path, "")), TOKENIZER)


def test_data_sets_give_texts_messages_and_shared_conversations(tmp_path: Path) -> None:
    shared = [{"from": "human", "value": "w2"}, {"from": "gpt", "value": "w3"}]
    chat = [{"role": "user", "content": "w4"}]
    Dataset.from_dict({"ask": ["w1", "", "w5"]}).to_parquet(tmp_path / "a" / "train.parquet")
    Dataset.from_dict({"talk": [shared]}).to_parquet(tmp_path / "b" / "train.parquet")
    Dataset.from_dict({"talk": [chat]}).to_parquet(tmp_path / "c" / "train.parquet")
    found = [
        text(prompt.tokens)
        for folder, column in (("a", "ask"), ("b", "talk"), ("c", "talk"))
        for prompt in read_prompts(DatasetPrompts(name=str(tmp_path / folder), column=column), TOKENIZER)
    ]
    assert found == [USER.format(word) for word in ("w1", "w5", "w2", "w4")]


def test_rows_of_a_data_set_that_are_no_prompts_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"role": "assistant", "content": "w2"}
    rows = [[ASKED], [answer], None, [ASKED, {"role": "assistant", "content": None}, ASKED], [ASKED, answer]]
    Dataset.from_dict({"talk": rows}).to_parquet(tmp_path / "a" / "train.parquet")
    source = DatasetPrompts(name=str(tmp_path / "a"), column="talk")
    assert [text(prompt.tokens) for prompt in read_prompts(source, TOKENIZER)] == [USER.format("w1")] * 2
    said = capsys.readouterr().err.splitlines()[-1]  # before it, bars of the library
    assert said.startswith("3 of 5 rows left out: 1 no user turn with text, 1 no prompt, 1 a turn that is not text; the first: ")
    assert "row 1: no user turn with text" in said
    Dataset.from_dict({"talk": [[answer], [answer]]}).to_parquet(tmp_path / "b" / "train.parquet")
    with pytest.raises(UserError, match=r"holds no prompts \(2 rows cannot be used: 2 no user turn with text; the first: .* row 0: no"):
        read_prompts(DatasetPrompts(name=str(tmp_path / "b"), column="talk"), TOKENIZER)


def test_a_data_set_that_was_saved_to_disk_is_loaded(tmp_path: Path) -> None:
    one, other = Dataset.from_dict({"ask": ["w1"]}), Dataset.from_dict({"ask": ["w2"]}, split=Split.TEST)
    one.save_to_disk(tmp_path / "one")
    other.save_to_disk(tmp_path / "other")
    DatasetDict({"train": one, "test": other}).save_to_disk(tmp_path / "both")

    def read(folder: str, **options: str) -> list[str]:
        source = DatasetPrompts(name=str(tmp_path / folder), column="ask", **options)  # type: ignore[arg-type]
        return [text(prompt.tokens) for prompt in read_prompts(source, TOKENIZER)]

    assert read("one") == read("both") == [USER.format("w1")]
    assert read("other") == read("other", split="test") == read("both", split="test") == [USER.format("w2")]
    with pytest.raises(UserError, match=r"no split 'tests' \(did you mean 'test'\?\); it has test"):
        read("other", split="tests")
    with pytest.raises(UserError, match="no split 'dev'; it has train, test"):
        read("both", split="dev")
    with pytest.raises(UserError, match="knows no subsets; leave `subset` out"):
        read("one", subset="en")


def test_a_wrong_column_or_data_set_is_named(tmp_path: Path) -> None:
    Dataset.from_dict({"question": ["w1"]}).to_parquet(tmp_path / "a" / "train.parquet")
    with pytest.raises(UserError, match=r"no column 'questions' \(did you mean 'question'\?\)"):
        read_prompts(DatasetPrompts(name=str(tmp_path / "a"), column="questions"), TOKENIZER)
    with pytest.raises(UserError, match="cannot be loaded"):
        read_prompts(DatasetPrompts(name=str(tmp_path / "none")), TOKENIZER)


def test_without_a_template_texts_are_plain_and_messages_are_refused() -> None:
    plain = make_tokenizer()
    plain.chat_template = None
    assert text(tokenize(plain, "w1 w2", "here")) == "w1 w2"
    with pytest.raises(UserError, match="here: `messages` need a chat template"):
        tokenize(plain, [{"role": "user", "content": "w1"}], "here")
    with pytest.raises(UserError, match="'self' needs a chat template"):
        frame(plain)


def test_the_frame_is_the_template_up_to_and_behind_the_users_words() -> None:
    prefix, suffix = frame(TOKENIZER)
    assert prefix == "<s> <user> "
    assert suffix.split() == ["<end>", "<assistant>"]
    assert turn_ends(TOKENIZER, suffix) == (TOKENIZER.eos_token_id,)


def test_every_domain_has_openings_and_they_take_turns() -> None:
    turns = openings(SelfPrompts(count=70))
    assert [domain for domain, _ in turns[:7]] == list(DOMAINS)
    assert len(set(turns)) == 70
    assert all(len({opening for domain, opening in openings(SelfPrompts(count=700)) if domain == name}) >= 12 for name in DOMAINS)


def test_an_unknown_domain_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'maths' has no opening .*did you mean 'math'\?"):
        openings(SelfPrompts(domains=("maths",)))
    own = jsonl(tmp_path, {"domain": "distribution", "opening": "w1"})
    assert openings(SelfPrompts(domains=("distribution",), openings=own, count=2)) == [("distribution", "w1")] * 2


def test_turn_jobs_begin_with_the_bare_prefix_and_the_opening(tmp_path: Path, target: Target) -> None:
    own = jsonl(tmp_path, {"domain": "a", "opening": "w1 w2"}, {"domain": "a", "opening": ""})
    jobs = turn_jobs(SelfPrompts(domains=("a",), openings=own, count=2, max_tokens=9), target)
    assert [text(job.prompt) for job in jobs] == ["<s> <user> w1 w2", "<s> <user>"]
    assert {job.max_new_tokens for job in jobs} == {9}


def test_unfinished_empty_and_repeated_turns_are_dropped() -> None:
    w = TOKENIZER.convert_tokens_to_ids

    def turn(opening: str, words: str, ended: bool = True) -> Turn:
        return Turn(w(["<s>", "<user>", *opening.split()]), w(words.split()), ended, opening, "a")

    turns = [
        turn("w1", "w3 w4"),
        turn("w1 w9", "w3 w4", ended=False),  # ran into its limit
        turn("w1 w8", "w3 <user>"),  # went on with another turn
        turn("w1", ""),  # nothing but the opening
        turn("w1 w3", "w4"),  # the first one's text in other pieces
        turn("", "w5"),
    ]
    prompts, dropped = kept_prompts(TOKENIZER, turns)
    assert [text(prompt.tokens) for prompt in prompts] == [USER.format("w1 w3 w4"), USER.format("w5")]
    assert dropped == {"unfinished": 2, "empty": 1, "repeated": 1}


def test_the_configuration_names_kinds_and_unknown_keys() -> None:
    config = parse(DataConfig, {"sources": [{"kind": "jsonl", "path": "p"}, {"kind": "self", "count": 3}]}, "recipe")
    assert [source.kind for source in config.sources] == ["jsonl", "self"]
    with pytest.raises(UserError, match=r"unknown key 'max_token' \(did you mean 'max_tokens'"):
        parse(DataConfig, {"sources": [{"kind": "self", "max_token": 3}]}, "recipe")
    with pytest.raises(UserError, match="recipe: sources"):
        parse(DataConfig, {"sources": [{"kind": "csv"}]}, "recipe")


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_temperature_that_no_answer_is_drawn_at_is_refused(temperature: float) -> None:
    with pytest.raises(UserError, match=r"recipe: temperatures\.1: "):
        parse(DataConfig, {"temperatures": [0.0, temperature]}, "recipe")
    with pytest.raises(UserError, match=r"recipe: sources\.0\.temperature: "):
        parse(DataConfig, {"sources": [{"kind": "self", "temperature": temperature}]}, "recipe")


CONVERSATION = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
SHARED = [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]
LAYOUTS: dict[str, tuple[dict[str, object], str]] = {
    "messages": ({"messages": CONVERSATION}, USER.format("w1 w2")),
    "messages as JSON text": ({"messages": json.dumps(CONVERSATION)}, USER.format("w1 w2")),
    "ShareGPT": ({"id": "a", "conversations": SHARED}, USER.format("w1 w2")),
    "ShareGPT with a system text": ({"conversations": SHARED, "system": "w9"}, "<s> <system> w9 <end> " + USER.format("w1 w2")[4:]),
    "ShareGPT as JSON text": ({"conversations": json.dumps(SHARED)}, USER.format("w1 w2")),
    "Alpaca": ({"instruction": "w1", "input": "", "output": "w3"}, USER.format("w1")),
    "Alpaca with input": ({"instruction": "w1", "input": "w2", "output": "w3"}, USER.format("w1 w2")),
    "OpenAI with weights": ({"messages": [CONVERSATION[0], {**CONVERSATION[1], "weight": 0}]}, USER.format("w1 w2")),
    "OpenAI preferences": ({"input": {"messages": CONVERSATION[:1]}, "preferred_output": CONVERSATION[1:]}, USER.format("w1 w2")),
    "TRL texts": ({"prompt": "w1 w2", "completion": "w3"}, USER.format("w1 w2")),
    "TRL lists": ({"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]}, USER.format("w1 w2")),
    "TRL preferences": ({"chosen": CONVERSATION, "rejected": CONVERSATION}, USER.format("w1 w2")),
    "text": ({"text": "w1 w2"}, USER.format("w1 w2")),
    "question": ({"question": "w1 w2", "answer": "w3"}, USER.format("w1 w2")),
}
"""Layout -> a row of it, and the prompt that it is."""


def write(folder: Path, form: str, rows: list[dict[str, object]]) -> Path:
    """The rows as people keep them; a file for each form."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"train.{form.removesuffix(' of Windows')}"
    if form == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif form == "arrow":
        Dataset.from_list(rows).save_to_disk(folder / "saved")
        path = next((folder / "saved").glob("*.arrow"))
    elif form == "json":
        path.write_text(json.dumps(rows, indent=2))
    elif form == "jsonl of Windows":
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode())
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("form", ["jsonl", "jsonl of Windows", "json", "parquet", "arrow"])
def test_every_layout_in_every_form_is_the_same_prompt_for_both_kinds_of_sources(tmp_path: Path, form: str) -> None:
    for number, (name, (row, prompt)) in enumerate(LAYOUTS.items()):
        if form in ("parquet", "arrow") and number % 3:  # a library writes and reads them, slowly
            continue
        path = write(tmp_path / str(number), form, [{**row, "domain": None}, {**row, "domain": "d"}])
        folder = tmp_path / str(number) / ("saved" if form == "arrow" else "")
        sources = [kind for place in (path, folder) for kind in (JsonlPrompts(path=str(place)), DatasetPrompts(name=str(place)))]
        for source in sources:
            read = [(text(one.tokens), one.domain) for one in read_prompts(source, TOKENIZER)]
            assert read == [(prompt, ""), (prompt, "d")], (name, source)


def test_a_prompt_that_is_about_json_stays_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": '[{"w1": 1}]'}, {"prompt": "{w1"})
    assert len(read_prompts(JsonlPrompts(path=path), TOKENIZER)) == 2


def test_a_folder_takes_all_files_and_a_named_column_alone(tmp_path: Path) -> None:
    write(tmp_path / "a", "jsonl", [{"prompt": "w1", "ask": "w2"}])
    write(tmp_path, "json", [{"prompt": "w3", "ask": "w4"}])
    read = read_prompts(JsonlPrompts(path=str(tmp_path), column="ask"), TOKENIZER)
    assert [text(one.tokens) for one in read] == [USER.format("w2"), USER.format("w4")]
    with pytest.raises(UserError, match=r"no column 'asks' \(did you mean 'ask'\?\)"):
        read_prompts(JsonlPrompts(path=str(tmp_path), column="asks"), TOKENIZER)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="a folder without a file of prompts"):
        read_prompts(JsonlPrompts(path=str(tmp_path / "none")), TOKENIZER)
