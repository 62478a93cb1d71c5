"""Suffix automaton and suffix array against counting every substring by hand."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from drafttrain.core.suffix import Cursor, Span, SuffixArray, SuffixAutomaton, suffix_order

Texts = list[list[int]]


def grown(rng: random.Random, vocab: int) -> tuple[SuffixAutomaton, Texts, list[int]]:
    """Three texts that grow in turns in one automaton."""
    automaton, texts, ends = SuffixAutomaton(), [list[int](), [], []], [0, 0, 0]
    for _ in range(rng.randint(3, 40)):
        which, token = rng.randrange(3), rng.randrange(vocab)
        texts[which].append(token)
        ends[which] = automaton.extend(ends[which], token)
    return automaton, texts, ends


def substrings(texts: Texts) -> Counter[tuple[int, ...]]:
    return Counter(tuple(text[i:j]) for text in texts for i in range(len(text)) for j in range(i + 1, len(text) + 1))


@pytest.mark.parametrize("vocab", [1, 2, 4])
def test_every_substring_of_every_text_is_counted_however_they_grow(vocab: int) -> None:
    rng = random.Random(vocab)
    for _ in range(40):
        automaton, texts, ends = grown(rng, vocab)
        for substring, count in substrings(texts).items():
            state = 0
            for token in substring:
                state = automaton.following[state][token]
            assert automaton.count[state] == count
        assert [automaton.length[end] for end in ends] == [len(text) for text in texts]


def test_a_step_finds_the_longest_suffix_that_stood_before_and_a_copy_goes_its_own_way() -> None:
    automaton, end = SuffixAutomaton(), 0
    for token in [1, 2, 3, 9, 2, 3, 1]:
        end = automaton.extend(end, token)
    copy = automaton.copy()
    cursor = copy.step(Cursor(end, copy.length[end]), 2)  # 1 2 occurred before
    assert cursor.length == 2
    assert [context.length for context in copy.contexts(cursor)] == [2, 1, 0]
    copy.extend(end, 7)
    assert 7 not in automaton.following[0]


@pytest.mark.parametrize("vocab", [2, 5])
def test_a_suffix_array_counts_what_follows_every_substring(vocab: int) -> None:
    rng = random.Random(vocab)
    texts = [[rng.randrange(vocab) for _ in range(rng.randint(1, 30))] for _ in range(4)]
    tokens = np.array([token for text in texts for token in [*text, vocab]], dtype=np.int32)
    array = SuffixArray(tokens, suffix_order(tokens), vocab)
    counts = substrings(texts)
    for substring, count in counts.items():
        span: Span | None = None
        for token in substring[:6]:
            span = array.narrow(span, token)
        assert span is not None
        if len(substring) <= 6:
            after = {token: counts[(*substring, token)] for token in range(vocab) if counts[(*substring, token)]}
            assert (len(span), array.following(span)) == (count, after)
