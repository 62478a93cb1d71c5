"""What decoding measured: rounds, accepted lengths, conditional acceptance, and where the time went."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PHASES = ("prefill", "draft", "score", "verify", "commit", "other")
START, PAUSE = "start", "pause"
"""Marks of the clock that are no phase."""


@dataclass
class Statistics:
    """Counts over any number of prompts; add them up with `+`."""

    rounds: int = 0
    tokens: int = 0
    """Tokens kept in rounds, the bonus token included; the prefill's token is not counted."""
    attempts: list[int] = field(default_factory=list)
    """attempts[k]: rounds in which a node at depth k + 1 could have stood, because its parent did."""
    accepts: list[int] = field(default_factory=list)
    """accepts[k]: rounds in which one did."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    target_forwards: int = 0
    drafter_calls: int = 0
    syncs: int = 0
    """Times the host waited for the device during rounds."""
    prefetched: int = 0
    """Rounds of rows for which drafts were prefetched."""
    prefetch_hits: int = 0
    """Prefetched drafts that came true."""
    prefetch_calls: int = 0
    """Drafter calls that prefetching took; `drafter_calls` counts them too."""
    calls_saved: int = 0
    """Drafter calls that hits saved: without prefetching it would be `drafter_calls - prefetch_calls + calls_saved`."""
    by_drafter: dict[str, dict[str, int]] = field(default_factory=dict)
    """Where there are several drafters, of each: `rounds` it proposed in, `tokens` kept in them, drafter `calls`, `catch_ups` (proposals
    that first read what was committed while it was idle), `caught_up` tokens read so, and the `bytes` of its state at most."""

    @property
    def tau(self) -> float:
        """Accepted length: tokens per round, pooled; plain decoding is 1."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def alpha(self) -> list[float | None]:
        """alpha[k]: share of nodes at depth k + 1 that stood, given their parent did; None where none was tried."""
        return [yes / all_ if all_ else None for yes, all_ in zip(self.accepts, self.attempts, strict=True)]

    @property
    def decode_seconds(self) -> float:
        """Time of the rounds, prefill left out."""
        return sum(self.seconds.values()) - self.seconds["prefill"]

    def __add__(self, other: Statistics) -> Statistics:
        depth = max(len(self.attempts), len(other.attempts))

        def both(a: list[int], b: list[int]) -> list[int]:
            return [x + y for x, y in zip(a + [0] * (depth - len(a)), b + [0] * (depth - len(b)), strict=True)]

        return Statistics(
            self.rounds + other.rounds,
            self.tokens + other.tokens,
            both(self.attempts, other.attempts),
            both(self.accepts, other.accepts),
            {phase: self.seconds[phase] + other.seconds[phase] for phase in PHASES},
            self.target_forwards + other.target_forwards,
            self.drafter_calls + other.drafter_calls,
            self.syncs + other.syncs,
            self.prefetched + other.prefetched,
            self.prefetch_hits + other.prefetch_hits,
            self.prefetch_calls + other.prefetch_calls,
            self.calls_saved + other.calls_saved,
            _both_drafters(self.by_drafter, other.by_drafter),
        )


