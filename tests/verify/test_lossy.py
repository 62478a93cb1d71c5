"""Lossy rules on real trees: off they are the lossless rule token for token, loosened they accept no less, and every row says so."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Plan, Static
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.drafters.hybrid import HybridConfig
from drafttrain.drafters.ngram import Ngram
from drafttrain.evaluation.rows import summarise
from drafttrain.evaluation.runners import Contender
from drafttrain.recipe import load_recipe
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.generate import RoundRecord
from drafttrain.runtime.policy import Confident, ConfidentConfig
from drafttrain.verify import build
from drafttrain.verify.base import RuleConfig
from drafttrain.verify.confidence import Confidence, ConfidenceConfig, confidence
from drafttrain.verify.divergence import Divergence, DivergenceConfig, divergence
from drafttrain.verify.judge import Judge, JudgeConfig, JudgeHead
from drafttrain.verify.longest import Longest, LongestConfig
from drafttrain.verify.lossy import longest
from drafttrain.verify.reflective import ReflectiveConfig
from drafttrain.verify.typical import Typical, TypicalConfig, threshold
from tests.evaluation.toys import sample
from tests.families import TRAINABLE, slow_beyond, trained_drafter
from tests.verify.logged import COLD, PROMPTS, SHAPES, WARM, Round, decoded, drafter, lengths, rounds, target

OFF: dict[str, RuleConfig] = {
    "typical": TypicalConfig(epsilon=None), "confidence": ConfidenceConfig(tau_base=1.0), "judge": JudgeConfig(threshold=1.0),
    "divergence": DivergenceConfig(bound=0.0), "reflective": ReflectiveConfig(alpha=0.0), "longest": LongestConfig(width=1),
}  # fmt: skip
LOOSENED: dict[str, list[RuleConfig]] = {
    "typical by epsilon": [TypicalConfig(epsilon=value, delta=0.99) for value in (0.9, 0.5, 0.1, 0.02, 0.0)],
    "typical by delta": [TypicalConfig(epsilon=0.99, delta=value) for value in (0.99, 0.5, 0.2, 0.05, 0.0)],
    "confidence by tau_base": [ConfidenceConfig(tau_base=value) for value in (0.999, 0.7, 0.4, 0.1, 0.0)],
    "confidence by gamma": [ConfidenceConfig(tau_base=0.05, gamma=value) for value in (3.0, 1.0, 0.5, 0.1, 0.0)],
    "divergence by bound": [DivergenceConfig(bound=value) for value in (1e-9, 0.5, 1.0, 2.0, 20.0)],
}


@pytest.mark.parametrize("sampling", [COLD, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OFF)
def test_off_is_the_lossless_rule_token_for_token(name: str, shape: str, sampling: Sampling) -> None:
    lossless = RuntimeConfig(shape=SHAPES[shape])
    assert decoded(sampling, lossless.model_copy(update={"rule": OFF[name]})) == decoded(sampling, lossless)


@pytest.mark.parametrize("sampling", [COLD, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("knob", LOOSENED)
def test_a_loosened_knob_accepts_no_less_on_any_logged_tree(knob: str, shape: str, sampling: Sampling) -> None:
    steps = [lengths(build(config), rounds(shape, sampling)) for config in LOOSENED[knob]]
    for tighter, looser in pairwise(steps):
        assert (looser >= tighter).all()
    if knob.startswith("typical") and sampling.greedy:
        assert (steps[-1] == steps[0]).all()  # the distribution is one-hot: greedy, whatever the knob
    else:
        assert steps[-1].sum() > steps[0].sum()


def test_rows_of_a_batch_are_judged_as_if_alone() -> None:
    for logged in rounds("static", WARM)[:3]:
        for rule in (Typical(TypicalConfig()), Confidence(ConfidenceConfig())):
            together = logged.judged(rule).length
            alone = [alone_in(logged, row).judged(rule).length[0] for row in range(len(together))]
            assert together.tolist() == torch.stack(alone).tolist()


def alone_in(logged: Round, row: int) -> Round:
    tree, one = logged.tree, slice(row, row + 1)
    assert tree.draft_probs is not None and tree.probs_row is not None
    part = Tree(
        tree.tokens[one], tree.parents[one], tree.live[one], tree.draws, tree.max_depth, tree.max_children, None, tree.draft_probs[one],
        tree.probs_row[one],
    )  # fmt: skip
    return Round(part, Scored(logged.scored.logits[one], logged.scored.sampling))


# -- typical ------------------------------------------------------------------------------------------------------------------------------


def test_typical_acceptance_is_the_papers_inequality_node_by_node_and_the_longest_path_stands() -> None:
    rule = Typical(TypicalConfig(epsilon=0.2, delta=0.4))
    seen = 0
    for logged in rounds("static", WARM):
        tree, p, got = logged.tree, logged.scored.target_probs.double(), logged.judged(rule)
        for row in range(len(tree.tokens)):
            reached = {0: 0}
            for node in range(1, tree.tokens.shape[1]):
                above = int(tree.parents[row, node])
                probs = p[row, above]
                entropy = -sum(float(x) * float(x.log()) for x in probs if x > 0)
                typical = float(probs[tree.tokens[row, node]]) > min(0.2, 0.4 * 2.718281828459045**-entropy)
                if above in reached and typical:
                    reached[node] = reached[above] + 1
            assert int(got.length[row]) == max(reached.values())
            last = int(got.path[row, int(got.length[row]) - 1]) if got.length[row] else 0
            assert reached[last] == max(reached.values())
            seen += int(got.length[row])
    assert seen > 0


def test_the_typical_bar_is_epsilon_for_a_certain_distribution_and_falls_with_entropy() -> None:
    certain, even = torch.eye(16)[:1], torch.full((1, 16), 1 / 16)
    assert threshold(certain, 0.09, 0.3).item() == pytest.approx(0.09)
    assert threshold(even, 0.09, 0.3).item() == pytest.approx(0.3 / 16)


def test_of_equally_long_paths_the_likeliest_stands() -> None:
    zero = torch.zeros(1, 4, dtype=torch.long)
    tree = Tree(zero, torch.tensor([[0, 0, 0, 1]]), torch.tensor([[True, True, True, False]]), "deterministic", 2, 2)
    likely = torch.tensor([[1.0, 0.2, 0.3, 0.9]])
    assert longest(tree, torch.ones(1, 4, dtype=torch.bool), likely).tolist() == [2]  # node 3 is longer, but dead
    assert longest(replace(tree, live=tree.live | True), torch.ones(1, 4, dtype=torch.bool), likely).tolist() == [3]
    assert longest(tree, torch.zeros(1, 4, dtype=torch.bool), likely).tolist() == [0]


# -- longest ------------------------------------------------------------------------------------------------------------------------------


FORK = RuntimeConfig(shape=Static(children=(4, 1, 1)), rule=LongestConfig(width=4))


def forks(width: int, sampling: Sampling) -> list[Round]:
    """Rounds of the rule's own decoding whose first level the target named."""
    seen: list[Round] = []

    def log(record: RoundRecord) -> None:
        tree, scored = record.tree, record.scored
        seen.append(Round(tree, scored))

    runtime = FORK.model_copy(update={"rule": LongestConfig(width=width)})
    SpeculativeDecoder(target(), drafter(), runtime).generate(PROMPTS, 24, *sampling[:3], seed=3, on_round=log)
    assert not seen[0].tree.from_target
    return [one for one in seen if one.tree.from_target]


