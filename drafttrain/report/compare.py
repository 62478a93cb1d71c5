"""Two results side by side: accepted length, speed-up, conditional acceptance and time split, contender by contender.

What has a bootstrap interval is called different where the two intervals do not overlap; a difference inside them is noise until more
prompts say otherwise. What both measured in the same way is also looked at as one measurement done twice (`Again`).
"""

from __future__ import annotations

from collections.abc import Iterable
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
    names = left.name, right.name
    if left.file.resolve() == right.file.resolve():
        names = f"{left.name}, before", f"{left.name}, last"
    ours, theirs = newest_alike(left, right)
    for row in (*ours, *theirs):
        refuse_unmeasured_quality(row)
    for field, named in ASKED.items():
        a, b = vars(ours[0])[field], vars(theirs[0])[field]
        if a != b:
            told = [f"'{vars(rows[0])[named]}' {value}" if named else str(value) for rows, value in ((ours, a), (theirs, b))]
            said = f"their {named or field} differs ({told[0]} and {told[1]})"
            raise UserError(f"'{left.name}' and '{right.name}' cannot be compared: {said}; evaluate both alike")
    found, unlooped = ([_by_contender(rows, outputs) for rows in (ours, theirs)] for outputs in get_args(Outputs))
    labels = [[label for label, task in known if task == ALL] for known in found]
    mates = counterparts(*labels)
    pairs = [
        Pair(
            a if a == b else f"{a} | {b}", one, found[1][b, task],
            (unlooped[0][a, task], unlooped[1][b, task]) if (a, task) in unlooped[0] and (b, task) in unlooped[1] else None,
        ) for a, b in mates for (label, task), one in found[0].items() if label == a and (b, task) in found[1]
    ]  # fmt: skip
    if not any(pair.label != PLAIN for pair in pairs):
        raise UserError(f"'{left.name}' and '{right.name}' have no contender in common; give their contenders the same labels")
    paired = {label for mate in mates for label in mate}
    alone = [f"{run.name}: {label}" for run, known in zip((left, right), labels, strict=True) for label in known if label not in paired]
    again = measured_again(pairs)
    told = [*warnings(ours[0], theirs[0]), *unsteady(pairs)]
    told += unequal(again) if ours[0].temperature == 0 and ours[0].dtype == theirs[0].dtype == "float32" else []
    return RunComparison(names, pairs, alone, told, again)


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
