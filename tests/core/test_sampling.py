"""The nucleus keeps what a whole sort would, also where nothing is sorted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from drafttrain.core import sampling
from drafttrain.core.errors import UserError
from drafttrain.core.sampling import SMALL, Sampling, nucleus


def by_sorting(probs: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens as long as those before them hold less than `top_p`; of equals the lower id first."""
    ranked, order = probs.double().sort(dim=-1, descending=True, stable=True)
    kept = (ranked.cumsum(-1) - ranked) < top_p
    return torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, kept)


WAYS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sorted": sampling._nucleus_by_sorting, "by digits": sampling._nucleus_by_digits, "on the host": sampling._nucleus_on_host,
    "as chosen": nucleus,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.99999])
def test_it_keeps_what_a_whole_sort_would_keep(way: str, spread: float, ties: bool, top_p: float) -> None:
    logits = torch.randn(3, 2, 4 * SMALL, generator=torch.Generator().manual_seed(0)) * spread
    logits[0] *= torch.tensor([[9.0], [0.5]])  # rows that few tokens hold beside rows that take many
    probs = (logits.round() if ties else logits).softmax(-1)
    found = WAYS[way](probs, top_p)
    assert ((found > 0) == by_sorting(probs, top_p)).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 2))
    kept = found > 0
    torch.testing.assert_close(found / found.amax(-1, keepdim=True), torch.where(kept, probs, 0.0) / probs.amax(-1, keepdim=True))


@pytest.mark.parametrize("vocab", [100, 4 * SMALL])
def test_a_distribution_cut_already_stays_cut(vocab: int) -> None:
    """Tokens of probability 0 are no part of a nucleus, even where rounding leaves the rest short of `top_p`."""
    probs = Sampling(1.0, top_k=7).probs(torch.randn(5, vocab, generator=torch.Generator().manual_seed(1)))
    assert ((nucleus(probs, 1 - 1e-12) > 0) == (probs > 0)).all()


@pytest.mark.parametrize("temperature", [1e-20, 1e-30, 1e-40, 5e-324])
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.9}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_temperature_is_greedy_and_shares_between_ties(temperature: float, cut: dict[str, float], dtype: torch.dtype) -> None:
    logits = torch.tensor([[-30.0, 21.0, 21.5, 0.0], [-3.0, -1.0, -2.0, -4.0], [2.0, float("-inf"), 2.0, 1.0]], dtype=dtype)
    probs = Sampling(temperature, **cut).probs(logits)  # type: ignore[arg-type]
    assert torch.equal(probs, torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]]))


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf"), float("-inf")])
def test_a_temperature_that_no_distribution_has_is_refused(temperature: float) -> None:
    with pytest.raises(UserError, match=f"temperature {temperature} is not 0 or a finite positive number"):
        Sampling(temperature).check()
