"""The fast argmax beside the plain one."""

from __future__ import annotations

import pytest
import torch

from drafttrain.core.sampling import likeliest


@pytest.mark.parametrize("vocab", [1, 7, 256, 600, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_likeliest_equals_argmax_with_the_lowest_id_on_ties(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    # few distinct values: nearly every row has ties, within blocks and across them
    logits = torch.randint(-4, 5, (3, 50, vocab), generator=generator).to(dtype)
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(likeliest(logits), first)
    assert likeliest(logits[0, 0]) == first[0, 0]
