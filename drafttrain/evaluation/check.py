"""Is an answer right? Pure functions from a text to its final answer, and from that to right or wrong.

    number   the number behind `####` or in `\\boxed{}`, else the last number of the text (GSM8K's convention)
    choice   the letter that the text settles on: "the answer is B", "B)", "(B)"
    option   the first of the given words that the text names (positive, negative)
    word     one of the accepted answers stands in the text as whole words
    code     a program decides, in `execute.py`
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

Kind = Literal["number", "choice", "option", "word", "code"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NUMBER = re.compile(r"(?<![\w.])[-−]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\w])|(?<![\w.])[-−]?\d+(?:\.\d+)?")
MARKED = (re.compile(r"####\s*\$?\s*(\S+)"), re.compile(r"\\boxed\{\s*\$?\s*([^}]*)\}"))
FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.S | re.I)


@dataclass(frozen=True)
class AnswerCheck:
    """How the answer to an item is judged."""

    kind: Kind
    answers: tuple[str, ...]  # any of them is right; `code`: the tests that follow the program
    options: tuple[str, ...] = ()  # `option`: the words to choose from
    header: str = ""  # `code`: what stands before an answer that is only a function's body


def right(check: AnswerCheck, text: str) -> bool:
    """Whether the text gives an accepted answer. Not for `code`."""
    answer = final_answer(check, text)
    return answer is not None and answer in {canonical(check.kind, accepted) for accepted in check.answers}


def final_answer(check: AnswerCheck, text: str) -> str | None:
    """The answer that a text settles on, in canonical form; None where it gives none. Not for `code`.

    `word`: the first accepted answer that the text holds, since no other word could be told from prose.
    """
    assert check.kind != "code", "a program is run, not read"
    if check.kind == "number":
        return last_number(text)
    if check.kind == "choice":
        return choice_letter(text)
    if check.kind == "option":
        return first_named(text, check.options)
    return next((canonical("word", word) for word in check.answers if contains(text, word)), None)


def canonical(kind: Kind, answer: str) -> str:
    """The form in which two answers of a kind are compared."""
    if kind == "number":
        return last_number(answer) or normalise(answer)
    return answer.strip(" ().:").upper() if kind == "choice" else normalise(answer)


def normalise(text: str) -> str:
    """Lower case without accents and punctuation, one space between words: `The  Café!` -> `the cafe`."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(letter))
    return " ".join(re.findall(r"\w+", plain))


def contains(text: str, words: str) -> bool:
    """Whether `words` stand in the text one after another, as whole words."""
    return f" {normalise(words)} " in f" {normalise(text)} "


def first_named(text: str, options: Sequence[str]) -> str | None:
    """The option that the text names first, as whole words."""
    padded = f" {normalise(text)} "
    places = {normalise(option): padded.find(f" {normalise(option)} ") for option in options}
    found = {option: place for option, place in places.items() if place >= 0}
    return min(found, key=lambda option: found[option]) if found else None


def last_number(text: str) -> str | None:
    """The number a text ends on, as a plain decimal: `$1,200.50.` -> `1200.5`, `**26**` -> `26`; None without any.

    Where a place is marked (`#### 26`, `\\boxed{26}`), the last marked number counts.
    """
    for mark in MARKED:
        marked = [number for found in mark.findall(text) for number in _numbers(found)[-1:]]
        if marked:
            return marked[-1]
    found = _numbers(text)
    return found[-1] if found else None


def _numbers(text: str) -> list[str]:
    return [_decimal(found) for found in NUMBER.findall(text)]


def _decimal(number: str) -> str:
    """`1,200.50` -> `1200.5`, `26.0` -> `26`."""
    plain = number.replace(",", "").replace("−", "-")
    value = Fraction(plain)
    if value.denominator == 1:
        return str(value.numerator)
    return plain.rstrip("0")


def choice_letter(text: str, letters: str = "ABCDE") -> str | None:
    """The letter of a multiple choice that a text settles on; None where it names none.

    In this order: the last "answer is B" or "Answer: B"; a letter that opens the text; the first letter in brackets or before one; a
    letter standing alone on a line. A bare `A` inside a sentence is an article, not an answer.
    """
    one = f"[{letters}]"
    settled = rf"\b(?:answer|option|choice)\b(?:\s+(?:is|would\s+be|letter))*\s*:?\s*[*(\"']*({one})\b(?![ ]+[a-z])"
    said = re.findall(f"(?i:{settled.replace(one, f'(?-i:{one})')})", text)
    if said:
        return str(said[-1])
    opening = re.match(rf"[\s*(\"']*({one})(?=[).:,*\"'\s]|$)(?![ ]+[a-z])", text)
    bracketed = re.search(rf"(?:\(|\b)({one})\)", text)
    alone = re.search(rf"^\W*({one})\W*$", text, re.M)
    found = opening or bracketed or alone
    return found[1] if found else None


def program(check: AnswerCheck, text: str) -> str:
    """The program that decides a `code` item: what the text wrote (its first fenced block, or all of it), then the tests.

    A text that defines the function stands behind the header's own imports; one that is only a body continues the header.
    """
    block = FENCE.search(text)
    code = block[1] if block else text
    names = re.findall(r"^def (\w+)", check.header, re.M)
    whole = bool(names) and re.search(rf"^def {names[-1]}\b", code, re.M) is not None
    return f"{check.header}    pass\n\n{code}\n\n{check.answers[0]}" if whole else f"{check.header}{code}\n\n{check.answers[0]}"
