"""Tables from results files: Markdown for pages, rich for the terminal, and pages whose tables and plots come from the files by
name.

A page marks where figures belong, at the beginning of a line, and everything between its marks is replaced when it is rendered:

    <!-- results:NAME -->            one line a contender, from NAME.jsonl (`results:NAME tasks`: one a contender and task;
    <!-- /results:NAME -->           `results:NAME brief`: the columns that a reader compares; `results:NAME lengths`: what was
                                     accepted alone, where other jobs spoilt the times)

`results:NAME plots` places all plots, `results:NAME speedup` (or another of `PLOTS`) one of them. Of a file that `drafttrain eval
--replay-rules` wrote, `results:NAME rules` gives a table a log and `results:NAME figures` one of all logs; of one that `drafttrain study`
wrote, `results:NAME study` the cells; of one that `drafttrain verify --output` wrote, `results:NAME engines` its rows. A single figure
inside a sentence or a cell: `report/figures.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from drafttrain.core.disk import write_text
from drafttrain.core.errors import UserError
from drafttrain.evaluation.bench import read_rows
from drafttrain.evaluation.rows import ALL, Interval, Measured, Row
from drafttrain.evaluation.rule_rows import read_rule_rows
from drafttrain.evaluation.runners import GENERATE, PLAIN
from drafttrain.report import plots
from drafttrain.report.engine_tables import engines_table
from drafttrain.report.figures import render_figures, stale_figures
from drafttrain.report.frontier import NONE, number, page_of
from drafttrain.report.rule_tables import figures_table, rules_table
from drafttrain.runtime.stats import alpha_text

View = Literal["summary", "brief", "tasks", "lengths"]
TABLES: dict[str, Callable[[Path], str]] = {
    "summary": lambda file: results_table(read_rows(file)), "tasks": lambda file: results_table(read_rows(file), "tasks"),
    "brief": lambda file: results_table(read_rows(file), "brief"), "lengths": lambda file: results_table(read_rows(file), "lengths"),
    "rules": lambda file: rules_table(read_rule_rows(file)), "figures": lambda file: figures_table(read_rule_rows(file)),
    "study": page_of, "engines": engines_table,
}  # fmt: skip
"""What a mark may ask for that is text; everything else is a plot."""
ALL_PLOTS = "plots"
QUALITIES = {"right": "right", "same_answer": "same answer", "argmax_agreement": "argmax", "excess_kl": "excess KL"}
"""What of a row's quality stands in tables, and its name there; one of them at least is asked of a lossy rule."""
BRIEF = ("contender", "tau", "tau, no loops", "tokens/s", "speed-up [95%]", "speed-up, no loops [95%]", "quality", "differ from plain")
"""Columns of the view of that name."""
NAME = r"[\w.-]+"
"""Of a results file, as marks name it."""
MARK = re.compile(
    rf"^(?P<head><!-- results:(?P<name>{NAME})(?: (?P<view>[\w-]+))? -->\n)"
    r"(?P<body>.*?)"
    r"(?P<tail><!-- /results:(?P=name) -->)", re.S | re.M,
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One contender on one task: with all outputs, and without looping ones where any are left."""

    whole: Row
    straight: Row | None


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    head: str
    cell: Callable[[Line], str]
    names: bool = False  # says what the line is about, rather than a figure
    wide: bool = False  # left out in a terminal


def results_table(rows: Iterable[Row], view: View = "summary") -> str:
    """Markdown: a table for every setting (target, suite, device, ...) with what it was measured under below it.

    Where a contender was measured more than once under one setting, its last run counts. Raises `UserError` where a rule is lossy and
    what it cost was not measured.
    """
    parts = []
    for lines in by_setting(rows, view):
        refuse_unmeasured_qualities(lines)
        parts.append(f"{_markdown(*table(lines, view))}\n\n{footer(lines)}")
    return "\n\n".join(parts) + "\n"


def terminal_table(rows: Iterable[Row], view: View = "summary") -> Group:
    """The same for `rich.print`, without the columns that only a maintainer reads."""
    parts: list[Table | Text] = []
    for lines in by_setting(rows, view):
        kept = [column for column in columns(lines, view) if not column.wide]
        shown = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        for column in kept:
            shown.add_column(column.head, justify="left" if column.names else "right", no_wrap=column.names)
        for line in lines:
            shown.add_row(*(column.cell(line) for column in kept))
        parts += [shown, Text(footer(lines), style="dim")]
    return Group(*parts)


def table(lines: Sequence[Line], view: View = "summary") -> tuple[list[str], list[list[str]]]:
    """Head and body of one setting's table."""
    shown = columns(lines, view)
    return [column.head for column in shown], [[column.cell(line) for column in shown] for line in lines]


def columns(lines: Sequence[Line], view: View) -> list[Column]:
    """Those of a view; baselines, qualities, prefetching and measured costs have one where any of the lines was measured so."""
    if view == "brief":
        return [column for column in columns(lines, "summary") if column.head in BRIEF]
    measured = [line.whole.measured for line in lines]
    named = [Column("contender", lambda line: plots.name_of(line.whole.measured), names=True)]
    if view == "lengths":
        return [
            *named,
            Column("tau [95%]", lambda line: _tau(line.whole)), Column("tau, no loops [95%]", lambda line: _tau(line.straight)),
            Column("alpha_1 ..", lambda line: _alphas(line.whole.measured)),
            Column("nodes a round", lambda line: f"{line.whole.measured.nodes_per_round:.1f}"),
        ]  # fmt: skip
    if view == "tasks":
        named.append(Column("task", lambda line: line.whole.measured.task, names=True))
    shared = [
        Column("tau", lambda line: f"{line.whole.measured.tau:.2f}"),
        Column("tau, no loops", lambda line: NONE if line.straight is None else f"{line.straight.measured.tau:.2f}"),
        Column("alpha_1 ..", lambda line: _alphas(line.whole.measured)),
        Column("plain tokens/s", lambda line: f"{line.whole.measured.plain_tokens_per_second:.1f}"),
        Column("tokens/s", lambda line: f"{line.whole.measured.tokens_per_second:.1f}"),
        Column("speed-up [95%]", lambda line: _speedup(line.whole, PLAIN)),
        Column("speed-up, no loops [95%]", lambda line: _speedup(line.straight, PLAIN)),
    ]
    if any(GENERATE in one.speedups for one in measured):
        shared.append(Column("over generate [95%]", lambda line: _speedup(line.whole, GENERATE)))
        shared.append(Column("over generate, no loops [95%]", lambda line: _speedup(line.straight, GENERATE)))
    if any(quality(one) != NONE for one in measured):
        shared.append(Column("quality", lambda line: quality(line.whole.measured)))
    if any(one.prefetch for one in measured):
        shared.append(Column("prefetched drafts", lambda line: _prefetch(line.whole.measured)))
    if any(one.hybrid_costs for one in measured):
        shared.append(Column("hybrid_costs", lambda line: _hybrid_costs(line.whole.measured), wide=True))
    if view == "tasks":
        return [*named, *shared, Column("looping", lambda line: f"{line.whole.measured.looping:.0%}", wide=True)]
    return [
        *named, *shared,
        Column("yield", lambda line: f"{line.whole.measured.yield_of_tau:.2f}", wide=True),
        Column("loop efficiency", lambda line: number(line.whole.measured.loop_efficiency), wide=True),
        Column("drafting / bare", lambda line: number(line.whole.measured.drafting_overhead), wide=True),
        Column("differ from plain", lambda line: _differing(line.whole.measured), wide=True),
    ]  # fmt: skip


def refuse_unmeasured_quality(row: Row) -> None:
    """A `UserError` for a lossy rule whose row doesn't say what it did to the answers: its speed alone means nothing."""
    one = row.measured
    if not one.lossless and quality(one) == NONE:
        raise UserError(
            f"results of '{one.label}' on '{one.task}': rule '{one.rule}' is lossy and the row has no quality; "
            f"evaluate it again with quality columns, or leave it out of the report"
        )


def refuse_unmeasured_qualities(lines: Iterable[Line]) -> None:
    """The same for a table's lines."""
    for line in lines:
        refuse_unmeasured_quality(line.whole)


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
    """Replaces what stands between the marks of a Markdown page by what the files in `results` say; whether anything changed.

    Plots are linked, where `draw` puts them: beside their results file.
    """
    text = page.read_text(encoding="utf-8")
    rendered = render_text(text, results, str(page), _between(page, results))
    if rendered != text:
        write_text(page, rendered)
    return rendered != text


def stale(page: Path, results: Path) -> list[str]:
    """Names of the marks of a page under which something differs from what the files in `results` say, plots included."""
    text = page.read_text(encoding="utf-8")
    renewed = render_text(text, results, str(page), _between(page, results))
    marks = zip(MARK.finditer(text), MARK.finditer(renewed), strict=True)
    wrong = [old["name"] for old, new in marks if old["body"] != new["body"]]
    wrong += stale_figures(text, results, str(page))
    return [*wrong, *(name for name in plotted(text) if name not in wrong and not drawn(name, results))]


def render_text(text: str, results: Path, where: str, link: str = "") -> str:
    """A page's text with its tables and links to plots renewed. link: how the page reaches `results`, with a slash at its end.

    Raises `UserError` for a mark without its end, with an unknown view, or of a file that is not there.
    """
    def filled(mark: re.Match[str]) -> str:
        file, view = results / f"{mark['name']}.jsonl", mark["view"] or "summary"
        if view in TABLES:
            return mark["head"] + TABLES[view](file) + mark["tail"]
        if view != ALL_PLOTS and view not in plots.PLOTS:
            known = ", ".join((*TABLES, ALL_PLOTS, *plots.PLOTS))
            raise UserError(f"{where}: mark 'results:{mark['name']} {view}': the view is one of {known}")
        images = [
            f"![{plots.PLOTS[plot].title}]({link}{file}.svg)\n\n{plots.PLOTS[plot].caption}\n"
            for _, plot, file in plot_files(mark["name"], read_rows(file)) if view in (ALL_PLOTS, plot)
        ]  # fmt: skip
        return mark["head"] + "\n".join(images) + mark["tail"]

    opened = re.findall(rf"^<!-- results:({NAME})", text, re.M)
    closed = [mark["name"] for mark in MARK.finditer(text)]
    if opened != closed:
        lonely = next((name for name in opened if name not in closed), opened[0])
        raise UserError(f"{where}: mark 'results:{lonely}' has no matching '<!-- /results:{lonely} -->' after it")
    return render_figures(MARK.sub(filled, text), results, where)


def plot_files(name: str, rows: Iterable[Row]) -> Iterator[tuple[list[Measured], str, str]]:
    """What the plots of a results file are made from: (rows of one setting, plot, name of its files without suffix)."""
    for place, lines in enumerate(by_setting(rows, "tasks"), 1):
        refuse_unmeasured_qualities(lines)
        measured = [line.whole.uncut for line in lines]
        for plot in plots.shown(measured):
            yield measured, plot, f"{name}-{plot}" if place == 1 else f"{name}-{place}-{plot}"


def draw(name: str, results: Path) -> list[Path]:
    """Draws the plots of `results/NAME.jsonl` as SVG and PNG beside it. Raises `UserError` where matplotlib is missing."""
    rows = read_rows(results / f"{name}.jsonl")
    written = []
    for measured, plot, file in plot_files(name, rows):
        figure = plots.figure(plot, measured)
        for suffix in plots.SUFFIXES:
            written.append(results / f"{file}{suffix}")
            plots.save(figure, written[-1], plots.source_of(results / f"{name}.jsonl"))
    return written


def drawn(name: str, results: Path) -> bool:
    """Whether every plot lies there and was drawn from the results file as it is now."""
    rows = read_rows(results / f"{name}.jsonl")
    files = [results / f"{file}{suffix}" for *_, file in plot_files(name, rows) for suffix in plots.SUFFIXES]
    source = plots.source_of(results / f"{name}.jsonl").encode()
    return all(file.exists() and source in file.read_bytes() for file in files)


def plotted(text: str) -> list[str]:
    """Names of the results files whose plots a page shows."""
    return list(dict.fromkeys(mark["name"] for mark in MARK.finditer(text) if (mark["view"] or "summary") not in TABLES))


def _between(page: Path, results: Path) -> str:
    """How a page links to files beside the results: `docs/results/`, or nothing where it lies there itself."""
    way = Path(os.path.relpath(results, page.parent)).as_posix()
    return "" if way == "." else f"{way}/"


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


def by_setting(rows: Iterable[Row], view: View) -> Iterator[list[Line]]:
    """The lines of each setting's table."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in latest(rows):
        groups.setdefault(setting_key(row), []).append(row)
    for group in groups.values():
        found = {(row.measured.label, row.measured.task, row.measured.outputs): row for row in group}
        yield [
            Line(row, found.get((label, task, "not_looping"))) for (label, task, outputs), row in found.items()
            if outputs == "all" and (view == "tasks" or task == ALL)
        ]  # fmt: skip


def quality(row: Measured) -> str:
    """`right 0.42, argmax 0.97, excess KL 0.031`."""
    known = {title: (row.quality or {}).get(name) for name, title in QUALITIES.items()}
    return ", ".join(f"{title} {value:.3g}" for title, value in known.items() if value is not None) or NONE


SHOWN = 8
"""Depths whose alpha a table shows; lookups draft deeper."""


def _alphas(row: Measured) -> str:
    more = " …" if len(row.alpha) > SHOWN else ""
    return alpha_text(row.alpha[:SHOWN], zeros=False) + more or NONE


def _tau(row: Row | None) -> str:
    if row is None:
        return NONE
    return interval(row.measured.tau_interval or Interval(row.measured.tau, None, None))


def _speedup(row: Row | None, baseline: str) -> str:
    ratio = None if row is None else row.measured.speedups.get(baseline)
    return NONE if ratio is None else interval(ratio)


def _differing(row: Measured) -> str:
    """`3 of 60, margin <= 0.13`: the largest margin at which an output left plain decoding's."""
    exactness = row.exactness
    if exactness is None:
        return NONE
    known = [abs(margin) for margin in exactness.margins if margin is not None]
    return f"{exactness.different} of {exactness.compared}{f', margin <= {max(known):.2g}' if known else ''}"


def interval(ratio: Interval) -> str:
    """`1.26 [1.19, 1.34]`."""
    return f"{ratio.value:.2f}" if ratio.low is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _prefetch(row: Measured) -> str:
    """`hit in 41% of 732 rounds, 600 calls saved for 2,928`."""
    if not row.prefetch:
        return NONE
    prefetched, calls = row.prefetch["prefetched"], row.prefetch["prefetch_calls"]
    hits, saved = row.prefetch["prefetch_hits"], row.prefetch["calls_saved"]
    return f"hit in {hits / prefetched:.0%} of {prefetched:,} rounds, {saved:,} calls saved for {calls:,}"


def _hybrid_costs(row: Measured) -> str:
    """`draft_cost 0.29, node_cost 0.046`, as `runtime.hybrid` has them."""
    return ", ".join(f"{name} {price:.2g}" for name, price in (row.hybrid_costs or {}).items()) or NONE


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
