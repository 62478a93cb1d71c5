"""A report on disk: the results, a Markdown page with plots beside it, and one self-contained HTML page that holds all of it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from drafttrain.core.disk import write_text, write_whole
from drafttrain.core.errors import UserError
from drafttrain.evaluation.bench import read_rows
from drafttrain.evaluation.journal import lines_of
from drafttrain.evaluation.rows import Row
from drafttrain.evaluation.runners import PLAIN
from drafttrain.report import plots, tables
from drafttrain.report.tables import Line, View

RESULTS = "results.jsonl"
MARKDOWN = """# {name}

Written by `drafttrain report` from `{name}.jsonl`; every figure between two marks is renewed from there.

<!-- results:{name} -->
<!-- /results:{name} -->

## By task

<!-- results:{name} tasks -->
<!-- /results:{name} -->

## Plots

<!-- results:{name} plots -->
<!-- /results:{name} -->
"""
STYLE = """
:root { --ink: #1f2937; --faint: #6b7280; --line: #e5e7eb; --back: #f8fafc; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 27px; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 36px 0 12px; }
p.note { color: var(--faint); font-size: 13px; margin: 8px 0 0; max-width: 110ch; }
section.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 14px 0; }
div.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 9px 6px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; font-size: 12.5px; vertical-align: bottom; white-space: normal; min-width: 62px; }
th.name, td.name { text-align: left; padding-right: 16px; }
td.name { font-weight: 600; }
td:last-child { white-space: normal; min-width: 132px; padding-right: 0; }
tr:last-child td { border-bottom: 0; }
div.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 14px; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
figure[data-plot="speedup"] { grid-column: 1 / -1; }
figure[data-plot="speedup"] svg { max-width: 1020px; margin: 0 auto; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--faint); font-size: 13px; margin-top: 6px; }
"""
PROLOG = re.compile(r"^.*?(?=<svg)", re.S)
DRAWING = re.compile(r"<svg.*?</svg>", re.S)
UNREAD_IDS = re.compile(r' id="[a-z0-9A-Z]+_\d+"')  # matplotlib numbers its groups: several figures on a page would share ids


@dataclass
class ReportedRun:
    """What one argument of `report` or `compare` stands for."""

    name: str
    file: Path
    """The results."""
    rows: list[Row]


def open_run(path: Path) -> ReportedRun:
    """The results of a run's folder, or of a file. Raises `UserError` where there are none."""
    file = path / RESULTS if path.is_dir() else path
    if not path.exists():
        raise UserError(f"'{path}': no such file or folder; give the folder of a run, or a results file that `drafttrain eval` wrote")
    rows = read_rows(file)
    if not rows:
        raise UserError(f"results '{file}' are empty; `drafttrain eval` fills them")
    name = file.stem if file.name != RESULTS else file.absolute().parent.name
    return ReportedRun(re.sub(r"[^\w.-]+", "-", name), file, rows)


def together(runs: Sequence[ReportedRun]) -> list[Row]:
    """The rows of several runs; a contender that stands in more than one of them gets its run's name before its own, numbered where runs
    share one."""
    found = [{row.measured.label for row in run.rows} for run in runs]
    twice = {label for labels in found for label in labels if label != PLAIN and sum(label in other for other in found) > 1}
    before = [[other.name for other in runs[:place]].count(run.name) for place, run in enumerate(runs)]
    names = [f"{run.name} ({shared + 1})" if shared else run.name for run, shared in zip(runs, before, strict=True)]
    return [
        _named(row, name) if row.measured.label in twice else row for run, name in zip(runs, names, strict=True) for row in run.rows
    ]


