"""Tables of `evaluation/rule_rows.py`'s rows: one a log of rounds, and one of what all logs say about each figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from drafttrain.evaluation.rows import Interval
from drafttrain.evaluation.rule_rows import CHAIN, RuleRow
from drafttrain.report.frontier import NONE

HEAD = (
    "rule", "accepted length [95%]", "no loops [95%]", "difference [95%]", "relative [95%]", "relative, no loops [95%]", "reached 1 ..",
)  # fmt: skip
HEAD_IID = (*HEAD, "P* 1 ..", "accepts 1 ..", "of P* 1 ..")


def rules_table(rows: Sequence[RuleRow]) -> str:
    """Markdown: a table for each log, with what it was measured on below it."""
    parts = []
    for some in _by_log(rows):
        head = _head(some)
        lines = [head, ("---", *["---:"] * (len(head) - 1)), *(_cells(row, len(head)) for row in some)]
        parts.append(f"**{_title(some[0])}**\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{footer(some[0])}")
    return "\n\n".join(parts) + "\n"


def rules_terminal(rows: Sequence[RuleRow]) -> Group:
    """The same for `rich.print`."""
    parts: list[Table | Text] = []
    for some in _by_log(rows):
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, title=_title(some[0]), title_justify="left")
        head = _head(some)
        for name in head:
            table.add_column(name, justify="left" if name == HEAD[0] else "right", no_wrap=name == HEAD[0])
        for row in some:
            table.add_row(*_cells(row, len(head)))
        parts += [table, Text(footer(some[0]), style="dim")]
    return Group(*parts)


@dataclass(frozen=True)
class RuleFigure:
    """A comparison that every log of its draws allows: how far a rule is above another one, or of its limit."""

    name: str
    draws: str
    value: Callable[[dict[str, RuleRow]], Interval | None]


def _above(rule: str) -> Callable[[dict[str, RuleRow]], Interval | None]:
    return lambda rows: rows[rule].relative if rule in rows and rows[rule].against != rule else None


def _above_chain(rows: dict[str, RuleRow]) -> Interval | None:
    chain = rows.get(f"rejection, {CHAIN}")
    if chain is None:
        return None
    one = chain.relative  # of the chain to the tree: turned round
    low, high = ((None if end is None else 1 / (1 + end) - 1) for end in (one.high, one.low))
    return Interval(1 / (1 + one.value) - 1, low, high)


def _least_of_limit(rows: dict[str, RuleRow]) -> Interval | None:
    row = rows.get("multidraft")
    if row is None or not row.of_limit:
        return None
    least = min(row.of_limit, key=lambda share: share.value)
    return Interval(*(None if end is None else end - 1 for end in (least.value, least.low, least.high)))  # type: ignore[arg-type]


FIGURES = (
    RuleFigure("`traversal` above `recursive`", "any", _above("traversal")),
    RuleFigure("`recursive` above the chain of first-born children", "without_replacement", _above_chain),
    RuleFigure("`multidraft` above `recursive`", "iid", _above("multidraft")),
    RuleFigure("`multidraft` and P*, at the level where it is farthest from it", "iid", _least_of_limit),
)


def figures_table(rows: Sequence[RuleRow]) -> str:
    """Markdown: what the logs say about each of `FIGURES`, a line a log."""
    lines = [
        ("figure", "draws", "drafter", "temperature", "value [95%]", "no loops [95%]"), ("---", "---", "---", "---:", "---:", "---:"),
    ]  # fmt: skip
    logs = _by_log(rows)
    for figure in FIGURES:
        for some in logs:
            one, found = some[0], figure.value({row.rule: row for row in some})
            if figure.draws in ("any", one.draws) and found is not None:
                straight = figure.value({row.rule: replace(row, **vars(row.not_looping)) for row in some if row.not_looping is not None})
                values = (_shown(found, "{:+.1%}"), _shown(straight, "{:+.1%}"))
                lines.append((figure.name, one.draws, one.contender, str(one.temperature), *values))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _title(row: RuleRow) -> str:
    return f"{row.contender}, {row.draws} draws, temperature {row.temperature}"


def footer(row: RuleRow) -> str:
    """What a table was measured on and with."""
    installed = ", ".join(f"{package} {version}" for package, version in row.versions.items())
    looping = "" if row.looping is None else f"{row.looping:.0%} of the answers loop; "
    return (
        f"{row.rounds:,} rounds of {row.prompts} prompts, {row.draws} draws, decoded by {row.decoded_by} "
        f"({row.decoded_tau:.3f} tokens a round), each judged {row.chances} times; differences are to {row.against}. "
        f"{looping}"
        f"Contender {row.contender}; target {row.target} ({row.target_fingerprint}, {row.dtype}); suite {row.suite} ({row.suite_hash}), "
        f"at most {row.max_new_tokens} new tokens, temperature {row.temperature}, top-k {row.top_k}, top-p {row.top_p}, seed {row.seed}; "
        f"{row.device}; {installed}; {row.date[:10]}."
    )


def _by_log(rows: Sequence[RuleRow]) -> list[list[RuleRow]]:
    """Rows of each log; of a rule that was measured more than once the last."""
    logs: dict[tuple[str, str], dict[str, RuleRow]] = {}
    for row in rows:
        logs.setdefault((row.log, row.contender), {})[row.rule] = row
    return [list(some.values()) for some in logs.values()]


def _head(rows: Sequence[RuleRow]) -> tuple[str, ...]:
    return HEAD_IID if any(row.limit for row in rows) else HEAD


def _cells(row: RuleRow, columns: int) -> tuple[str, ...]:
    own, calm = row.rule == row.against, row.not_looping
    calm_tau, calm_relative = (None, None) if calm is None else (calm.tau, calm.relative)
    differences = (_shown(row.difference, "{:+.3f}"), _shown(row.relative, "{:+.1%}"), _shown(calm_relative, "{:+.1%}"))
    by_level = (row.limit, row.accepted, [share.value for share in row.of_limit])
    taus = (_shown(row.tau, "{:.3f}"), _shown(calm_tau, "{:.3f}"))
    cells = (row.rule, *taus, *(("",) * 3 if own else differences), _joined(row.reached, 2), *(_joined(part, 3) for part in by_level))
    return cells[:columns]


def _joined(values: Sequence[float], digits: int) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)


def _shown(interval: Interval | None, form: str) -> str:
    if interval is None:
        return NONE
    value = form.format(interval.value)
    if interval.low is None or interval.high is None:
        return value
    return f"{value} [{form.format(interval.low)}, {form.format(interval.high)}]"
