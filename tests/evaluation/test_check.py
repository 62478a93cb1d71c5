"""Final answers and whether they are right."""

from __future__ import annotations

import contextlib
import io
import re

import pytest

from drafttrain.evaluation.check import AnswerCheck, choice_letter, contains, final_answer, last_number, normalise, program, right
from drafttrain.evaluation.suites import load_suite

CHECKABLE = load_suite("checkable")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7 apples.", "7"), ("It costs $1,200.50.", "1200.5"), ("**26**", "26"), ("26.0", "26"), ("minus: -5", "-5"),
        ("−5 degrees", "-5"), ("10-3", "3"), ("#### 18\nThat is 2 + 16.", "18"), (r"so \boxed{42} it is, 100%", "42"), ("1,2,3", "3"),
        ("It is 25%.", "25"), ("x2 is a name", None), ("none", None), ("The answer is 7. 8 is wrong", "8"), ("0.50", "0.5"),
        ("12,345 steps", "12345"), ("in 1999, 17", "17"),
    ],
)  # fmt: skip
def test_the_last_number_counts_unless_a_place_is_marked(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("B) a dog", "B"), ("B. A dog", "B"), ("C: since (A) is wrong", "C"),
        ("(C)", "C"), ("The answer is D.", "D"), ("Answer: (B) dog", "B"),
        ("A) table\n\nThe correct answer is D) stone.", "D"), ("**C**", "C"), ("I think it is\nB\n", "B"),
        ("A dog is an animal.", None), ("The answer is a dog.", None), ("It would be (B), not (C).", "B"),
        ("the answer is A", "A"), ("The answer is A dog", None), ("nothing", None), ("A", "A"),
        ("The best option is B", "B"), ("Because of C3", None),
    ],
)  # fmt: skip
def test_the_letter_a_text_settles_on(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


def test_words_stand_whole_and_without_regard_to_case_accents_and_punctuation() -> None:
    assert normalise("  The  Déjà-Vu! ") == "the deja vu"
    assert contains("It is Carbon-Dioxide.", "carbon dioxide")
    assert not contains("spicy rice", "ice")


@pytest.mark.parametrize(
    ("check", "text", "verdict"),
    [
        (AnswerCheck("number", ("1,200",)), "That makes 1200 steps", True),
        (AnswerCheck("number", ("1,200",)), "That makes 1201 steps", False),
        (AnswerCheck("number", ("4",)), "four", False),
        (AnswerCheck("word", ("small", "little")), "It is little.", True),
        (AnswerCheck("word", ("small", "little")), "It is tiny.", False),
        (AnswerCheck("choice", ("b",)), "The answer is B", True),
        (AnswerCheck("choice", ("B",)), "The answer is C", False),
        (AnswerCheck("option", ("Negative",), ("Positive", "Negative")), "Negative, not positive", True),
        (AnswerCheck("option", ("Negative",), ("Positive", "Negative")), "Positive, not negative", False),
        (AnswerCheck("option", ("Negative",), ("Positive", "Negative")), "neither", False),
    ],
)
def test_right_and_wrong(check: AnswerCheck, text: str, verdict: bool) -> None:
    assert right(check, text) is verdict


def test_two_wrong_answers_differ_in_their_final_answer() -> None:
    check = AnswerCheck("number", ("4",))
    assert final_answer(check, "so 5") == final_answer(check, "5.0!") == "5"
    assert final_answer(check, "so 6") == "6"


HEADER = 'from math import sqrt\n\ndef helper(x):\n    return x\n\ndef twice(x):\n    """Double it."""\n'
TESTS = "def check(candidate):\n    assert candidate(2) == 4\ncheck(twice)\n"


@pytest.mark.parametrize(
    "text",
    [
        "    return 2 * x\n",
        "Here it is:\n```python\ndef twice(x):\n    return int(sqrt(4)) * helper(x)\n```\nDone. ```python\nbroken(\n```",
        "def twice(x):\n    return 2 * x",
        "```\n    return 2 * x\n```",
        "```python\ndef twice(x):\n    return 2 * x",
    ],
)
def test_a_program_is_the_answers_code_with_the_headers_names_and_the_tests(text: str) -> None:
    check = AnswerCheck("code", (TESTS,), header=HEADER)
    exec(program(check, text), {})
    with pytest.raises(AssertionError):
        exec(program(check, text.replace("return ", "return 1 + ")), {})


def test_a_header_may_lack_a_docstring() -> None:
    check = AnswerCheck("code", ("assert twice(2) == 4",), header="def twice(x):\n")
    exec(program(check, "def twice(x):\n    return 2 * x"), {})


def test_the_checkable_suite_holds_forty_questions_of_five_kinds() -> None:
    count = {task: sum(item.task == task for item in CHECKABLE.items) for task in CHECKABLE.tasks}
    assert count == dict.fromkeys(("fact", "language", "reading", "word_problem", "code"), 8)
    assert len({item.turns for item in CHECKABLE.items}) == 40
    assert all(item.check for item in CHECKABLE.items)


def test_answers_about_programs_are_what_the_programs_print() -> None:
    for item in CHECKABLE.select(tasks=("code",)).items:
        code = re.search(r"```python\n(.*?)\n```", item.turns[0], re.S)
        assert code
        assert item.check
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code[1], {})
        assert item.check.answers == (printed.getvalue().strip(),)


def test_answers_to_word_problems_follow_from_their_two_numbers() -> None:
    for item in CHECKABLE.select(tasks=("word_problem",)).items:
        first, second = map(int, re.findall(r"\d+", item.turns[0]))
        assert item.check
        assert int(item.check.answers[0]) in (first + second, first - second, first * second)


def test_no_question_gives_its_own_answer_away() -> None:
    """A target that repeats the question must not be right: a passage holds its answer, the question after it does not."""
    for item in CHECKABLE.items:
        if item.task != "code":
            assert item.check
            question = item.turns[0].split("\n\n")[-1]
            assert not right(item.check, question), item.id
