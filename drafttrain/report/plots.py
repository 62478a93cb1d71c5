"""Plots of one setting's results: speed-up by task, alpha_k, tau against time per round, acceptance against position, time split.

Each plot is a function of the measured rows; matplotlib (the extra `plots`) is imported where a figure is drawn. A file says in its
metadata which results it was drawn from, so that a stale one can be told without drawing it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from drafttrain.core.config import fingerprint
from drafttrain.core.disk import write_whole
from drafttrain.core.errors import UserError
from drafttrain.evaluation.rows import ALL, STRETCH, Interval, Measured
from drafttrain.evaluation.runners import PLAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a3d9a", "#8c564b", "#4d4d4d", "#b2df8a")
"""Of the contenders, in their order; told apart with any kind of sight (Okabe and Ito)."""
GREY, INK, FAINT = "#6b7280", "#1f2937", "#e5e7eb"
PHASE_COLOURS = {"draft": "#e69f00", "score": "#0072b2", "verify": "#cc79a7", "commit": "#009e73", "other": "#9ca3af"}
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#9ca3af",
    "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 14, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "grid.color": FAINT, "grid.linewidth": 0.8,
    "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "legend.frameon": False,
    "legend.fontsize": 9, "figure.facecolor": "white", "svg.fonttype": "none", "savefig.dpi": 160,
}  # fmt: skip
SUFFIXES = (".svg", ".png")
RATIOS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
SPOTS = [(reach * right, reach * up) for reach in (5, 9, 14, 20, 27, 35) for right, up in SIDES]
"""Points from a marker to its label, the nearest first."""
FEW = 3  # contenders for which there is room for more than the outline
MARKER = 90  # points squared
TOUCHING = 0.02  # of the axes: markers closer than this lie on each other, and the later is drawn smaller
FEW_ROUNDS = 20  # a share or a mean over fewer is noise


@dataclass(frozen=True)
class Plot:
    """One kind of plot."""

    title: str
    caption: str
    shown: Callable[[Sequence[Measured]], bool]
    """Whether the rows hold what it shows."""
    draw: Callable[[Axes, Sequence[Measured]], None]
    size: Callable[[Sequence[Measured]], tuple[float, float]]
    """Inches."""


def contenders(rows: Iterable[Measured]) -> dict[str, str]:
    """label -> colour; plain decoding, which is a line or a grey bar, left out."""
    labels = dict.fromkeys(row.label for row in rows if row.label != PLAIN)
    return {label: COLOURS[place % len(COLOURS)] for place, label in enumerate(labels)}


def name_of(row: Measured) -> str:
    """A label that says so where the rule is lossy."""
    return row.label if row.lossless else f"{row.label} (lossy)"


def draw_speedup(axes: Axes, rows: Sequence[Measured]) -> None:
    """Bars by task with their intervals; all tasks together stand apart on the right."""
    tasks, labels = _tasks(rows), contenders(rows)
    width = 0.8 / len(labels)
    places = {task: at + (0.35 if task == ALL and len(tasks) > 1 else 0.0) for at, task in enumerate(tasks)}
    for number, (label, colour) in enumerate(labels.items()):
        own = {row.task: row for row in rows if row.label == label and row.task in places}
        for task, row in own.items():
            ratio, at = row.speedups[PLAIN], places[task] + (number - (len(labels) - 1) / 2) * width
            axes.bar(at, ratio.value, width * 0.9, color=colour, label=name_of(row) if task == next(iter(own)) else None)
            top = ratio.value if ratio.low is None or ratio.high is None else ratio.high
            axes.errorbar(at, ratio.value, yerr=_reach(ratio), color=INK, elinewidth=1.1, capsize=min(4.0, 14 * width), capthick=1.1)
            if len(labels) <= FEW:
                axes.annotate(f"{ratio.value:.2f}", (at, top), (0, 4), textcoords="offset points", ha="center", fontsize=8.5)
    axes.axhline(1.0, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=3)
    axes.annotate(
        PLAIN, (1.0, 1.0), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", color=GREY, fontsize=9
    )  # fmt: skip
    axes.set_xticks(list(places.values()), list(places))
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("speed-up over plain decoding")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.04)
    _legend(axes, len(labels), wide=True)


def draw_alpha(axes: Axes, rows: Sequence[Measured]) -> None:
    """A line for each contender over all tasks; thin ones for single tasks, as long as they can be told apart."""
    labels, deepest = contenders(rows), 1
    for row in rows:
        known = alpha_curve(row)
        if row.label in labels and known and (row.task == ALL or len(labels) <= FEW):
            depths, whole = [*known], row.task == ALL
            deepest = max(deepest, *depths)
            style = {"linewidth": 2.2, "marker": "o", "markersize": 6} if whole else {"linewidth": 1.0, "alpha": 0.28}
            drawn, colour = [*known.values()], labels[row.label]
            axes.plot(depths, drawn, color=colour, label=name_of(row) if whole else None, zorder=4 if whole else 2, **style)
    axes.set_xticks(range(1, deepest + 1))
    axes.set_xlim(0.8, deepest + 0.2)
    axes.set_ylim(-0.03, 1.03)  # markers at the ends stand whole
    axes.set_xlabel("depth k of the drafted token")
    axes.set_ylabel(r"$\alpha_k$: stands, given that its parent does")
    _legend(axes, len(labels))


def alpha_curve(row: Measured) -> dict[int, float]:
    """depth -> alpha, where enough rounds are behind it."""
    pairs = enumerate(zip(row.alpha, row.behind_alpha, strict=True), 1)
    return {depth: alpha for depth, (alpha, rounds) in pairs if alpha is not None and rounds >= FEW_ROUNDS}


def draw_tau_time(axes: Axes, rows: Sequence[Measured]) -> None:
    """Accepted length against time per round: lines through plain decoding's point are equal speed-ups."""
    labels = contenders(rows)
    plain = next(row for row in rows if row.label == PLAIN and row.task == ALL)
    plain_time = _milliseconds(plain)
    shown_rows = [row for row in rows if row.label in labels and row.rounds]
    right = 1.3 * max([plain_time, *map(_milliseconds, shown_rows)])
    top = 1.12 * max([1.0, *(row.tau for row in shown_rows)])
    axes.scatter(plain_time, 1.0, s=MARKER, marker="s", color=GREY, zorder=5, label=PLAIN)
    _scatter_rounds(axes, shown_rows, labels, right, top, plain_time)
    speedups = [row.tau * plain_time / _milliseconds(row) for row in shown_rows]
    for speedup in ratios_near(speedups):
        _draw_equal_speedup(axes, speedup, plain_time, right, top)
    axes.set_xlim(0, right)
    axes.set_ylim(0, top)
    axes.set_xlabel("time per round (ms)")
    axes.set_ylabel("accepted length (tau)")
    _legend(axes, len(labels) + 1)
    legend: Any = axes.get_legend()
    for handle in legend.legend_handles:
        handle.set_sizes([MARKER])
    # the points of several contenders' tasks lie too close to be named
    if len(labels) == 1:
        task_points = {row.task: (_milliseconds(row), row.tau) for row in shown_rows if row.task != ALL}
        place_labels(axes, task_points, fontsize=8, color=GREY)


