"""The throughput model, and what goes into it."""

from __future__ import annotations

import pytest

from drafttrain.core.plan import Chain, Dynamic, Static
from drafttrain.design.forecast import (
    answer,
    forecast,
    midway,
    parted_texts,
    replay,
    replayed,
    spread,
    texts_of,
)
from drafttrain.drafters import build
from drafttrain.drafters.hybrid import HybridConfig
from drafttrain.drafters.ngram import NgramConfig
from drafttrain.evaluation.throughput import Forecast, best, break_even, frontier
from drafttrain.runtime.costs import Played, RoundCost, ScoreCurve, cost_of, round_costs, score_curve
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.stats import PHASES, Statistics
from tests.evaluation.toys import contender, target
from tests.families import REPRESENTATIVES, TRAINABLE, slow_beyond
from tests.runtime.test_adaptive import random_drafter

CURVE = ScoreCurve((1, 2, 8), (1.0, 1.2, 1.8))
PROMPTS = [[5, 10, 12, 30], [17, 18, 19, 17, 18], [10, 11, 12, 13, 14, 15, 16], [16, 15, 14]]
SHAPES = [Chain(length=1), Chain(length=3), Static(children=(3, 2, 1)), Dynamic(depth=3, beam=3, top_k=3, nodes=8)]


def at(tau: float, draft: float, nodes: int) -> Forecast:
    return Forecast(tau, draft, CURVE.at(nodes), 0.1, plain=1.1)


def test_score_times_lie_on_the_lines_between_what_was_measured_and_beyond() -> None:
    assert [CURVE.at(nodes) for nodes in (1, 2, 5, 8, 14)] == pytest.approx([1.0, 1.2, 1.5, 1.8, 2.4])
    assert CURVE.forwards(8) == pytest.approx(1.8)


def test_throughput_is_chosen_where_the_best_tau_is_another() -> None:
    deep, shallow = at(tau=3.0, draft=2.5, nodes=8), at(tau=2.2, draft=0.3, nodes=3)
    assert deep.tau > shallow.tau
    assert best([deep, shallow]) == 1
    assert shallow.tokens_per_second == pytest.approx(2.2 / (0.3 + 1.3 + 0.1))
    assert shallow.speedup == pytest.approx(2.2 * 1.1 / 1.7)


def test_plain_decoding_beats_a_drafter_that_costs_more_than_it_gives() -> None:
    assert at(tau=1.5, draft=1.0, nodes=5).speedup < 1 < at(tau=1.5, draft=0.01, nodes=2).speedup


def test_a_drafter_with_its_break_even_tau_is_as_fast() -> None:
    known, other = at(2.0, 0.2, 3), at(9.9, 0.7, 6)
    needed = break_even(known, other)
    assert Forecast(needed, other.draft, other.score, other.other, other.plain).tokens_per_second == pytest.approx(known.tokens_per_second)


def test_the_frontier_holds_what_nothing_beats_in_both() -> None:
    cells = [at(1.5, 0.1, 2), at(1.4, 0.2, 2), at(2.5, 0.9, 4), at(2.4, 1.5, 8), at(2.6, 1.6, 8)]
    assert frontier(cells) == [0, 2, 4]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.shape}-{shape.nodes}")
@pytest.mark.parametrize("family", slow_beyond(["fitted eagle3", *TRAINABLE], ["fitted eagle3", *REPRESENTATIVES]))
def test_replay_counts_what_greedy_decoding_counts_with_every_tree(family: str, shape: Chain | Static | Dynamic) -> None:
    """Rounds, tokens and acceptance by depth, on texts of different lengths side by side."""
    drafter = contender().decoder.drafter if family == "fitted eagle3" else random_drafter(family, target())
    got = replayed_as_decoded(SpeculativeDecoder(target(), drafter, RuntimeConfig(shape=shape)))
    assert family != "fitted eagle3" or got.tau > 1.2


@pytest.mark.parametrize("hybrid", [None, HybridConfig(draft_cost=50.0), HybridConfig(draft_cost=0.1)], ids=["ngram", "dear", "cheap"])
@pytest.mark.parametrize("prompts", [1, 4])
def test_replay_goes_through_rounds_in_which_nothing_is_drafted(prompts: int, hybrid: HybridConfig | None) -> None:
    drafter = build(NgramConfig(), target().shape) if hybrid is None else contender().decoder.drafter
    decoder = SpeculativeDecoder(target(), drafter, RuntimeConfig(shape=SHAPES[-1], hybrid=hybrid))
    replayed_as_decoded(decoder, PROMPTS[:prompts])


def replayed_as_decoded(decoder: SpeculativeDecoder, prompts: list[list[int]] = PROMPTS) -> Statistics:
    """Replayed counts, which are those of decoding the same texts one by one."""
    assert decoder.drafter is not None
    answers = [made[: 9 if place == 1 else None] for place, made in enumerate(answer(target(), prompts, 21))]
    got = replayed(decoder, texts_of(target(), prompts, answers, [decoder.drafter]))
    decoded = [decoder.generate([prompt], max_new_tokens=len(made))[0] for prompt, made in zip(prompts, answers, strict=True)]
    assert [one.tokens for one in decoded] == answers
    counted = sum((one.statistics for one in decoded), Statistics())
    for name in ("rounds", "tokens", "attempts", "accepts"):
        assert vars(got)[name] == vars(counted)[name], name
    return got


