"""What counts as going round in circles."""

from __future__ import annotations

import random

import pytest

from drafttrain.evaluation.loops import GRAM, WINDOW, loops, repeats

VARIED = random.Random(0).choices(range(1000), k=400)


@pytest.mark.parametrize("period", [1, 2, 7, 30, 68])
def test_the_same_tokens_over_and_over_loop_whatever_their_period(period: int) -> None:
    phrase = VARIED[:period]
    assert loops((phrase * 200)[: period + WINDOW])


def test_a_list_that_counts_while_it_repeats_itself_loops() -> None:
    points = [token for number in range(8) for token in [900 + number, *VARIED[:11]]]
    assert loops(points)


def test_a_loop_that_ends_counts() -> None:
    assert loops(VARIED[:30] + VARIED[30:40] * 7 + VARIED[40:140])


def test_varied_text_does_not_loop_nor_does_one_sentence_said_twice() -> None:
    assert not loops(VARIED)
    assert not loops(VARIED[:60] + VARIED[20:50] + VARIED[60:120])


def test_repeats_far_apart_do_not_add_up_to_a_loop() -> None:
    assert not loops([token for place in range(4) for token in VARIED[:20] + VARIED[100 + 60 * place : 160 + 60 * place]])


def test_a_text_shorter_than_the_window_never_loops() -> None:
    assert not loops([7] * (WINDOW - 1))
    assert loops([7] * WINDOW)
    assert not loops([])


def test_the_line_is_drawn_at_five_sixths_of_the_window() -> None:
    again = VARIED[:40]
    assert loops(again + VARIED[100:108] + again)  # 40 of the last 48
    assert not loops(again + VARIED[100:108] + again[:39] + VARIED[108:150])


def test_repeats_marks_exactly_the_tokens_of_grams_that_began_earlier() -> None:
    rng = random.Random(1)
    for _ in range(20):
        tokens = rng.choices(range(2), k=60)
        grams = [tuple(tokens[start : start + GRAM]) for start in range(len(tokens) - GRAM + 1)]
        old = [gram in grams[:start] for start, gram in enumerate(grams)]
        assert repeats(tokens) == [any(old[max(0, place - GRAM + 1) : place + 1]) for place in range(len(tokens))]
