"""Tables from results files: Markdown for pages, rich for the terminal, and pages whose tables come from the files by
name.

A page marks where a table belongs, at the beginning of a line, and everything between its marks is replaced when it is rendered:

    <!-- results:NAME -->            one line a contender, from NAME.jsonl (`results:NAME tasks`: one a contender and task)
    <!-- /results:NAME -->
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from drafttrain.core.errors import UserError
from drafttrain.data.shards import write_whole
from drafttrain.evaluation.bench import read_rows
from drafttrain.evaluation.rows import ALL, Interval, Measured, Row
from drafttrain.evaluation.runners import PLAIN

View = Literal["summary", "tasks"]
VIEWS: dict[str, View] = {"summary": "summary", "tasks": "tasks"}
NONE = "–"
MARK = re.compile(
    r"^(?P<head><!-- results:(?P<name>[\w.-]+)(?: (?P<view>\w+))? -->\n)"
    r"(?P<body>.*?)"
    r"(?P<tail><!-- /results:(?P=name) -->)", re.S | re.M,
)  # fmt: skip
COLUMNS = (
    "tau", "tau, no loops", "alpha_1 ..", "plain tokens/s", "tokens/s", "speed-up [95%]", "speed-up, no loops [95%]",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One contender on one task: with all outputs, and without looping ones where any are left."""

    whole: Row
    straight: Row | None


def results_table(rows: Iterable[Row], view: View = "summary") -> str:
    """Markdown: a table for every setting (target, suite, device, ...) with what it was measured under below it.

    Where a contender was measured more than once under one setting, its last run counts.
    """
    parts = [f"{_markdown(_head(view), _cells(lines, view))}\n\n{footer(lines)}" for lines in _by_setting(rows, view)]
    return "\n\n".join(parts) + "\n"


def terminal_table(rows: Iterable[Row], view: View = "summary") -> Group:
    """The same for `rich.print`, without the columns that only a maintainer reads."""
    parts: list[Table | Text] = []
    names = _labels(view)
    for lines in _by_setting(rows, view):
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        for place, name in enumerate(_head(view)[: names + len(COLUMNS)]):
            table.add_column(name, justify="left" if place < names else "right", no_wrap=place < names)
        for cells in _cells(lines, view):
            table.add_row(*cells[: names + len(COLUMNS)])
        parts += [table, Text(footer(lines), style="dim")]
    return Group(*parts)


def footer(lines: Sequence[Line]) -> str:
    """What a table was measured on and with."""
    rows = [line.whole for line in lines]
    one = rows[-1]
    how = "greedy" if one.temperature == 0 else f"temperature {one.temperature}, top-k {one.top_k}, top-p {one.top_p}"
    installed = ", ".join(f"{package} {version}" for package, version in one.versions.items())
    days, commits = sorted({row.date[:10] for row in rows}), sorted({row.commit for row in rows if row.commit})
    prompts = max(row.measured.prompts for row in rows)
    looping = [row.measured.looping for row in rows if row.measured.label == PLAIN and row.measured.task == ALL]
    asked = f"{prompts} prompts" if one.repeats == 1 else f"{prompts} prompts x {one.repeats}"
    facts = [
        f"Target {one.target} ({one.target_fingerprint}, {one.dtype})",
        f"suite {one.suite} ({one.suite_hash}), {asked}, at most {one.max_new_tokens} new tokens, {how}, seed {one.seed}",
        *(f"{share:.0%} of plain outputs loop" for share in looping[-1:]),
        f"{one.device}, {one.threads} threads",
        f"{installed} ({', '.join(commits)})" if commits else installed,
        " to ".join(dict.fromkeys([days[0], days[-1]])),
    ]
    return "; ".join(facts) + "."


def render(page: Path, results: Path) -> bool:
    """Replaces the marked tables of a Markdown page by those of the files in `results`; whether anything changed."""
    text = page.read_text(encoding="utf-8")
    rendered = render_text(text, results, str(page))
    if rendered != text:
        write_whole(page, lambda partial: partial.write_text(rendered, encoding="utf-8"))
    return rendered != text