def test_the_branch_that_the_target_follows_longest_stands_and_its_candidates_open_the_next_round() -> None:
    other = 0
    for logged in forks(4, COLD):
        tree, scored, got = logged.tree, logged.scored, logged.judged(Longest(LongestConfig(width=4)))
        assert got.next is None and got.target_candidates is not None
        for row in range(len(tree.tokens)):
            runs = {child: run(logged, row, child) for child, _ in children(tree, row, 0)}
            path = got.path[row, : int(got.length[row])].tolist()
            assert len(path) == 1 + max(runs.values()) == 1 + runs[path[0]]
            assert path[0] == 1 or runs[1] < runs[path[0]]
            other += path[0] != 1
            assert got.target_candidates[row].tolist() == scored.logits[row, path[-1]].topk(4).indices.tolist()
    assert other > 0


@pytest.mark.parametrize("sampling", [COLD, WARM], ids=["greedy", "sampled"])
def test_more_candidates_accept_no_less_of_a_tree_that_they_opened(sampling: Sampling) -> None:
    steps = [lengths(Longest(LongestConfig(width=width)), forks(4, sampling)) for width in (2, 3, 4)]
    for fewer, more in pairwise(steps):
        assert (more >= fewer).all()
    assert steps[-1].sum() > steps[0].sum()


