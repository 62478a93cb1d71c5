"""Multi-draft selection: never above P*, at P* by the program, one draft equals speculative sampling, and what it does in practice."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored
from drafttrain.evaluation.limits import one_by_one
from drafttrain.verify import multidraft
from drafttrain.verify.multidraft import SCHEMES, Multidraft, MultidraftConfig, acceptance, limit
from drafttrain.verify.recursive import RecursiveConfig
from tests.verify.walk import first_tokens, probs_row

CONFIGS = {name: MultidraftConfig(scheme=name) for name in SCHEMES}


def distributions(vocab: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    drawn = torch.distributions.Dirichlet(torch.full((vocab,), 0.7)).sample((2, rows))
    return drawn[0], drawn[1]


@pytest.mark.parametrize("K", [1, 2, 3])
def test_the_limit_is_what_no_set_of_tokens_allows_more_of(K: int) -> None:
    p, q = distributions(5, 20)
    for row in range(20):
        sets = [list(part) for size in range(6) for part in combinations(range(5), size)]
        worst = min(float(p[row, part].sum() - q[row, part].double().sum() ** K) for part in sets)
        assert float(limit(p[row], q[row], K)) == pytest.approx(1 + worst, abs=1e-6)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_the_program_over_all_sets_reaches_the_limit(K: int) -> None:
    p, q = distributions(4, 15)
    torch.testing.assert_close(acceptance(p, q, K, CONFIGS["optimal"]), limit(p, q, K), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("K", [1, 2, 3])
def test_no_scheme_is_above_the_limit_and_one_draft_is_speculative_sampling(scheme: str, K: int) -> None:
    p, q = distributions(4 if scheme == "optimal" else 20, 15)
    found = acceptance(p, q, K, CONFIGS[scheme])
    assert (found <= limit(p, q, K) + 1e-6).all()
    if K == 1:
        torch.testing.assert_close(found, torch.minimum(p, q).sum(-1).double(), atol=1e-6, rtol=0)


def alike(vocab: int, rows: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The distributions of logits, and of the same logits with noise."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(rows, vocab)
    return logits.softmax(-1), (logits + noise * torch.randn(rows, vocab)).softmax(-1)


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3, 1.0, 3.0])
def test_priority_is_at_the_limit_for_good_and_for_bad_drafters_and_never_below_recursive(noise: float, K: int) -> None:
    p, q = alike(200, 50, noise)
    ours, best = acceptance(p, q, K, CONFIGS["priority"]), limit(p, q, K)
    assert (ours >= one_by_one(RecursiveConfig(), p, q, K) - 0.002).all()  # tokens of one rank, not told apart, are alike to 1/128
    assert (ours > 0.95 * best).all()
    assert ours.mean() > 0.998 * best.mean()


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_further_drafts_never_make_priority_worse(noise: float) -> None:
    p, q = alike(200, 50, noise)
    rates = torch.stack([acceptance(p, q, K, CONFIGS["priority"]) for K in range(1, 9)])
    assert (rates.diff(dim=0) > -0.001).all()  # as above


@pytest.mark.parametrize("scheme", ["priority", "tournament", "truncated"])
def test_more_drafts_stand_more_often(scheme: str) -> None:
    p, q = distributions(20, 40)
    rates = [acceptance(p, q, K, CONFIGS[scheme]).mean() for K in (1, 2, 4)]
    assert rates[0] < rates[1] < rates[2]


@pytest.mark.parametrize("scheme", ["priority", "optimal"])
def test_drafts_of_the_targets_own_distribution_always_stand_where_the_choice_is_optimal(scheme: str) -> None:
    p, _ = distributions(5, 10)
    torch.testing.assert_close(acceptance(p, p, 3, CONFIGS[scheme]), torch.ones(10, dtype=torch.float64), atol=1e-6, rtol=0)


def test_priority_is_above_recursive_rejection_and_near_the_limit() -> None:
    p, q = distributions(20, 500)
    for K in (2, 4):
        ours, best = acceptance(p, q, K, CONFIGS["priority"]), limit(p, q, K)
        assert (ours >= one_by_one(RecursiveConfig(), p, q, K) - 0.002).double().mean() > 0.995
        assert ours.mean() > 0.998 * best.mean()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("K", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_drafts_stand_as_often_as_the_distribution_of_the_choice_says(scheme: str, K: int) -> None:
    """All K drafts of 4 tokens through the rule's own call, each with its probability, all of its choices walked."""
    for seed in range(3):
        p, q = distributions(4, 1, seed)
        tree, scored, weight = all_drafts(p, q, K)
        claimed = float(acceptance(p, q, K, CONFIGS[scheme])[0])
        assert float(weight @ probs_row(Multidraft(CONFIGS[scheme]), tree, scored).length) == pytest.approx(claimed, abs=1e-6)
        assert claimed <= float(limit(p, q, K)[0]) + 1e-6


