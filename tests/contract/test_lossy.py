"""Lossy rules: switched off they are lossless, by enumeration through the real round; switched on the same sum sees that they are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.plan import Chain, Plan, Shape, Static
from drafttrain.core.rng import SeededRng, branches
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored
from drafttrain.runtime import generate
from drafttrain.runtime.generate import DecodingLoop
from drafttrain.runtime.policy import Confident, ConfidentConfig, Fixed, Policy
from drafttrain.runtime.rows import Request
from drafttrain.verify import RULES, build
from drafttrain.verify.base import RuleConfig
from drafttrain.verify.confidence import ConfidenceConfig
from drafttrain.verify.divergence import DivergenceConfig
from drafttrain.verify.judge import JudgeConfig
from drafttrain.verify.longest import LongestConfig
from drafttrain.verify.recursive import RecursiveConfig
from drafttrain.verify.reflective import ReflectiveConfig
from drafttrain.verify.rejection import RejectionConfig
from drafttrain.verify.typical import TypicalConfig
from tests.contract.tables import TableDrafter, TableTarget

OFF: dict[str, RuleConfig] = {
    "typical": TypicalConfig(epsilon=None), "confidence": ConfidenceConfig(tau_base=1.0), "judge": JudgeConfig(threshold=1.0),
    "divergence": DivergenceConfig(bound=0.0), "reflective": ReflectiveConfig(alpha=0.0), "longest": LongestConfig(width=1),
}  # fmt: skip
ON: dict[str, RuleConfig] = {
    "typical": TypicalConfig(), "confidence": ConfidenceConfig(tau_base=0.3), "divergence": DivergenceConfig(bound=0.5),
    "reflective": ReflectiveConfig(alpha=0.3, prompt=(0, 1)), "longest": LongestConfig(width=2),
}  # fmt: skip
READS_STATES = {"judge"}  # tables have none: see tests/verify/test_judge.py
TREES: dict[str, Shape] = {"2": Static(children=(2,)), "1-1": Chain(length=2), "2-1": Static(children=(2, 1))}


def distance(
    monkeypatch: pytest.MonkeyPatch, config: RuleConfig, policy: Policy, sampling: Sampling, vocab: int, trees: list[Tree] | None = None
) -> float:
    """Total variation between the joint distribution of the two tokens after the first one, as it comes out, and the target's own."""
    target = TableTarget(vocab)

    def probs(*context: int) -> np.ndarray:
        return sampling.probs(torch.tensor(target.p(context)).log().float()).double().numpy()

    out, total = np.zeros((vocab, vocab)), 0.0
    for rng in branches(1):
        monkeypatch.setattr(generate, "SeededRng", lambda seed, ids, rng=rng: rng)
        batch = DecodingLoop(
            target, TableDrafter(vocab), build(config), policy, sampling, seed=0,  # type: ignore[arg-type]
            on_round=lambda record: None if trees is None else trees.append(record.tree),
        )  # fmt: skip
        batch.start([Request([1, 1], 0, 9)])
        batch.step()
        while build(config).leaves_next_open and len(batch.written[0]) < 3:  # what was refused is known of the token left open
            batch.step()
        tokens = batch.written[0][1:]
        out[tokens[0]] += rng.probability * (np.eye(vocab)[tokens[1]] if len(tokens) > 1 else probs(1, 1, 0, tokens[0]))
        total += rng.probability
    assert abs(total - 1) < 1e-9, total  # every branch was walked once
    own = probs(1, 1, 0)[:, None] * np.array([probs(1, 1, 0, first) for first in range(vocab)])
    return float(np.abs(out - own).sum() / 2)


def fixed(config: RuleConfig, tree: str, draws: Any) -> Fixed:
    return Fixed(Plan(TREES[tree], draws, record_probs=build(config).needs_draft_probs))


def test_every_lossy_rule_is_named_here() -> None:
    assert set(OFF) == set(ON) | READS_STATES == {name for name, rule in RULES.items() if not rule.lossless}


