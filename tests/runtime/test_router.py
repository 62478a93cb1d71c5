"""Routers on simulated arms: who is chosen how often, how regret grows with the number of arms, and what scores survive.

An arm accepts each draft token with a probability of its own; K = 4 tokens are drafted a round.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Plan
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored
from drafttrain.runtime.pool import alignment, block_divergence
from drafttrain.runtime.router import ROUTERS, Hedge, Router, Trail, load_scores, normal_hedge, save_scores
from drafttrain.runtime.simulate import expected_length, regret

K = 4


def router(name: str, arms: int, seed: int = 0, **options: object) -> Router:
    kind = ROUTERS[name]
    return kind(kind.Config(name=name, **options), [1.0] * arms, K, np.random.default_rng(seed))


@pytest.mark.parametrize("options", [{}, {"discount": 0.99}, {"window": 200}, {"reward": "efficiency"}], ids=str)
def test_ucb_comes_to_choose_the_best_arm(options: dict[str, object]) -> None:
    lost = regret(router("ucb", 4, **options), [0.3, 0.8, 0.5, 0.4], rounds=600, seed=1)
    assert lost.shares[1] > 0.6
    if "discount" not in options and "window" not in options:  # what forgets goes on trying
        assert lost.late < 0.5 * lost.early


def test_ucb_with_a_window_follows_a_change_of_the_best_arm_and_without_one_lags() -> None:
    found = {}
    for window in (None, 60):
        chooser = router("ucb", 2, window=window)
        regret(chooser, [0.8, 0.3], rounds=600, seed=1)
        found[window] = regret(chooser, [0.3, 0.8], rounds=300, seed=2).shares[1]
    assert found[60] > 0.6
    assert found[60] > found[None] + 0.1


def test_halving_ends_with_the_best_arm_and_stays_there() -> None:
    chooser = router("halving", 8, budget=240)
    regret(chooser, [0.2, 0.3, 0.25, 0.85, 0.4, 0.1, 0.3, 0.2], rounds=300, seed=1)
    assert {chooser.choose() for _ in range(5)} == {3}


def test_exp3_draws_the_best_arm_more_than_evenly() -> None:
    assert regret(router("exp3", 4), [0.3, 0.8, 0.3, 0.3], rounds=2000, seed=1).shares[1] > 0.4


def test_hedges_regret_is_nearly_flat_in_the_number_of_arms_and_ucbs_is_not() -> None:
    lost = {name: [_mean_regret(name, arms) for arms in (4, 16, 64)] for name in ("hedge", "ucb")}
    assert lost["hedge"][2] < 3 * lost["hedge"][0]
    assert lost["ucb"][2] > 4 * lost["ucb"][0]
    assert all(hedge < ucb for hedge, ucb in zip(lost["hedge"], lost["ucb"], strict=True))


def _mean_regret(name: str, arms: int) -> float:
    rates = [*np.linspace(0.3, 0.6, arms - 1).tolist(), 0.8]
    return float(np.mean([regret(router(name, arms, seed), rates, rounds=400, seed=seed).total for seed in range(2)]))


def test_normal_hedge_solves_its_equation_and_is_even_before_anything_is_known() -> None:
    assert normal_hedge([-1.0, 0.0, -3.0]) == pytest.approx([1 / 3] * 3)
    regrets = np.array([3.0, 1.0, -2.0, 0.5])
    weights = np.array(normal_hedge(regrets.tolist()))
    assert weights.sum() == pytest.approx(1)
    assert weights[2] == 0
    # w_i / w_j = R_i / R_j exp((R_i^2 - R_j^2) / 2c) gives c, for which mean exp([R]+^2 / 2c) = e
    c = (regrets[0] ** 2 - regrets[1] ** 2) / (2 * np.log(weights[0] / weights[1] * regrets[1] / regrets[0]))
    assert np.exp(np.maximum(regrets, 0) ** 2 / (2 * c)).mean() == pytest.approx(np.e, rel=1e-6)


def test_hedge_waits_for_whole_stretches_and_drops_what_an_end_cuts() -> None:
    chooser, trail = router("hedge", 2), Trail()
    assert isinstance(chooser, Hedge)
    for _ in range(K - 1):
        chooser.reveal(trail, [0.9, 0.1], [0.9, 0.1])
    assert chooser.regret == [0.0, 0.0]  # censored: nothing is known of a whole round yet
    chooser.reveal(trail, [0.9, 0.1], [0.9, 0.1])
    assert chooser.regret[0] > 0 > chooser.regret[1]
    assert len(trail.accept) == K - 1


def test_the_unbiased_estimator_is_the_mean_accepted_length_and_the_product_is_not() -> None:
    """A Markov chain of two tokens: after one the drafter is right, after the other it is wrong; every path is walked."""
    p = np.array([[0.7, 0.3], [0.4, 0.6]])
    q = np.array([[0.7, 0.3], [0.95, 0.05]])
    accept, realised = np.minimum(p, q).sum(1), np.minimum(1, q / p)
    mean = {"unbiased": 0.0, "product": 0.0}
    for path in np.ndindex(*[2] * K):
        weight, state, g, w = 1.0, 0, [], []
        for token in path:
            g.append(accept[state])
            w.append(realised[state, token])
            weight *= p[state, token]
            state = token
        for estimator in mean:
            chooser = router("hedge", 1, estimator=estimator)
            assert isinstance(chooser, Hedge)
            trail = Trail()
            trail.accept.extend([value] for value in g)
            trail.realised.extend([value] for value in w)
            mean[estimator] += weight * chooser._length(trail, 0)
    # the true mean, by recursion over the state: a round goes on where the drafted token is accepted
    length = np.ones(2)
    for _ in range(K):
        length = 1 + (np.minimum(p, q) * length).sum(1)
    assert mean["unbiased"] == pytest.approx(length[0])
    assert abs(mean["product"] - length[0]) > 0.02


def test_costs_make_plain_decoding_win_where_drafting_does_not_pay() -> None:
    kind = ROUTERS["ucb"]
    dear = kind(kind.Config(name="ucb", plain=True, costs=(3.0,)), [3.0, 1.0], K, np.random.default_rng(0))
    cheap = kind(kind.Config(name="ucb", plain=True, costs=(1.2,)), [1.2, 1.0], K, np.random.default_rng(0))
    assert regret(dear, [0.5, 0.0], rounds=400, seed=1).shares[1] > 0.7  # 1.94 tokens for 3
    assert regret(cheap, [0.5, 0.0], rounds=400, seed=1).shares[0] > 0.7


@pytest.mark.parametrize("name", ["ucb", "exp3", "halving", "hedge"])
def test_saved_scores_go_on_where_they_were_and_other_pools_are_refused(name: str, tmp_path: Path) -> None:
    chooser, labels = router(name, 3), ["a", "b", "c"]
    regret(chooser, [0.2, 0.9, 0.4], rounds=100, seed=1)
    save_scores(chooser, labels, tmp_path / "scores.json")
    again = router(name, 3)
    load_scores(again, labels, tmp_path / "scores.json")
    assert again.state() == chooser.state() != router(name, 3).state()
    with pytest.raises(UserError, match="is of router"):
        load_scores(again, ["a", "b", "d"], tmp_path / "scores.json")
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_scores(again, labels, tmp_path / "scores.json")


def test_block_divergence_is_the_mean_overlap_of_p_and_q_along_the_chain() -> None:
    torch.manual_seed(0)
    q, p = torch.rand(1, 2, 5).softmax(-1), torch.randn(1, 3, 5)
    tree = Tree(
        torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, 1]]), torch.ones(1, 3).bool(), "iid", 2, 1, draft_probs=q,
        probs_row=torch.tensor([[0, 0, 1]]),
    )  # fmt: skip
    scored = Scored(p, Sampling(0.8))
    expected = torch.minimum((p[0, :2] / 0.8).softmax(-1), q[0]).sum(-1).mean()
    torch.testing.assert_close(block_divergence(tree, scored)[0], expected)


def test_alignment_of_certain_tokens_is_the_targets_mass_of_them_and_of_nothing_is_nothing() -> None:
    p = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]])
    nothing = float("-inf")
    logits = torch.tensor([[[nothing, 0.0, nothing], [nothing, nothing, nothing]]])
    accept, realised = alignment(p, logits, torch.tensor([[1, 2]]), Plan(Chain(length=2)), Sampling(1.0))
    assert accept.tolist() == [[pytest.approx(0.3), 0.0]]
    assert realised.tolist() == [[1.0, 0.0]]


def test_expected_length_counts_the_bonus_token() -> None:
    assert expected_length(0.0, K) == 1
    assert expected_length(1.0, K) == K + 1
    assert expected_length(0.5, 2) == pytest.approx(1.75)