def all_drafts(p: torch.Tensor, q: torch.Tensor, K: int) -> tuple[Tree, Scored, torch.Tensor]:
    """Every K drafts from q below one root, side by side as rows, and the probability of each. p, q: [1, V]."""
    drafts = torch.cartesian_prod(*[torch.arange(p.shape[1])] * K).view(-1, K)
    tokens = torch.cat([torch.zeros(len(drafts), 1).long(), drafts], 1)
    zeros = torch.zeros_like(tokens)
    tree = Tree(tokens, zeros, zeros == 0, "iid", 1, K, draft_probs=q.expand(len(drafts), 1, -1), probs_row=zeros)
    return tree, Scored(p.log()[:, None].expand(len(drafts), K + 1, -1), Sampling(1.0)), q[0, drafts].double().prod(1)


TIES = {
    "the same distribution": ((0.25, 0.25, 0.5), (0.25, 0.25, 0.5)),
    "equal logits": ((0.25, 0.25, 0.25, 0.25), (0.25, 0.25, 0.25, 0.25)),
    "two of a ratio": ((0.4, 0.2, 0.3, 0.1), (0.2, 0.1, 0.2, 0.5)),
    "one never drafted": ((0.25, 0.25, 0.5), (0.5, 0.5, 0.0)),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tie", TIES)
def test_the_distribution_comes_out_where_tokens_tie(tie: str, scheme: str) -> None:
    p, q = (torch.tensor([probs]) for probs in TIES[tie])
    tree, scored, weight = all_drafts(p, q, 3 if scheme == "priority" else 2)
    tree, scored, weight = tree.select(weight.nonzero()[:, 0]), Scored(scored.logits[weight > 0], Sampling(1.0)), weight[weight > 0]
    out = first_tokens(probs_row(Multidraft(CONFIGS[scheme]), tree, scored), tree, weight)
    assert float((out - p[0]).abs().sum() / 2) < 1e-6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_distribution_comes_out_of_random_distributions(scheme: str) -> None:
    for seed in range(4):
        p, q = distributions(4, 1, seed)
        tree, scored, weight = all_drafts(p, q, 3 if scheme in ("priority", "tournament") else 2)  # a program a row takes its time
        out = first_tokens(probs_row(Multidraft(CONFIGS[scheme]), tree, scored), tree, weight)
        assert float((out - p[0]).abs().sum() / 2) < 1e-6


def test_the_distribution_comes_out_where_tokens_share_their_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in vocabularies too large for a rank a token: here three ranks, of ratios below 1, from 1 to 2, and above."""
    for name, value in (("RANK_BITS", 23), ("LOWEST", 126), ("HIGHEST", 128)):
        monkeypatch.setattr(multidraft, name, value)
    for seed in range(8):
        p, q = distributions(4, 1, seed)
        tree, scored, weight = all_drafts(p, q, 3)
        out = first_tokens(probs_row(Multidraft(CONFIGS["priority"]), tree, scored), tree, weight)
        assert float((out - p[0]).abs().sum() / 2) < 1e-6


def test_a_program_that_is_too_large_is_refused_by_name() -> None:
    p, q = distributions(50, 1)
    with pytest.raises(UserError, match=r"scheme 'optimal': 3 drafts of 50 tokens make 20875 sets; use scheme 'priority'"):
        acceptance(p, q, 3, CONFIGS["optimal"])
