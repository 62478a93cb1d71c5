"""What `throughput.py` reckons with: this device's costs (`runtime.costs`) and the accepted length replayed on the target's own answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from drafttrain.core.sampling import Sampling
from drafttrain.drafters.base import Drafter
from drafttrain.evaluation.loops import loops
from drafttrain.evaluation.throughput import Forecast
from drafttrain.runtime.costs import RoundCost, ScoreCurve
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.runtime.stats import Statistics
from drafttrain.runtime.tree_replay import ReplayTexts, read_texts, tree_replay
from drafttrain.target.adapter import Target

SIDE_BY_SIDE = 8
"""Texts replayed at once."""


def midway(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[list[int]]:
    """Prompts with half of their answers: rounds from there on are typical, as lookups find more the longer a text is."""
    return [prompt + answer[: len(answer) // 2] for prompt, answer in zip(prompts, answers, strict=True)]


def answer(target: Target, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The target's own greedy answers, decoded plainly and side by side."""
    return [made.tokens for made in SpeculativeDecoder(target).generate(list(prompts), max_new_tokens, batch_size=SIDE_BY_SIDE)]


def parted_texts(
    target: Target, prompts: Sequence[list[int]], answers: Sequence[list[int]], drafters: Sequence[Drafter]
) -> tuple[list[ReplayTexts], list[ReplayTexts]]:
    """`texts_of` the answers that don't go round in circles, and of those that do."""
    parts: tuple[list[int], list[int]] = ([], [])
    for place, tokens in enumerate(answers):
        parts[loops(tokens)].append(place)
    straight, looping = (texts_of(target, [prompts[i] for i in part], [answers[i] for i in part], drafters) for part in parts)
    return straight, looping


def texts_of(target: Target, prompts: Sequence[list[int]], answers: Sequence[list[int]], drafters: Iterable[Drafter]) -> list[ReplayTexts]:
    """Prompts and answers as replay reads them, similar lengths together."""
    needs = frozenset().union(*(drafter.needs for drafter in drafters))
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]) + len(answers[place]))
    parts = [order[start : start + SIDE_BY_SIDE] for start in range(0, len(order), SIDE_BY_SIDE)]
    return [read_texts(target, [prompts[i] for i in part], [answers[i] for i in part], needs) for part in parts]


@dataclass(frozen=True)
class ReplayedLength:
    """What replay counts on the target's answers."""

    tau: float
    tau_not_looping: float | None  # of the answers that don't go round in circles; None where all do
    alpha: list[float | None]


def replay(decoder: SpeculativeDecoder, not_looping: Iterable[ReplayTexts], looping: Iterable[ReplayTexts]) -> ReplayedLength:
    """Of both kinds together, and of the first alone."""
    straight = replayed(decoder, not_looping)
    whole = straight + replayed(decoder, looping)
    return ReplayedLength(whole.tau, straight.tau if straight.rounds else None, whole.alpha)


def replayed(decoder: SpeculativeDecoder, texts: Iterable[ReplayTexts]) -> Statistics:
    """What the decoder's drafter, under its runtime, gets accepted on these texts."""
    assert decoder.drafter is not None
    return tree_replay(decoder.drafter, decoder.target.head, texts, decoder.runtime.fitted(Sampling())[1])


def typical_context(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> int:
    """Committed tokens in the middle of a typical answer."""
    return max(1, round(mean(len(prompt) + len(answer) / 2 for prompt, answer in zip(prompts, answers, strict=True))))


def forecast(tau: float, cost: RoundCost, plain: RoundCost, curve: ScoreCurve, tau_not_looping: float | None = None) -> Forecast:
    """The parts put together."""
    score = mean(curve.at(nodes + 1) for nodes in cost.nodes)
    return Forecast(tau, cost.draft, score, cost.other, plain.draft + curve.at(1) + plain.other, tau_not_looping)


def spread(prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    """At most `count` prompts of evenly spread lengths, the longest among them."""
    ordered = sorted(prompts, key=len, reverse=True)
    count = min(count, len(ordered))
    return [ordered[round(place * (len(ordered) - 1) / max(1, count - 1))] for place in range(count)]
