"""From single decodings to the rows of results.jsonl. `docs/evaluation.md` gives the formula of every field."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from itertools import accumulate
from operator import add, mul
from typing import Any, Literal

import numpy as np

from drafttrain.core.errors import UserError
from drafttrain.core.renamed import current_row
from drafttrain.evaluation.efficiency import Efficiency
from drafttrain.evaluation.quality import JudgedText, Quality, pooled
from drafttrain.evaluation.runners import GENERATE, PLAIN, Facts, Outcome
from drafttrain.evaluation.suites import ALL
from drafttrain.runtime.stats import PHASES, Statistics

FORMAT = 1
RESAMPLES = 10_000
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t, 97.5%, of 1, 2, ... degrees of freedom; the last one stands for more, too."""
PREFETCH = ("prefetched", "prefetch_hits", "prefetch_calls", "calls_saved")
BASELINES = (PLAIN, GENERATE)
"""Whom speed-ups are measured against, as far as they are in a run."""
STRETCH = 16
"""Tokens of an answer whose rounds are counted together in `positions`."""
Outputs = Literal["all", "not_looping"]


@dataclass
class Difference:
    """Where a greedy output leaves plain decoding's."""

    at: int  # index of the first differing token of the answer
    margin: float | None  # the target's logit of plain decoding's token less the other's; None where one output just ends


