"""Every registered rule, for all draws it accepts, keeps the target's law: exact enumeration through the real round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.chance import Scripted, branches
from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic, Plan, Shape, Static
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.runtime import generate
from drafttrain.runtime.generate import Batch, Request
from drafttrain.runtime.policy import Fixed
from drafttrain.verify import RULES
from drafttrain.verify.base import Rule
from tests.contract.tables import TableDrafter, TableTarget

LOSSLESS = sorted(name for name, rule in RULES.items() if rule.lossless)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in LOSSLESS},
    "recursive naive": ("recursive", {"naive": True}),
    **{f"multidraft {scheme}": ("multidraft", {"scheme": scheme}) for scheme in ("tournament", "truncated", "optimal")},
}
"""Every lossless rule with its default options, and their other ways: label -> rule, options."""
TREES: dict[str, Shape] = {
    "2": Static(children=(2,)),
    "1-1": Chain(length=2), "2-1": Static(children=(2, 1)), "2-2": Static(children=(2, 2)), "3-1": Static(children=(3, 1)),
    "1-2": Static(children=(1, 2)), "2-2-1": Static(children=(2, 2, 1)), "ragged": Static(choices=((0,), (1,), (0, 0), (0, 1), (0, 0, 0))),
    "chain-3": Chain(length=3), "dynamic": Dynamic(depth=2, beam=2, top_k=2, nodes=4),
}  # fmt: skip
LONG = [("iid", "2-2-1"), ("iid", "3-1"), ("iid", "2-2"), ("iid", "ragged"), ("without_replacement", "2-2-1")]  # over 10 s each
WIDE = ("2-2", "3-1", "2-2-1", "ragged")  # variants of a rule walk these in the slow tests only
CASES = [
    pytest.param(name, draws, tree, marks=[pytest.mark.slow] if (draws, tree) in LONG or (name not in RULES and tree in WIDE) else [])
    for name, (rule, _) in VARIANTS.items()
    for draws in ("point", "iid", "without_replacement")
    for tree, shape in TREES.items()
    if (draws, "chain" if shape.shape == "chain" else "tree") in RULES[rule].accepts and (shape.shape != "dynamic" or draws == "point")
]
SMALL = [case for case in CASES if case.values[2] in ("2", "1-1")]


def two_tokens(
    monkeypatch: pytest.MonkeyPatch, rule: str, draws: Any, shape: Shape, sampling: Sampling, vocab: int, rows: int = 1, watch: int = 0,
    change: Callable[[Tree], Tree] | None = None, seed: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """The joint law [V, V] of the two tokens after the first one: as it comes out, and the target's own."""
    target, drafter = TableTarget(vocab), TableDrafter(vocab, seed)
    if change is not None:
        propose = drafter.propose
        drafter.propose = lambda *given: change(propose(*given))  # type: ignore[method-assign]
    prompts = [[1, 1], [0, 1, 1], [1]][:rows]
    root = [*prompts[watch], 0]
    after = [target_law(target, [*root, first], sampling) for first in range(vocab)]
    out = np.zeros((vocab, vocab))
    total = 0.0
    for chance in branches(rows, watch):
        monkeypatch.setattr(generate, "Seeded", lambda seed, ids, chance=chance: chance)
        batch = Batch(target, drafter, made(rule), Fixed(Plan(shape, draws)), sampling, seed=0)  # type: ignore[arg-type]
        batch.start([Request(prompt, index, 9) for index, prompt in enumerate(prompts)])
        batch.step()
        tokens = batch.written[watch][1:]
        out[tokens[0]] += chance.probability * (np.eye(vocab)[tokens[1]] if len(tokens) > 1 else after[tokens[0]])
        total += chance.probability
    assert abs(total - 1) < 1e-9, total  # every branch was walked once
    return out, target_law(target, root, sampling)[:, None] * np.array(after)


def made(variant: str) -> Rule:
    name, options = VARIANTS[variant]
    return RULES[name](RULES[name].Config(name=name, **options))


def target_law(target: TableTarget, context: list[int], sampling: Sampling) -> np.ndarray:
    return sampling.law(torch.tensor(target.p(context)).log().float()).double().numpy()


def distance(laws: tuple[np.ndarray, np.ndarray]) -> float:
    return float(np.abs(laws[0] - laws[1]).sum() / 2)


@pytest.mark.parametrize(("rule", "draws", "tree"), CASES)
def test_rule_keeps_the_targets_law(monkeypatch: pytest.MonkeyPatch, rule: str, draws: str, tree: str) -> None:
    sampling = Sampling() if RULES[VARIANTS[rule][0]].temperatures == "zero" else Sampling(temperature=1.0)
    vocab = 2 if tree in ("2-2-1", "ragged") and draws != "point" else 3
    assert distance(two_tokens(monkeypatch, rule, draws, TREES[tree], sampling, vocab)) < 1e-6


