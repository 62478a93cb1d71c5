"""The script that writes checkable questions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from drafttrain.evaluation.check import right
from drafttrain.evaluation.suites import load_suite

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_questions.py"


def written(path: Path, *options: str) -> Path:
    subprocess.run([sys.executable, str(SCRIPT), str(path), *options], check=True, capture_output=True)
    return path


def test_questions_are_a_suite_of_many_kinds_without_repeats_and_the_same_ones_every_time(tmp_path: Path) -> None:
    first = written(tmp_path / "a.jsonl", "--count", "140")
    assert first.read_bytes() == written(tmp_path / "b.jsonl", "--count", "140").read_bytes()
    assert first.read_bytes() != written(tmp_path / "c.jsonl", "--count", "140", "--seed", "1").read_bytes()
    suite = load_suite(str(first))
    assert len(suite.items) == len({item.turns[0] for item in suite.items}) == 140
    assert len(suite.tasks) == 14


def test_each_answer_is_accepted_and_sums_are_what_they_say(tmp_path: Path) -> None:
    for item in load_suite(str(written(tmp_path / "a.jsonl", "--count", "280"))).items:
        assert item.check is not None
        assert right(item.check, f"The answer is {item.check.answers[0]}.")
        assert not right(item.check, "I do not know.")
        if item.task in ("add", "subtract"):
            sum_ = item.turns[0].removeprefix("What is ").removesuffix("?")
            assert item.check.answers == (str(eval(sum_)),)  # our own digits