def test_drawn_candidates_differ_and_are_never_what_the_target_just_refused() -> None:
    for logged in forks(4, WARM):
        got = logged.judged(Longest(LongestConfig(width=4)))
        assert got.target_candidates is not None
        for row, target_candidates in enumerate(got.target_candidates.tolist()):
            last = int(got.path[row, int(got.length[row]) - 1])
            assert len(set(target_candidates)) == 4
            assert not set(target_candidates) & {token for _, token in children(logged.tree, row, last)}


def test_a_distribution_of_fewer_tokens_than_candidates_repeats_its_first_one() -> None:
    logged = forks(4, WARM)[0]
    two = Scored(logged.scored.logits, Sampling(1.0, top_k=2))
    got = Round(logged.tree, two).judged(Longest(LongestConfig(width=4)))
    assert got.target_candidates is not None
    for row, target_candidates in enumerate(got.target_candidates.tolist()):
        last = int(got.path[row, int(got.length[row]) - 1])
        assert all(float(two.target_probs[row, last, token]) > 0 for token in target_candidates)
        assert target_candidates[2:] == target_candidates[:1] * 2


@pytest.mark.parametrize("family", slow_beyond(TRAINABLE))
@pytest.mark.parametrize("sampling", [COLD, WARM], ids=["greedy", "sampled"])
def test_rounds_left_open_go_on_from_the_last_accepted_token_and_nothing_is_lost_or_counted_twice(family: str, sampling: Sampling) -> None:
    """A node of the cache is worth what a forward of the whole text gives there, for every family and row."""
    drafter, seen = trained_drafter(family, target(), PROMPTS), list[tuple[Tree, Scored, Verdict]]()
    decoder = SpeculativeDecoder(target(), drafter, FORK)
    for prompt in PROMPTS:
        seen.clear()
        (made,) = decoder.generate([prompt], 20, *sampling[:3], seed=3, on_round=seen.append)
        text, origins = [*prompt, made.tokens[0]], [0]
        for place, (tree, scored, verdict) in enumerate((record.tree, record.scored, record.verdict) for record in seen):
            assert tree.from_target == (place > 0)
            assert int(tree.tokens[0, 0]) == text[-1]
            whole = target().model(torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(scored.logits[0, 0], whole, atol=2e-4, rtol=1e-4)  # fp32 in another order
            stood = tree.tokens[0, verdict.path[0, : int(verdict.length[0])]].tolist()
            assert stood or not tree.from_target
            text += stood
            origins += [0 if tree.from_target and not depth else 1 for depth in range(len(stood))]
            if place + 1 < len(seen):
                assert verdict.target_candidates is not None
                assert verdict.target_candidates[0].tolist() == seen[place + 1].tree.tokens[0, 1:5].tolist()
        assert text[len(prompt) :][:20] == made.tokens and origins[:20] == made.origins
        counts = made.statistics
        assert (counts.rounds, counts.tokens) == (len(seen), 19)
        assert counts.attempts[0] == 1  # the first round's: candidates are not the drafter's
        assert sum(counts.accepts) <= sum(made.origins)


@pytest.mark.parametrize("sampling", [COLD, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("policy", ["fixed", "adaptive", "confidence"])
def test_rounds_left_open_give_a_row_of_a_batch_what_it_gets_alone(policy: str, sampling: Sampling) -> None:
    runtime = FORK.model_copy(update={"policy": ConfidentConfig(floor=0.6, at_least=0) if policy == "confidence" else policy})
    decoder = SpeculativeDecoder(target(), drafter(), runtime)
    together = decoder.generate(PROMPTS, 24, *sampling[:3], seed=3)
    if policy == "adaptive":
        assert {len(one.tokens) for one in together} == {24}  # plain rounds commit the first candidate
        return
    alone = [decoder.generate(PROMPTS, 24, *sampling[:3], seed=3, batch_size=1)[place].tokens for place in range(3)]
    assert [one.tokens for one in together] == alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": SHAPES["dynamic"]}, "dynamic shape may drop them"),
        ({"hybrid": HybridConfig()}, "a lookup drafts under committed tokens alone; leave runtime.hybrid out"),
        ({"corrupt": 0.5}, "would swap them"),
        ({"prefetch": 1}, "runtime.prefetch drafts on a guess of the next token"),
    ],
)
def test_what_cannot_draft_below_candidates_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"rule 'longest' leaves the next token open.*{message}"):
        FORK.model_copy(update=changes).fitted(WARM)
    with pytest.raises(UserError, match="this drafter is a lookup"):
        FORK.fitted(WARM, Ngram)