@pytest.mark.parametrize("tree", sorted(TREES))
@pytest.mark.parametrize("draws", ["deterministic", "iid", "without_replacement"])
@pytest.mark.parametrize("name", sorted(OFF))
def test_a_lossy_rule_that_is_off_keeps_the_targets_distribution(monkeypatch: pytest.MonkeyPatch, name: str, draws: str, tree: str) -> None:
    vocab = 3 if draws == "deterministic" else 2
    for sampling in (Sampling(1.0), Sampling()):
        assert distance(monkeypatch, OFF[name], fixed(OFF[name], tree, draws), sampling, vocab) < 1e-6


@pytest.mark.parametrize("name", sorted(set(ON) - {"longest"}))  # its first round is like any other: see below
def test_a_lossy_rule_that_is_on_is_seen_to_be_lossy(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert distance(monkeypatch, ON[name], fixed(ON[name], "1-1", "deterministic"), Sampling(1.0), 3) > 0.01


def test_the_longest_branch_of_several_candidates_is_seen_to_be_lossy_and_of_one_to_be_exact() -> None:
    """The paper's own loss, over 50,000 rows: the distribution of the first token below the root, chosen by how well the draft goes on."""
    rows, vocab, table = 50_000, 3, TableTarget(3)
    distributions = torch.tensor(np.array([table.p([]), *(table.p([first]) for first in range(vocab))])).float()
    rng = SeededRng(5, torch.arange(rows))
    candidates = rng.draw(distributions[0].expand(rows, 1, -1), 2, replace=False)[:, 0]  # [rows, 2]
    drafted = torch.tensor([2, 0, 1])[candidates]  # what stands below each of them
    tokens = torch.cat([torch.zeros_like(candidates[:, :1]), candidates, drafted], 1)
    parents = torch.tensor([0, 0, 0, 1, 2]).expand(rows, -1)
    logits = torch.cat(
        [distributions[:1].expand(rows, 1, -1), distributions[1 + candidates], distributions[:1].expand(rows, 2, -1)], 1
    ).log()
    for shown, bounds in ((2, (0.03, 1.0)), (1, (0.0, 0.01))):
        live = torch.tensor([True, True, shown > 1, True, shown > 1]).expand(rows, -1)
        tree = Tree(tokens, parents, live, "deterministic", 2, 2, from_target=True)
        verdict = build(LongestConfig(width=2))(tree, Scored(logits, Sampling(1.0)), rng)
        first = tokens.gather(1, verdict.path[:, :1])[:, 0]
        away = float((first.bincount(minlength=vocab) / rows - distributions[0]).abs().sum() / 2)
        assert bounds[0] <= away < bounds[1], (shown, away)


def test_the_longest_branch_below_one_candidate_of_two_keeps_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    trees: list[Tree] = []
    policy = fixed(ON["longest"], "1-1", "deterministic")
    assert distance(monkeypatch, ON["longest"], policy, Sampling(1.0), 2, trees) < 1e-6
    assert any(tree.from_target for tree in trees)


@pytest.mark.parametrize(("config", "shape", "draws"), [
    (RejectionConfig(), Chain(length=3), "iid"),
    (RecursiveConfig(), Static(children=(2, 1)), "without_replacement"),
    (RecursiveConfig(), Static(children=(2, 2)), "deterministic"),
])  # fmt: skip
def test_a_draft_length_that_follows_the_drafters_confidence_keeps_the_distribution(
    monkeypatch: pytest.MonkeyPatch, config: RuleConfig, shape: Shape, draws: Any
) -> None:
    trees: list[Tree] = []
    for floor in (0.1, 0.2, 0.4):
        policy = Confident(Plan(shape, draws), ConfidentConfig(floor=floor, at_least=0))
        assert distance(monkeypatch, config, policy, Sampling(1.0), 3, trees) < 1e-6
    assert any(not tree.live.all() for tree in trees)  # some stopped early
    assert any(tree.live.all() for tree in trees)  # and some did not
