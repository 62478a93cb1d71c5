"""A design study's cells: which there are, what was found of each, and how that looks as a table and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from drafttrain.core.config import Config
from drafttrain.core.disk import write_text
from drafttrain.core.errors import UserError
from drafttrain.evaluation.journal import read_lines
from drafttrain.evaluation.rows import known_alpha
from drafttrain.evaluation.throughput import Forecast, best, frontier
from drafttrain.report import plots
from drafttrain.runtime.stats import alpha_text

TOLERANCE = 0.15
"""How far off a forecast may be before the plot shows it outside of its band."""
NONE = "–"


class StudyConfig(Config):
    """What `drafttrain study` varies. Every drafter is trained as the `train` section says: that is its budget."""

    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """`section.key` -> the values it takes; every combination is a cell. Keys of `drafter`, `train` and `runtime`, or a whole section:
    `{drafter.layers: [1, 2], runtime.shape.length: [2, 4]}` has four cells and trains two drafters."""
    confirm: int = Field(default=3, ge=0)
    """Cells that are decoded for real, the fastest by forecast."""
    timed: int = Field(default=4, ge=1)
    """Prompts whose rounds are timed for the forecast."""


@dataclass(frozen=True)
class Measurement:
    """A real run's figures, from `drafttrain eval`'s own rows."""

    tau: float
    tokens_per_second: float
    speedup: float
    speedup_not_looping: float | None = None  # None: all outputs loop, or it was measured before this was told


@dataclass(frozen=True)
class Finding:
    """What a study knows of one cell."""

    label: str
    values: dict[str, Any]  # of the grid's keys
    drafter: str  # folder
    budget: str  # what the drafter was trained with
    forecast: Forecast
    alpha: tuple[float | None, ...]
    measured: Measurement | None = None

    @property
    def error(self) -> float | None:
        """By how much of the measured tokens a second the forecast is off."""
        if self.measured is None:
            return None
        return self.forecast.tokens_per_second / self.measured.tokens_per_second - 1

    @property
    def speedup_error(self) -> float | None:
        """The same of the speed-up, from which a machine that is busier at one time than at another falls out."""
        return None if self.measured is None else self.forecast.speedup / self.measured.speedup - 1

    def to_json(self) -> dict[str, Any]:
        known = self.forecast
        made = {
            "round": known.round, "tokens_per_second": known.tokens_per_second,
            "speedup": known.speedup, "speedup_not_looping": known.speedup_not_looping,
        }  # fmt: skip
        return {**asdict(self), "forecast": {**asdict(known), **made}, "error": self.error, "speedup_error": self.speedup_error}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Finding:
        """What `to_json` gave. Raises `KeyError` or `TypeError` for anything else."""
        parts = {name: data["forecast"][name] for name in ("tau", "draft", "score", "other", "plain")}
        known = Forecast(**parts, tau_not_looping=data["forecast"].get("tau_not_looping"))
        measured = None if data["measured"] is None else Measurement(**data["measured"])
        return cls(data["label"], data["values"], data["drafter"], data["budget"], known, known_alpha(data["alpha"]), measured)


def write_findings(findings: Sequence[Finding], measured_on: str, file: Path) -> None:
    """A line of JSON a cell."""
    lines = [json.dumps({**finding.to_json(), "measured_on": measured_on}) + "\n" for finding in findings]
    write_text(file, "".join(lines))


def page_of(file: Path) -> str:
    """`markdown` of a file that `write_findings` wrote, or a `UserError`."""
    if not file.is_file():
        raise UserError(f"study '{file}': no such file; `drafttrain study` writes it")
    lines = read_lines(file)
    try:
        return markdown([Finding.from_json(line) for line in lines], lines[0]["measured_on"])
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"study '{file}': not the cells of a study ({error}); `drafttrain study` writes them anew") from error


HEAD = (
    "cell", "tau", "tau, no loops", "alpha_1 ..", "draft ms", "score ms", "other ms", "round ms", "tokens/s",
    "speed-up", "speed-up, no loops", "measured tau", "measured tokens/s", "measured speed-up", "measured speed-up, no loops",
    "error", "speed-up's error",
)  # fmt: skip


def cells_table(findings: Sequence[Finding]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Head and body, the fastest by forecast first."""
    return HEAD, [_cells(finding) for finding in by_forecast(findings)]


def by_forecast(findings: Sequence[Finding]) -> list[Finding]:
    """The fastest first."""
    return sorted(findings, key=lambda finding: -finding.forecast.tokens_per_second)


def _cells(finding: Finding) -> list[str]:
    known, measured = finding.forecast, finding.measured
    times = [f"{1e3 * seconds:.2f}" for seconds in (known.draft, known.score, known.other, known.round)]
    alpha = alpha_text(finding.alpha, zeros=False) or NONE
    speedups = (number(known.speedup), number(known.speedup_not_looping))
    out = [finding.label, number(known.tau), number(known.tau_not_looping), alpha, *times, f"{known.tokens_per_second:.1f}", *speedups]
    if measured is None:
        return [*out, *[NONE] * 6]
    reached = (number(measured.tau), f"{measured.tokens_per_second:.1f}", number(measured.speedup), number(measured.speedup_not_looping))
    return [*out, *reached, f"{finding.error:+.1%}", f"{finding.speedup_error:+.1%}"]


