"""Two results side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drafttrain.core.errors import UserError
from drafttrain.evaluation.rows import Interval, Row
from drafttrain.evaluation.runners import PLAIN
from drafttrain.report.compare import apart, compare, counterparts, figures, half_width, side_by_side
from drafttrain.report.page import ReportedRun
from tests.evaluation.test_rows import passes, rows_of
from tests.evaluation.toys import sample


def run(name: str, seconds: float = 1.0, rounds: int = 10, plain: float = 4.0, **changes: Any) -> ReportedRun:
    """Eight prompts of 40 tokens, whose times differ a little from each other."""
    items = [(str(n), 1 + n / 100) for n in range(8)]
    plainly = [sample(item, PLAIN, plain * spread, 40, 40) for item, spread in items]
    mine = [sample(item, "mine", seconds * (2 - spread), 40, rounds) for item, spread in items]
    return ReportedRun(name, Path(name), [replace(row, **changes) for row in rows_of(*plainly, *mine).values()])


def renamed(one: ReportedRun, label: str) -> ReportedRun:
    rows = [replace(row, measured=replace(row.measured, label=label)) if row.measured.label == "mine" else row for row in one.rows]
    return replace(one, rows=rows)


def figure(left: ReportedRun, right: ReportedRun, name: str) -> Any:
    pair = next(pair for pair in compare(left, right).pairs if pair.label != PLAIN and pair.task == "all")
    return next(one for one in figures(pair) if one.name == name)


def test_a_speed_up_outside_the_others_interval_differs_and_one_inside_does_not() -> None:
    assert figure(run("a"), run("b", seconds=2.0), "speed-up over plain").differs is True
    assert figure(run("a"), run("b", seconds=1.001), "speed-up over plain").differs is False
    assert figure(run("a"), run("b", rounds=20), "tau").differs is True
    assert figure(run("a"), run("b", rounds=20), "tau").change == "-50.0%"


def test_intervals_are_apart_only_where_neither_end_reaches_the_other() -> None:
    assert apart(Interval(1, 0.9, 1.1), Interval(1.3, 1.2, 1.4)) is apart(Interval(1.3, 1.2, 1.4), Interval(1, 0.9, 1.1)) is True
    assert apart(Interval(1, 0.9, 1.2), Interval(1.3, 1.2, 1.4)) is False
    assert apart(Interval(1, None, None), Interval(9, 8.0, 10.0)) is None


def test_what_was_reached_without_looping_outputs_stands_beside_the_whole() -> None:
    left, right = run("a"), run("b", rounds=20)
    slower = [
        replace(row, measured=replace(row.measured, tau=row.measured.tau / 2, tau_interval=None))
        if row.measured.outputs == "not_looping" else row for row in right.rows
    ]  # fmt: skip
    got = figure(left, replace(right, rows=slower), "tau, no loops")
    assert (got.left.split()[0], got.right) == ("4.00", "1.00")
    assert figure(left, right, "speed-up over plain, no loops").left == figure(left, right, "speed-up over plain").left


def test_the_time_split_is_given_for_a_token() -> None:
    got = figure(run("a"), run("b", seconds=2.0), "ms per token: score")
    assert (got.left, got.right, got.change) == ("24.12", "48.25", "+100.0%")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_fingerprint": "other"}, r"their target differs \('toy' f00d and 'toy' other\)"),
        ({"suite_hash": "other"}, "their suite differs"),
        ({"temperature": 1.0}, r"their temperature differs \(0.0 and 1.0\)"),
        ({"max_new_tokens": 64}, "their max_new_tokens differs"),
    ],
)
def test_results_of_other_texts_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"'a' and 'b' cannot be compared: {said}"):
        compare(run("a"), run("b", **change))


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"threads": 8}, {"dtype": "bfloat16"}, {"versions": {"torch": "3"}}])
def test_another_machine_is_a_warning(change: dict[str, Any]) -> None:
    (warning,) = compare(run("a"), run("b", **change)).warnings
    assert warning.startswith(f"{next(iter(change))} differs: ")


def test_a_machine_that_ran_at_another_speed_is_a_warning() -> None:
    (warning,) = compare(run("a"), run("b", plain=8.0)).warnings
    assert "plain decoding itself ran at 9.7 | 4.8 tokens/s" in warning
    assert compare(run("a"), run("b")).warnings == []


def test_contenders_are_paired_by_name_and_the_last_two_left_with_each_other() -> None:
    assert counterparts([PLAIN, "a", "b"], [PLAIN, "b", "c"]) == [(PLAIN, PLAIN), ("b", "b"), ("a", "c")]
    assert counterparts([PLAIN, "a", "b"], [PLAIN, "c"]) == [(PLAIN, PLAIN)]
    got = compare(run("a"), renamed(run("b"), "other"))
    assert {pair.label for pair in got.pairs} == {PLAIN, "mine | other"}


def test_contenders_without_a_counterpart_are_listed_and_nothing_in_common_is_refused() -> None:
    more: list[Row] = [*run("a").rows, *(row for row in renamed(run("a"), "wide").rows if row.measured.label == "wide")]
    assert compare(ReportedRun("a", Path(), more), run("b")).alone == ["a: wide"]
    with pytest.raises(UserError, match="no contender in common"):
        compare(ReportedRun("a", Path(), more), renamed(run("b"), "third"))


def test_the_last_evaluation_of_a_file_counts() -> None:
    rows = [*run("a", seconds=9.0, suite_hash="earlier").rows, *(replace(row, run="run-2") for row in run("a").rows)]
    assert figure(ReportedRun("a", Path(), rows), run("b"), "speed-up over plain").change == "+0.0%"


def test_the_newest_evaluations_that_asked_the_same_are_compared() -> None:
    earlier = [replace(row, run="run-0") for row in run("a", seconds=2.0).rows]
    mixed = ReportedRun("b", Path("b"), [*earlier, *run("b", seconds=9.0, suite_hash="later").rows])
    assert figure(run("a"), mixed, "speed-up over plain").change == "-50.0%"
    assert figure(mixed, run("a"), "speed-up over plain").change == "+100.0%"
    again = ReportedRun("b", Path("b"), [*[replace(row, run="run-00") for row in run("a", seconds=4.0).rows], *mixed.rows])
    assert figure(again, again, "speed-up over plain").change == "+100.0%"


def test_a_lossy_row_without_quality_is_refused() -> None:
    lossy = run("b")
    rows = [replace(row, measured=replace(row.measured, lossless=False, rule="typical")) for row in lossy.rows]
    with pytest.raises(UserError, match="rule 'typical' is lossy and the row has no quality"):
        compare(run("a"), replace(lossy, rows=rows))


def test_the_terminal_shows_both_and_marks_what_differs() -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(side_by_side(compare(run("first"), run("second", seconds=2.0, device="cuda"))))
    text = console.export_text()
    (line,) = [line for line in text.splitlines() if "speed-up over plain " in line]
    assert "4.1" in line and "2.0" in line and "-50.0%" in line and "differs" in line
    assert "warning: device differs: cpu | cuda" in text
    assert "first" in text and "second" in text


def repeated(name: str, *speedups: float, **changes: Any) -> ReportedRun:
    """Eight prompts, run once for each of `speedups`."""
    own, plain = passes(*speedups)
    return ReportedRun(name, Path(name), [replace(row, **changes) for row in rows_of(*plain, *own).values()])


def test_a_second_measurement_is_held_against_both_intervals_of_the_first() -> None:
    (near,) = compare(repeated("a", 1.50, 1.51), repeated("b", 1.52, 1.51)).again
    assert (near.identical, near.inside(False), near.inside(True)) == (True, True, True)
    (far,) = compare(repeated("a", 1.50, 1.51), repeated("b", 1.70, 1.71)).again
    assert (far.inside(False), far.inside(True)) == (True, False)  # these prompts differ more from each other than the two runs do
    (once,) = compare(repeated("a", 1.50), repeated("b", 1.51)).again
    assert (once.inside(False), once.inside(True)) == (True, None)


def test_each_has_to_lie_in_the_others_interval_not_one_in_one() -> None:
    (again,) = compare(repeated("a", 1.0, 2.0), repeated("b", 1.90, 1.91)).again
    left, right = again.intervals(True)
    assert left is not None and right is not None and left.low is not None and left.high is not None
    assert left.low < right.value < left.high
    assert again.inside(True) is False


def test_contenders_that_drafted_in_another_way_are_no_second_measurement() -> None:
    other = repeated("b", 1.50, 1.51)
    rows = [replace(row, measured=replace(row.measured, drafter_fingerprint="other")) for row in other.rows]
    assert compare(repeated("a", 1.50, 1.51), replace(other, rows=rows)).again == []


def test_another_tau_is_a_warning_where_greedy_decoding_in_fp32_leaves_none() -> None:
    (warning,) = compare(run("a"), run("b", rounds=11)).warnings
    assert warning == "mine: greedy in float32, and yet 320 tokens in 80 rounds | 320 in 88"
    assert compare(run("a", dtype="bfloat16"), run("b", dtype="bfloat16", rounds=11)).warnings == []
    assert compare(run("a", temperature=1.0), run("b", temperature=1.0, rounds=11)).warnings == []
    assert compare(run("a"), run("b")).warnings == []


def test_one_file_given_twice_is_its_last_two_evaluations() -> None:
    one, other, last = (run("a", seconds=seconds).rows for seconds in (9.0, 2.0, 1.0))
    named = [replace(row, run=f"run-{number}") for number, rows in enumerate((one, other, last)) for row in rows]
    both = ReportedRun("a", Path("a"), named)
    assert compare(both, both).names == ("a, before", "a, last")
    assert figure(both, both, "speed-up over plain").change == "+100.0%"
    with pytest.raises(UserError, match="'a' holds one evaluation, which cannot be compared with itself"):
        compare(run("a"), run("a"))


def test_half_widths_are_shares_of_the_value() -> None:
    assert half_width(Interval(2.0, 1.9, 2.1)) == pytest.approx(0.05)
    assert half_width(Interval(2.0, None, None)) is None


def test_the_terminal_says_whether_the_second_measurement_repeats_the_first() -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(side_by_side(compare(repeated("first", 1.50, 1.51), repeated("second", 1.70, 1.71))))
    lines = console.export_text().splitlines()
    prompts, repeats = [line for line in lines if "over prompts " in line or "over repeats " in line]
    assert "2.0000, identical" in prompts and "640 / 320" in prompts and prompts.rstrip().endswith("inside")
    assert "±6." in repeats and repeats.rstrip().endswith("outside")