@dataclass
class Sample:
    """One decoding by one runner, as the journal keeps it."""

    item: str
    turn: int
    repeat: int
    task: str
    label: str
    outcome: Outcome
    looping: bool
    difference: Difference | None = None
    quality: JudgedText | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """What it shares with the other runners' decodings of the same prompt."""
        return self.item, self.turn, self.repeat

    @property
    def decode_seconds(self) -> float:
        return self.outcome.wall - self.outcome.statistics.seconds["prefill"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Sample:
        difference = None if data["difference"] is None else Difference(**data["difference"])
        quality = JudgedText(**data["quality"]) if data.get("quality") else None  # older journals have none
        outcome = Outcome.from_json(data["outcome"])
        return cls(**{**data, "outcome": outcome, "difference": difference, "quality": quality})


@dataclass(frozen=True)
class Interval:
    """A ratio and its 95% interval; None where one prompt, or one pass over the suite, gives none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Exactness:
    """Greedy outputs against plain decoding's."""

    compared: int
    different: int
    margins: tuple[float | None, ...]  # of the different ones
    prompts: tuple[str, ...]  # their items


@dataclass(frozen=True)
class Setting:
    """What all rows of a run share: what was asked of which target, where, and with what."""

    run: str
    target: str
    target_fingerprint: str
    dtype: str
    suite: str
    suite_hash: str
    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    repeats: int
    seed: int
    device: str
    threads: int
    versions: dict[str, str]
    commit: str | None
    date: str


@dataclass(frozen=True)
class Measured:
    """What one runner's decodings of one task gave."""

    label: str
    drafter: str | None
    drafter_fingerprint: str | None
    rule: str | None
    lossless: bool
    draws: str | None
    shape: dict[str, Any] | None
    draft_length: int
    slots: int
    options: dict[str, Any] | None
    task: str
    outputs: Outputs
    prompts: int
    rounds: int
    tokens: int
    tau: float
    alpha: tuple[float | None, ...]
    nodes_per_round: float
    tokens_per_second: float
    tokens_per_second_with_prefill: float
    plain_tokens_per_second: float
    seconds: dict[str, float]
    speedups: dict[str, Interval]  # baseline -> ratio
    yield_of_tau: float
    looping: float
    exactness: Exactness | None
    peak_memory: int
    loop_efficiency: float | None = None
    drafting_overhead: float | None = None
    policy: str | None = None
    tau_interval: Interval | None = None
    positions: tuple[tuple[int, int], ...] = ()
    """(rounds, tokens they kept) of the rounds that begin in each `STRETCH` tokens of an answer."""
    prefetch: dict[str, int] | None = None  # prefetched drafts, hits, prefetch_calls, calls_saved; see `Statistics`
    by_drafter: dict[str, dict[str, int]] | None = None  # of a pool; see `Statistics`
    quality: Quality | None = None  # see `quality.pooled`; None where it was not measured
    repeat_intervals: dict[str, Interval] = field(default_factory=dict)  # as `speedups`; where `repeats` is 1 without an interval
    attempts: tuple[int, ...] = ()
    """Rounds behind each of `alpha`."""
    hybrid_costs: dict[str, float] | None = None  # what `auto` costs of `runtime.hybrid` turned out to be

    @property
    def behind_alpha(self) -> list[float]:
        """Rounds behind each of `alpha`; where a row does not say, the most that there can have been: those that stood one level above."""
        if self.attempts:
            return [*self.attempts]
        return [*accumulate((alpha or 0.0 for alpha in self.alpha[:-1]), mul, initial=float(self.rounds))] if self.alpha else []

    @property
    def seconds_per_token(self) -> dict[str, float]:
        """The time split of decoding alone."""
        return {phase: _ratio(spent, self.tokens) for phase, spent in self.seconds.items() if phase != "prefill"}

    @property
    def seconds_per_round(self) -> float:
        """Of decoding alone."""
        return _ratio(sum(self.seconds.values()) - self.seconds["prefill"], self.rounds)


@dataclass(frozen=True)
class Row(Setting):
    """A line of results.jsonl."""

    measured: Measured

    @property
    def uncut(self) -> Measured:
        """`measured`, its `positions` ending where the length limit may cut a round, which then kept less than stood."""
        deepest = max(self.measured.draft_length, len(self.measured.alpha))  # a lookup's chain may be longer than the shape
        room = max(0, self.max_new_tokens - deepest)
        return replace(self.measured, positions=self.measured.positions[: room // STRETCH])

    def to_json(self) -> dict[str, Any]:
        flat = asdict(self)
        return {"format": FORMAT, **flat.pop("measured"), **flat}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> Row:
        """Raises `UserError` where the row is of another format; `where` opens the message."""
        data = current_row(data)
        if data.pop("format", None) != FORMAT:
            raise UserError(f"{where}: not a result row of format {FORMAT}; evaluate again with this drafttrain")
        try:
            shared = {field.name: data.pop(field.name) for field in fields(Setting)}
            data["alpha"], data["attempts"] = known_alpha(data["alpha"]), tuple(data.get("attempts", ()))
            for kind in ("speedups", "repeat_intervals"):
                data[kind] = {name: Interval(**ratio) for name, ratio in data.get(kind, {}).items()}
            if data["exactness"] is not None:
                data["exactness"] = Exactness(**{key: _tuple(value) for key, value in data["exactness"].items()})
            if data.get("tau_interval") is not None:
                data["tau_interval"] = Interval(**data["tau_interval"])
            data["positions"] = tuple(_tuple(stretch) for stretch in data.get("positions", ()))
            return cls(**shared, measured=Measured(**data))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: a broken result row ({error}); evaluate again, or remove the line") from error


def known_alpha(values: Sequence[float | None]) -> tuple[float | None, ...]:
    """alpha as it was written; None, too, where a 0 follows a 0: nothing was tried there, and older rows did not tell the two apart."""
    return tuple(None if value == before == 0 else value for before, value in zip([None, *values], values, strict=False))


def make_rows(
    samples: Sequence[Sample], facts: dict[str, Facts], efficiencies: dict[str, Efficiency], setting: Setting,
    hybrid_costs: Mapping[str, dict[str, float]] | None = None,
) -> list[Row]:
    """A row for each runner, task (and all of them together) and kind of outputs; none where no prompt is left."""
    tasks = [*dict.fromkeys(sample.task for sample in samples), ALL]
    by_key = {label: {sample.key: sample for sample in samples if sample.label == label} for label in BASELINES if label in facts}
    rows = []
    for label, runner_facts in facts.items():
        exact = setting.temperature == 0 and label != PLAIN
        costs = (hybrid_costs or {}).get(label)
        for task in tasks:
            task_samples = [sample for sample in samples if sample.label == label and task in (ALL, sample.task)]
            for outputs, chosen in _kinds(task_samples, by_key[PLAIN]):
                if not chosen:
                    continue
                # efficiency was measured once, over everything
                efficiency = efficiencies.get(label) if task == ALL and outputs == "all" else None
                baselines = {name: [found[sample.key] for sample in chosen] for name, found in by_key.items()}
                plain = baselines.pop(PLAIN)
                measured = summarise(chosen, plain, runner_facts, label, task, outputs, efficiency, exact, baselines)
                rows.append(Row(**asdict(setting), measured=replace(measured, hybrid_costs=costs)))
    return rows


def _kinds(samples: list[Sample], plain: dict[tuple[str, int, int], Sample]) -> Iterable[tuple[Outputs, list[Sample]]]:
    yield "all", samples
    yield "not_looping", [sample for sample in samples if not (sample.looping or plain[sample.key].looping)]


def summarise(
    own: Sequence[Sample], plain: Sequence[Sample], facts: Facts, label: str, task: str, outputs: Outputs,
    efficiency: Efficiency | None = None, exact: bool = False, others: Mapping[str, Sequence[Sample]] | None = None,
) -> Measured:
    """One runner's decodings against plain decoding's of the same prompts, pair by pair, and against other baselines'."""
    total = _pooled(own)
    baselines = {PLAIN: plain, **(others or {})}
    speedups = {name: ratio_interval(own, theirs) for name, theirs in baselines.items()}
    written, wall = sum(len(sample.outcome.tokens) for sample in own), sum(sample.outcome.wall for sample in own)
    return Measured(
        **asdict(facts), label=label, task=task, outputs=outputs,
        prompts=len({(sample.item, sample.turn) for sample in own}),
        rounds=total.rounds, tokens=total.tokens, tau=total.tau, alpha=tuple(total.alpha), attempts=tuple(total.attempts),
        nodes_per_round=_ratio(sum(sample.outcome.drafted for sample in own), total.rounds),
        tokens_per_second=_ratio(total.tokens, _decoding(own)),
        tokens_per_second_with_prefill=_ratio(written, wall),
        plain_tokens_per_second=_ratio(_pooled(plain).tokens, _decoding(plain)),
        seconds={phase: total.seconds[phase] for phase in PHASES},
        speedups=speedups, repeat_intervals={name: repeat_interval(own, theirs) for name, theirs in baselines.items()},
        yield_of_tau=_ratio(speedups[PLAIN].value, total.tau),
        looping=_ratio(sum(sample.looping for sample in own), len(own)),
        exactness=_exactness(own) if exact else None,
        peak_memory=max(sample.outcome.peak_memory for sample in own),
        loop_efficiency=efficiency.loop if efficiency else None,
        drafting_overhead=efficiency.drafting if efficiency else None,
        prefetch={name: vars(total)[name] for name in PREFETCH} if total.prefetched else None,
        by_drafter=total.by_drafter or None,
        quality=pooled([sample.quality for sample in own if sample.quality is not None]),
        tau_interval=tau_interval(own), positions=by_position(own),
    )


def by_position(own: Iterable[Sample]) -> tuple[tuple[int, int], ...]:
    """See `Measured.positions`; a round begins behind the tokens that stand, the prefill's included."""
    found: dict[int, tuple[int, int]] = {}
    for sample in own:
        place = 1
        for tokens in sample.outcome.kept:
            rounds, kept = found.get(place // STRETCH, (0, 0))
            found[place // STRETCH] = rounds + 1, kept + tokens
            place += tokens
    return tuple(found.get(stretch, (0, 0)) for stretch in range(max(found, default=-1) + 1))


def ratio_interval(
    own: Sequence[Sample], plain: Sequence[Sample], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Speed-up: seconds per token of plain decoding over seconds per token of ours, sums over all prompts; the interval
    is the middle 95% of the same ratio over prompts resampled within their tasks (percentile bootstrap; an item's turns and
    repeats stay together, pairs too)."""
    return _bootstrap(own, _paired_sums(own, plain), _speedup, resamples, seed)


def tau_interval(own: Sequence[Sample], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The accepted length with its interval, over the same resampled prompts as `ratio_interval`'s."""
    sums = [(sample.outcome.statistics.tokens, sample.outcome.statistics.rounds) for sample in own]
    return _bootstrap(own, np.array(sums, dtype=float), _tau, resamples, seed)


def repeat_interval(own: Sequence[Sample], plain: Sequence[Sample]) -> Interval:
    """The speed-up with the interval in which it falls, 95 times of 100, when the same prompts are run again as often on this machine.

    Each pass over the suite (`evaluation.repeats`) gives a speed-up; their spread is what time does to it, whatever lasts shorter than a
    pass or as long. Student's t over R passes, and twice the variance of their mean: the other run has one of its own.
    """
    sums, repeats = _paired_sums(own, plain), np.array([sample.repeat for sample in own])
    value = float(_speedup(sums.sum(0)))
    passes = np.array([_speedup(sums[repeats == repeat].sum(0)) for repeat in np.unique(repeats)])
    R = len(passes)
    if R < 2 or not np.isfinite(passes).all():
        return Interval(value, None, None)
    reach = STUDENT[min(R - 1, len(STUDENT)) - 1] * np.log(passes).std(ddof=1) * np.sqrt(2 / R)
    return Interval(value, value * float(np.exp(-reach)), value * float(np.exp(reach)))


def _paired_sums(own: Sequence[Sample], plain: Sequence[Sample]) -> np.ndarray:
    """[B, 4] of every pair: plain seconds, plain tokens, our seconds, our tokens."""
    sums = []
    for ours, theirs in zip(own, plain, strict=True):
        assert ours.key == theirs.key, f"{ours.key} is paired with {theirs.key}"
        sums.append(
            (theirs.decode_seconds, theirs.outcome.statistics.tokens, ours.decode_seconds, ours.outcome.statistics.tokens)
        )
    return np.array(sums, dtype=float)


def _bootstrap(
    own: Sequence[Sample], sums: np.ndarray, ratio: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> Interval:
    """`ratio` of the sums over all decodings (`sums` [B, n]), and over items resampled within their tasks.

    Of a task's m items m - 1 are drawn, each counting m / (m - 1) times (Rao & Wu, 1988): m of so few would
    show too little spread. Where a task has one item alone, whose spread nobody knows, all tasks are resampled as one.
    """
    place = {item: index for index, item in enumerate(dict.fromkeys(sample.item for sample in own))}
    pooled = np.zeros((len(place), sums.shape[1]))
    np.add.at(pooled, [place[sample.item] for sample in own], sums)
    value = float(ratio(pooled.sum(0)))
    if len(place) < 2:
        return Interval(value, None, None)
    tasks = {place[sample.item]: sample.task for sample in own}
    strata = [[item for item in tasks if tasks[item] == task] for task in dict.fromkeys(tasks.values())]
    if min(len(stratum) for stratum in strata) < 2:
        strata = [[*tasks]]
    generator, drawn = np.random.default_rng(seed), np.zeros((resamples, sums.shape[1]))
    for stratum in strata:
        m = len(stratum)
        times = generator.multinomial(m - 1, np.full(m, 1 / m), size=resamples)  # [R, m] how often each was drawn
        drawn += times @ pooled[stratum] * (m / (m - 1))
    low, high = np.nanpercentile(ratio(drawn), [2.5, 97.5])
    return Interval(value, float(low), float(high))


def _speedup(sums: np.ndarray) -> np.ndarray:
    """[..., 4] -> [...]; nan where a sum is 0 (no token decoded)."""
    plain_seconds, plain_tokens, seconds, tokens = np.moveaxis(sums, -1, 0)
    return _divided(plain_seconds * tokens, plain_tokens * seconds)


def _tau(sums: np.ndarray) -> np.ndarray:
    """[..., 2] -> [...]; nan where there was no round."""
    tokens, rounds = np.moveaxis(sums, -1, 0)
    return _divided(tokens, rounds)


def _divided(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = over / under
    return np.where(np.isfinite(ratio), ratio, np.nan)


def _exactness(own: Sequence[Sample]) -> Exactness:
    different = [(sample.item, sample.difference.margin) for sample in own if sample.difference is not None]
    prompts, margins = zip(*different, strict=True) if different else ((), ())
    return Exactness(len(own), len(different), margins, prompts)


def _pooled(samples: Sequence[Sample]) -> Statistics:
    return reduce(add, (sample.outcome.statistics for sample in samples), Statistics())


def _decoding(samples: Sequence[Sample]) -> float:
    return sum(sample.decode_seconds for sample in samples)


def _ratio(over: float, under: float) -> float:
    return over / under if under else 0.0


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
