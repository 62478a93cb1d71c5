"""`drafttrain tune`: the shape (and of several drafters the one) that decodes fastest on this device, by the model of
`evaluation/throughput.py` and a short measurement of it.

Whatever was measured stands in OUTPUT/tune/journal.jsonl, from where a command that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from rich.progress import Progress, TaskID

from drafttrain.core.config import fingerprint
from drafttrain.core.disk import folder_fingerprint
from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic, Shape
from drafttrain.design.forecast import (
    ReplayedLength,
    answer,
    forecast,
    midway,
    parted_texts,
    replay,
    spread,
    typical_context,
)
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.files import load_drafter
from drafttrain.evaluation.bench import progress_bar
from drafttrain.evaluation.journal import ResultJournal
from drafttrain.evaluation.machine import device_name, versions
from drafttrain.evaluation.runners import PLAIN, shape_name
from drafttrain.evaluation.suites import load_suite
from drafttrain.evaluation.throughput import Forecast, best
from drafttrain.recipe import RESOLVED, Recipe
from drafttrain.report.frontier import number
from drafttrain.runtime.costs import RoundCost, ScoreCurve, hybrid_costs, round_costs, score_curve
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder, find_drafter
from drafttrain.target.adapter import Target

CHAINS = (1, 2, 3, 4, 5, 6, 8)
TREES = ((4, 3), (8, 4), (16, 4), (32, 8), (60, 10))
"""Drafted nodes, and how many nodes a level expands into how many children."""
DEPTHS = (2, 4, 6)
PRICED = 2
"""Prompts on which a hybrid's costs are measured."""
TIMED = 4
"""Prompts whose rounds are timed."""

T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """A trained drafter under one shape."""

    recipe: Recipe  # of the run that trained it, with the runtime that is tried
    drafter: Drafter
    weights: str  # fingerprint of the drafter's folder
    decoder: SpeculativeDecoder  # of the same, which drafts always
    label: str

    @property
    def key(self) -> str:
        """Fingerprint of what is measured."""
        return fingerprint(self.weights, self.decoder.runtime)

    def under(self, **changes: Any) -> Candidate:
        """The same with other values of its runtime."""
        runtime = self.recipe.runtime.model_copy(update=changes)
        recipe = self.recipe.model_copy(update={"runtime": runtime})
        return candidate(self.decoder.target, recipe, self.drafter, self.weights)


@dataclass(frozen=True)
class Tuned:
    """What was considered, and what is best."""

    labels: list[str]
    forecasts: list[Forecast]
    chosen: int
    recipe: Recipe  # the best drafter's, with the best runtime
    number: int  # which of the recipes that is


@dataclass
class TuningRecord:
    """Measurements that are made once: whatever stands in the journal is read."""

    target: Target
    max_new_tokens: int
    where: str  # fingerprint of what all of them depend on
    journal: ResultJournal  # nobody else's meanwhile
    progress: Progress
    bar: TaskID

    def once(self, what: str, depends: Sequence[Any], kind: TypeAdapter[T], measure: Callable[[], T]) -> T:
        """depends: on what else the measurement depends. kind: what it gives, to and from JSON."""
        self.progress.update(self.bar, description=f"tune: {what}")
        key = fingerprint(self.where, what, *depends)
        entry = next((one for one in self.journal.entries if one["key"] == key), None)
        if entry is None:
            entry = {"what": what, "key": key, "found": kind.dump_python(measure(), mode="json")}
            self.journal.append(entry)
        self.progress.advance(self.bar)
        return kind.validate_python(entry["found"])

    def costs(self, what: str, tried: Sequence[Candidate], prompts: Sequence[list[int]], rounds: int) -> dict[str, RoundCost]:
        """By candidate's key, and plain decoding's; all by turns: a busy machine hits all."""
        decoders = {PLAIN: SpeculativeDecoder(self.target), **{one.key: one.decoder for one in tried}}

        def measure() -> dict[str, RoundCost]:
            return dict(zip(decoders, round_costs([*decoders.values()], prompts, self.max_new_tokens, rounds), strict=True))

        return self.once(what, sorted(decoders), TypeAdapter(dict[str, RoundCost]), measure)


