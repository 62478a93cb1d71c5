"""The only source of randomness while decoding.

`SeededRng` derives every number from (seed, row, how many were asked for before): a row's text depends neither on its batch nor on the
device. `SpreadRng` is for means over many runs. `ScriptedRng` walks every branch of the real code path, so that a test can add up the exact
distribution of what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from functools import lru_cache
from itertools import permutations, product
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor


class Rng(Protocol):
    """B rows; every call advances all of them by the same amount."""

    def bernoulli(self, p: Tensor) -> Tensor:
        """[B, ...] probabilities -> [B, ...] bool."""
        ...

    def draw(self, probs: Tensor, k: int, replace: bool) -> Tensor:
        """[B, W, V] distributions -> [B, W, k] token ids in the order they were drawn."""
        ...

    def substream(self, number: int | Tensor) -> None:
        """What follows is drawn from numbers set apart for turn `number` ([B] where rows differ), however many the turns before took."""
        ...


class RowRng(Rng, Protocol):
    """Streams that rows take with them when they leave a batch or enter one."""

    def select(self, rows: Tensor) -> RowRng:
        """The streams of these rows ([R] int64), where they stand now; the own ones stay where they are."""
        ...

    def join(self, other: Any) -> RowRng:
        """These streams followed by the other's."""
        ...


def draw_one(rng: Rng, probs: Tensor) -> Tensor:
    """[B, V] distributions -> [B] one token of each."""
    return rng.draw(probs[:, None], 1, replace=True)[:, 0, 0]


class SeededRng:
    """Counter-based randomness: one stream a row, keyed by (seed, row id)."""

    def __init__(self, seed: int, rows: Tensor, purpose: int = 0) -> None:
        """rows: [B] int64, the id of each row's stream (prompt index, sample index, ... as one number). purpose: streams of one seed and
        row that are used for different things, such as prompts and their answers, have different purposes."""
        # One mixed into the other, not XORed: a symmetric key gives (seed 3, row 4) the stream of (seed 5, row 2).
        seeded = _mix(_mix(torch.full_like(rows.long(), seed)) + purpose)
        self.key = _mix(_mix(seeded + rows.long()) ^ rows.long())  # [B]
        self.count = torch.zeros_like(self.key)  # [B] numbers used so far

    def select(self, rows: Tensor) -> SeededRng:
        """The streams of these rows, where they stand now."""
        part = object.__new__(SeededRng)
        part.key, part.count = self.key[rows], self.count[rows]
        return part

    def join(self, other: SeededRng) -> SeededRng:
        """This batch's streams followed by the other's."""
        both = object.__new__(SeededRng)
        both.key, both.count = torch.cat([self.key, other.key]), torch.cat([self.count, other.count])
        return both

    def substream(self, number: int | Tensor) -> None:
        self.count = torch.zeros_like(self.count) + (number << 32)

    def uniform(self, *shape: int) -> Tensor:
        """[B, *shape] fp64 in [0, 1), 53 bits."""
        size = 1
        for extent in shape:
            size *= extent
        index = self.count[:, None] + torch.arange(size, device=self.key.device)
        bits = _mix(self.key[:, None] + index * _GOLDEN)
        self.count = self.count + size
        return ((bits >> 11) & _MASK53).double().mul_(2.0**-53).view(len(self.key), *shape)

    def bernoulli(self, p: Tensor) -> Tensor:
        return self.uniform(*p.shape[1:]) < p

    def draw(self, probs: Tensor, k: int, replace: bool) -> Tensor:
        if replace:
            return inverse_cdf(probs, self.uniform(*probs.shape[1:-1], k))
        drawn = []
        for _ in range(k):
            drawn.append(inverse_cdf(probs, self.uniform(*probs.shape[1:-1], 1)))
            probs = probs.scatter(-1, drawn[-1], 0.0)
        return torch.cat(drawn, -1)


class SpreadRng(SeededRng):
    """Streams for means over many runs of one thing: each run alone is as random as `SeededRng`, the runs of one row together cover the
    unit interval, and the squares and cubes of their first numbers, evenly (scrambled Sobol points, shifted at random row by row: Cranley
    and Patterson, 1976; Owen, 1997), so that their mean has far less noise and no bias."""

    def __init__(self, seed: int, rows: Tensor, runs: Tensor, of: int) -> None:
        """rows: [B] int64, one id for all runs of a thing; runs: [B] int64, which of its `of` runs each is."""
        super().__init__(seed, rows)
        self.points = _sobol(of).to(rows.device)[runs]  # [B, NUMBERS]
        self.asked = 0

    def uniform(self, *shape: int) -> Tensor:
        shift = super().uniform(*shape)
        first, self.asked = self.asked, self.asked + shift[0].numel()
        return (shift + self.points[:, first : self.asked].view_as(shift)) % 1.0