def _milliseconds(row: Measured) -> float:
    return 1e3 * row.seconds_per_round


def _scatter_rounds(
    axes: Axes, rows: Sequence[Measured], labels: Mapping[str, str], right: float, top: float, plain_time: float
) -> None:
    """A large marker a contender; small ones for its tasks where there are few contenders. Markers that lie on each other shrink."""
    large_points = [(plain_time / right, 1 / top)]
    for row in rows:
        time, tau = _milliseconds(row), row.tau
        colour = labels[row.label]
        if row.task != ALL:
            if len(labels) <= FEW:
                axes.scatter(time, tau, s=34, color=colour, alpha=0.55, edgecolors="white", linewidths=1.0, zorder=4)
            continue
        point = (time / right, tau / top)
        beneath = sum(math.dist(other, point) < TOUCHING for other in large_points)
        size = MARKER / 2.5**beneath
        axes.scatter(time, tau, s=size, color=colour, edgecolors="white", linewidths=1.0, label=name_of(row), zorder=5)
        large_points.append(point)


def _draw_equal_speedup(axes: Axes, speedup: float, plain_time: float, right: float, top: float) -> None:
    """The dotted line of all rounds that are `speedup` times as fast as plain decoding."""
    end = min(right, top * plain_time / speedup)
    axes.plot([0, end], [0, speedup * end / plain_time], color=GREY, linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)
    axes.text(
        0.96 * end, 0.96 * speedup * end / plain_time, f"{speedup:g}x", color=GREY, fontsize=9, ha="center", va="center", zorder=3,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def ratios_near(reached: Sequence[float]) -> list[float]:
    """Speed-ups for which lines are drawn: 1, and those about as large as the ones reached."""
    return [ratio for ratio in RATIOS if ratio == 1 or 0.6 * min(reached) < ratio < 1.6 * max(reached)]


def place_labels(axes: Axes, labels: Mapping[str, tuple[float, float]], **style: Any) -> None:
    """Writes each text beside its point (x, y): where it covers least of markers, other texts and the legend, then near, then where it is
    crossed by the fewest lines. To be called last: what is drawn or changed later is not seen."""
    from matplotlib.patheffects import withStroke

    figure: Any = axes.get_figure(root=True)
    figure.draw_without_rendering()  # lays out; from here on extents in pixels are known
    lines = [line.get_path().transformed(line.get_transform()) for line in axes.lines]
    legend = axes.get_legend()
    taken = [*_marker_boxes(axes, figure.dpi / 72), *(fixed.get_window_extent() for fixed in [*axes.texts, legend] if fixed is not None)]
    for name, point in labels.items():
        text = axes.annotate(name, point, (0, 0), textcoords="offset points", in_layout=False, zorder=6, **style)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # readable where a line goes through

        def cost(spot: tuple[int, int], text: Annotation = text) -> tuple[float, int, int]:
            box = _moved(text, spot)
            covered = sum(_common(box, other) for other in taken) + box.width * box.height - _common(box, axes.bbox)
            return round(covered, 3), max(map(abs, spot)), sum(line.intersects_bbox(box, filled=False) for line in lines)

        taken.append(_moved(text, min(SPOTS, key=cost)))


def _moved(text: Annotation, spot: tuple[int, int]) -> Bbox:
    """The label put so many points beside its marker; its extent in pixels, with a margin."""
    right, up = spot
    across = "left" if right > 0 else "right" if right else "center"
    text.set(position=spot, ha=across, va="bottom" if up > 0 else "top" if up else "center")
    return text.get_window_extent().padded(1)


def _marker_boxes(axes: Axes, point: float) -> Iterator[Bbox]:
    """Extents of all scattered markers. point: in pixels."""
    from matplotlib.collections import PathCollection
    from matplotlib.transforms import Bbox

    for markers in axes.collections:
        if isinstance(markers, PathCollection):
            radius = point * max(markers.get_sizes()) ** 0.5 / 2
            for x, y in axes.transData.transform(markers.get_offsets()):
                yield Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _common(one: Bbox, other: Bbox) -> float:
    """Area that both cover, in square pixels."""
    width, height = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)


