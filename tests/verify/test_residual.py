"""What is left of a distribution after any number of falls: one number keeps what the papers do step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drafttrain.core.tree import Draws
from drafttrain.verify.residual import Residual

B, W, V, FALLS = 3, 4, 12, 4


def distributions(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    P, Q = ((2 * torch.randn(B, W, V, generator=generator)).softmax(-1) for _ in range(2))
    return P, Q


def drawn(Q: Tensor, replace: bool, seed: int) -> Tensor:
    """[B, W, FALLS] tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(Q.flatten(0, 1), FALLS, replace, generator=generator).view(B, W, FALLS)


def step(P: Tensor, Q: Tensor, token: int, weight: float) -> tuple[float, float, Tensor]:
    """One fall at one node as the papers write it, all normalised, fp64: P / Q at the token, S, and what is left."""
    left = (weight * P - Q).clamp_min(0)
    S = float(left.sum())
    return float(P[token] / Q[token]), S, left / S if S > 0 else torch.full_like(P, 1 / V)


@pytest.mark.parametrize("draws", ["iid", "without_replacement", "deterministic"])
@pytest.mark.parametrize("seed", range(5))
def test_every_fall_is_that_of_normalised_distributions(draws: Draws, seed: int) -> None:
    P, Q = distributions(seed)
    tokens = drawn(Q, draws == "iid", seed)
    fell = torch.rand(B, W, FALLS, generator=torch.Generator().manual_seed(seed)) < 0.8
    weights = 0.3 + 0.7 * torch.rand(B, W, FALLS, generator=torch.Generator().manual_seed(seed + 9), dtype=torch.float64)
    ours = Residual(P, None if draws == "deterministic" else Q, draws, tokens)
    now_P, now_Q = P.double(), Q.double()
    for rank in range(FALLS):
        n = W - rank // 2  # later ones at the first nodes alone
        weight = weights[:, :n, rank] if draws != "deterministic" else torch.ones(B, n, dtype=torch.float64)
        ratio, S = ours.reject(fell[:, :n, rank], weight)
        for row in range(B):
            for node in range(n):
                token = int(tokens[row, node, rank])
                q = torch.eye(V, dtype=torch.float64)[token] if draws == "deterministic" else now_Q[row, node]
                expected_ratio, expected_S, left = step(now_P[row, node], q, token, float(weight[row, node]))
                assert float(ratio[row, node]) == pytest.approx(expected_ratio, rel=2e-4, abs=1e-6)
                if fell[row, node, rank]:
                    assert float(S[row, node]) == pytest.approx(expected_S, abs=2e-6)
                    now_P[row, node] = left
                    if draws == "without_replacement":
                        now_Q[row, node, token] = 0.0
                        now_Q[row, node] /= now_Q[row, node].sum()
    torch.testing.assert_close(ours.probs().double(), now_P, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(P, distributions(seed)[0], atol=0, rtol=0)  # read, never written


def test_a_twin_of_a_chosen_token_that_fell_has_nothing_left() -> None:
    P, _ = distributions(0)
    fell = torch.ones(B, W, dtype=torch.bool)
    left = Residual(P, None, "deterministic", torch.zeros(B, W, 2, dtype=torch.long))
    first, _ = left.reject(fell)
    again, S = left.reject(fell)
    torch.testing.assert_close(first, P[..., 0].double())
    assert (again == 0).all() and torch.allclose(S, torch.ones_like(S))
    assert (left.probs()[..., 0] == 0).all()


def test_what_did_not_fall_leaves_everything_as_it_was() -> None:
    P, Q = distributions(1)
    left = Residual(P, Q, "without_replacement", drawn(Q, False, 1))
    left.reject(torch.zeros(B, W, dtype=torch.bool))
    torch.testing.assert_close(left.probs(), P)


@pytest.mark.parametrize("vocab", [512, 520, 521])
def test_what_a_nearly_certain_draft_leaves_of_its_distribution_is_known_to_the_last_digits(vocab: int) -> None:
    logits = torch.randn(1, 1, vocab, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[..., 300] = 30.0
    Q, P = logits.softmax(-1).float(), torch.full((1, 1, vocab), 1 / vocab)
    left = Residual(P, Q, "without_replacement", torch.tensor([[[300, 7]]]))
    left.reject(torch.ones(1, 1, dtype=torch.bool))
    others = Q.double().sum() - Q[0, 0, 300].double()
    assert 0 < float(others) < 1e-9
    torch.testing.assert_close(left.rest[0, 0], others, rtol=1e-5, atol=0)