def tune(recipes: Sequence[Recipe]) -> Tuned:
    """The fastest way of decoding with one of the recipes' trained drafters, greedily and at batch 1, on the first one's suite.

    Where no candidate beats plain decoding, the best one's policy becomes `adaptive`, which decodes plainly while drafting loses. Raises
    `UserError` where a drafter is missing or another target's.
    """
    first = recipes[0]
    if first.evaluation.temperature > 0:
        raise UserError(f"evaluation.temperature {first.evaluation.temperature}: tune forecasts greedy decoding; set it to 0")
    target = Target.load(first.target)
    tried = [candidate for recipe in recipes for candidate in candidates(target, recipe)]
    suite, reader = first.evaluation.chosen(load_suite(first.evaluation.suite)), SpeculativeDecoder(target)
    prompts = [reader.tokenize(item.opening()) for item in suite.items]
    limit = first.evaluation.max_new_tokens
    where = fingerprint(
        target.fingerprint, str(target.dtype), suite.hash, limit, device_name(target.device), torch.get_num_threads(), versions()
    )
    journal = ResultJournal(first.folder / "tune" / "journal.jsonl")
    with journal.alone(), progress_bar() as progress:
        hybrid = any(one.recipe.runtime.hybrid for one in tried)
        kept = TuningRecord(target, limit, where, journal, progress, progress.add_task("tune", total=3 + hybrid + len(tried)))
        answers = kept.once("answers", (), TypeAdapter(list[list[int]]), lambda: answer(target, prompts, limit))
        context, needs = typical_context(prompts, answers), frozenset().union(*(one.drafter.needs for one in tried))
        curve = kept.once("score curve", (needs,), TypeAdapter(ScoreCurve), lambda: score_curve(target, context, needs))
        tried = with_costs(kept, tried, curve, spread(midway(prompts, answers), PRICED))
        found = forecasts(kept, tried, curve, prompts, answers)
    chosen = best(found)
    runtime = tried[chosen].recipe.runtime
    if found[chosen].speedup < 1:
        runtime = runtime.model_copy(update={"policy": "adaptive"})
    best_of = tried[chosen].recipe
    whose = next(place for place, recipe in enumerate(recipes) if recipe.folder == best_of.folder)
    return Tuned([one.label for one in tried], found, chosen, best_of.model_copy(update={"runtime": runtime}), whose)


def candidates(target: Target, recipe: Recipe) -> list[Candidate]:
    """Every shape that the recipe's drafter can draft and its rule verifies, the recipe's own first."""
    folder = find_drafter(recipe.folder)
    drafter, weights = load_drafter(folder, target.fingerprint), folder_fingerprint(folder)
    out = []
    for shape in shapes(drafter.max_depth, recipe.runtime.shape):
        runtime = unmeasured(recipe.runtime.model_copy(update={"shape": shape}))
        if fits(runtime, recipe):
            out.append(candidate(target, recipe.model_copy(update={"runtime": runtime}), drafter, weights))
    return out


def unmeasured(runtime: RuntimeConfig) -> RuntimeConfig:
    """With numbers for prices that would be measured for each decoder: `priced` measures them, as it does all others."""
    if runtime.hybrid is None:
        return runtime
    found = dict.fromkeys(runtime.hybrid.unmeasured, 0.0)
    return runtime.model_copy(update={"hybrid": runtime.hybrid.model_copy(update=found)})


def candidate(target: Target, recipe: Recipe, drafter: Drafter, weights: str) -> Candidate:
    """The drafter under the recipe's runtime."""
    steady = recipe.runtime.model_copy(update={"policy": "fixed"})  # what is measured is drafting
    decoder = SpeculativeDecoder(target, drafter, steady)
    assert decoder.drafter is not None
    label = f"{recipe.folder.name}: {decoder.drafter.config.name} {named(recipe.runtime.shape)}"
    return Candidate(recipe, drafter, weights, decoder, label)


