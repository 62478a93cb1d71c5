"""Two results side by side: accepted length, speed-up, conditional acceptance and time split, contender by contender.

What has a bootstrap interval is called different where the two intervals do not overlap; a difference inside them is noise until more
prompts say otherwise. What both measured in the same way is also looked at as one measurement done twice (`Again`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from drafttrain.core.errors import UserError
from drafttrain.evaluation.rows import ALL, BASELINES, Interval, Measured, Outputs, Row
from drafttrain.evaluation.runners import PLAIN
from drafttrain.report.page import ReportedRun
from drafttrain.report.tables import NONE, interval, quality, refuse_unmeasured_quality
from drafttrain.runtime.stats import PHASES

ASKED: dict[str, str] = {
    "target_fingerprint": "target", "suite_hash": "suite", "temperature": "", "top_k": "", "top_p": "", "max_new_tokens": "",
}  # fmt: skip
"""Where these differ, the two decoded other texts and nothing can be compared; by the field that says their name, if there is one."""
MEASURED_ON = ("device", "threads", "dtype", "versions", "repeats")
"""Where these differ, times differ for another reason than the contenders."""
WAY = ("drafter", "drafter_fingerprint", "rule", "draws", "shape", "options", "policy")
"""Where these agree, two contenders drafted and verified alike."""
STEADY = 0.05  # plain decoding's speed may differ by this share before it is pointed out


OUTPUTS: tuple[Outputs, ...] = get_args(Outputs)


@dataclass(frozen=True)
class ComparedFigure:
    """One quantity in both results; `differs` is None where no interval is known."""

    name: str
    left: str
    right: str
    change: str = ""
    differs: bool | None = None


@dataclass(frozen=True)
class Pair:
    """One contender on one task in both results."""

    label: str
    left: Measured
    right: Measured
    unlooped: tuple[Measured, Measured] | None = None
    """Both without the prompts whose plain output loops; None where one has no such prompt left."""

    @property
    def task(self) -> str:
        return self.left.task


@dataclass(frozen=True)
class RunComparison:
    """Two results that may be compared."""

    names: tuple[str, str]
    pairs: list[Pair]
    alone: list[str]
    """Contenders that only one of the two has."""
    warnings: list[str]
    again: list[Again]
    """Contenders that both measured in the same way."""


@dataclass(frozen=True)
class Again:
    """One contender, measured twice in the same way."""

    label: str
    left: Measured
    right: Measured

    @property
    def identical(self) -> bool:
        """Whether tau is the same to the last digit: as many tokens in as many rounds."""
        return (self.left.tokens, self.left.rounds) == (self.right.tokens, self.right.rounds)

    def inside(self, repeated: bool) -> bool | None:
        """Whether each speed-up lies within the other's interval, over prompts or over repeats; None where one is unknown."""
        left, right = self.intervals(repeated)
        return _within(left, right) if left is not None and right is not None else None

    def intervals(self, repeated: bool) -> tuple[Interval | None, Interval | None]:
        left, right = ((one.repeat_intervals if repeated else one.speedups).get(PLAIN) for one in (self.left, self.right))
        return left, right


def compare(left: ReportedRun, right: ReportedRun) -> RunComparison:
    """The newest evaluations of the two that asked the same, or the newest two of one file that did. Raises `UserError` where target, suite
    or sampling differ, a lossy rule's quality was not measured, or no contender has a counterpart."""
    left_rows, right_rows = newest_alike(left, right)
    for row in (*left_rows, *right_rows):
        refuse_unmeasured_quality(row)
    _refuse_other_questions(left, right, left_rows[0], right_rows[0])
    left_labels = _contender_labels(left_rows)
    right_labels = _contender_labels(right_rows)
    mates = counterparts(left_labels, right_labels)
    pairs = _paired_rows(mates, left_rows, right_rows)
    if not any(pair.label != PLAIN for pair in pairs):
        raise UserError(f"'{left.name}' and '{right.name}' have no contender in common; give their contenders the same labels")
    again = measured_again(pairs)
    notes = [*warnings(left_rows[0], right_rows[0]), *unsteady(pairs)]
    # only greedy decoding in fp32 leaves nothing to rounding, so only there must equal drafters give equal counts
    if left_rows[0].temperature == 0 and left_rows[0].dtype == right_rows[0].dtype == "float32":
        notes += unequal(again)
    return RunComparison(_names(left, right), pairs, _without_mate(left, right, left_labels, right_labels, mates), notes, again)


