"""The arithmetic of a result row, on decodings with made-up figures."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy.stats import bootstrap, t

from drafttrain.core.errors import UserError
from drafttrain.evaluation.efficiency import Efficiency
from drafttrain.evaluation.rows import (
    STUDENT,
    Difference,
    Interval,
    Row,
    Sample,
    Setting,
    by_position,
    make_rows,
    ratio_interval,
    repeat_interval,
    summarise,
    tau_interval,
)
from drafttrain.evaluation.runners import GENERATE, PLAIN, Facts
from tests.evaluation.toys import sample

SETTING = Setting(
    "run-1", "toy", "f00d", "float32", "mine", "beef", 0.0, 0, 1.0, 32, 1, 0, "cpu", 2, {"torch": "2"}, None,
    "2025-01-01",
)  # fmt: skip
PLAINLY = [sample("a", PLAIN, 4.0, 40, 40), sample("b", PLAIN, 1.0, 10, 10)]
DRAFTED = [sample("a", "mine", 1.0, 40, 10), sample("b", "mine", 0.5, 10, 10)]


def test_accepted_length_is_pooled_over_prompts_not_a_mean_of_means() -> None:
    uneven = [sample("a", "mine", 1.0, 40, 10), sample("b", "mine", 0.5, 10, 5)]
    assert summarise(uneven, PLAINLY, Facts(), "mine", "all", "all").tau == (40 + 10) / (10 + 5)


def test_speed_up_compares_seconds_per_token_over_all_prompts_without_the_prefill() -> None:
    row = summarise(DRAFTED, PLAINLY, Facts(), "mine", "all", "all")
    assert row.speedups[PLAIN].value == pytest.approx((5.0 / 50) / (1.5 / 50))
    assert row.tokens_per_second == pytest.approx(50 / 1.5)
    assert row.plain_tokens_per_second == pytest.approx(50 / 5.0)
    assert row.yield_of_tau == pytest.approx((5.0 / 1.5) / 2.5)


def test_speed_up_is_per_token_where_outputs_have_different_lengths() -> None:
    longer = [sample("a", "mine", 4.0, 80, 20)]
    assert ratio_interval(longer, PLAINLY[:1]).value == pytest.approx(2.0)


def test_tokens_with_prefill_count_its_token_and_its_time() -> None:
    row = summarise(DRAFTED, PLAINLY, Facts(), "mine", "all", "all")
    assert row.tokens_per_second_with_prefill == pytest.approx(52 / 3.5)


def test_conditional_acceptance_nodes_and_time_split_are_pooled() -> None:
    row = summarise(DRAFTED, PLAINLY, Facts(), "mine", "all", "all")
    assert row.alpha == ((30 + 0) / (10 + 10),)
    assert row.nodes_per_round == 4.0
    assert row.seconds["prefill"] == 2.0
    assert row.seconds["score"] == 1.5


def test_the_interval_is_the_percentile_bootstrap_over_prompts() -> None:
    rng = np.random.default_rng(5)
    seconds, ours = rng.uniform(3, 5, 30), rng.uniform(1, 4, 30)
    plain = [sample(str(n), PLAIN, float(s), 40, 40) for n, s in enumerate(seconds)]
    own = [sample(str(n), "mine", float(s), 40, 20) for n, s in enumerate(ours)]
    got = ratio_interval(own, plain)
    expected = bootstrap(
        (seconds, ours), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, method="percentile",
        vectorized=True, n_resamples=10_000, random_state=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert got.low == pytest.approx(expected.low, abs=0.03 * width)  # two draws of 10,000 resamples differ by about 1%
    assert got.high == pytest.approx(expected.high, abs=0.03 * width)


def width(got: Interval) -> float:
    assert got.low is not None and got.high is not None
    return got.high - got.low


def decoded(seconds: np.ndarray, label: str, tasks: int) -> list[Sample]:
    """A prompt for each of `seconds`, by turns of so many tasks."""
    return [sample(str(n), label, float(one), 40, 20, task=f"task-{n % tasks}") for n, one in enumerate(seconds)]


def test_prompts_are_resampled_within_their_tasks() -> None:
    """What tasks differ by is not left to chance: the suite has a fixed number of prompts of each."""
    seconds = np.tile([1.0, 2.0, 4.0], 10)  # every task alike in itself
    own, plain = decoded(seconds, "mine", 3), decoded(np.full(30, 4.0), PLAIN, 3)
    assert width(ratio_interval(own, plain)) == pytest.approx(0.0)
    assert width(tau_interval(own)) == pytest.approx(0.0)
    together = [replace(one, task="math") for one in own]
    assert width(ratio_interval(together, [replace(one, task="math") for one in plain])) > 0.3


def test_every_task_weighs_in_the_interval_as_in_the_value_however_few_prompts_it_has() -> None:
    """Tasks whose prompts are all alike have no spread: what is resampled is the value itself."""
    few = [sample(f"few-{n}", "mine", 1.0, 40, 10, task="few") for n in range(2)]
    many = [sample(f"many-{n}", "mine", 1.0, 40, 40, task="many") for n in range(10)]
    got = tau_interval([*few, *many])
    assert got.value == pytest.approx(12 * 40 / (2 * 10 + 10 * 40))
    assert (got.low, got.high) == pytest.approx((got.value, got.value))


def test_the_interval_within_tasks_is_as_wide_as_theory_says_however_few_prompts_a_task_has() -> None:
    rng = np.random.default_rng(3)
    for prompts, tasks in ((40, 20), (60, 6)):
        seconds = rng.uniform(3.9, 4.1, prompts)  # little spread: the ratio is all but linear in it
        own, plain = decoded(seconds, "mine", tasks), decoded(np.full(prompts, 8.0), PLAIN, tasks)
        within = np.mean([seconds[task::tasks].var(ddof=1) for task in range(tasks)])
        expected = 2 * 1.96 * np.sqrt(within / prompts) / seconds.mean() * (8.0 / seconds.mean())
        assert width(ratio_interval(own, plain)) == pytest.approx(expected, rel=0.05)  # 10,000 resamples: about 1%


def test_where_a_task_has_one_prompt_alone_all_are_resampled_as_one() -> None:
    own, plain = decoded(np.linspace(1, 4, 9), "mine", 4), decoded(np.full(9, 4.0), PLAIN, 4)
    lonely = [*own, sample("lonely", "mine", 2.0, 40, 20, task="lonely")], [*plain, sample("lonely", PLAIN, 4.0, 40, 20, task="lonely")]
    as_one = [[replace(one, task="math") for one in side] for side in lonely]
    assert ratio_interval(*lonely) == ratio_interval(*as_one)
    assert ratio_interval(own, plain) != ratio_interval(*([replace(one, task="math") for one in side] for side in (own, plain)))


def passes(*speedups: float) -> tuple[list[Sample], list[Sample]]:
    """Eight prompts that differ a lot, run once for each of `speedups`."""
    own, plain = [], []
    for repeat, speedup in enumerate(speedups):
        plain += [replace(sample(str(n), PLAIN, 4.0, 40, 40), repeat=repeat) for n in range(8)]
        own += [replace(sample(str(n), "mine", (1 + n) / 4.5 * 4.0 / speedup, 40, 20), repeat=repeat) for n in range(8)]
    return own, plain


def test_the_interval_over_repeats_is_where_another_run_of_the_same_prompts_falls() -> None:
    """95 of 100 pairs of runs lie so that the second is in the first's interval; prompts that differ do not widen it."""
    rng = np.random.default_rng(7)
    for R in (2, 3, 5):
        spread, inside, tries = 0.01, 0, 400
        for _ in range(tries):
            one, other = (repeat_interval(*passes(*1.5 * np.exp(rng.normal(0, spread, R)))) for _ in range(2))
            assert one.low is not None and one.high is not None
            inside += one.low <= other.value <= one.high
        assert abs(inside / tries - 0.95) < 3.5 * np.sqrt(0.95 * 0.05 / tries)
    assert width(repeat_interval(*passes(1.5, 1.5))) == pytest.approx(0.0)
    assert width(ratio_interval(*passes(1.5, 1.5))) > 0.5
    assert repeat_interval(*passes(1.5)) == Interval(pytest.approx(1.5), None, None)


