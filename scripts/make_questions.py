"""Writes questions with exact answers, for `drafttrain judge`: small sums, word problems, comparisons, days, units, lists, letters.

    python scripts/make_questions.py questions.jsonl [--count 320] [--seed 0]

Every kind is asked equally often, no question twice; the same seed gives the same file. Numbers are small, so that small models get a fair
share right. The lines are a suite (`drafttrain/evaluation/suites.py`).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

Question = tuple[str, str, str | list[str]]
"""prompt, how it is checked, answer"""

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack")
THINGS = ("apples", "books", "pencils", "coins", "marbles", "stickers", "cookies", "shells", "stamps", "flowers")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
UNITS = (
    ("minutes", "hour", 60), ("seconds", "minute", 60), ("hours", "day", 24), ("days", "week", 7), ("months", "year", 12),
    ("centimeters", "meter", 100), ("meters", "kilometer", 1000), ("grams", "kilogram", 1000),
    ("inches", "foot", 12), ("cents", "dollar", 100),
)  # fmt: skip
CAPITALS = {
    "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo",
    "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Ireland": "Dublin", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "India": "New Delhi", "Thailand": "Bangkok", "Cuba": "Havana", "Peru": "Lima",
    "Chile": "Santiago", "Kenya": "Nairobi", "Hungary": "Budapest", "Belgium": "Brussels", "Denmark": "Copenhagen",
}  # fmt: skip
OPPOSITES = {
    "big": "small", "fast": "slow", "up": "down", "left": "right", "day": "night", "old": ["young", "new"], "rich": "poor", "wet": "dry",
    "early": "late", "open": "closed", "happy": ["sad", "unhappy"], "strong": "weak", "light": ["dark", "heavy"], "full": "empty",
    "high": "low", "long": "short", "clean": "dirty", "hard": ["soft", "easy"], "first": "last", "true": "false", "noisy": "quiet",
}  # fmt: skip
WORDS = ("apple", "river", "yellow", "garden", "music", "winter", "orange", "planet", "window", "banana", "kitchen", "doctor", "summer")


def add(dice: random.Random) -> Question:
    a, b = dice.randint(2, 40), dice.randint(2, 30)
    return f"What is {a} + {b}?", "number", str(a + b)


def subtract(dice: random.Random) -> Question:
    a, b = dice.randint(10, 50), dice.randint(1, 10)
    return f"What is {a} - {b}?", "number", str(a - b)


def multiply(dice: random.Random) -> Question:
    a, b = dice.randint(2, 12), dice.randint(2, 10)
    return f"What is {a} times {b}? Explain briefly.", "number", str(a * b)


def gain(dice: random.Random) -> Question:
    name, thing, a, b = dice.choice(NAMES), dice.choice(THINGS), dice.randint(2, 20), dice.randint(2, 10)
    return f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", "number", str(a + b)


def lose(dice: random.Random) -> Question:
    name, thing, a, b = dice.choice(NAMES), dice.choice(THINGS), dice.randint(10, 20), dice.randint(1, 9)
    return f"{name} has {a} {thing} and gives away {b} of them. How many {thing} are left?", "number", str(a - b)


def boxes(dice: random.Random) -> Question:
    thing, a, b = dice.choice(THINGS), dice.randint(2, 6), dice.randint(2, 10)
    return f"There are {a} boxes with {b} {thing} in each box. How many {thing} are there in total?", "number", str(a * b)


def larger(dice: random.Random) -> Question:
    a, b = dice.sample(range(1, 100), 2)
    return f"Which number is larger, {a} or {b}? Write a full sentence and end with the larger number.", "number", str(max(a, b))


def next_day(dice: random.Random) -> Question:
    today, name = dice.randrange(7), dice.choice(NAMES)
    prompt = f"{name} arrives on {DAYS[today]} and leaves the day after. On which day does {name} leave?"
    return prompt, "word", DAYS[(today + 1) % 7]


def next_month(dice: random.Random) -> Question:
    month, name = dice.randrange(12), dice.choice(NAMES)
    return f"{name} was born in the month after {MONTHS[month]}. Which month is that?", "word", MONTHS[(month + 1) % 12]


def units(dice: random.Random) -> Question:
    small, large, each = dice.choice(UNITS)
    many = dice.randint(1, 3)
    plural = "feet" if large == "foot" else f"{large}s"
    return f"How many {small} are there in {many} {large if many == 1 else plural}?", "number", str(many * each)


def capital(dice: random.Random) -> Question:
    country = dice.choice(list(CAPITALS))
    asked = dice.choice(("What is the capital of {}?", "Name the capital of {} and describe it.", "Which city is the capital of {}?"))
    return asked.format(country), "word", CAPITALS[country]


def opposite(dice: random.Random) -> Question:
    word = dice.choice(list(OPPOSITES))
    asked = dice.choice(("Give the opposite of the word '{}'.", "Which word means the opposite of '{}'? Use it in a sentence."))
    return asked.format(word), "word", OPPOSITES[word]


def last_of_list(dice: random.Random) -> Question:
    words = dice.sample(WORDS, 4)
    return f"Here is a list: {', '.join(words)}. Which word is the last one in the list?", "word", words[-1]


def letter(dice: random.Random) -> Question:
    word = dice.choice(WORDS)
    options = [word, *dice.sample([other for other in WORDS if other[0] != word[0]], 2)]
    dice.shuffle(options)
    return f"Which of these words begins with the letter '{word[0]}': {', '.join(options)}?", "word", word


KINDS: dict[str, Callable[[random.Random], Question]] = {
    "add": add, "subtract": subtract, "multiply": multiply, "gain": gain, "lose": lose, "boxes": boxes, "larger": larger,
    "next_day": next_day, "next_month": next_month, "units": units, "capital": capital, "opposite": opposite, "last_of_list": last_of_list,
    "letter": letter,
}  # fmt: skip


def questions(count: int, seed: int) -> list[dict[str, object]]:
    """At most `count` lines of a suite; a kind that has no further question gives way to the others."""
    dice, kinds = random.Random(seed), list(KINDS)
    seen: set[str] = set()
    lines: list[dict[str, object]] = []
    while kinds and len(lines) < count:
        for kind in list(kinds)[: count - len(lines)]:
            fresh = (made for made in (KINDS[kind](dice) for _ in range(50)) if made[0] not in seen)
            found = next(fresh, None)
            if found is None:
                kinds.remove(kind)
                continue
            prompt, check, answer = found
            seen.add(prompt)
            lines.append({"id": f"{kind}-{len(lines) + 1}", "task": kind, "prompt": prompt, "check": check, "answer": answer})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSONL file to write")
    parser.add_argument("--count", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines = questions(args.count, args.seed)
    args.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} questions of {len({str(line['task']) for line in lines})} kinds in {args.output}")


if __name__ == "__main__":
    main()