@pytest.mark.parametrize(("rule", "draws", "tree"), SMALL)
@pytest.mark.parametrize("watch", [0, 2])
def test_rule_keeps_the_law_of_each_row_of_a_batch(monkeypatch: pytest.MonkeyPatch, rule: str, draws: str, tree: str, watch: int) -> None:
    sampling = Sampling() if RULES[VARIANTS[rule][0]].temperatures == "zero" else Sampling(temperature=1.0)
    assert distance(two_tokens(monkeypatch, rule, draws, TREES[tree], sampling, 2, rows=3, watch=watch)) < 1e-6


@pytest.mark.parametrize(("rule", "draws", "tree"), [case for case in SMALL if case.values[0] != "greedy"])
def test_rule_keeps_a_law_cut_by_temperature_top_k_and_top_p(monkeypatch: pytest.MonkeyPatch, rule: str, draws: str, tree: str) -> None:
    sampling = Sampling(temperature=0.7, top_k=2, top_p=0.9)
    assert distance(two_tokens(monkeypatch, rule, draws, TREES[tree], sampling, 3)) < 1e-6


@pytest.mark.parametrize("rule", [name for name in LOSSLESS if RULES[name].temperatures != "zero" and name != "multidraft"])
def test_sampling_rules_decode_greedily_at_temperature_zero(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    assert distance(two_tokens(monkeypatch, rule, "point", TREES["chain-3"], Sampling(), 3)) < 1e-6


def relabelled(draws: Any) -> Callable[[Tree], Tree]:
    return lambda tree: replace(tree, draws=draws)


def sorted_siblings(tree: Tree) -> Tree:
    """The root's two children by probability instead of in the order they were drawn."""
    assert tree.law_rows is not None
    root = tree.law_rows[:, 0]
    swap = root.gather(1, tree.tokens[:, 1:2]) < root.gather(1, tree.tokens[:, 2:3])
    return replace(tree, tokens=torch.where(swap, tree.tokens[:, [0, 2, 1]], tree.tokens))


def dropped_after_a_look(tree: Tree) -> Tree:
    """Discards the second token of a chain where its own probability turns out low."""
    assert tree.law_rows is not None
    q = tree.law_rows[:, 1].gather(1, tree.tokens[:, 2:3])[:, 0]
    live = tree.live.clone()
    live[:, 2] = q > 0.4
    return replace(tree, live=live)


def without_renormalising(tree: Tree) -> Tree:
    """The second sibling, drawn without the first, verified by the law that still holds it."""
    return replace(tree, draws="iid")


@pytest.mark.parametrize(
    ("drawn", "tree", "change"),
    [
        ("iid", "2", relabelled("without_replacement")),
        ("without_replacement", "2", without_renormalising),
        ("without_replacement", "2", sorted_siblings),
        ("iid", "1-1", dropped_after_a_look),
    ],
    ids=["iid-as-without-replacement", "un-renormalised", "sorted-siblings", "dropped-after-a-look"],
)
def test_known_ways_of_losing_exactness_are_seen(monkeypatch: pytest.MonkeyPatch, drawn: str, tree: str, change: Any) -> None:
    def worst(change: Any) -> float:
        given = (monkeypatch, "recursive", drawn, TREES[tree], Sampling(1.0), 3)
        return max(distance(two_tokens(*given, change=change, seed=seed)) for seed in range(2, 8))

    assert worst(None) < 1e-6
    assert worst(change) > 0.01


@pytest.mark.parametrize("drawn", ["iid", "without_replacement"])
def test_treating_any_tree_as_point_stays_exact(monkeypatch: pytest.MonkeyPatch, drawn: str) -> None:
    assert distance(two_tokens(monkeypatch, "recursive", drawn, TREES["2"], Sampling(1.0), 3, change=relabelled("point"))) < 1e-6


def test_rules_refuse_what_they_would_not_keep_exact() -> None:
    rejection, greedy = (RULES[name](RULES[name].Config(name=name)) for name in ("rejection", "greedy"))
    with pytest.raises(UserError, match=r"rule 'rejection' is not exact for iid draws in a tree.*treat_as"):
        rejection.check(TREES["2-2"], "iid", Sampling(1.0))
    with pytest.raises(UserError, match=r"rule 'greedy' decodes greedily, but temperature is 0\.7"):
        greedy.check(TREES["1-1"], "point", Sampling(0.7))


def test_scripted_branches_cover_every_outcome_once() -> None:
    law, total = torch.tensor([[[0.2, 0.5, 0.3]]]), {}
    for chance in branches(1):
        assert isinstance(chance, Scripted)
        drawn = tuple(chance.draw(law, 2, replace=False)[0, 0].tolist())
        kept = bool(chance.bernoulli(torch.tensor([0.25]))[0])
        total[drawn, kept] = chance.probability
    assert len(total) == 12
    assert abs(total[(1, 0), True] - 0.5 * 0.4 * 0.25) < 1e-6
    assert abs(sum(total.values()) - 1) < 1e-6