def test_students_t_is_the_tables() -> None:
    for degrees, known in enumerate(STUDENT, 1):
        assert known == pytest.approx(t.ppf(0.975, degrees), abs=6e-4)


def test_repeats_are_pooled_and_a_row_says_where_they_would_fall_again() -> None:
    own, plain = passes(1.4, 1.6)
    row = rows_of(*plain, *own)["mine", "all", "all"].measured
    assert (row.prompts, row.rounds, row.tokens) == (8, 2 * 8 * 20, 2 * 8 * 40)
    assert row.speedups[PLAIN].value == pytest.approx(2 / (1 / 1.4 + 1 / 1.6))
    assert row.repeat_intervals[PLAIN] == repeat_interval(own, plain)
    assert rows_of(*PLAINLY, *DRAFTED)["mine", "all", "all"].measured.repeat_intervals[PLAIN].low is None


def test_the_accepted_length_has_an_interval_over_prompts_around_the_pooled_value() -> None:
    own = [sample(str(n), "mine", 1.0, 40, rounds) for n, rounds in enumerate((10, 20, 40, 20))]
    got = tau_interval(own)
    assert got.value == summarise(own, own, Facts(), "mine", "all", "all").tau == 160 / 90
    assert got.low is not None and got.high is not None and 1.0 < got.low < got.value < got.high < 4.0
    again = tau_interval(own * 3)
    assert (again.value, again.low, again.high) == pytest.approx((got.value, got.low, got.high))
    assert tau_interval(own[:1]).low is None


