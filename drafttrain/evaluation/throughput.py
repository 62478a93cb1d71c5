"""How fast a drafter decodes, foretold from its accepted length and from latencies (Yan et al., 2024, arXiv:2402.01528).

    tokens/s = tau / (t_draft + t_score(N) + t_other)        batch 1, seconds a round
    speed-up = tokens/s x seconds of a plain round

tau counts tokens a round, the bonus token included (the paper's TAR + 1); N counts a round's nodes with the root. A drafter's quality is
only one side: what it costs decides as much, and t_score grows with N. Pure functions; what goes in is measured by
`runtime.costs` and `forecast.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Forecast:
    """One way of decoding on one device."""

    tau: float
    draft: float  # seconds a round
    score: float
    other: float
    plain: float  # seconds of a plain round
    tau_not_looping: float | None = None  # where no output goes round in circles; None: there is none such, or it is not known

    @property
    def round(self) -> float:
        """Seconds."""
        return self.draft + self.score + self.other

    @property
    def tokens_per_second(self) -> float:
        return self.tau / self.round

    @property
    def speedup(self) -> float:
        """Over plain decoding, whose tau is 1."""
        return self.tau * self.plain / self.round

    @property
    def speedup_not_looping(self) -> float | None:
        return None if self.tau_not_looping is None else self.tau_not_looping * self.plain / self.round


def best(forecasts: Sequence[Forecast]) -> int:
    """Which one decodes fastest; of equals the first."""
    return max(range(len(forecasts)), key=lambda place: forecasts[place].tokens_per_second)


def break_even(known: Forecast, other: Forecast) -> float:
    """The tau that `other` needs to decode as fast as `known` (the paper's break-even TAR, plus one)."""
    return known.tau * other.round / known.round


def frontier(forecasts: Sequence[Forecast]) -> list[int]:
    """Those that no other beats in both accepted length and seconds a round, by their seconds."""
    order = sorted(range(len(forecasts)), key=lambda place: (forecasts[place].round, -forecasts[place].tau))
    kept: list[int] = []
    for place in order:
        if not kept or forecasts[place].tau > forecasts[kept[-1]].tau:
            kept.append(place)
    return kept