def children(tree: Tree, row: int, node: int) -> list[tuple[int, int]]:
    """A node's children and their tokens."""
    return [(child, int(tree.tokens[row, child])) for child in tree.children[row, node].tolist() if child >= 0]


def run(logged: Round, row: int, node: int) -> int:
    """How many drafted tokens below a node are what the target would write one after another."""
    best = int(logged.scored.top[row, node])
    return next((1 + run(logged, row, child) for child, token in children(logged.tree, row, node) if token == best), 0)


# -- confidence ---------------------------------------------------------------------------------------------------------------------------


def test_confidence_runs_from_an_even_distribution_to_a_certain_one() -> None:
    distributions = torch.stack([torch.full((8,), 1 / 8), torch.eye(8)[3], torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0])])
    assert confidence(distributions, 0.5).tolist() == pytest.approx([0.0, 1.0, 0.5 * (1 - 1 / 3)], abs=1e-6)
    assert confidence(distributions, 0.0).tolist() == pytest.approx([0.0, 1.0, 0.0])  # the margin alone


def test_the_confidence_bar_is_stricter_where_the_drafter_is_uncertain() -> None:
    rule = Confidence(ConfidenceConfig(tau_base=0.2, gamma=1.0))
    logged = rounds("chain", COLD)[0]
    assert logged.tree.draft_probs is not None
    V = logged.tree.draft_probs.shape[-1]
    certain = torch.zeros_like(logged.tree.draft_probs).index_fill_(-1, torch.tensor([0]), 1.0)
    half = second_choices(logged.tree, logged.scored)
    for distributions, expected in ((certain, 4), (torch.full_like(certain, 1 / V), 0)):
        assert set(Round(replace(logged.tree, draft_probs=distributions), half).judged(rule).length.tolist()) == {expected}


def second_choices(tree: Tree, scored: Scored) -> Scored:
    """A target that gives every drafted token half of what it gives its likeliest one."""
    logits = torch.full_like(scored.logits, -9.0)
    row = torch.arange(len(logits))[:, None]
    logits[row, tree.parents[:, 1:], tree.tokens[:, 1:]] = -torch.log(torch.tensor(2.0))
    spare = next(token for token in range(logits.shape[-1]) if token not in tree.tokens)
    logits[..., spare] = 0.0
    return Scored(logits, scored.sampling)


def test_a_drafter_without_distributions_is_refused_by_the_rule_that_reads_them() -> None:
    logged = rounds("chain", COLD)[0]
    bare = Round(replace(logged.tree, draft_probs=None, probs_row=None), logged.scored)
    with pytest.raises(UserError, match="rule 'confidence' reads the drafter's distributions"):
        bare.judged(Confidence(ConfidenceConfig()))


@pytest.mark.parametrize("shape", SHAPES)
def test_distributions_of_deterministic_trees_are_those_that_chose_the_tokens_and_recording_them_changes_no_tree(shape: str) -> None:
    logged = rounds(shape, COLD)[:1]
    tree = logged[0].tree
    assert tree.draft_probs is not None and tree.probs_row is not None
    row = torch.arange(len(tree.tokens))[:, None]
    distributions, mass = tree.draft_probs[row, tree.probs_row], tree.draft_probs[row, tree.probs_row, tree.tokens]
    likelier = (distributions > mass[..., None]).sum(-1)  # [B, N] tokens that the distribution puts before the node's own
    for node in range(1, tree.tokens.shape[1]):
        elder = (tree.parents[:, 1:node] == tree.parents[:, node, None]).sum(1)
        assert torch.equal(likelier[:, node], elder)  # the k-th child is the k-th likeliest token of its distribution
    bare = drafter_tree(shape)
    assert bare.draft_probs is None
    assert torch.equal(bare.tokens, tree.tokens) and torch.equal(bare.parents, tree.parents)