NUMBERS = 1024
"""How many each run of `SpreadRng` has."""


@lru_cache(maxsize=8)
def _sobol(count: int) -> Tensor:
    """[count, NUMBERS] fp64 in [0, 1)."""
    return torch.quasirandom.SobolEngine(NUMBERS, scramble=True, seed=0).draw(count, dtype=torch.float64)


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """[..., V] non-negative weights and [..., k] uniforms -> [..., k] ids; a token of weight 0 is never drawn."""
    total = probs.double().cumsum(-1)
    point = u * total[..., -1:]
    return torch.searchsorted(total, point.contiguous(), right=True).clamp_max(probs.shape[-1] - 1)


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MASK53 = (1 << 53) - 1


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele et al., 2014) on int64, with logical shifts."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & ((1 << 33) - 1))


class ScriptedRng:
    """Replays one branch for the watched row and remembers its probability; the other rows draw from `others`.

    Use `branches` to walk all of them. The script is a list of outcome indices; past its end the first possible outcome is taken.
    """

    def __init__(self, script: list[int], others: SeededRng, watch: int = 0) -> None:
        self.script, self.others, self.watch = script, others, watch
        self.taken: list[tuple[int, int]] = []  # (outcome, the next possible one or -1) of each choice so far
        self.weights: list[float] = []  # their probabilities

    @property
    def probability(self) -> float:
        """Of all choices so far."""
        return prod(self.weights)

    def select(self, rows: Tensor) -> ScriptedRng:
        """These rows, on the same script; where the watched one is left behind, only `others` is asked."""
        row_list = rows.tolist()
        part = copy(self)  # the record of choices stays one
        part.watch = row_list.index(self.watch) if self.watch in row_list else -1
        part.others = self.others.select(rows)
        return part

    def join(self, other: ScriptedRng) -> ScriptedRng:
        both = copy(self)
        both.others = self.others.join(other.others)
        return both

    def bernoulli(self, p: Tensor) -> Tensor:
        out = self.others.bernoulli(p)
        if self.watch < 0:
            return out
        ours = p[self.watch].clamp(0, 1)
        flat = [bool(self._choose([1 - float(x), float(x)])) for x in ours.reshape(-1)]
        out[self.watch] = torch.tensor(flat).view(ours.shape)
        return out

    def draw(self, probs: Tensor, k: int, replace: bool) -> Tensor:
        out = self.others.draw(probs, k, replace)
        if self.watch < 0:
            return out
        rows = probs[self.watch].double().reshape(-1, probs.shape[-1])
        drawn = [self._draw_one((row / row.sum()).tolist(), k, replace) for row in rows]
        out[self.watch] = torch.tensor(drawn).view(*probs.shape[1:-1], k)
        return out

    def substream(self, number: int | Tensor) -> None:
        self.others.substream(number)

    def _draw_one(self, row: list[float], k: int, replace: bool) -> tuple[int, ...]:
        support = [t for t, w in enumerate(row) if w > 0]
        if replace:
            outcomes = list(product(support, repeat=k))
        else:  # where the distribution has fewer than k tokens, the rest comes with probability 0: any fixed order will do
            filler = tuple(t for t in range(len(row)) if t not in support)[: max(0, k - len(support))]
            outcomes = [drawn + filler for drawn in permutations(support, min(k, len(support)))]
        return outcomes[self._choose([_sequence_weight(row, seq, replace) for seq in outcomes])]

    def _choose(self, weights: list[float]) -> int:
        step = len(self.taken)
        outcome = self.script[step] if step < len(self.script) else next(i for i, w in enumerate(weights) if w > 0)
        following = [i for i, w in enumerate(weights) if w > 0 and i > outcome]
        self.taken.append((outcome, following[0] if following else -1))
        self.weights.append(weights[outcome])
        return outcome


def _sequence_weight(row: list[float], sequence: tuple[int, ...], replace: bool) -> float:
    weight, left = 1.0, 1.0
    for token in sequence:
        weight *= row[token] / left if left > 1e-12 else 1.0  # nothing left: the filler
        left = left if replace else left - row[token]
    return weight


def next_script(taken: Sequence[tuple[int, int]]) -> list[int] | None:
    """The script of the branch after one whose choices were `taken`, (outcome, the next possible one or -1) each, depth first; None after
    the last."""
    for step in reversed(range(len(taken))):
        if taken[step][1] >= 0:
            return [outcome for outcome, _ in taken[:step]] + [taken[step][1]]
    return None


def branches(rows: int, watch: int = 0) -> Iterator[ScriptedRng]:
    """Every branch of row `watch` of `rows` in turn: run the code with each yielded chance, then read its `probability`."""
    script: list[int] | None = []
    while script is not None:
        rng = ScriptedRng(script, SeededRng(0, torch.arange(rows)), watch)
        yield rng
        script = next_script(rng.taken)