def draw_position(axes: Axes, rows: Sequence[Measured]) -> None:
    """Accepted length of the rounds that begin in each stretch of the answers; `rows` as `Row.uncut` gives them."""
    labels = contenders(rows)
    for row in rows:
        if row.label in labels and row.task == ALL and row.positions:
            known = [(at, tokens / rounds) for at, (rounds, tokens) in enumerate(row.positions) if rounds >= FEW_ROUNDS]
            places = [(at + 0.5) * STRETCH for at, _ in known]
            axes.plot(
                places, [tau for _, tau in known], color=labels[row.label], linewidth=2.2, marker="o", markersize=5, label=name_of(row)
            )  # fmt: skip
            axes.axhline(row.tau, color=labels[row.label], linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)
    axes.axhline(1.0, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlim(0, None)
    axes.set_ylim(0.9, axes.get_ylim()[1] * 1.05)
    axes.set_xlabel(f"place in the answer (tokens, by {STRETCH})")
    axes.set_ylabel("accepted length (tau)")
    _legend(axes, len(labels))


def draw_time(axes: Axes, rows: Sequence[Measured]) -> None:
    """A bar for each way of decoding, as long as it takes for one token, split by phase."""
    bars = _whole(rows)
    longest = max(sum(row.seconds_per_token.values()) for row in bars)
    for place, row in enumerate(bars):
        left = 0.0
        for phase, colour in PHASE_COLOURS.items():
            spent = row.seconds_per_token[phase]
            axes.barh(place, 1e3 * spent, left=1e3 * left, height=0.62, color=colour, label=phase if place == 0 else None)
            if spent > 0.05 * longest:
                ink = "white" if phase in ("score", "commit") else INK
                axes.text(1e3 * (left + spent / 2), place, f"{1e3 * spent:.1f}", ha="center", va="center", fontsize=8.5, color=ink)
            left += spent
        axes.annotate(f"{1e3 * left:.1f} ms", (1e3 * left, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [name_of(row) for row in bars])
    axes.set_ylim(len(bars) - 0.45, -0.55)
    axes.set_xlim(0, 1.14e3 * longest)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("milliseconds per token, prefill left out")
    _legend(axes, len(PHASE_COLOURS))


def _tasks(rows: Sequence[Measured]) -> list[str]:
    """In order, all of them together at the end; alone where there is only one."""
    single = [task for task in dict.fromkeys(row.task for row in rows) if task != ALL]
    return [*single, ALL] if len(single) > 1 else [ALL]


def _whole(rows: Sequence[Measured]) -> list[Measured]:
    return [row for row in rows if row.task == ALL and row.tokens]


def _drafted(rows: Sequence[Measured]) -> bool:
    return any(row.label != PLAIN and row.task == ALL for row in rows)


def _reach(ratio: Interval) -> list[list[float]] | None:
    """How far the interval goes below and above, as matplotlib takes it."""
    return None if ratio.low is None or ratio.high is None else [[ratio.value - ratio.low], [ratio.high - ratio.value]]


def _legend(axes: Axes, entries: int, wide: bool = False) -> None:
    """Between title and axes, where no data can be under it."""
    columns = 5 if wide or entries <= 5 else 3
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.012, 1.0), ncols=min(entries, columns), borderaxespad=0.3, handlelength=1.2, columnspacing=1.4
    )  # fmt: skip
    axes.set_title(axes.get_title(loc="left"), loc="left", pad=14 + 16 * -(-entries // columns))


def _wide(rows: Sequence[Measured]) -> tuple[float, float]:
    """Room for every bar and for every task's name."""
    tasks = _tasks(rows)
    one = max(0.32 * (1 + len(contenders(rows))), 0.1 + 0.088 * max(map(len, tasks)))
    return min(16.0, max(7.2, 1.6 + one * len(tasks))), 4.4


def _even(rows: Sequence[Measured]) -> tuple[float, float]:
    return 7.2, 4.4


def _tall(rows: Sequence[Measured]) -> tuple[float, float]:
    return 7.2, 1.7 + 0.5 * len(_whole(rows))


PLOTS: dict[str, Plot] = {
    "speedup": Plot(
        "Speed-up by task", "Seconds a token of plain decoding over those of each contender, with 95% bootstrap intervals over prompts.",
        _drafted, draw_speedup, _wide,
    ),
    "alpha": Plot(
        "Conditional acceptance by depth",
        f"How often a drafted token at depth k stands, given that its parent does, where that is known from {FEW_ROUNDS} rounds or more; "
        "thin: single tasks.",
        lambda rows: any(alpha_curve(row) for row in rows if row.label != PLAIN), draw_alpha, _even,
    ),
    "tau-time": Plot(
        "Accepted length against time per round",
        "On a dotted line the speed-up over plain decoding is the same: a longer draft pays while the points climb faster than the line.",
        lambda rows: {True, False} <= {row.label == PLAIN for row in rows if row.task == ALL and row.rounds}, draw_tau_time, _even,
    ),
    "position": Plot(
        "Acceptance along the answer",
        f"Accepted length of the rounds that begin in each {STRETCH} tokens of the answers, up to where the length limit may cut a round; "
        "dotted: over all rounds.",
        lambda rows: any(rounds >= FEW_ROUNDS for row in _whole(rows) if row.label != PLAIN for rounds, _ in row.positions),
        draw_position, _even,
    ),
    "time": Plot(
        "Where the time of a token goes", "Each bar is as long as one token takes: the phases of a round over the tokens it gives.",
        lambda rows: bool(_whole(rows)), draw_time, _tall,
    ),
}  # fmt: skip


def shown(rows: Sequence[Measured]) -> list[str]:
    """Names of the plots that these rows (one setting's, over all outputs) have data for."""
    return [name for name, plot in PLOTS.items() if plot.shown(rows)]


def figure(name: str, rows: Sequence[Measured]) -> Figure:
    """One plot, drawn. Raises `UserError` where matplotlib is missing."""
    figures, style = _matplotlib()
    plot = PLOTS[name]
    with style(STYLE):
        drawn: Figure = figures.Figure(figsize=plot.size(rows), layout="constrained")
        axes = drawn.add_subplot()
        axes.set_title(plot.title)
        plot.draw(axes, rows)
    return drawn


def save(drawn: Figure, path: Path, source: str) -> None:
    """Writes a figure whole. source: what it was drawn from, kept in the metadata."""
    if path.suffix == ".svg":
        write_whole(path, lambda partial: write_svg(drawn, partial, path.stem, source))
    else:
        _, style = _matplotlib()
        with style(STYLE):
            write_whole(path, lambda partial: drawn.savefig(partial, format="png", metadata={"Source": source, "Software": None}))


def source_of(file: Path) -> str:
    """What a plot of a results file says that it was drawn from."""
    return f"drafttrain results {fingerprint(file.read_text(encoding='utf-8'))}"


def write_svg(drawn: Figure, file: Path | TextIO, salt: str, source: str = "") -> None:
    """The same figure gives the same text. salt: tells apart the ids of figures that stand on one page."""
    _, style = _matplotlib()
    with style({**STYLE, "svg.hashsalt": salt}):
        drawn.savefig(file, format="svg", metadata={"Date": None, **({"Source": source} if source else {})})


def _matplotlib() -> tuple[Any, Any]:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise UserError("plots need matplotlib, which is not installed; pip install 'drafttrain[plots]'") from error
    return matplotlib.figure, matplotlib.rc_context