def stale(page: Path, results: Path) -> list[str]:
    """Names of the marked tables of a page that differ from what the files in `results` say."""
    text = page.read_text(encoding="utf-8")
    marks = zip(MARK.finditer(text), MARK.finditer(render_text(text, results, str(page))), strict=True)
    return [old["name"] for old, new in marks if old["body"] != new["body"]]


def render_text(text: str, results: Path, where: str) -> str:
    """A page's text with its tables renewed. Raises `UserError` for a mark without its end, or of a file that is not
    there."""

    def table(mark: re.Match[str]) -> str:
        rows = read_rows(results / f"{mark['name']}.jsonl")
        if mark["view"] not in (None, *VIEWS):
            raise UserError(f"{where}: mark 'results:{mark['name']} {mark['view']}': the view is {' or '.join(VIEWS)}")
        return mark["head"] + results_table(rows, VIEWS[mark["view"] or "summary"]) + mark["tail"]

    opened = re.findall(r"^<!-- results:([\w.-]+)", text, re.M)
    closed = [mark["name"] for mark in MARK.finditer(text)]
    if opened != closed:
        lonely = next((name for name in opened if name not in closed), opened[0])
        raise UserError(f"{where}: mark 'results:{lonely}' has no matching '<!-- /results:{lonely} -->' after it")
    return MARK.sub(table, text)


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each setting, contender, task and kind of outputs, in the order in which they first came."""
    last: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        last[(*setting_key(row), row.measured.label, row.measured.task, row.measured.outputs)] = row
    return list(last.values())


def setting_key(row: Row) -> tuple[Any, ...]:
    """Rows with equal keys may stand in one table."""
    return (
        row.target, row.target_fingerprint, row.dtype, row.suite, row.suite_hash, row.temperature, row.top_k, row.top_p,
        row.max_new_tokens, row.repeats, row.seed, row.device, row.threads, tuple(row.versions.items()),
    )  # fmt: skip


def _by_setting(rows: Iterable[Row], view: View) -> Iterable[list[Line]]:
    """A table's lines: plain decoding is a column, unless it stands alone."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in latest(rows):
        groups.setdefault(setting_key(row), []).append(row)
    for group in groups.values():
        found = {(row.measured.label, row.measured.task, row.measured.outputs): row for row in group}
        yield [
            Line(row, found.get((label, task, "not_looping"))) for (label, task, outputs), row in found.items()
            if outputs == "all" and (view == "tasks" or task == ALL)
        ]  # fmt: skip


def _head(view: View) -> tuple[str, ...]:
    if view == "tasks":
        return ("contender", "task", *COLUMNS, "looping")
    return ("contender", *COLUMNS, "yield", "loop efficiency", "drafting / bare", "differ from plain")


def _labels(view: View) -> int:
    return 2 if view == "tasks" else 1


def _cells(lines: Sequence[Line], view: View) -> list[list[str]]:
    return [_line_cells(line, view) for line in lines]


def _line_cells(line: Line, view: View) -> list[str]:
    whole, straight = line.whole.measured, line.straight.measured if line.straight else None
    name = whole.label if whole.lossless else f"{whole.label} (lossy)"
    figures = [
        f"{whole.tau:.2f}", NONE if straight is None else f"{straight.tau:.2f}",
        " ".join(f"{alpha:.2f}".lstrip("0") for alpha in whole.alpha) or NONE,
        f"{whole.plain_tokens_per_second:.1f}", f"{whole.tokens_per_second:.1f}", _interval(whole.speedups[PLAIN]),
        NONE if straight is None else _interval(straight.speedups[PLAIN]),
    ]  # fmt: skip
    if view == "tasks":
        return [name, whole.task, *figures, f"{whole.looping:.0%}"]
    shares = [f"{whole.yield_of_tau:.2f}", _number(whole.loop_efficiency), _number(whole.drafting_overhead)]
    return [name, *figures, *shares, _differing(whole)]


def _differing(row: Measured) -> str:
    """`3 of 60, margin <= 0.13`: the largest margin at which an output left plain decoding's."""
    exactness = row.exactness
    if exactness is None:
        return NONE
    known = [abs(margin) for margin in exactness.margins if margin is not None]
    return f"{exactness.different} of {exactness.compared}{f', margin <= {max(known):.2g}' if known else ''}"


def _interval(ratio: Interval) -> str:
    return f"{ratio.value:.2f}" if ratio.low is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
