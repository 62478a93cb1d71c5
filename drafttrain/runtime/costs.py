"""What rounds cost on this device, measured: t_score by the number of nodes, t_draft and t_other from a few real rounds.

Batch 1, greedy. Everything that is compared is measured by turns, after a warm-up, and medians are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol, TypeVar

import torch

from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Layout
from drafttrain.drafters.base import Drafter
from drafttrain.runtime.generate import DecodingLoop, RoundHook, RoundRecord
from drafttrain.runtime.rows import Request
from drafttrain.runtime.stats import now
from drafttrain.target.adapter import Target

NODES = (1, 2, 4, 8, 16, 32, 64)
WARM_UP = 3
TEXT, TEXTS = 32, 3  # tokens of a text that prices are measured behind, and how many such texts

Compared = TypeVar("Compared")


class Decoder(Protocol):
    """What is measured of a decoder: whoever makes loops (`runtime.decoder.SpeculativeDecoder` does) can be."""

    target: Target
    drafter: Drafter | None

    def batch(self, sampling: Sampling, *, on_round: RoundHook | None = None) -> DecodingLoop:
        """A loop, ready to start."""
        ...


@dataclass(frozen=True)
class ScoreCurve:
    """t_score at some numbers of nodes."""

    nodes: tuple[int, ...]  # ascending, the root counted
    seconds: tuple[float, ...]

    def at(self, nodes: int) -> float:
        """Seconds of a target forward over `nodes`: on the line between the neighbours measured, or on the last line beyond them."""
        assert nodes >= self.nodes[0] and len(self.nodes) == len(self.seconds) >= 2
        right = next((place for place, known in enumerate(self.nodes) if known >= nodes), len(self.nodes) - 1)
        right = max(right, 1)
        (a, b), (low, high) = self.nodes[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
        return low + (high - low) * (nodes - a) / (b - a)

    def forwards(self, nodes: int) -> float:
        """What scoring `nodes` costs, in forwards of one token."""
        return self.at(nodes) / self.at(1)


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
    cache.set_lengths([context])
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
    decoders: Sequence[Decoder], prompts: Sequence[list[int]], max_new_tokens: int, rounds: int = 12
) -> list[RoundCost]:
    """Of each decoder, over the first `rounds` rounds on each prompt (token ids)."""
    played: list[list[Played]] = [[] for _ in decoders]
    for decoder in decoders:
        _play(decoder, prompts[0], max_new_tokens, WARM_UP)
    for turn, prompt in enumerate(prompts):
        for place in in_turn(range(len(decoders)), turn):
            played[place] += _play(decoders[place], prompt, max_new_tokens, rounds)
    return [cost_of(seen) for seen in played]


def cost_of(played: Sequence[Played]) -> RoundCost:
    """Of some real rounds: a hybrid's don't all run the trained drafter, so that a median of all would be that of one kind."""
    kinds = {calls: [one.seconds["draft"] for one in played if one.calls == calls] for calls in {one.calls for one in played}}
    draft = sum(median(seconds) * len(seconds) for seconds in kinds.values()) / len(played)
    other = median(one.seconds["verify"] + one.seconds["commit"] + one.seconds["other"] for one in played)
    return RoundCost(draft, other, tuple(one.nodes for one in played), median(one.seconds["score"] for one in played))


def _play(decoder: Decoder, prompt: list[int], max_new_tokens: int, rounds: int) -> list[Played]:
    """The first `rounds` rounds."""
    drafter, nodes = decoder.drafter, [0]

    def look(record: RoundRecord) -> None:
        nodes[0] = int(record.tree.live.sum()) - 1

    batch = decoder.batch(Sampling(), on_round=look)
    batch.start([Request(prompt, 0, min(max_new_tokens, decoder.target.max_context - len(prompt)))])
    batch.clock.take()  # waits for the device and forgets the prefill
    out: list[Played] = []
    while not batch.done and len(out) < rounds:
        before = drafter.calls if drafter else 0
        batch.step()
        out.append(Played(batch.clock.take(), (drafter.calls if drafter else 0) - before, nodes[0]))
    return out


def measured_hybrid_costs(alone: Decoder, nodes: int) -> dict[str, float]:
    """`prices` for trees of `nodes`, in a few seconds and without a suite: rounds and forwards behind texts of random tokens.

    alone: decodes with the trained drafter alone. Its counters and the target's stay as they were.
    """
    target, drafter = alone.target, alone.drafter
    assert drafter is not None
    before = target.forwards, drafter.calls
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, target.vocab_size, (TEXTS, TEXT), generator=generator).tolist()
    played = [one for text in texts for one in _play(alone, text, TEXT, WARM_UP + 1)[1:] if one.calls]
    curve = score_curve(target, TEXT, drafter.needs, 5, (1, nodes + 1))
    target.forwards, drafter.calls = before
    draft = median(one.seconds["draft"] for one in played) if played else 0.0
    return hybrid_costs(draft, curve.at(1), curve, nodes)


def hybrid_costs(draft: float, forward: float, curve: ScoreCurve, nodes: int) -> dict[str, float]:
    """A hybrid's, from the seconds that the trained drafter takes alone beside a plain forward's, and what `nodes` add to that."""
    return {"draft_cost": round(draft / forward, 3), "node_cost": round(max(0.0, curve.forwards(nodes + 1) - 1) / nodes, 4)}


def in_turn(compared: Sequence[Compared], place: int) -> list[Compared]:
    """The order at a place: everyone comes first, second, ... equally often, and follows each neighbour as often as it
    goes before it."""
    turned = [compared[(place + offset) % len(compared)] for offset in range(len(compared))]
    return turned if place // len(compared) % 2 == 0 else turned[::-1]