def _both_drafters(first: dict[str, dict[str, int]], second: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Counts added up drafter by drafter; of memory, the larger."""
    out = {label: dict(counts) for label, counts in first.items()}
    for label, counts in second.items():
        total = out.setdefault(label, {})
        for name, count in counts.items():
            before = total.get(name, 0)
            total[name] = max(before, count) if name == "bytes" else before + count
    return out


def alpha_text(alpha: Iterable[float | None], zeros: bool = True) -> str:
    """`0.62 0.00 –`: a dash where nothing was tried. zeros: False leaves out those before the point, as tables do."""
    shown = ("–" if value is None else f"{value:.2f}" for value in alpha)
    return " ".join(shown if zeros else (value.removeprefix("0") for value in shown))


@dataclass(frozen=True)
class PastRound:
    """One round of a batch, as the host knows it afterwards."""

    rows: int  # computed, finished ones included
    going: int  # rows that were not finished before
    tokens: int  # that they gained together
    drafted: bool  # False: decoded plainly
    seconds: float  # by the host's clock; it waits for the device once a round
    arms: tuple[int, ...] = ()  # of each of these rows: which drafter proposed, 0 where there is one
    gained: tuple[int, ...] = ()  # of each of these rows: its tokens


@dataclass
class History(Statistics):
    """All that a policy may know before a round. Of the counts it holds `rounds`, `tokens` and `syncs`, over all rows."""

    latest: PastRound | None = None
    arm_rounds: Counter[int] = field(default_factory=Counter)
    """Rounds of rows by drafter."""
    arm_tokens: Counter[int] = field(default_factory=Counter)
    """Tokens by drafter."""

    def add(self, round_: PastRound) -> None:
        """The round that has just ended."""
        self.rounds, self.tokens, self.latest = self.rounds + round_.going, self.tokens + round_.tokens, round_
        for arm, tokens in zip(round_.arms, round_.gained, strict=True):
            self.arm_rounds[arm] += 1
            self.arm_tokens[arm] += tokens


class Tally:
    """Per-row counts of a running loop by drafter, kept on the device: [R, A] rounds and tokens, [R, A, K] attempts and accepts."""

    def __init__(self, rows: int, device: torch.device, arms: int = 1) -> None:
        """arms: drafters that are told apart."""
        self.rounds = torch.zeros(rows, arms, dtype=torch.long, device=device)
        self.tokens = torch.zeros_like(self.rounds)
        self.attempts = torch.zeros(rows, arms, 0, dtype=torch.long, device=device)
        self.accepts = torch.zeros_like(self.attempts)

    def __len__(self) -> int:
        return len(self.rounds)

    def grow(self, rows: int) -> None:
        """Room for so many rows more."""
        for name in ("rounds", "tokens", "attempts", "accepts"):
            counts: Tensor = vars(self)[name]
            setattr(self, name, torch.cat([counts, counts.new_zeros(rows, *counts.shape[1:])]))

    def add(
        self, rows: Tensor, going: Tensor, kept: Tensor, accepted: Tensor, tried: Tensor, depth: int, from_target: bool = False,
        arms: Tensor | None = None,
    ) -> None:
        """One round of the batch's `rows` [B]: which of them went on, tokens kept, nodes accepted, depths tried ([B] each; 0 everywhere
        where a row was done). from_target: the first level was the target's own (`Tree.from_target`), and counts in no alpha. arms: [B]
        which drafter proposed; None where there is one."""
        missing = depth - self.attempts.shape[2]
        if missing > 0:
            more = self.attempts.new_zeros(*self.rounds.shape, missing)
            self.attempts, self.accepts = torch.cat([self.attempts, more], 2), torch.cat([self.accepts, more], 2)
        place = rows, torch.zeros_like(rows) if arms is None else arms
        level = torch.arange(self.attempts.shape[2], device=rows.device)
        drafted = level >= int(from_target)
        self.rounds.index_put_(place, going.long(), accumulate=True)
        self.tokens.index_put_(place, kept, accumulate=True)
        self.attempts.index_put_(place, (drafted & (level < tried[:, None])).long(), accumulate=True)
        self.accepts.index_put_(place, (drafted & (level < accepted[:, None])).long(), accumulate=True)

    def row(self, index: int, labels: Sequence[str] = ()) -> Statistics:
        """One row's counts (waits for the device). labels: the drafters' names, where there are several."""
        rounds, tokens = self.rounds[index].tolist(), self.tokens[index].tolist()
        attempts, accepts = self.attempts[index].sum(0).tolist(), self.accepts[index].sum(0).tolist()
        by_drafter = {}
        if len(labels) > 1:
            for label, count, gained in zip(labels, rounds, tokens, strict=True):
                by_drafter[label] = {"rounds": count, "tokens": gained}
        return Statistics(sum(rounds), sum(tokens), attempts, accepts, by_drafter=by_drafter)


def now(device: torch.device) -> float:
    """Seconds of the host's clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """Laps by phase. On CUDA they are events, read once at the end: timing makes nothing wait."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.laps: list[tuple[str, float | torch.cuda.Event]] = []
        self.start()

    def start(self) -> None:
        """Begins a new run of laps; what passed since the last one counts nowhere."""
        self.laps.append((START, self._now()))

    def pause(self) -> None:
        """What passed since the last mark counts nowhere, and the run of laps goes on."""
        self.laps.append((PAUSE, self._now()))

    def lap(self, phase: str) -> None:
        """What passed since the last mark belongs to `phase`."""
        self.laps.append((phase, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def runs(self) -> list[dict[str, float]]:
        """Seconds a phase of each run of laps: the prefill's first, then every round's."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        runs: list[dict[str, float]] = [{}]
        for (_, before), (phase, after) in zip(self.laps, self.laps[1:], strict=False):
            if phase == START:
                runs.append({})
            elif phase != PAUSE:
                runs[-1][phase] = runs[-1].get(phase, 0.0) + _elapsed(before, after)
        return [run for run in runs if run]

    def seconds(self) -> dict[str, float]:
        """Seconds a phase so far."""
        runs = self.runs()
        return {phase: sum(run.get(phase, 0.0) for run in runs) for phase in PHASES}

    def take(self) -> dict[str, float]:
        """The same, and forgets the laps."""
        seconds, self.laps = self.seconds(), self.laps[-1:]
        return seconds


def _elapsed(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    assert isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event)
    return before.elapsed_time(after) / 1e3