def drafter_tree(shape: str) -> Tree:
    """The first round's tree as it is drafted where no rule reads distributions."""
    seen: list[Tree] = []
    decoder = SpeculativeDecoder(target(), drafter(), RuntimeConfig(shape=SHAPES[shape]))
    decoder.generate(PROMPTS, 20, *COLD[:3], seed=1, on_round=lambda record: seen.append(record.tree))
    return seen[0]


# -- divergence ---------------------------------------------------------------------------------------------------------------------------


def test_divergence_is_kullback_leibler_and_finite_where_the_drafter_cannot_propose() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25, 0.0]), torch.tensor([0.25, 0.5, 0.25, 0.0])
    assert divergence(p, q).item() == pytest.approx(0.25 * math.log(2))
    assert divergence(p, p).item() == pytest.approx(0, abs=1e-6)
    missing = 0.25 * math.log(0.5) + 0.25 * math.log(0.25e9)
    assert divergence(p, torch.tensor([0.5, 0.5, 0.0, 0.0])).item() == pytest.approx(missing, rel=1e-5)


@pytest.mark.parametrize("sampling", [COLD, WARM], ids=["greedy", "sampled"])
def test_where_drafter_and_target_have_the_same_distributions_a_whole_chain_stands(sampling: Sampling) -> None:
    logged = rounds("chain", sampling)[0]
    raw = logged.scored.logits[:, :-1].softmax(-1)
    same = Round(replace(logged.tree, draft_probs=raw), logged.scored)
    assert set(same.judged(Divergence(DivergenceConfig(bound=1e-3))).length.tolist()) == {4}
    far = Round(replace(logged.tree, draft_probs=raw.roll(1, -1)), logged.scored)
    auto = RuntimeConfig(shape=Chain(length=4), draws="deterministic").fitted(sampling)[0]
    assert torch.equal(far.judged(Divergence(DivergenceConfig(bound=1e-3))).length, far.judged(auto).length)


def test_an_inner_rule_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"rule 'greedy' decodes greedily, but temperature is 0\.8"):
        RuntimeConfig(rule=DivergenceConfig(inner="greedy")).fitted(WARM)
    with pytest.raises(UserError, match=r"rule 'rejection' is not exact for deterministic draws in a tree"):
        RuntimeConfig(shape=SHAPES["static"], rule=DivergenceConfig(inner="rejection")).fitted(COLD)


# -- the policy ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [COLD, WARM], ids=["greedy", "sampled"])
def test_draft_lengths_fall_with_the_floor_and_greedy_text_stays_the_same(sampling: Sampling) -> None:
    drafted = []
    for floor in (0.0, 0.02, 0.1, 1.0):
        live: list[Tensor] = []
        runtime = RuntimeConfig(shape=Chain(length=4), policy=ConfidentConfig(floor=floor))
        decoder = SpeculativeDecoder(target(), drafter(), runtime)
        made = decoder.generate([[1, 2, 3]], 24, *sampling[:3], seed=3, on_round=lambda record, live=live: live.append(record.tree.live))
        drafted.append(sum(int(one.sum()) - 1 for one in live) / len(live))
        if sampling.greedy:
            plain = SpeculativeDecoder(target()).generate([[1, 2, 3]], 24)
            assert made[0].tokens == plain[0].tokens
    assert drafted[0] == 4 and drafted[-1] == 1  # `at_least` is drafted whatever the confidence
    assert drafted[1] > drafted[2]
    if sampling.greedy:
        assert drafted == sorted(drafted, reverse=True)