def test_replay_tells_the_accepted_length_of_the_answers_that_do_not_loop() -> None:
    decoder = contender().decoder
    assert decoder.drafter is not None
    answers = [[3, 4, 5] * 30, *answer(target(), PROMPTS[1:], 21)]
    straight, looping = (texts_of(target(), PROMPTS[part], answers[part], [decoder.drafter]) for part in (slice(1, None), slice(1)))
    got = replay(decoder, *parted_texts(target(), PROMPTS, answers, [decoder.drafter]))
    whole, calm = replayed(decoder, [*straight, *looping]), replayed(decoder, straight)
    assert (got.tau, got.tau_not_looping, got.alpha) == (whole.tau, calm.tau, whole.alpha)
    assert got.tau != got.tau_not_looping
    known = forecast(got.tau, RoundCost(0.5, 0.1, (3,)), RoundCost(0.0, 0.1, (0,)), CURVE, got.tau_not_looping)
    assert known.speedup_not_looping == pytest.approx(calm.tau * known.plain / known.round)


def test_where_all_answers_loop_nothing_is_told_of_others() -> None:
    decoder = contender().decoder
    assert decoder.drafter is not None
    texts = parted_texts(target(), PROMPTS[:1], [[3, 4, 5] * 30], [decoder.drafter])
    assert replay(decoder, *texts).tau_not_looping is None


def test_replay_asks_the_target_for_nothing() -> None:
    decoder = contender().decoder
    assert decoder.drafter is not None
    texts = texts_of(target(), PROMPTS, answer(target(), PROMPTS, 12), [decoder.drafter])
    before = target().forwards
    replayed(decoder, texts)
    assert target().forwards == before


def test_a_curve_is_measured_at_every_number_of_nodes_and_leaves_no_trace() -> None:
    before = target().forwards
    curve = score_curve(target(), 20, {"aux_hidden_states"}, passes=2, nodes=(1, 3, 6))
    assert curve.nodes == (1, 3, 6)
    assert min(curve.seconds) > 0
    assert target().forwards - before == 1 + (2 + 3) * 3  # the prefill; warm-up and passes


def test_timed_prompts_are_spread_from_the_longest_to_the_shortest() -> None:
    assert [len(prompt) for prompt in spread(PROMPTS, 3)] == [7, 4, 3]
    assert len(spread(PROMPTS, 9)) == 4


def played(draft: float, calls: int, nodes: int, verify: float = 0.1) -> Played:
    return Played({**dict.fromkeys(PHASES, 0.0), "draft": draft, "score": 2.0, "verify": verify}, calls, nodes)


def test_rounds_with_and_without_the_trained_drafter_count_as_often_as_they_come() -> None:
    """And a round that something else slowed down counts for what its kind takes."""
    rounds = [played(1.0, 4, 24), played(1.1, 4, 20), played(9.0, 4, 24), played(0.01, 0, 3, verify=5.0), played(0.03, 0, 5)]
    assert cost_of(rounds) == RoundCost(pytest.approx((3 * 1.1 + 2 * 0.02) / 5), pytest.approx(0.1), (24, 20, 24, 3, 5), 2.0)


def test_a_forecast_scores_the_nodes_that_rounds_bring_not_those_they_might() -> None:
    plain, cost = RoundCost(0.0, 0.1, (0, 0)), RoundCost(0.5, 0.1, (1, 7, 0))
    known = forecast(2.0, cost, plain, CURVE)
    assert known.score == pytest.approx((1.2 + 1.8 + 1.0) / 3)
    assert (known.tau, known.draft, known.other, known.plain) == pytest.approx((2.0, 0.5, 0.1, 1.1))


def test_nodes_and_calls_of_real_rounds_are_counted() -> None:
    drafter = contender().decoder.drafter
    few = Dynamic(depth=2, beam=2, top_k=2, nodes=30)  # 2 and 4 nodes are all it ever sees
    decoders = [SpeculativeDecoder(target(), drafter, RuntimeConfig(shape=shape)) for shape in (Chain(length=3), few)]
    plain, three, tree = round_costs([SpeculativeDecoder(target()), *decoders], PROMPTS[:2], 12, rounds=4)
    assert (set(plain.nodes), set(three.nodes), set(tree.nodes)) == ({0}, {3}, {6})
    dear = HybridConfig(draft_cost=50.0, lookup=NgramConfig(shortest=6))  # never worth it
    runtime = RuntimeConfig(shape=Dynamic(depth=2, beam=2, top_k=2, nodes=6), hybrid=dear)
    (lone,) = round_costs([SpeculativeDecoder(target(), drafter, runtime)], PROMPTS[:2], 12, rounds=4)
    assert lone.nodes.count(0) > len(lone.nodes) / 2  # nothing was looked up, and the trained drafter is too dear


def test_rounds_are_timed_from_the_middle_of_the_answers() -> None:
    assert midway([[1, 2], [3]], [[4, 5, 6, 7], [8]]) == [[1, 2, 4, 5], [3]]
