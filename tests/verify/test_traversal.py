"""Traversal verification: never worse than going top down, equal where it must be, block verification on a chain, its known mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored
from drafttrain.verify import traversal
from drafttrain.verify.residual import Residual
from drafttrain.verify.traversal import Swept, left_at, postorder, standing, sweep
from tests.verify.trees import TOPOLOGIES, all_trees, recursive_reach


def expected(tree: Tree, scored: Scored, weight: Tensor) -> tuple[float, float]:
    """Accepted length over all trees and all chances: traversal's and recursive's."""
    ours = (standing(tree, sweep(tree, scored).a) * tree.depth).sum(1)
    theirs = recursive_reach(tree, scored.p)[:, 1:].sum(1)  # a node that is reached adds one
    return float(weight @ ours), float(weight @ theirs)


@pytest.mark.parametrize("draws", ["iid", "without_replacement"])
def test_it_is_never_worse_than_recursive_over_500_random_cases_and_mostly_better(draws: str) -> None:
    gains = []
    for seed in range(50):
        for name in ("1-1", "1-1-1", "2-1", "2-2", "ragged"):
            vocab = 2 if name in ("2-2", "ragged") else 3
            ours, theirs = expected(*all_trees(TOPOLOGIES[name], draws, vocab, 2 * seed, 2 * seed + 1))
            gains.append(ours - theirs)
    assert len(gains) == 250  # for each of two draws
    assert min(gains) > -1e-6
    assert sum(gain > 1e-4 for gain in gains) > 100


@pytest.mark.parametrize("draws", ["iid", "without_replacement"])
def test_at_depth_one_it_equals_recursive(draws: str) -> None:
    for seed in range(10):
        ours, theirs = expected(*all_trees(TOPOLOGIES["2"], draws, 3, 2 * seed, 2 * seed + 1))
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("draws", ["iid", "without_replacement"])
def test_at_temperature_zero_it_equals_recursive(draws: str) -> None:
    for seed in range(10):
        tree, scored, weight = all_trees(TOPOLOGIES["2-1"], draws, 3, 2 * seed, 2 * seed + 1)
        ours, theirs = expected(tree, Scored(scored.logits, Sampling()), weight)
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_on_a_chain_the_expected_length_is_that_of_block_verification() -> None:
    """E[accepted] = sum over l of E[p_l] with p_l = min(1, p_{l-1} p / q)."""
    for seed in range(10):
        tree, scored, weight = all_trees(TOPOLOGIES["1-1-1"], "iid", 3, 2 * seed, 2 * seed + 1)
        row, running, total = torch.arange(len(weight)), torch.ones_like(weight), 0.0
        for node in range(1, 4):
            token = tree.tokens[:, node]
            q = tree.law(torch.full_like(token, node))[row, token]
            running = (running * scored.p[row, node - 1, token] / q).clamp_max(1)
            total += float(weight @ running)
        assert expected(tree, scored, weight)[0] == pytest.approx(total, abs=1e-6)


def test_every_node_is_tried_after_its_children_and_elder_branches_before_younger_ones() -> None:
    tree, _, _ = all_trees(TOPOLOGIES["2-2"], "iid", 1, 0, 1)
    assert postorder(tree)[0].argsort().tolist() == [3, 4, 1, 5, 6, 2, 0]


right = sweep


def first_tokens(tree: Tree, scored: Scored, weight: Tensor) -> Tensor:
    """[V] the law of the first token that comes out."""
    swept = traversal.sweep(tree, scored)
    stands = standing(tree, swept.a)  # [B, N]
    out = torch.zeros(scored.logits.shape[-1], dtype=torch.float64)
    for node in range(tree.tokens.shape[1]):
        path, length = tree.path_to(torch.full((len(weight),), node))
        share = weight * stands[:, node]
        if int(length[0]):
            out.index_add_(0, tree.tokens.gather(1, path[:, :1])[:, 0], share)
        else:
            out += (share[:, None] * left_at(tree, scored, swept, torch.full((len(weight),), node))[:, 0].double()).sum(0)
    return out


def wrong_q(P: Tensor, Q: Tensor, draws: str, falls: int) -> Residual:
    """Elder siblings stay in."""
    return Residual(P, Q, "iid", falls)


def no_cascade(tree: Tree, scored: Scored) -> Swept:
    """Descendants of younger siblings keep the chances that they had before an elder one failed."""
    swept, p = right(tree, scored), scored.p
    a, row = swept.a.clone(), torch.arange(len(p))
    for child in range(1, a.shape[1]):
        if tree.depth[0, child] < tree.max_depth:
            continue
        parent, token = tree.parents[:, child], tree.tokens[:, child]
        above, over = tree.parents[row, parent], tree.tokens[row, parent]
        first = (p[row, above, over].double() / tree.law(parent)[row, over].double()).clamp_max(1)
        a[:, child] = (first * p[row, parent, token].double() / tree.law(torch.full_like(token, child))[row, token].double()).clamp_max(1)
    return replace(swept, a=a)


@pytest.mark.parametrize(
    ("draws", "name", "broken"),
    [("without_replacement", "Residual", wrong_q), ("iid", "sweep", no_cascade)],
    ids=["P without Q", "no cascade"],
)
def test_known_ways_of_losing_exactness_are_seen(
    monkeypatch: pytest.MonkeyPatch, draws: str, name: str, broken: Callable[..., Any]
) -> None:
    def worst() -> float:
        found = []
        for seed in range(4):
            given = all_trees(TOPOLOGIES["2-1"], draws, 3, 2 * seed, 2 * seed + 1)
            found.append(float((first_tokens(*given) - given[1].p[0, 0].double()).abs().sum() / 2))
        return max(found)

    assert worst() < 1e-6
    monkeypatch.setattr(traversal, name, broken)
    assert worst() > 0.01
