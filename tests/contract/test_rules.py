"""Every registered rule, for all draws it accepts, keeps the target's distribution: exact enumeration through the real round.

And every known way of losing it is seen: trees that a rule is told the wrong thing about, and rules that are wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic, Plan, Shape, Static
from drafttrain.core.rng import Rng, ScriptedRng, SeededRng, branches
from drafttrain.core.sampling import Sampling, normalise
from drafttrain.core.tree import Draws, Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.drafters.grow import Frontier, grow
from drafttrain.runtime import generate
from drafttrain.runtime.generate import DecodingLoop
from drafttrain.runtime.policy import Fixed
from drafttrain.runtime.rows import Request
from drafttrain.verify import RULES
from drafttrain.verify.base import Rule, RuleConfig
from tests.contract.tables import TableDrafter, TableTarget
from tests.contract.tables import probs as table
from tests.verify.walk import probs_row

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
    "younger deeper": Static(choices=((0,), (1,), (1, 0), (1, 1), (1, 1, 0))),
    "chain-3": Chain(length=3), "dynamic": Dynamic(depth=2, beam=2, top_k=2, nodes=4),
}  # fmt: skip
LONG = [
    ("iid", "2-2-1"), ("iid", "3-1"), ("iid", "2-2"), ("iid", "ragged"), ("iid", "younger deeper"), ("without_replacement", "2-2-1"),
]  # over 10 s each
WIDE = ("2-2", "3-1", "2-2-1", "ragged", "younger deeper")  # variants of a rule walk these in the slow tests only
CASES = [
    pytest.param(name, draws, tree, marks=[pytest.mark.slow] if (draws, tree) in LONG or (name not in RULES and tree in WIDE) else [])
    for name, (rule, _) in VARIANTS.items()
    for draws in ("deterministic", "iid", "without_replacement")
    for tree, shape in TREES.items()
    if (draws, "chain" if shape.shape == "chain" else "tree") in RULES[rule].accepts
    and (shape.shape != "dynamic" or draws == "deterministic")
]
SMALL = [case for case in CASES if case.values[2] in ("2", "1-1")]
WIDER = [case for case in CASES if case not in SMALL and case.values[0] in RULES]


def two_tokens(
    monkeypatch: pytest.MonkeyPatch, rule: str, draws: Any, shape: Shape, sampling: Sampling, vocab: int, rows: int = 1, watch: int = 0,
    change: Callable[[Tree], Tree] | None = None, seed: int = 2, other: Rule | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The joint distribution [V, V] of the two tokens after the first one: as it comes out, and the target's own.

    change: what happens to each tree before it is scored. other: a rule that is not registered.
    """
    target, drafter = TableTarget(vocab), TableDrafter(vocab, seed)
    if change is not None:
        propose = drafter.propose
        drafter.propose = lambda *given: change(propose(*given))  # type: ignore[method-assign]
    prompts = [[1, 1], [0, 1, 1], [1]][:rows]
    root = [*prompts[watch], 0]
    after = [target_law(target, [*root, first], sampling) for first in range(vocab)]
    out = np.zeros((vocab, vocab))
    total = 0.0
    for rng in branches(rows, watch):
        monkeypatch.setattr(generate, "SeededRng", lambda seed, ids, rng=rng: rng)
        batch = DecodingLoop(target, drafter, other or made(rule), Fixed(Plan(shape, draws, record_probs=True)), sampling, seed=0)  # type: ignore[arg-type]
        batch.start([Request(prompt, index, 9) for index, prompt in enumerate(prompts)])
        batch.step()
        tokens = batch.written[watch][1:]
        out[tokens[0]] += rng.probability * (np.eye(vocab)[tokens[1]] if len(tokens) > 1 else after[tokens[0]])
        total += rng.probability
    assert abs(total - 1) < 1e-9, total  # every branch was walked once
    return out, target_law(target, root, sampling)[:, None] * np.array(after)


def made(variant: str) -> Rule:
    name, options = VARIANTS[variant]
    return RULES[name](RULES[name].Config(name=name, **options))


def target_law(target: TableTarget, context: list[int], sampling: Sampling) -> np.ndarray:
    return sampling.probs(torch.tensor(target.p(context)).log().float()).double().numpy()


def distance(record_probs: tuple[np.ndarray, np.ndarray]) -> float:
    return float(np.abs(record_probs[0] - record_probs[1]).sum() / 2)