def test_the_policy_stops_a_row_for_good_and_begins_every_round_afresh() -> None:
    stop = Confident(Plan(Chain(length=3)), ConfidentConfig(floor=0.5, at_least=0)).plan(None).stop  # type: ignore[arg-type]
    assert stop is not None
    sure, lost = torch.tensor([[[20.0, 0, 0]], [[20.0, 0, 0]]]), torch.tensor([[[0.0, 0, 0]], [[20.0, 0, 0]]])
    for _ in range(2):
        assert stop(0, sure).tolist() == [False, False]
        assert stop(1, lost).tolist() == [True, False]
        assert stop(2, sure).tolist() == [True, False]  # a sure level after a lost one opens nothing


# -- no waiting for the host --------------------------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Fails where a value or a size would have to be fetched from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket._qualified_op_name not in WAITS, func
        return func(*args, **(kwargs or {}))


WAITS = {f"aten::{name}" for name in ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique2")}
SWITCHED_ON: list[RuleConfig] = [
    TypicalConfig(), ConfidenceConfig(), DivergenceConfig(bound=1.0), JudgeConfig(head="in memory"), ReflectiveConfig(prompt=(1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("sampling", [COLD, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", SWITCHED_ON, ids=lambda config: config.name)
def test_no_lossy_rule_waits_for_the_host(config: RuleConfig, shape: str, sampling: Sampling) -> None:
    rule, logged = build(config), rounds(shape, sampling)[0]
    if isinstance(rule, Judge):
        rule.head = JudgeHead(32, "in-memory")
    else:
        rule.prepare(target())
    with NoWaiting():
        rule.layout(logged.tree)
        logged.judged(rule)


@pytest.mark.parametrize("sampling", [COLD, WARM], ids=["greedy", "sampled"])
def test_rounds_left_open_do_not_wait_for_the_host(sampling: Sampling) -> None:
    logged = forks(4, sampling)[0]
    with NoWaiting():
        logged.judged(Longest(LongestConfig(width=4)))


def test_the_watch_over_waits_sees_one() -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        bool(torch.ones(1))


# -- options and rows ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtime.rule={name: typical, epsilon: 1.5}", r"runtime\.rule\.epsilon.*less than 1.*1\.5"),
        ("runtime.rule={name: typical, delta: -1}", r"runtime\.rule\.delta.*-1"),
        ("runtime.rule={name: confidence, tau_base: 1.1}", r"runtime\.rule\.tau_base.*1\.1"),
        ("runtime.rule={name: confidence, gama: 1}", r"unknown key 'gama' \(did you mean 'gamma'\?\)"),
        ("runtime.rule={name: judge}", r"rule 'judge' has no head; give .* runtime\.rule\.head"),
        ("runtime.rule={name: judge, threshold: -0.1}", r"runtime\.rule\.threshold.*-0\.1"),
        ("runtime.rule={name: reflective, alpha: 1.2}", r"runtime\.rule\.alpha.*1\.2"),
        ("runtime.rule={name: divergence, bound: -1}", r"runtime\.rule\.bound.*-1"),
        ("runtime.rule={name: divergence, inner: typical}", r"runtime\.rule\.inner.*'recursive'"),
        ("runtime.policy={name: confidence, floor: 2}", r"runtime\.policy.*2"),
        ("runtime.policy=confidense", r"did you mean 'confidence'"),
    ],
)
def test_options_out_of_range_are_refused_by_name(tmp_path: Any, override: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("drafter: {name: eagle3}\ntrain: {steps: 1}\n")
    with pytest.raises(UserError, match=message):
        load_recipe(path, [override])


@pytest.mark.parametrize("name", OFF)
def test_a_result_row_of_a_lossy_rule_says_so_and_names_its_knobs_even_when_it_is_off(name: str) -> None:
    runner = Contender("mine", SpeculativeDecoder(target(), drafter(), RuntimeConfig(shape=Chain(length=2), rule=OFF[name])))
    own = [sample("a", "mine", 1.0, 40, 10)]
    row = summarise(own, [sample("a", "plain", 4.0, 40, 40)], runner.facts(COLD), "mine", "all", "all")
    assert (row.rule, row.lossless) == (name, False)
    assert row.options is not None and row.options["rule"] == OFF[name].model_dump(mode="json", exclude={"name"})
