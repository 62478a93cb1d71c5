"""The plot of a stream: accepted length along it, a line a method, with the shifts marked; below it what each method cost in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drafttrain.evaluation.streams import StreamRow, pooled_tau, shifts
from drafttrain.report.plots import COLOURS, GREY, STYLE, SUFFIXES, _matplotlib, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = Mapping[str, Sequence[StreamRow]]
"""Each method's rows, in the order of the stream."""


def moving_tau(rows: Sequence[StreamRow], window: int) -> list[float]:
    """Accepted length over the `window` requests up to each one, pooled; never across a shift, so that no point mixes two tasks."""
    begins = {0, *shifts([row.task for row in rows])}
    out, first = list[float](), 0
    for place in range(len(rows)):
        first = place if place in begins else first
        out.append(pooled_tau(rows[max(first, place + 1 - window) : place + 1]))
    return out


def stream_figure(results: Results, window: int = 8) -> Figure:
    """Raises `UserError` where matplotlib is missing."""
    figures, style = _matplotlib()
    with style(STYLE):
        drawn: Figure = figures.Figure(figsize=(9, 6.4), layout="constrained")
        above, below = drawn.subplots(2, 1, height_ratios=(3, 0.5 + 0.25 * len(results)))
        _draw_lengths(above, results, window)
        _draw_costs(below, results)
    return drawn


def _draw_lengths(axes: Axes, results: Results, window: int) -> None:
    for number, (method, rows) in enumerate(results.items()):
        axes.plot(range(len(rows)), moving_tau(rows, window), color=COLOURS[number % len(COLOURS)], label=method, linewidth=1.8)
    tasks = [row.task for row in next(iter(results.values()))]
    marks = shifts(tasks)
    for place in marks:
        axes.axvline(place - 0.5, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
    for place in [0, *marks] if marks else []:
        axes.annotate(tasks[place], (place, 1.0), (3, -10), xycoords=("data", "axes fraction"), textcoords="offset points", color=GREY)
    axes.set_title("Accepted length over the stream")
    axes.set_xlabel("request")
    axes.set_ylabel(f"accepted length (tau), last {window} requests")
    axes.legend(loc="lower right", ncols=3)


def _draw_costs(axes: Axes, results: Results) -> None:
    """Learning stands beside decoding: no second of it is free."""
    methods = list(results)[::-1]
    decoding = [sum(row.decode_seconds for row in results[method]) for method in methods]
    learning = [sum(row.learn_seconds for row in results[method]) for method in methods]
    axes.barh(methods, decoding, color="#0072b2", label="decoding")
    axes.barh(methods, learning, left=decoding, color="#e69f00", label="learning")
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def write_stream_plot(results: Results, path: Path, window: int = 8) -> list[Path]:
    """`path` with .svg and .png; the files."""
    drawn = stream_figure(results, window)
    written = [path.with_suffix(suffix) for suffix in SUFFIXES]
    for file in written:
        save(drawn, file, f"drafttrain stream of {len(next(iter(results.values())))} requests")
    return written


def stream_table(results: Results) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Heads and cells: accepted length in all and between shifts, and seconds."""
    tasks = [row.task for row in next(iter(results.values()))]
    marks = shifts(tasks)
    parts = list(zip([0, *marks], [*marks, len(tasks)], strict=True)) if marks else []
    stretch_names = [f"{tasks[first]} {first}-{end - 1}" for first, end in parts]
    heads = ["method", "tau", *stretch_names, "updates", "decoding s", "learning s"]
    body: list[Sequence[str]] = []
    for method, rows in results.items():
        stretches = [f"{pooled_tau(rows[first:end]):.3f}" for first, end in parts]
        seconds = [sum(row.decode_seconds for row in rows), sum(row.learn_seconds for row in rows)]
        updates = max(row.last_version for row in rows)
        body.append([method, f"{pooled_tau(rows):.3f}", *stretches, str(updates), *(f"{value:.1f}" for value in seconds)])
    return heads, body