@pytest.mark.parametrize(("rule", "draws", "tree"), CASES)
def test_rule_keeps_the_targets_distribution(monkeypatch: pytest.MonkeyPatch, rule: str, draws: str, tree: str) -> None:
    sampling = Sampling() if RULES[VARIANTS[rule][0]].temperatures == "zero" else Sampling(temperature=1.0)
    vocab = 2 if tree in ("2-2-1", "ragged", "younger deeper") and draws != "deterministic" else 3
    assert distance(two_tokens(monkeypatch, rule, draws, TREES[tree], sampling, vocab)) < 1e-6


@pytest.mark.parametrize("rule", [name for name in LOSSLESS if ("deterministic", "tree") in RULES[name].accepts])
def test_a_shape_wider_than_the_draft_vocabulary_keeps_the_distribution(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    sampling = Sampling() if RULES[rule].temperatures == "zero" else Sampling(temperature=1.0)
    assert distance(two_tokens(monkeypatch, rule, "deterministic", Static(children=(4, 1)), sampling, 3)) < 1e-6


TOPOLOGIES = ("1-1", "2-1", "2-2", "3-1", "1-2", "2-2-1", "ragged", "younger deeper")


@pytest.mark.parametrize(("cases", "names"), [(CASES, list(VARIANTS)), ([*SMALL, *WIDER], LOSSLESS)], ids=["one row", "three rows"])
def test_every_lossless_rule_is_walked_with_all_draws_it_takes_over_all_topologies(cases: list[Any], names: list[str]) -> None:
    walked = {case.values for case in cases}
    due = {
        (name, draws, tree) for name in names for draws, form in RULES[VARIANTS[name][0]].accepts for tree in TOPOLOGIES
        if form == ("chain" if TREES[tree].shape == "chain" else "tree")
    }  # fmt: skip
    assert due <= walked
    assert {name for name, _, _ in due} == set(names)


@pytest.mark.parametrize(("rule", "draws", "tree"), WIDER)
def test_rule_keeps_the_distribution_of_a_row_of_a_batch_over_all_topologies(
    monkeypatch: pytest.MonkeyPatch, rule: str, draws: str, tree: str
) -> None:
    sampling = Sampling() if RULES[rule].temperatures == "zero" else Sampling(temperature=1.0)
    vocab = 3 if draws == "deterministic" or (draws, tree) == ("without_replacement", "3-1") else 2
    assert distance(two_tokens(monkeypatch, rule, draws, TREES[tree], sampling, vocab, rows=3, watch=1)) < 1e-6


@pytest.mark.parametrize(("rule", "draws", "tree"), SMALL)
@pytest.mark.parametrize("watch", [0, 2])
def test_rule_keeps_the_distribution_of_each_row_of_a_batch(
    monkeypatch: pytest.MonkeyPatch, rule: str, draws: str, tree: str, watch: int
) -> None:
    sampling = Sampling() if RULES[VARIANTS[rule][0]].temperatures == "zero" else Sampling(temperature=1.0)
    assert distance(two_tokens(monkeypatch, rule, draws, TREES[tree], sampling, 2, rows=3, watch=watch)) < 1e-6


@pytest.mark.parametrize(("rule", "draws", "tree"), [case for case in SMALL if case.values[0] != "greedy"])
def test_rule_keeps_a_distribution_cut_by_temperature_top_k_and_top_p(
    monkeypatch: pytest.MonkeyPatch, rule: str, draws: str, tree: str
) -> None:
    sampling = Sampling(temperature=0.7, top_k=2, top_p=0.9)
    assert distance(two_tokens(monkeypatch, rule, draws, TREES[tree], sampling, 3)) < 1e-6


@pytest.mark.parametrize("rule", [name for name in LOSSLESS if RULES[name].temperatures != "zero" and name != "multidraft"])
def test_sampling_rules_decode_greedily_at_temperature_zero(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    assert distance(two_tokens(monkeypatch, rule, "deterministic", TREES["chain-3"], Sampling(), 3)) < 1e-6


def relabelled(draws: Any) -> Callable[[Tree], Tree]:
    return lambda tree: replace(tree, draws=draws)


def sorted_siblings(tree: Tree) -> Tree:
    """The root's two children by probability instead of in the order they were drawn."""
    assert tree.draft_probs is not None
    root = tree.draft_probs[:, 0]
    swap = root.gather(1, tree.tokens[:, 1:2]) < root.gather(1, tree.tokens[:, 2:3])
    return replace(tree, tokens=torch.where(swap, tree.tokens[:, [0, 2, 1]], tree.tokens))


def dropped_after_a_look(tree: Tree) -> Tree:
    """Discards the second token of a chain where its own probability turns out low."""
    return _second_while_likely(tree, 2)


def stopped_after_a_look(tree: Tree) -> Tree:
    """Ends the chain below a first token whose probability turns out low, and keeps that token."""
    return _second_while_likely(tree, 1)


def _second_while_likely(tree: Tree, looked_at: int) -> Tree:
    """A chain whose second token lives where the drafter's distribution gave the token at node `looked_at` enough."""
    assert tree.draft_probs is not None
    q = tree.draft_probs[:, looked_at - 1].gather(1, tree.tokens[:, looked_at, None])[:, 0]
    live = tree.live.clone()
    live[:, 2] = q > 0.4
    return replace(tree, live=live)


def without_twins(tree: Tree) -> Tree:
    """The second of two equal siblings is taken out before verification."""
    live = tree.live.clone()
    live[:, 2] &= tree.tokens[:, 1] != tree.tokens[:, 2]
    return replace(tree, live=live)


def of_the_kept(tree: Tree) -> Tree:
    """Chosen children as if drawn from the distribution of the chosen ones alone."""
    assert tree.draft_probs is not None and tree.probs_row is not None
    kept = torch.zeros_like(tree.draft_probs)
    row = torch.arange(len(kept))
    for node in range(1, tree.tokens.shape[1]):
        at = row, tree.probs_row[:, node], tree.tokens[:, node]
        kept[at] = tree.draft_probs[at]
    return replace(tree, draws="iid", draft_probs=normalise(kept))


def of_another_temperature(tree: Tree) -> Tree:
    """The distribution on record is not the one that the tokens were drawn from: warped on one side, or by weights of another time."""
    assert tree.draft_probs is not None
    return replace(tree, draft_probs=normalise(tree.draft_probs**2))


WRONG: dict[str, tuple[tuple[str, ...], str, str, Callable[[Tree], Tree]]] = {
    "iid as without replacement": (("recursive", "traversal"), "iid", "2", relabelled("without_replacement")),
    "un-renormalised": (("recursive", "traversal", "multidraft"), "without_replacement", "2", relabelled("iid")),
    "sorted siblings": (("recursive", "traversal"), "without_replacement", "2", sorted_siblings),
    "sorted duplicates": (("recursive", "traversal"), "iid", "2", sorted_siblings),
    "dropped after a look": (("rejection", "recursive", "traversal", "multidraft"), "iid", "1-1", dropped_after_a_look),
    "top-k as iid": (("recursive", "traversal", "multidraft"), "deterministic", "2", relabelled("iid")),
    "top-k as without replacement": (("recursive", "traversal"), "deterministic", "2", relabelled("without_replacement")),
    "top-k of its own distribution": (("recursive", "traversal", "multidraft"), "deterministic", "2", of_the_kept),
    "argmax as drawn": (("rejection", "recursive", "traversal", "multidraft"), "deterministic", "1-1", relabelled("iid")),
    "duplicates taken out": (("recursive", "traversal", "multidraft"), "iid", "2", without_twins),
    "distribution of another temperature": (("rejection", "recursive", "traversal", "multidraft"), "iid", "1-1", of_another_temperature),
}
"""What a rule may be told that is not so: the rules that lose the distribution by it, how the tree was drawn, its shape, what happens to
it."""


def worst(
    monkeypatch: pytest.MonkeyPatch, rule: str, drawn: str, tree: str, change: Callable[[Tree], Tree] | None, other: Rule | None = None
) -> float:
    """Largest total variation of two tokens, over several drafters."""
    given = (monkeypatch, rule, drawn, TREES[tree], Sampling(1.0), 3)
    return max(distance(two_tokens(*given, change=change, seed=seed, other=other)) for seed in range(2, 8))


@pytest.mark.parametrize(("rule", "way"), [(rule, way) for way, (rules, *_) in WRONG.items() for rule in rules])
def test_known_ways_of_losing_exactness_are_seen(monkeypatch: pytest.MonkeyPatch, rule: str, way: str) -> None:
    _, drawn, tree, change = WRONG[way]
    assert worst(monkeypatch, rule, drawn, tree, change) > 0.01


@pytest.mark.parametrize("rule", ["rejection", "recursive", "traversal", "multidraft"])
def test_a_draft_may_end_below_a_token_that_was_looked_at_and_kept(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    assert worst(monkeypatch, rule, "iid", "1-1", stopped_after_a_look) < 1e-6


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize("drawn", ["deterministic", "iid", "without_replacement"])
@pytest.mark.parametrize("assumed", ["deterministic", "iid", "without_replacement"])
def test_only_deterministic_is_exact_for_trees_that_were_drawn_otherwise(
    monkeypatch: pytest.MonkeyPatch, rule: str, drawn: str, assumed: str
) -> None:
    found = worst(monkeypatch, rule, drawn, "2", relabelled(assumed))
    assert found < 1e-6 if assumed in ("deterministic", drawn) else found > 0.01


class Wrong(Rule):
    """A rule that claims to be lossless and is not: siblings of depth one, drawn iid."""

    Config, accepts = RuleConfig, frozenset({("iid", "tree")})

    def __init__(self, against: str = "") -> None:
        """against: `` takes the child of the largest p as it is; `q` and `something near` verify it by a distribution that it does not
        have."""
        super().__init__(RuleConfig(name="wrong"))
        self.against = against

    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        row, p = torch.arange(len(tree.tokens)), scored.target_probs[:, 0]
        best = p.gather(1, tree.tokens[:, 1:]).argmax(1) + 1
        token, probs = tree.tokens[row, best], tree.draft_probs_at(best)
        if self.against == "something near":  # to the distribution of the choice
            probs = normalise(probs * p)
        ratio = p[row, token] / probs[row, token] if self.against else torch.ones(len(row))
        stands = rng.bernoulli(ratio.clamp_max(1.0))
        left = torch.where(stands[:, None], scored.target_probs[row, best], normalise((p - probs).clamp_min(0)))
        path, length = tree.path_to(torch.where(stands, best, 0))
        return Verdict(path, length, rng.draw(left[:, None], 1, replace=True)[:, 0, 0])


@pytest.mark.parametrize("against", ["", "q", "something near"])
def test_the_best_of_several_drafts_without_its_own_distribution_is_seen(monkeypatch: pytest.MonkeyPatch, against: str) -> None:
    assert worst(monkeypatch, "recursive", "iid", "2", None, Wrong(against)) > 0.01


class Longest(Rule):
    """Chains below roots that were drawn from the target's own distribution; the longest run of accepted tokens is kept, or the first
    root."""

    Config, accepts = RuleConfig, frozenset({("without_replacement", "tree")})

    def __init__(self, first: bool = False) -> None:
        """first: keeps the branch of the first root, however long, which is exact."""
        super().__init__(RuleConfig(name="longest"))
        self.first = first

    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        row, C = torch.arange(len(tree.tokens)), tree.max_children
        roots, tips = torch.arange(1, C + 1), torch.arange(C + 1, 2 * C + 1)  # nodes of the two levels
        p, q = (
            scored.target_probs[:, roots],
            torch.stack([tree.draft_probs_at(torch.full_like(row, int(tip))) for tip in tips], 1),
        )  # [B, C, V]
        drafted = tree.tokens[:, tips, None]
        kept = rng.bernoulli((p.gather(2, drafted) / q.gather(2, drafted))[..., 0].clamp_max(1.0))  # [B, C]
        which = torch.zeros_like(row) if self.first else kept.long().argmax(1)
        stands = kept[row, which]
        node = torch.where(stands, tips[which], roots[which])
        probs = torch.where(stands[:, None], scored.target_probs[row, node], normalise((p[row, which] - q[row, which]).clamp_min(0)))
        path, length = tree.path_to(node)
        return Verdict(path, length, rng.draw(probs[:, None], 1, replace=True)[:, 0, 0])


@pytest.mark.parametrize("first", [False, True], ids=["longest", "first"])
def test_the_longest_branch_below_target_drawn_roots_is_seen_and_the_first_one_is_exact(
    monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    def drawn_by_the_target(drafter: TableDrafter, state: Any, roots: torch.Tensor, plan: Plan, sampling: Sampling, rng: Any) -> Tree:
        at = [TableTarget(3).p([*text, root]) for text, root in zip(state.texts, roots.tolist(), strict=True)]
        first = torch.tensor(np.array(at)).log().float()[:, None]
        texts = [[*text, root] for text, root in zip(state.texts, roots.tolist(), strict=True)]

        def step(frontier: Frontier) -> torch.Tensor:
            if not frontier.level:
                return first
            rows = zip(texts, frontier.tokens.tolist(), strict=True)
            return torch.tensor([[table(drafter.seed, [*text, token], 3).tolist() for token in row] for text, row in rows]).log()

        return grow(step, roots, plan, sampling, rng).tree

    monkeypatch.setattr(TableDrafter, "propose", drawn_by_the_target)
    found = worst(monkeypatch, "recursive", "without_replacement", "2-1", None, Longest(first))
    assert found < 1e-6 if first else found > 0.01


TOKEN_BY_TOKEN = {"rejection", "recursive", "recursive naive", "traversal", *(name for name in VARIANTS if name.startswith("multidraft"))}
"""Rules that promise to be speculative sampling where there is one draft a level; a new one that does adds its name."""
ONE_DRAFT = [
    (name, draws, 1 if name == "traversal" else 2)  # longer chains are block verification
    for name, (rule, _) in VARIANTS.items()
    if name in TOKEN_BY_TOKEN
    for draws in ("deterministic", "iid", "without_replacement")
    if RULES[rule].temperatures != "zero" and (draws, "chain") in RULES[rule].accepts
]


@pytest.mark.parametrize(("name", "draws", "length"), ONE_DRAFT)
def test_one_draft_a_level_is_speculative_sampling(name: str, draws: Draws, length: int) -> None:
    """Chain by chain: the same distribution of accepted length and next token as `rejection`. Match-sampling is weaker where tokens were
    drawn."""
    logits, q = (2 * torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    plan = Plan(Chain(length=length), draws, record_probs=True)
    drawn = grow(lambda frontier: q[frontier.tokens], torch.arange(3).repeat(8), plan, Sampling(1.0), SeededRng(0, torch.arange(24))).tree
    scored = Scored(logits[drawn.tokens], Sampling(1.0))
    ours, theirs = (probs_row(made(rule), drawn, scored).next for rule in (name, "rejection"))
    if name == "recursive naive" and draws != "deterministic":
        assert float((ours - theirs).abs().max()) > 0.01
    else:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_rules_refuse_what_they_would_not_keep_exact() -> None:
    rejection, greedy = (RULES[name](RULES[name].Config(name=name)) for name in ("rejection", "greedy"))
    with pytest.raises(UserError, match=r"rule 'rejection' is not exact for iid draws in a tree.*or a chain \(runtime.shape\)"):
        rejection.check("tree", "iid", Sampling(1.0))
    with pytest.raises(UserError, match=r"rule 'greedy' decodes greedily, but temperature is 0\.7"):
        greedy.check("chain", "deterministic", Sampling(0.7))


@pytest.mark.parametrize("name", RULES)
def test_what_a_rule_advises_where_it_does_not_fit_is_what_it_takes(name: str) -> None:
    rule = RULES[name](RULES[name].Config(name=name))
    takes = {topology: {draws for draws, form in rule.accepts if form == topology} for topology in ("chain", "tree")}
    for topology, draws in product(takes, ("deterministic", "iid", "without_replacement")):
        if draws in takes[topology]:
            continue
        with pytest.raises(UserError) as refused:
            rule.check(topology, draws, Sampling(0.0))
        said = str(refused.value)
        assert ("treat_as to 'deterministic'" in said) == ("deterministic" in takes[topology])
        assert ("or a chain" in said) == (not takes[topology])
        advised = re.findall(r"runtime\.draws to '(\w+)'", said)
        assert set(advised) <= takes[topology]
        assert bool(advised) == (bool(takes[topology]) and "deterministic" not in takes[topology])


def test_scripted_branches_cover_every_outcome_once() -> None:
    probs, total = torch.tensor([[[0.2, 0.5, 0.3]]]), {}
    for rng in branches(1):
        assert isinstance(rng, ScriptedRng)
        drawn = tuple(rng.draw(probs, 2, replace=False)[0, 0].tolist())
        kept = bool(rng.bernoulli(torch.tensor([0.25]))[0])
        total[drawn, kept] = rng.probability
    assert len(total) == 12
    assert abs(total[(1, 0), True] - 0.5 * 0.4 * 0.25) < 1e-6
    assert abs(sum(total.values()) - 1) < 1e-6
