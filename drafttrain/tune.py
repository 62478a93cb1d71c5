"""`drafttrain tune`: the shape (and of several drafters the one) that decodes fastest on this device, by the model of
`evaluation/throughput.py` and a short measurement of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic, Shape
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.files import load_drafter
from drafttrain.evaluation.forecast import RoundCost, answer, forecasts, midway, round_costs, score_curve, spread, typical_context
from drafttrain.evaluation.frontier import number
from drafttrain.evaluation.runners import shape_name
from drafttrain.evaluation.suites import load_suite
from drafttrain.evaluation.throughput import Forecast, ScoreCurve, best
from drafttrain.recipe import RESOLVED, Recipe
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder, find_drafter
from drafttrain.target.adapter import Target

CHAINS = (1, 2, 3, 4, 5, 6, 8)
TREES = ((4, 3), (8, 4), (16, 4), (32, 8), (60, 10))
"""Drafted nodes, and how many nodes a level expands into how many children."""
DEPTHS = (2, 4, 6)
PRICED = 2
"""Prompts on which a hybrid's prices are measured."""


@dataclass(frozen=True)
class Candidate:
    """A trained drafter under one shape."""

    recipe: Recipe  # of the run that trained it, with the runtime that is tried
    drafter: Drafter
    decoder: SpeculativeDecoder  # of the same, which drafts always
    label: str


@dataclass(frozen=True)
class Tuned:
    """What was considered, and what is best."""

    labels: list[str]
    forecasts: list[Forecast]
    chosen: int
    recipe: Recipe  # the best drafter's, with the best runtime
    number: int  # which of the recipes that is


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
    answers = answer(target, prompts, limit)
    curve = score_curve(target, typical_context(prompts, answers), frozenset().union(*(one.drafter.needs for one in tried)))
    tried = priced(target, tried, curve, spread(midway(prompts, answers), PRICED), limit)
    found = forecasts(target, [one.decoder for one in tried], prompts, answers, limit, curve)
    chosen = best(found)
    runtime = tried[chosen].recipe.runtime
    if found[chosen].speedup < 1:
        runtime = runtime.model_copy(update={"policy": "adaptive"})
    best_of = tried[chosen].recipe
    number = next(place for place, recipe in enumerate(recipes) if recipe.folder == best_of.folder)
    return Tuned([one.label for one in tried], found, chosen, best_of.model_copy(update={"runtime": runtime}), number)


def candidates(target: Target, recipe: Recipe) -> list[Candidate]:
    """Every shape that the recipe's drafter can draft and its rule verifies, the recipe's own first."""
    folder = find_drafter(recipe.folder)
    drafter = load_drafter(folder, target.fingerprint)
    out = []
    for shape in shapes(drafter.max_depth, recipe.runtime.shape):
        runtime = recipe.runtime.model_copy(update={"shape": shape})
        if fits(runtime, recipe):
            out.append(candidate(target, recipe.model_copy(update={"runtime": runtime}), drafter))
    return out


def candidate(target: Target, recipe: Recipe, drafter: Drafter) -> Candidate:
    """The drafter under the recipe's runtime."""
    steady = recipe.runtime.model_copy(update={"policy": "fixed"})  # what is measured is drafting
    decoder = SpeculativeDecoder(target, drafter, steady)
    assert decoder.drafter is not None
    return Candidate(recipe, drafter, decoder, f"{recipe.folder.name}: {decoder.drafter.config.name} {named(recipe.runtime.shape)}")


def priced(
    target: Target, tried: Sequence[Candidate], curve: ScoreCurve, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[Candidate]:
    """Hybrids with this device's prices for their shapes, measured behind a few prompts; the others as they are.

    head_cost: what the trained drafter takes to draft this shape alone; node_cost: what its nodes add to the target's forward, shared
    among them; both in forwards of one token.
    """
    hybrids = [place for place, one in enumerate(tried) if one.recipe.runtime.hybrid is not None]
    if not hybrids:
        return [*tried]
    alone = [one.decoder.runtime.model_copy(update={"hybrid": None}) for one in tried]
    bare = [SpeculativeDecoder(target, tried[place].drafter, alone[place]) for place in hybrids]
    plain, *costs = round_costs([SpeculativeDecoder(target), *bare], prompts, max_new_tokens, rounds=6)  # by turns: a busy machine hits all
    out = [*tried]
    for place, cost in zip(hybrids, costs, strict=True):
        runtime = out[place].recipe.runtime
        assert runtime.hybrid is not None
        hybrid = runtime.hybrid.model_copy(update=prices(cost, plain, curve, runtime.shape.nodes))
        recipe = out[place].recipe.model_copy(update={"runtime": runtime.model_copy(update={"hybrid": hybrid})})
        out[place] = candidate(target, recipe, out[place].drafter)
    return out


def prices(cost: RoundCost, plain: RoundCost, curve: ScoreCurve, nodes: int) -> dict[str, float]:
    """A hybrid's, from what the trained drafter takes alone beside a plain forward, and what `nodes` add to that."""
    return {"head_cost": round(cost.draft / plain.score, 3), "node_cost": round(max(0.0, curve.forwards(nodes + 1) - 1) / nodes, 4)}


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
