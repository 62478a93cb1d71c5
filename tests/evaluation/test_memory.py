"""Peak memory of a stretch of work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drafttrain.evaluation.memory import PeakMemory


def test_what_was_used_before_does_not_count() -> None:
    before = np.ones(512 << 17)  # 512 MiB
    del before
    memory = PeakMemory(torch.device("cpu"))
    if not memory.counts_anew:
        pytest.skip("this system cannot forget a peak")
    start = memory.read()
    held = np.ones(256 << 17)
    assert 200 << 20 < memory.read() - start < 400 << 20, len(held)