def _names(left: ReportedRun, right: ReportedRun) -> tuple[str, str]:
    if left.file.resolve() == right.file.resolve():
        return f"{left.name}, before", f"{left.name}, last"
    return left.name, right.name


def _refuse_other_questions(left: ReportedRun, right: ReportedRun, left_row: Row, right_row: Row) -> None:
    """A `UserError` where the two evaluations did not ask the same of the target."""
    for field, shown_field in ASKED.items():
        left_value = vars(left_row)[field]
        right_value = vars(right_row)[field]
        if left_value == right_value:
            continue
        left_text, right_text = str(left_value), str(right_value)
        if shown_field:
            left_text = f"'{vars(left_row)[shown_field]}' {left_value}"
            right_text = f"'{vars(right_row)[shown_field]}' {right_value}"
        raise UserError(
            f"'{left.name}' and '{right.name}' cannot be compared: their {shown_field or field} differs ({left_text} and {right_text}); "
            f"evaluate both alike"
        )


def _contender_labels(rows: Iterable[Row]) -> list[str]:
    """Labels in the order of the file, of what was measured over all tasks."""
    return [row.measured.label for row in rows if row.measured.task == ALL and row.measured.outputs == OUTPUTS[0]]


def _paired_rows(mates: Iterable[tuple[str, str]], left_rows: Sequence[Row], right_rows: Sequence[Row]) -> list[Pair]:
    """The tasks that both of a pair of contenders were measured on, pair by pair."""
    all_outputs, not_looping = OUTPUTS
    left_all, right_all = _by_contender(left_rows, all_outputs), _by_contender(right_rows, all_outputs)
    left_steady, right_steady = _by_contender(left_rows, not_looping), _by_contender(right_rows, not_looping)
    pairs = []
    for left_label, right_label in mates:
        label = left_label if left_label == right_label else f"{left_label} | {right_label}"
        for (row_label, task), measured in left_all.items():
            if row_label != left_label or (right_label, task) not in right_all:
                continue
            steady = None
            if (left_label, task) in left_steady and (right_label, task) in right_steady:
                steady = left_steady[left_label, task], right_steady[right_label, task]
            pairs.append(Pair(label, measured, right_all[right_label, task], steady))
    return pairs


def _without_mate(
    left: ReportedRun, right: ReportedRun, left_labels: Iterable[str], right_labels: Iterable[str], mates: Iterable[tuple[str, str]]
) -> list[str]:
    """`RUN: LABEL` of every contender that has no counterpart."""
    paired_labels = {label for mate in mates for label in mate}
    alone = [f"{left.name}: {label}" for label in left_labels if label not in paired_labels]
    alone += [f"{right.name}: {label}" for label in right_labels if label not in paired_labels]
    return alone


def _by_contender(rows: Iterable[Row], outputs: Outputs) -> dict[tuple[str, str], Measured]:
    """What was measured over these outputs, by label and task."""
    return {(row.measured.label, row.measured.task): row.measured for row in rows if row.measured.outputs == outputs}


def measured_again(pairs: Iterable[Pair]) -> list[Again]:
    """The contenders, plain decoding aside, that drafted with the same weights in the same way."""
    whole = [pair for pair in pairs if pair.task == ALL and pair.label != PLAIN]
    return [Again(pair.label, pair.left, pair.right) for pair in whole if all(vars(pair.left)[key] == vars(pair.right)[key] for key in WAY)]


def unequal(again: Iterable[Again]) -> list[str]:
    """Greedy decoding in fp32 leaves nothing to chance or rounding: where tau differs all the same, something is wrong."""
    return [
        f"{one.label}: greedy in float32, and yet {one.left.tokens} tokens in {one.left.rounds} rounds | "
        f"{one.right.tokens} in {one.right.rounds}"
        for one in again if not one.identical and one.left.lossless and one.left.policy != "adaptive"
    ]  # fmt: skip


