"""Traversal verification: never worse than going top down, equal where it must be, block verification on a chain, its known mistakes.

Everything is asked of the rule's own call, on all trees that a drafter can draw.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drafttrain.core.sampling import Sampling, normalise
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored
from drafttrain.verify.recursive import Recursive, RecursiveConfig
from drafttrain.verify.traversal import Traversal, TraversalConfig
from tests.verify.trees import DEEP, TOPOLOGIES, all_trees, many_trees, recursive_reach
from tests.verify.walk import first_tokens, probs_row

TRAVERSAL, RECURSIVE = Traversal(TraversalConfig()), Recursive(RecursiveConfig())
DRAWS = ("iid", "without_replacement")
SEEDS = 32
CASES = len(DEEP) * len(DRAWS) * SEEDS


def by_seed(value: Tensor, weight: Tensor, seed: Tensor) -> Tensor:
    """[B] -> [seeds] mean over all trees of a target and a drafter."""
    return torch.zeros(int(seed.max()) + 1, dtype=torch.float64).index_add(0, seed, weight * value)


def lengths(name: str, draws: str, seeds: range, sampling: Sampling | None = None) -> tuple[Tensor, Tensor]:
    """[seeds] expected accepted length over all trees and all chances: traversal's and recursive's."""
    tree, scored, weight, seed = many_trees(name, draws, seeds, sampling)
    ours, theirs = (by_seed(probs_row(rule, tree, scored).length, weight, seed) for rule in (TRAVERSAL, RECURSIVE))
    return ours, theirs


def test_there_are_500_random_cases() -> None:
    assert CASES >= 500


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("name", DEEP)
def test_it_is_never_worse_than_recursive_over_500_random_cases_and_mostly_better(draws: str, name: str) -> None:
    ours, theirs = lengths(name, draws, range(SEEDS))
    assert len(ours) == SEEDS
    assert float((ours - theirs).min()) > -1e-6
    assert int((ours - theirs > 1e-4).sum()) > SEEDS / 3


def test_below_a_younger_sibling_that_carries_the_deeper_branch_it_can_be_worse() -> None:
    """The elder leaf is tried first, with all that the younger branch could have used; no theorem covers trees."""
    ours, theirs = lengths("younger deeper", "without_replacement", range(SEEDS))
    assert float((ours - theirs).min()) < -1e-3
    assert float((ours - theirs).mean()) > 0


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("name", ["2", "3"])
def test_at_depth_one_it_equals_recursive(draws: str, name: str) -> None:
    ours, theirs = lengths(name, draws, range(SEEDS))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert float(ours.std()) > 0.01


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("name", DEEP)
def test_at_temperature_zero_it_equals_recursive(draws: str, name: str) -> None:
    ours, theirs = lengths(name, draws, range(8), Sampling())
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert float(ours.max()) > 0.1


@pytest.mark.parametrize("draws", DRAWS)
def test_recursive_reaches_nodes_as_its_paper_says(draws: str) -> None:
    for name in ("2-2", "ragged"):
        tree, scored, *_ = many_trees(name, draws, range(4))
        said = probs_row(RECURSIVE, tree, scored)
        torch.testing.assert_close(said.length, recursive_reach(tree, scored.target_probs)[:, 1:].sum(1), atol=1e-6, rtol=0)


def test_on_a_chain_the_expected_length_is_that_of_block_verification() -> None:
    """E[accepted] = sum over l of E[p_l] with p_l = min(1, p_{l-1} p / q)."""
    tree, scored, weight, seed = many_trees("1-1-1", "iid", range(10))
    row, running, total = torch.arange(len(weight)), torch.ones_like(weight), torch.zeros_like(weight)
    for node in range(1, 4):
        token = tree.tokens[:, node]
        q = tree.draft_probs_at(torch.full_like(token, node))[row, token]
        running = (running * scored.target_probs[row, node - 1, token] / q).clamp_max(1)
        total += running
    ours = by_seed(probs_row(TRAVERSAL, tree, scored).length, weight, seed)
    torch.testing.assert_close(ours, by_seed(total, weight, seed), atol=1e-6, rtol=0)


def by_the_paper(tree: Tree, p: Tensor, mistake: str = "") -> Tensor:
    """[B, N, V] the distribution of the last node that stands and the token after it: node by node, leaves first. One parent table for all
    rows."""
    B, N, V = p.shape
    row, parent = torch.arange(B), tree.parents[0].tolist()
    P, Q = p.double().clone(), torch.stack([tree.draft_probs_at(torch.full((B,), node)).double() for node in range(N)], 1)
    own, out, left = {0: torch.ones(B, dtype=torch.float64)}, torch.zeros(B, N, V, dtype=torch.float64), torch.ones(B, dtype=torch.float64)
    start = P.clone()

    def rng(node: int) -> Tensor:
        """min(1, a P / Q) along the path, from the nearest node whose children have failed."""
        if node in own:
            return own[node]
        stale = mistake == "siblings on their own" or (mistake == "no cascade" and node in parent)
        probs, token = (start if stale else P)[row, parent[node]], tree.tokens[:, node]
        return (rng(parent[node]) * probs[row, token] / Q[row, node, token].clamp_min(1e-300)).clamp_max(1)

    for node in order(tree):
        stands, token, above = rng(node), tree.tokens[:, node], parent[node]
        out[:, node], left = (left * stands)[:, None] * P[:, node], left * (1 - stands)
        if node:
            a, R = rng(above), (rng(above)[:, None] * P[:, above] - Q[:, node]).clamp_min(0)
            S = R.sum(-1)
            P[:, above] = torch.where((S > 0)[:, None], normalise(R), P[:, above])
            own[above] = torch.ones_like(S) if above == 0 else S / (S + 1 - a).clamp_min(1e-300)
            if tree.draws == "without_replacement" and mistake != "P without Q":
                for younger in range(node + 1, N):
                    if parent[younger] == above:
                        Q[:, younger] = normalise(Q[:, younger].scatter(1, token[:, None], 0.0))
    return out


def order(tree: Tree) -> list[int]:
    """Every node after its children, elder branches before younger ones."""

    def below(node: int) -> list[int]:
        return [*(one for child in tree.children[0, node].tolist() if child >= 0 for one in below(child)), node]

    return below(0)


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("name", ["2", "1-1-1", "2-1", "1-2", "2-2", "ragged", "ragged wide", "younger deeper"])
def test_it_says_what_the_paper_says_of_every_tree(draws: str, name: str) -> None:
    tree, scored, weight, _ = many_trees(name, draws, range(3))
    drawn = weight > 0
    said = probs_row(TRAVERSAL, tree, scored).next
    torch.testing.assert_close(said[drawn], by_the_paper(tree, scored.target_probs)[drawn], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("draws", "mistake"), [("without_replacement", "P without Q"), ("iid", "no cascade"), ("iid", "siblings on their own")]
)
def test_known_ways_of_losing_exactness_are_seen(draws: str, mistake: str) -> None:
    def worst(mistake: str) -> float:
        return max(distance(all_trees(TOPOLOGIES["2-1"], draws, 3, 2 * seed, 2 * seed + 1), mistake) for seed in range(6))

    assert worst("") < 1e-6
    assert worst(mistake) > 0.01


def distance(given: tuple[Tree, Scored, Tensor], mistake: str) -> float:
    """Total variation of the first token from the target's distribution."""
    tree, scored, weight = given
    out = by_the_paper(tree, scored.target_probs, mistake)
    total = (weight[:, None] * out[:, 0]).sum(0)
    for node in range(1, out.shape[1]):
        path, _ = tree.path_to(torch.full((len(weight),), node))
        total.index_add_(0, tree.tokens.gather(1, path[:, :1])[:, 0], weight * out[:, node].sum(-1))
    return float((total - scored.target_probs[0, 0].double()).abs().sum() / 2)


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("name", DEEP)
def test_the_first_token_has_the_targets_distribution(draws: str, name: str) -> None:
    small = name == "2-2-1" or (name == "ragged wide" and draws == "iid")
    tree, scored, weight = all_trees(TOPOLOGIES[name], draws, 2 if small else 3, 0, 1)
    found = first_tokens(probs_row(TRAVERSAL, tree, scored), tree, weight)
    assert float((found - scored.target_probs[0, 0].double()).abs().sum() / 2) < 1e-6