def test_rounds_are_counted_where_in_the_answer_they_begin() -> None:
    long = replace(DRAFTED[0], outcome=replace(DRAFTED[0].outcome, kept=[4, 10, 1, 1, 3]))  # begin behind 1, 5, 15, 16, 17 tokens
    short = replace(DRAFTED[1], outcome=replace(DRAFTED[1].outcome, kept=[2]))
    assert by_position([long, short]) == ((4, 17), (2, 4))
    assert by_position(DRAFTED) == ()


@pytest.mark.parametrize(("draft_length", "depths", "stretches"), [(16, 0, 7), (17, 0, 6), (0, 0, 8), (4, 24, 6)])
def test_stretches_in_which_the_length_limit_can_cut_a_round_are_not_shown(draft_length: int, depths: int, stretches: int) -> None:
    row = rows_of(*PLAINLY, *DRAFTED)["mine", "all", "all"]
    measured = replace(row.measured, draft_length=draft_length, alpha=(0.5,) * depths, positions=((20, 40),) * 8)
    assert len(replace(row, max_new_tokens=128, measured=measured).uncut.positions) == stretches


def test_speed_ups_are_given_against_every_baseline_of_the_run() -> None:
    peer = [sample("a", GENERATE, 2.0, 40, 40), sample("b", GENERATE, 1.0, 10, 10)]
    speedups = rows_of(*PLAINLY, *DRAFTED, *peer)["mine", "all", "all"].measured.speedups
    assert {name: ratio.value for name, ratio in speedups.items()} == pytest.approx({PLAIN: 5 / 1.5, GENERATE: 3 / 1.5})
    assert set(rows_of(*PLAINLY, *DRAFTED)["mine", "all", "all"].measured.speedups) == {PLAIN}


def test_rows_written_before_a_field_was_added_are_read_with_its_default() -> None:
    row = rows_of(*PLAINLY, *DRAFTED)["mine", "all", "all"]
    added = {"policy", "tau_interval", "positions", "quality", "repeat_intervals", "hybrid_costs"}
    before = {key: value for key, value in row.to_json().items() if key not in added}
    assert Row.from_json(before, "here") == replace(row, measured=replace(row.measured, tau_interval=None, repeat_intervals={}))


def test_repeats_of_a_prompt_do_not_narrow_the_interval() -> None:
    plain = [sample(str(n), PLAIN, 4.0, 40, 40) for n in range(8)]
    own = [sample(str(n), "mine", 1.0 + n, 40, 20) for n in range(8)]
    assert ratio_interval(own * 5, plain * 5) == pytest.approx(ratio_interval(own, plain))


def test_one_prompt_alone_has_no_interval() -> None:
    alone = ratio_interval(DRAFTED[:1], PLAINLY[:1])
    assert (alone.value, alone.low, alone.high) == (4.0, None, None)


def rows_of(*samples: Sample) -> dict[tuple[str, str, str], Row]:
    shape = {"shape": "chain", "length": 4}
    facts = {label: Facts() for label in (PLAIN, GENERATE) if any(one.label == label for one in samples)}
    facts |= {"mine": Facts("eagle3", "cafe", "greedy", True, "deterministic", shape, 4, 4)}
    efficiency = {"mine": Efficiency(0.10, 0.8, 1.5)}
    rows = make_rows(samples, facts, efficiency, SETTING)
    return {(row.measured.label, row.measured.task, row.measured.outputs): row for row in rows}