def newest_alike(left: ReportedRun, right: ReportedRun) -> tuple[list[Row], list[Row]]:
    """The newest evaluation on the right that one on the left asked the same as, and the newest of these; if none did, the newest two."""
    ours, theirs = evaluations(left.rows), evaluations(right.rows)
    same = left.file.resolve() == right.file.resolve()
    if same and len(ours) == 1:
        raise UserError(f"'{left.name}' holds one evaluation, which cannot be compared with itself; evaluate again, or give another run")
    pairs = [(a, b) for at, b in enumerate(theirs) for a in (theirs[at + 1 :] if same else ours)]
    return next(((a, b) for a, b in pairs if all(vars(a[0])[key] == vars(b[0])[key] for key in ASKED)), pairs[0])


def evaluations(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each run in a file, the newest run first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.run, []).append(row)
    return [*found.values()][::-1]


def counterparts(left: list[str], right: list[str]) -> list[tuple[str, str]]:
    """Labels that belong together: equal ones, and the one left over on each side where there is just one."""
    both = [(label, label) for label in left if label in right]
    rest = [label for label in left if label not in right], [label for label in right if label not in left]
    return [*both, (rest[0][0], rest[1][0])] if len(rest[0]) == len(rest[1]) == 1 else both


def warnings(left: Row, right: Row) -> list[str]:
    """Where the two were measured on different things."""
    return [
        f"{field} differs: {vars(left)[field]} | {vars(right)[field]}" for field in MEASURED_ON if vars(left)[field] != vars(right)[field]
    ]  # fmt: skip


def unsteady(pairs: Iterable[Pair]) -> list[str]:
    """Plain decoding's own speed tells whether the machine was the same."""
    for pair in pairs:
        speeds = pair.left.tokens_per_second, pair.right.tokens_per_second
        if pair.label == PLAIN and pair.task == ALL and abs(speeds[1] / speeds[0] - 1) > STEADY:
            return [f"plain decoding itself ran at {speeds[0]:.1f} | {speeds[1]:.1f} tokens/s: compare speed-ups, not times"]
    return []


def figures(pair: Pair) -> list[ComparedFigure]:
    """All quantities of a contender."""
    left, right = pair.left, pair.right
    out = _reached(left, right)
    if pair.unlooped is not None:
        out += _reached(*pair.unlooped, ", no loops")
    out.append(_number("tokens/s", left.tokens_per_second, right.tokens_per_second, 1))
    for depth in range(max(len(left.alpha), len(right.alpha))):
        a, b = (one.alpha[depth] if depth < len(one.alpha) else None for one in (left, right))
        out.append(ComparedFigure(f"alpha_{depth + 1}", _shown(a, 2), _shown(b, 2), "" if a is None or b is None else f"{b - a:+.2f}"))
    out.append(_number("ms per round", 1e3 * left.seconds_per_round, 1e3 * right.seconds_per_round, 1))
    for phase in PHASES[1:]:
        split = 1e3 * left.seconds_per_token[phase], 1e3 * right.seconds_per_token[phase]
        out.append(_number(f"ms per token: {phase}", *split, 2))
    out.append(_number("nodes a round", left.nodes_per_round, right.nodes_per_round, 1))
    out.append(_number("yield", left.yield_of_tau, right.yield_of_tau, 2))
    if left.loop_efficiency is not None and right.loop_efficiency is not None:
        out.append(_number("loop efficiency", left.loop_efficiency, right.loop_efficiency, 2))
    out.append(ComparedFigure("looping", f"{left.looping:.0%}", f"{right.looping:.0%}"))
    if {quality(left), quality(right)} != {NONE}:
        out.append(ComparedFigure("quality", quality(left), quality(right)))
    return out


def _reached(left: Measured, right: Measured, which: str = "") -> list[ComparedFigure]:
    """Accepted length and speed-ups. which: of the outputs, for the names."""
    tau = _ratio(f"tau{which}", left.tau_interval or _bare(left.tau), right.tau_interval or _bare(right.tau))
    return [tau] + [
        _ratio(f"speed-up over {baseline}{which}", left.speedups[baseline], right.speedups[baseline])
        for baseline in BASELINES if baseline in left.speedups and baseline in right.speedups
    ]  # fmt: skip