def write_report(runs: Sequence[ReportedRun], folder: Path, name: str) -> list[Path]:
    """NAME.jsonl, NAME.md, NAME.html and the plots in `folder`; what was written, the pages first.

    A NAME.md that is there keeps its text, and only its marks are renewed. Raises `UserError` where a lossy rule's quality was not
    measured, matplotlib is missing, or the name cannot stand in a mark; nothing is written then.
    """
    if not re.fullmatch(tables.NAME, name):
        raise UserError(f"--name '{name}': letters, digits, '.', '_' and '-' make the name of a report's files; give another")
    rows = together(runs)
    html = page(name, rows)
    data, markdown, whole = (folder / f"{name}.{kind}" for kind in ("jsonl", "md", "html"))
    folder.mkdir(parents=True, exist_ok=True)
    measured = runs[0].file.read_bytes() if len(runs) == 1 else lines_of([row.to_json() for row in rows])
    write_whole(data, lambda partial: partial.write_bytes(measured))
    if not markdown.exists():
        write_text(markdown, MARKDOWN.format(name=name))
    tables.render(markdown, folder)
    write_text(whole, html)
    return [whole, markdown, data, *tables.draw(name, folder)]


def page(title: str, rows: Sequence[Row]) -> str:
    """One HTML page without any outside resource: for each setting its tables and plots."""
    parts = [f"<h1>{escape(title)}</h1>", '<p class="note">Speculative decoding, measured by <code>drafttrain eval</code>.</p>']
    for summary, tasks in zip(tables.by_setting(rows, "summary"), tables.by_setting(rows, "tasks"), strict=True):
        tables.refuse_unmeasured_qualities(tasks)
        one = tasks[0].whole
        how = "greedy" if one.temperature == 0 else f"temperature {one.temperature:g}"
        parts.append(f"<h2>{escape(one.target)} on {escape(one.suite)}, {how}, {escape(one.device)}</h2>")
        if summary:
            parts.append(_card(_table(summary, "summary"), tables.footer(tasks)))
        parts.append(f'<div class="plots">{"".join(_figures(title, tasks))}</div>')
        parts.append("<h2>By task</h2>" + _card(_table(tasks, "tasks"), ""))
    return document(title, "".join(parts))


def is_stale(file: Path, results: Path) -> bool:
    """Whether the words and figures of NAME.html are other than what `page` makes of NAME.jsonl in `results` now; its drawings are not
    compared."""
    return DRAWING.sub("", file.read_text(encoding="utf-8")) != DRAWING.sub("", _page_of(file, results))


def renew(file: Path, results: Path) -> bool:
    """Writes NAME.html anew from NAME.jsonl in `results` where `is_stale`; whether it was."""
    old = is_stale(file, results)
    if old:
        write_text(file, _page_of(file, results))
    return old


def _page_of(file: Path, results: Path) -> str:
    return page(file.stem, together([open_run(results / f"{file.stem}.jsonl")]))


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole HTML page around `body`, in this project's look."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n<body><main>{body}</main>"
        f"{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def inline_svg(name: str, drawn: str) -> str:
    """An SVG file's text as it may stand inside a page."""
    return UNREAD_IDS.sub("", PROLOG.sub("", drawn)).replace("<svg ", f'<svg role="img" aria-label="{escape(name)}" ', 1)


def _figures(title: str, lines: Sequence[Line]) -> list[str]:
    measured = [line.whole.uncut for line in lines]
    out = []
    for name in plots.shown(measured):
        drawn = io.StringIO()
        plots.write_svg(plots.figure(name, measured), drawn, f"{title}-{name}")
        svg = inline_svg(plots.PLOTS[name].title, drawn.getvalue())
        out.append(f'<figure data-plot="{name}">{svg}<figcaption>{escape(plots.PLOTS[name].caption)}</figcaption></figure>')
    return out


def _table(lines: Sequence[Line], view: View) -> str:
    shown = tables.columns(lines, view)
    kinds = [' class="name"' if column.names else "" for column in shown]
    head = "".join(f"<th{kind}>{escape(column.head)}</th>" for column, kind in zip(shown, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{escape(column.cell(line))}</td>' for column, kind in zip(shown, kinds, strict=True))}</tr>"
        for line in lines
    )
    return f'<div class="scroll"><table data-view="{view}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _card(inside: str, note: str) -> str:
    return f'<section class="card">{inside}{f"""<p class="note">{escape(note)}</p>""" if note else ""}</section>'


def _named(row: Row, run: str) -> Row:
    return replace(row, measured=replace(row.measured, label=f"{run}: {row.measured.label}"))