def test_there_is_a_row_for_each_runner_task_and_kind_of_outputs() -> None:
    qa = [sample("q", PLAIN, 2.0, 20, 20, task="qa"), sample("q", "mine", 1.0, 20, 10, task="qa")]
    rows = rows_of(*PLAINLY, *DRAFTED, *qa)
    assert set(rows) == set(product((PLAIN, "mine"), ("math", "qa", "all"), ("all", "not_looping")))
    assert rows["mine", "all", "all"].measured.rounds == 30
    assert rows["mine", "qa", "all"].measured.rounds == 10


def test_a_prompt_is_left_out_of_not_looping_where_either_output_loops() -> None:
    looping_plain = sample("c", PLAIN, 1.0, 40, 40, looping=True)
    looping_own = sample("b", "mine", 0.5, 10, 10, looping=True)
    rows = rows_of(*PLAINLY, looping_plain, DRAFTED[0], looping_own, sample("c", "mine", 1.0, 40, 10))
    assert rows["mine", "all", "not_looping"].measured.rounds == DRAFTED[0].outcome.statistics.rounds
    assert rows["mine", "all", "not_looping"].measured.plain_tokens_per_second == pytest.approx(40 / 4.0)
    assert rows["mine", "all", "all"].measured.looping == pytest.approx(1 / 3)
    assert rows[PLAIN, "all", "not_looping"].measured.prompts == 2


def test_where_every_output_loops_there_is_no_row_without_loops() -> None:
    rows = rows_of(sample("a", PLAIN, 4.0, 40, 40, looping=True), DRAFTED[0])
    assert {kind for *_, kind in rows} == {"all"}


def test_efficiency_stands_in_the_row_over_all_tasks_only() -> None:
    rows = rows_of(*PLAINLY, *DRAFTED)
    assert rows["mine", "all", "all"].measured.loop_efficiency == pytest.approx(0.8)
    assert rows["mine", "all", "all"].measured.drafting_overhead == pytest.approx(1.5)
    assert rows["mine", "math", "all"].measured.loop_efficiency is None
    assert rows[PLAIN, "all", "all"].measured.loop_efficiency is None


def test_differing_outputs_are_counted_with_their_margins_and_prompts() -> None:
    other = sample("b", "mine", 0.5, 10, 10, difference=Difference(3, 0.125))
    exactness = rows_of(*PLAINLY, DRAFTED[0], other)["mine", "all", "all"].measured.exactness
    assert exactness is not None
    assert (exactness.compared, exactness.different, exactness.margins, exactness.prompts) == (2, 1, (0.125,), ("b",))
    assert rows_of(*PLAINLY, *DRAFTED)[PLAIN, "all", "all"].measured.exactness is None


def test_a_row_and_a_sample_survive_the_way_through_json() -> None:
    other = sample("b", "mine", 0.5, 10, 10, difference=Difference(3, None))
    rounds = replace(DRAFTED[0], outcome=replace(DRAFTED[0].outcome, kept=[4] * 10))
    for row in rows_of(*PLAINLY, rounds, other).values():
        assert Row.from_json(json.loads(json.dumps(row.to_json())), "here") == row
    assert Sample.from_json(json.loads(json.dumps(other.to_json()))) == other


def test_a_row_of_another_format_or_with_a_missing_key_is_refused() -> None:
    data = rows_of(*PLAINLY, *DRAFTED)["mine", "all", "all"].to_json()
    with pytest.raises(UserError, match="here: not a result row of format 1"):
        Row.from_json({**data, "format": 99}, "here")
    with pytest.raises(UserError, match="here: a broken result row"):
        Row.from_json({key: value for key, value in data.items() if key != "tau"}, "here")


def test_alpha_is_unknown_where_nothing_was_tried_in_older_rows_too() -> None:
    never = replace(DRAFTED[0].outcome.statistics, attempts=[8, 4, 0], accepts=[4, 0, 0])
    mine = [replace(one, outcome=replace(one.outcome, statistics=never)) for one in DRAFTED]
    row = rows_of(*PLAINLY, *mine)["mine", "all", "all"]
    assert (row.measured.alpha, row.measured.attempts) == ((0.5, 0.0, None), (16, 8, 0))
    assert Row.from_json(json.loads(json.dumps(row.to_json())), "here") == row
    older = {name: value for name, value in row.to_json().items() if name != "attempts"} | {"alpha": [0.5, 0.0, 0.0]}
    read = Row.from_json(older, "here").measured
    assert (read.alpha, read.attempts) == ((0.5, 0.0, None), ())
    assert read.behind_alpha == [20, 10, 0]  # the most that there can have been
