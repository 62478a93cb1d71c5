"""The nucleus keeps what a whole sort would, also where nothing is sorted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

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


CUTS: dict[str, tuple[dict[str, float], list[LogitsProcessor]]] = {
    "min_p": ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
    "typical_p": ({"typical_p": 0.6}, [TypicalLogitsWarper(0.6)]),
    "all": (
        {"top_k": 30, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.8},
        [TopKLogitsWarper(30), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05), TypicalLogitsWarper(0.8)],
    ),
}


@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_cuts_are_those_of_transformers(case: str, spread: float) -> None:
    options, warpers = CUTS[case]
    logits = torch.randn(20, 200, generator=torch.Generator().manual_seed(2)) * spread
    scores = TemperatureLogitsWarper(0.7)(torch.zeros(20, 1).long(), logits)
    for warper in warpers:
        scores = warper(torch.zeros(20, 1).long(), scores)
    torch.testing.assert_close(Sampling(0.7, **options).probs(logits), scores.softmax(-1))  # type: ignore[arg-type]


def test_top_n_sigma_keeps_logits_near_the_largest_at_every_temperature() -> None:
    logits = torch.tensor([[4.0, 2.5, 2.0, -2.0, float("-inf")]])  # deviation of the four: 2.22
    for temperature in (0.5, 1.0, 3.0):
        kept = Sampling(temperature, top_n_sigma=0.8).probs(logits) > 0
        assert kept.tolist() == [[True, True, False, False, False]]