def with_costs(kept: TuningRecord, tried: Sequence[Candidate], curve: ScoreCurve, prompts: Sequence[list[int]]) -> list[Candidate]:
    """Hybrids with this device's prices for their shapes, measured behind a few prompts; the others as they are.

    draft_cost: what the trained drafter takes to draft this shape alone; node_cost: what its nodes add to the target's forward, shared
    among them; both in forwards of one token.
    """
    alone = {place: one.under(hybrid=None) for place, one in enumerate(tried) if one.recipe.runtime.hybrid is not None}
    if not alone:
        return [*tried]
    costs = kept.costs("hybrid_costs", [*alone.values()], prompts, rounds=6)
    out = [*tried]
    for place, bare in alone.items():
        runtime = out[place].recipe.runtime
        assert runtime.hybrid is not None
        found = hybrid_costs(costs[bare.key].draft, costs[PLAIN].score, curve, runtime.shape.nodes)
        out[place] = out[place].under(hybrid=runtime.hybrid.model_copy(update=found))
    return out


def forecasts(
    kept: TuningRecord, tried: Sequence[Candidate], curve: ScoreCurve, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> list[Forecast]:
    """Of each candidate. answers: the target's own greedy ones."""
    costs = kept.costs("rounds", tried, spread(midway(prompts, answers), TIMED), rounds=12)
    texts = cache(lambda: parted_texts(kept.target, prompts, answers, [one.drafter for one in tried]))  # none where nothing waits

    def foretold(one: Candidate) -> Forecast:
        accepted = kept.once("replay", (one.key,), TypeAdapter(ReplayedLength), lambda: replay(one.decoder, *texts()))
        return forecast(accepted.tau, costs[one.key], costs[PLAIN], curve, accepted.tau_not_looping)

    return [foretold(one) for one in tried]


def shapes(deepest: int | None, own: Shape) -> list[Shape]:
    """Chains and trees of many sizes, no deeper than `deepest`; `own` comes first."""
    chains: list[Shape] = [Chain(length=length) for length in CHAINS]
    trees: list[Shape] = [
        Dynamic(depth=depth, beam=width, top_k=width, nodes=nodes) for nodes, width in TREES for depth in DEPTHS if depth < nodes
    ]
    return [shape for shape in dict.fromkeys([own, *chains, *trees]) if deepest is None or shape.depth <= deepest]


def fits(runtime: RuntimeConfig, recipe: Recipe) -> bool:
    """Whether the recipe's rule and draws stay exact with this shape."""
    try:
        runtime.fitted(recipe.evaluation.sampling)
    except UserError:
        return False
    return True


def named(shape: Shape) -> str:
    """`chain-4`, `tree-16, 4 deep`."""
    return shape_name(shape) if shape.shape == "chain" else f"{shape_name(shape)}, {shape.depth} deep"


def table(tuned: Tuned) -> tuple[tuple[str, ...], list[list[str]]]:
    """Head and body, the fastest first."""
    pairs = sorted(zip(tuned.labels, tuned.forecasts, strict=True), key=lambda pair: -pair[1].tokens_per_second)
    head = ("candidate", "tau", "tau, no loops", "draft ms", "score ms", "other ms", "tokens/s", "speed-up", "speed-up, no loops")
    return head, [[label, *_figures(one)] for label, one in pairs]


def _figures(one: Forecast) -> list[str]:
    times = [f"{1e3 * seconds:.2f}" for seconds in (one.draft, one.score, one.other)]
    speedups = (number(one.speedup), number(one.speedup_not_looping))
    return [number(one.tau), number(one.tau_not_looping), *times, f"{one.tokens_per_second:.1f}", *speedups]


def destination(recipe: Recipe, write: Path | None) -> Path:
    """Where the tuned recipe goes: `write`, or the run's own resolved recipe."""
    return write or recipe.folder / RESOLVED
