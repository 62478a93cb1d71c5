"""What `throughput.py` reckons with, measured on this device: t_score by the number of nodes, t_draft and t_other from a few real rounds,
and the accepted length replayed on the target's own answers.

Batch 1, greedy. Everything that is compared is measured by turns, after a warm-up, and medians are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median

import torch

from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Layout, Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.drafters.base import Drafter
from drafttrain.evaluation.loops import loops
from drafttrain.evaluation.machine import now
from drafttrain.evaluation.throughput import Forecast, ScoreCurve
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.runtime.generate import Request
from drafttrain.runtime.retrace import Texts, read_texts, retrace
from drafttrain.runtime.stats import Statistics
from drafttrain.target.adapter import Target

NODES = (1, 2, 4, 8, 16, 32, 64)
SIDE_BY_SIDE = 8
"""Texts replayed at once."""
WARM_UP = 3


@dataclass(frozen=True)
class RoundCost:
    """What a round takes around the target's forward, and how many nodes it brings there."""

    draft: float  # seconds: medians of the rounds with as many drafter calls, by how often such rounds come
    other: float  # median seconds: verify, commit, and the loop's own
    nodes: tuple[int, ...]  # drafted nodes of each round that was timed
    score: float = 0.0  # median seconds of the target's forwards over them


@dataclass(frozen=True)
class Played:
    """One real round."""

    seconds: dict[str, float]  # by phase
    calls: int  # of the drafter
    nodes: int  # drafted


def score_curve(target: Target, context: int, needs: Iterable[str], passes: int = 9, nodes: Sequence[int] = NODES) -> ScoreCurve:
    """t_score(N) behind `context` committed tokens. needs: features that the target hands over too."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, target.vocab_size, (1, context + max(nodes)), generator=generator).to(target.device)
    cache = target.new_cache(1, context + max(nodes) + 1)
    target.prefill(cache, tokens[:, :context], torch.tensor([context], device=target.device))
    cache.settle([context])
    taken: dict[int, list[float]] = {N: [] for N in nodes}
    for number in range(WARM_UP + passes):
        for N in nodes if number % 2 else nodes[::-1]:
            order = torch.arange(N, device=target.device)
            chain = Layout(tokens[:, context : context + N], order[None], (order[:, None] >= order)[None])
            start = now(target.device)
            target.score(cache, chain, Sampling(), needs)
            taken[N].append(now(target.device) - start)
    return ScoreCurve(tuple(nodes), tuple(median(taken[N][WARM_UP:]) for N in nodes))


def round_costs(
    decoders: Sequence[SpeculativeDecoder], prompts: Sequence[list[int]], max_new_tokens: int, rounds: int = 12
) -> list[RoundCost]:
    """Of each decoder, over the first `rounds` rounds on each prompt (token ids)."""
    played: list[list[Played]] = [[] for _ in decoders]
    for decoder in decoders:
        _play(decoder, prompts[0], max_new_tokens, WARM_UP)
    for turn, prompt in enumerate(prompts):
        for place in _turned(len(decoders), turn):
            played[place] += _play(decoders[place], prompt, max_new_tokens, rounds)
    return [cost_of(seen) for seen in played]


def cost_of(played: Sequence[Played]) -> RoundCost:
    """Of some real rounds: a hybrid's don't all run the trained drafter, so that a median of all would be that of one kind."""
    kinds = {calls: [one.seconds["draft"] for one in played if one.calls == calls] for calls in {one.calls for one in played}}
    draft = sum(median(seconds) * len(seconds) for seconds in kinds.values()) / len(played)
    other = median(one.seconds["verify"] + one.seconds["commit"] + one.seconds["other"] for one in played)
    return RoundCost(draft, other, tuple(one.nodes for one in played), median(one.seconds["score"] for one in played))


def _play(decoder: SpeculativeDecoder, prompt: list[int], max_new_tokens: int, rounds: int) -> list[Played]:
    """The first `rounds` rounds."""
    drafter, nodes = decoder.drafter, [0]

    def look(tree: Tree, scored: Scored, verdict: Verdict) -> None:
        nodes[0] = int(tree.live.sum()) - 1

    batch = decoder.batch(Sampling(), on_round=look)
    batch.start([Request(prompt, 0, min(max_new_tokens, decoder.target.max_context - len(prompt)))])
    batch.clock.take()  # waits for the device and forgets the prefill
    out: list[Played] = []
    while not batch.done and len(out) < rounds:
        before = drafter.calls if drafter else 0
        batch.step()
        out.append(Played(batch.clock.take(), (drafter.calls if drafter else 0) - before, nodes[0]))
    return out


def midway(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[list[int]]:
    """Prompts with half of their answers: rounds from there on are typical, as lookups find more the longer a text is."""
    return [prompt + answer[: len(answer) // 2] for prompt, answer in zip(prompts, answers, strict=True)]


def answer(target: Target, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The target's own greedy answers, decoded plainly and side by side."""
    return [made.tokens for made in SpeculativeDecoder(target).generate(list(prompts), max_new_tokens, batch_size=SIDE_BY_SIDE)]


def parted_texts(
    target: Target, prompts: Sequence[list[int]], answers: Sequence[list[int]], drafters: Sequence[Drafter]
) -> tuple[list[Texts], list[Texts]]:
    """`texts_of` the answers that don't go round in circles, and of those that do."""
    parts: tuple[list[int], list[int]] = ([], [])
    for place, tokens in enumerate(answers):
        parts[loops(tokens)].append(place)
    straight, looping = (texts_of(target, [prompts[i] for i in part], [answers[i] for i in part], drafters) for part in parts)
    return straight, looping


def texts_of(target: Target, prompts: Sequence[list[int]], answers: Sequence[list[int]], drafters: Iterable[Drafter]) -> list[Texts]:
    """Prompts and answers as replay reads them, similar lengths together."""
    needs = frozenset().union(*(drafter.needs for drafter in drafters))
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]) + len(answers[place]))
    parts = [order[start : start + SIDE_BY_SIDE] for start in range(0, len(order), SIDE_BY_SIDE)]
    return [read_texts(target, [prompts[i] for i in part], [answers[i] for i in part], needs) for part in parts]


@dataclass(frozen=True)
class Replay:
    """What replay counts on the target's answers."""

    tau: float
    tau_not_looping: float | None  # of the answers that don't go round in circles; None where all do
    alpha: list[float | None]


def replay(decoder: SpeculativeDecoder, not_looping: Iterable[Texts], looping: Iterable[Texts]) -> Replay:
    """Of both kinds together, and of the first alone."""
    straight = replayed(decoder, not_looping)
    whole = straight + replayed(decoder, looping)
    return Replay(whole.tau, straight.tau if straight.rounds else None, whole.alpha)


def replayed(decoder: SpeculativeDecoder, texts: Iterable[Texts]) -> Statistics:
    """What the decoder's drafter, under its runtime, gets accepted on these texts."""
    assert decoder.drafter is not None
    return retrace(decoder.drafter, decoder.target.head, texts, decoder.runtime.fitted(Sampling())[1])


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


def _turned(count: int, turn: int) -> list[int]:
    order = [(turn + place) % count for place in range(count)]
    return order if turn % 2 == 0 else order[::-1]
