"""A whole round waits for the device once, whichever family drafts: to hand out the tokens it gained."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

from drafttrain.core.plan import Chain, Dynamic, Static
from drafttrain.core.sampling import Sampling
from drafttrain.drafters import DRAFTERS
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.generate import DecodingLoop, Request
from drafttrain.target.adapter import Target
from tests.families import TRAINABLE, tiny_drafter
from tests.tiny import tiny_target
from tests.waiting import reported_waits

ROUNDS = 3
THE_WAIT = ["tolist"]
CASES = [
    (family, shape, temperature)
    for family in TRAINABLE  # lookups look on the host
    for shape in (Chain(length=2), Static(children=(2, 1)), Dynamic(depth=2, beam=2, top_k=2, nodes=4))
    for temperature in (0.0, 1.0)
    if temperature == 0.0 or shape.shape == "dynamic" or DRAFTERS[family].draws >= {"iid", "without_replacement"}
]


@lru_cache
def target() -> Target:
    return tiny_target(3)


def begun(family: str, shape: Any, temperature: float) -> DecodingLoop:
    """Three rows of unequal length that no round of the test ends."""
    decoder = SpeculativeDecoder(target(), tiny_drafter(family, target()), RuntimeConfig(shape=shape))
    batch = decoder.batch(Sampling(temperature), 0)
    batch.start([Request(prompt, row, 40) for row, prompt in enumerate(([1, 2, 3], [4, 5, 6, 7, 8], [9, 9]))])
    return batch


@pytest.mark.parametrize(("family", "shape", "temperature"), CASES, ids=lambda value: getattr(value, "shape", value))
def test_a_round_waits_for_the_device_once(family: str, shape: Any, temperature: float) -> None:
    batch = begun(family, shape, temperature)
    for _ in range(ROUNDS):
        waits: list[str] = []
        with reported_waits(waits.append):
            batch.step()
        assert waits == THE_WAIT
    assert not batch.done


def test_plain_decoding_waits_once_a_round_too() -> None:
    batch = SpeculativeDecoder(target()).batch(Sampling(), 0)
    batch.start([Request([1, 2, 3], 0, 40)])
    waits: list[str] = []
    with reported_waits(waits.append):
        batch.step()
    assert waits == THE_WAIT