def number(value: float | None) -> str:
    """A cell of a table."""
    return NONE if value is None else f"{value:.2f}"


def markdown(findings: Sequence[Finding], measured_on: str) -> str:
    """The table, what it was measured on, and what comes out."""
    head, body = cells_table(findings)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (head, ["---"] * len(head), *body)]
    chosen = findings[best([finding.forecast for finding in findings])]
    budgets = "; ".join(dict.fromkeys(finding.budget for finding in findings))
    errors = [abs(finding.error) for finding in findings if finding.error is not None]
    ratios = [abs(finding.speedup_error) for finding in findings if finding.speedup_error is not None]
    measured = f"Forecasts of {len(errors)} cells measured for real"
    facts = [
        f"tau and alpha are replayed on the target's own greedy answers, times are forecast from medians. Drafters: {budgets}.",
        f"Fastest by forecast: **{chosen.label}**.",
        *([f"{measured} are off by at most {max(errors):.1%} in tokens/s, {max(ratios):.1%} in speed-up."] if errors else []),
        measured_on,
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(facts) + "\n"


def draw(findings: Sequence[Finding], path: Path, source: str) -> None:
    """The frontier beside forecasts against measurements, as PNG or SVG by the path's suffix. Points have the number of their line in the
    table. source: what it was drawn from, kept in the metadata.

    Raises `UserError` where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a study's plot needs matplotlib: pip install 'drafttrain[plots]', then run the same command again") from error
    ordered = by_forecast(findings)
    figure = Figure(figsize=(15, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_frontier(left, ordered)
    _draw_errors(right, ordered)
    names = "\n".join(f"{number:2d}  {finding.label}" for number, finding in enumerate(ordered, 1))
    right.annotate(names, (1.03, 1), xycoords="axes fraction", va="top", fontsize=8, linespacing=1.6)
    plots.place_labels(left, {str(place): (1e3 * one.forecast.round, one.forecast.tau) for place, one in enumerate(ordered, 1)}, fontsize=8)
    plots.place_labels(right, {str(place): point for place, point in _pairs(ordered).items()}, fontsize=8)
    plots.save(figure, path, source)


def _draw_frontier(axes: Any, findings: Sequence[Finding]) -> None:
    """Accepted length over a round's time: equal throughput lies on lines through the origin."""
    known = [finding.forecast for finding in findings]
    across = [1e3 * one.round for one in known]
    widest, highest = 1.15 * max(across), 1.15 * max(one.tau for one in known)
    plain = 1e3 * known[0].plain
    for ratio in plots.ratios_near([one.speedup for one in known]):
        end = min(widest, highest * plain / ratio)
        axes.plot([0, end], [0, ratio * end / plain], color="0.85" if ratio != 1 else "0.5", lw=1, zorder=0)
        axes.annotate(f"{ratio:g}x", (end, ratio * end / plain), color="0.5", fontsize=8)
    edge = frontier(known)
    axes.plot([across[place] for place in edge], [known[place].tau for place in edge], color="tab:blue", ls="--", lw=1, label="frontier")
    axes.scatter(across, [one.tau for one in known], color="tab:blue", zorder=2)
    chosen = best(known)
    axes.scatter(across[chosen], known[chosen].tau, marker="*", s=200, color="tab:orange", zorder=3, label="fastest by forecast")
    axes.set(xlabel="ms a round", ylabel="accepted length (tau)", xlim=(0, widest), ylim=(0, highest))
    axes.set_title("Lines: equal speed-up over plain decoding", fontsize=10, pad=16)
    axes.legend(loc="lower right")


def _draw_errors(axes: Any, findings: Sequence[Finding]) -> None:
    """Forecast over measurement, with the band of `TOLERANCE`."""
    pairs = [*_pairs(findings).values()]
    axes.set(xlabel="measured tokens/s", ylabel="forecast tokens/s")
    axes.set_title(f"{len(pairs)} cells decoded for real; band: {TOLERANCE:.0%}", fontsize=10, pad=16)
    if not pairs:
        return
    end = 1.2 * max(map(max, pairs))
    axes.fill_between([0, end], [0, end * (1 - TOLERANCE)], [0, end * (1 + TOLERANCE)], color="0.9", zorder=0)
    axes.plot([0, end], [0, end], color="0.6", lw=1, zorder=1)
    axes.scatter(*zip(*pairs, strict=True), color="tab:blue", zorder=2)
    axes.set(xlim=(0, end), ylim=(0, end))


def _pairs(findings: Sequence[Finding]) -> dict[int, tuple[float, float]]:
    """Number in the table -> (measured, forecast) tokens a second, of the cells that were decoded."""
    return {
        place: (finding.measured.tokens_per_second, finding.forecast.tokens_per_second)
        for place, finding in enumerate(findings, 1) if finding.measured is not None
    }  # fmt: skip
