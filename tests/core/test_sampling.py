"""The nucleus: the fast way and the whole sort keep the same tokens."""

from __future__ import annotations

import pytest
import torch

from drafttrain.core import sampling
from drafttrain.core.sampling import PREFIX, Sampling, nucleus

VOCAB = 4 * PREFIX


def law(spread: float, ties: bool) -> torch.Tensor:
    torch.manual_seed(0)
    logits = spread * torch.randn(3, 2, VOCAB)
    return (logits.round() if ties else logits).softmax(-1)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_the_prefix_keeps_what_a_whole_sort_keeps(monkeypatch: pytest.MonkeyPatch, top_p: float, ties: bool) -> None:
    whole = sampling._sorted_nucleus(law(4.0, ties), top_p)
    monkeypatch.setattr(sampling, "_sorted_nucleus", None)  # not asked
    torch.testing.assert_close(nucleus(law(4.0, ties), top_p), whole)
    assert ((nucleus(law(4.0, ties), top_p) > 0) == (whole > 0)).all()


def test_a_flat_law_is_sorted_whole() -> None:
    flat = law(0.01, False)
    found = nucleus(flat, 0.9)
    assert (found > 0).sum(-1).min() > PREFIX
    torch.testing.assert_close(found, sampling._sorted_nucleus(flat, 0.9))


def test_top_p_of_one_keeps_every_token() -> None:
    logits = torch.randn(2, VOCAB)
    assert (Sampling(1.0).law(logits) > 0).all()