def side_by_side(comparison: RunComparison) -> Group:
    """For the terminal: a table for each contender, and one over the tasks."""
    parts: list[Table | Text] = [Text(f"warning: {warning}", "yellow") for warning in comparison.warnings]
    for pair in comparison.pairs:
        if pair.task == ALL and pair.label != PLAIN:
            shown = _table((pair.label, *comparison.names, "change", ""))
            for figure in figures(pair):
                shown.add_row(figure.name, figure.left, figure.right, figure.change, _mark(figure))
            parts.append(shown)
    tasks = _table(("contender", "task", *(f"{what}, {name}" for what in ("tau", "speed-up") for name in comparison.names), ""))
    for pair in comparison.pairs:
        if pair.task != ALL and pair.label != PLAIN:
            tau, speedup = figures(pair)[:2]
            both = ComparedFigure("", "", "", differs=_either(tau.differs, speedup.differs))
            tasks.add_row(pair.label, pair.task, tau.left, tau.right, speedup.left, speedup.right, _mark(both))
    parts.append(tasks)
    if comparison.again:
        parts += [_again_table(comparison), Text(AGAIN_NOTE, "dim")]
    if comparison.alone:
        parts.append(Text(f"in one of them only: {', '.join(comparison.alone)}", "dim"))
    return Group(*parts)


AGAIN_NOTE = (
    "measured twice in the same way: does each speed-up lie inside the other's 95% interval? Over prompts: what other prompts of the same "
    "tasks would give; over repeats: what the same prompts give when they are run again on this machine."
)


def _again_table(comparison: RunComparison) -> Table:
    """Two lines for each: over prompts and over repeats."""
    shown = _table(("measured twice", "tau", "tokens / rounds", "speed-up, 95%", *comparison.names, ""))
    for one in comparison.again:
        counts = f"{one.left.tokens} / {one.left.rounds}"
        counts += "" if one.identical else f" | {one.right.tokens} / {one.right.rounds}"
        told = one.label, f"{one.left.tau:.4f}, identical" if one.identical else f"{one.left.tau:.4f} | {one.right.tau:.4f}", counts
        for kind, repeated, said in (("over prompts", False, told), ("over repeats", True, ("", "", ""))):
            shown.add_row(*said, kind, *(_with_half_width(known) for known in one.intervals(repeated)), _inside(one.inside(repeated)))
    return shown


def _inside(inside: bool | None) -> Text:
    return {True: Text("inside", "dim"), False: Text("outside", "bold yellow"), None: Text("")}[inside]


def half_width(known: Interval) -> float | None:
    """Of an interval, as a share of its value; None where it is unknown."""
    if known.low is None or known.high is None or not known.value:
        return None
    return (known.high - known.low) / 2 / known.value


def _with_half_width(known: Interval | None) -> str:
    width = None if known is None else half_width(known)
    return NONE if known is None or width is None else f"{interval(known)} ±{width:.1%}"


def _within(left: Interval, right: Interval) -> bool | None:
    """Whether each value lies in the other's interval; None where one is unknown."""
    if left.low is None or left.high is None or right.low is None or right.high is None:
        return None
    return left.low <= right.value <= left.high and right.low <= left.value <= right.high


def apart(left: Interval, right: Interval) -> bool | None:
    """Whether two intervals do not overlap; None where one is unknown."""
    if left.low is None or left.high is None or right.low is None or right.high is None:
        return None
    return left.high < right.low or right.high < left.low


def _either(*marks: bool | None) -> bool | None:
    known = [mark for mark in marks if mark is not None]
    return any(known) if known else None


def _ratio(name: str, left: Interval, right: Interval) -> ComparedFigure:
    change = f"{right.value / left.value - 1:+.1%}" if left.value else ""
    return ComparedFigure(name, interval(left), interval(right), change, apart(left, right))


def _number(name: str, left: float, right: float, digits: int) -> ComparedFigure:
    return ComparedFigure(name, f"{left:.{digits}f}", f"{right:.{digits}f}", f"{right / left - 1:+.1%}" if left else "")


def _shown(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _bare(value: float) -> Interval:
    return Interval(value, None, None)


def _mark(figure: ComparedFigure) -> Text:
    return {True: Text("differs", "bold yellow"), False: Text("overlap", "dim"), None: Text("")}[figure.differs]


def _table(heads: Iterable[str]) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place == 0 or head in ("", "task") else "right")
    return table
