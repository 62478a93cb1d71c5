"""Replay of sampled texts against decoding itself."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.plan import Chain
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.grow import widen
from drafttrain.runtime.decoder import Generation, RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.replay import Expected, _expect_answer, replay_sampled, stands
from tests.families import slow_beyond
from tests.runtime.test_rounds import FAST, PROMPTS, WAYS, drafter, target
from tests.tiny import packed

K, NEW, SAMPLES = 3, 24, 120
WARM = Sampling(temperature=0.8, top_p=0.95)


@lru_cache
def texts() -> list[list[int]]:
    plain = SpeculativeDecoder(target()).generate(PROMPTS, NEW, *WARM[:3], seed=1, n=SAMPLES, batch_size=64)
    return [PROMPTS[index // SAMPLES] + one.tokens for index, one in enumerate(plain)]


def replayed(name: str, temperature: float | None = None) -> Expected:
    starts = [len(PROMPTS[index // SAMPLES]) for index in range(len(texts()))]
    batches = [packed(target(), texts()[at : at + 20], starts[at : at + 20]) for at in range(0, len(starts), 20)]
    return replay_sampled(drafter(name), batches, target().head, WARM, K, temperature, chunk=100)


def decoded(name: str, temperature: float | None = None) -> list[Generation]:
    runtime = RuntimeConfig(shape=Chain(length=K), drafter_temperature=temperature)
    return SpeculativeDecoder(target(), drafter(name), runtime).generate(PROMPTS, NEW, *WARM[:3], seed=2, n=SAMPLES, batch_size=64)


@pytest.mark.parametrize("temperature", [None, pytest.param(1.4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", slow_beyond(WAYS, FAST))
def test_sampled_replay_gives_the_accepted_length_of_sampled_decoding(name: str, temperature: float | None) -> None:
    expected, online = replayed(name, temperature), decoded(name, temperature)
    tokens, rounds = (np.array([getattr(one.statistics, field) for one in online], float) for field in ("tokens", "rounds"))
    tau = tokens.sum() / rounds.sum()
    spread = np.std(tokens - tau * rounds) / rounds.mean() / np.sqrt(len(online))  # of the ratio, over answers
    low, high = expected.interval()
    assert abs(expected.tau - tau) < 3 * np.hypot(spread, (high - low) / 4)
    assert abs(expected.length - tau) < 3 * np.hypot(spread, (high - low) / 4)
    assert tau > 1.1
    accepts = np.sum([one.statistics.accepts for one in online], 0)
    attempts = np.sum([one.statistics.attempts for one in online], 0)
    for level in range(2):
        share = accepts[level] / attempts[level]
        assert abs(expected.alpha[level] - share) < 4 * np.sqrt(share * (1 - share) / attempts[level]) + 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", slow_beyond(WAYS, FAST))
def test_how_likely_draws_stand_is_what_the_two_distributions_say_at_every_root_and_depth(name: str) -> None:
    starts = [len(PROMPTS[index // SAMPLES]) for index in (0, SAMPLES, 2 * SAMPLES)]
    batch = packed(target(), [texts()[index] for index in (0, SAMPLES, 2 * SAMPLES)], starts)
    used, head = drafter(name), target().head
    g, w = (values[0] for values in stands(used, batch, head, WARM, 5, temperature=1.3, chunk=7))
    expected_g, expected_w = torch.zeros_like(g), torch.zeros_like(w)
    for step, states in enumerate(used.teacher_forced_states(batch, head, 5)):
        token, supervised = (values[0] for values in batch.ahead(step + 2))
        for at in supervised.nonzero()[:, 0].tolist():
            p = WARM.probs(head.logits(batch.features["last_hidden_state"][0, at + step + 1]))
            q = WARM._replace(temperature=1.3).probs(used.readout(states[0, at], step, head))
            q = q if used.draft_ids is None else widen(q, used.draft_ids, len(p))
            expected_g[at, step], expected_w[at, step] = torch.minimum(p, q).sum(), min(1.0, float(q[token[at]] / p[token[at]]))
    torch.testing.assert_close(g, expected_g)
    torch.testing.assert_close(w, expected_w)
    assert (g > 0).sum() > 100


def test_expected_rounds_are_those_of_every_way_the_coins_can_fall() -> None:
    rng = np.random.default_rng(0)
    for length, depth in product((2, 3, 6), (1, 2, 4)):
        g, w = rng.random((2, length + 3, depth))
        tokens, rounds, attempts, accepts, gained = _expect_answer(g, w, 2, 2 + length)
        expected = np.zeros(2 + 2 * depth)

        def follow(
            root: int, weight: float, g: Any = g, w: Any = w, end: int = 1 + length, depth: int = depth, out: Any = expected
        ) -> None:
            """From `root`: one round, then whatever root follows."""
            if root >= end or weight == 0:
                return
            out[0] += weight
            for level in range(depth):
                if root + level >= end:
                    return
                out[1 + level] += weight
                out[1 + depth + level] += weight * g[root - 1, level]
                out[-1] += weight * g[root - 1, level] * (root + level + 1 < end)
                follow(root + level + 1, weight * (1 - w[root - 1, level]))
                weight *= w[root - 1, level]
            follow(root + depth + 1, weight)

        follow(2, 1.0)
        assert tokens == length - 1
        np.testing.assert_allclose([rounds, *attempts, *accepts, gained], expected, atol=1e-12)


def test_the_biased_product_of_overlaps_is_not_what_replay_uses() -> None:
    """w follows the token that stood; products of g alone miss that acceptances depend on it."""
    g, w = np.full((9, 2), 0.5), np.full((9, 2), 0.5)
    w[:, 0] = [1.0, 0.0] * 4 + [1.0]
    g[:, 1] = [0.9, 0.1] * 4 + [0.9]  # what follows is easy to guess where the first token was
    _, _, attempts, accepts, _ = _expect_answer(g, w, 1, 9)
    assert accepts[1] / attempts[1] > 0.8  # not 0.5, the mean over positions
