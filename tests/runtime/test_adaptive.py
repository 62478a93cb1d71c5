"""The adaptive policy: when it drafts, and that what it decodes stays the target's own. Time is counted work, not a clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drafttrain.core.plan import Chain, Dynamic, Plan
from drafttrain.core.sampling import Sampling
from drafttrain.core.types import Committed
from drafttrain.drafters.base import CATCH_UP, Drafter
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.generate import DecodingLoop
from drafttrain.runtime.policy import LONGEST_PAUSE, PAUSE, PLAIN_PROBE, PROBE, RENEW, Adaptive
from drafttrain.runtime.rows import Request
from drafttrain.runtime.stats import History, PastRound
from drafttrain.target.adapter import Target
from tests.families import TINY, TRAINABLE, bare_drafter, slow_beyond
from tests.tiny import fitted, greedy_text, tiny_eagle3, tiny_target

PROMPTS = [[5, 9, 11, 30, 2, 7], [1, 2, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48]]


def random_drafter(family: str, target: Target) -> Drafter:
    """Never right but by accident."""
    drafter = bare_drafter(family, target, 5, **TINY[family])
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter.eval()


def run(
    target: Target, drafter: Drafter, prompts: list[list[int]], new_tokens: int, shape: Any, call: float
) -> tuple[DecodingLoop, list[bool]]:
    """Decodes with the adaptive policy under counted time; also says in which rounds the drafter proposed.

    call: what a drafter's call takes, in target forwards.
    """
    decoder = SpeculativeDecoder(target, drafter, RuntimeConfig(shape=shape, policy="adaptive"))
    batch = decoder.batch(Sampling())
    batch.accounts.now = lambda: target.forwards + call * drafter.calls
    batch.start([Request(prompt, index, new_tokens) for index, prompt in enumerate(prompts)])
    drafted = []
    while not batch.done:
        batch.step()
        assert batch.history.latest is not None
        drafted.append(batch.history.latest.drafted)
    return batch, drafted


@pytest.mark.parametrize("family", slow_beyond(TRAINABLE))
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["alone", "batch"])
def test_a_drafter_that_loses_is_left_alone_and_the_text_is_the_targets_own(family: str, prompts: list[list[int]]) -> None:
    target = tiny_target(3)
    drafter = random_drafter(family, target)
    batch, drafted = run(target, drafter, prompts, 90, Chain(length=3), call=0.5)
    assert batch.written == [greedy_text(target.model, prompt, 90) for prompt in prompts]
    assert drafted[:PROBE] == [True] * PROBE
    assert sum(drafted) <= 3 * PROBE  # of about 90: the first try, and those after 16 and 32 rounds more
    assert sum(drafted) > PROBE  # it was tried again
    proposals = 3 * sum(drafted)  # a call a level, or fewer
    catching_up = len(drafted) // (CATCH_UP // 2)  # idle rounds are read many at a time
    assert drafter.calls <= 1 + proposals + catching_up


@pytest.mark.parametrize("shape", [Chain(length=3), Dynamic(depth=3, beam=3, top_k=3, nodes=8)], ids=lambda shape: shape.shape)
def test_a_drafter_that_wins_goes_on_drafting(shape: Any) -> None:
    target = tiny_target()
    drafter = fitted(tiny_eagle3(target, ttt_steps=3), target, PROMPTS, new_tokens=90, steps=120)
    batch, drafted = run(target, drafter, PROMPTS[:1], 90, shape, call=0.2)
    assert batch.written == [greedy_text(target.model, PROMPTS[0], 90)]
    assert [place for place, one in enumerate(drafted) if not one] == [PROBE, PROBE + 1]  # timed once
    assert batch.statistics()[0].tau > 1.6


def test_sampled_text_of_plain_rounds_is_plain_decodings_own() -> None:
    """Once drafting has been given up, a round draws what plain decoding draws: nothing of the drafter's."""
    target = tiny_target(3)
    decoder = SpeculativeDecoder(target, random_drafter("eagle3", target), RuntimeConfig(shape=Chain(length=3), policy="adaptive"))
    policy = decoder._policies.setdefault(decoder.runtime.fitted(Sampling(1.0))[1], Adaptive(decoder.runtime.fitted(Sampling(1.0))[1]))
    for drafted in (*[True] * PROBE, *[False] * PLAIN_PROBE):
        policy.plan(seen(1, drafted, 2.0 if drafted else 1.0))
    got = decoder.generate(PROMPTS[0], max_new_tokens=PAUSE - 2, temperature=1.0, seed=4)[0]
    assert got.statistics.drafter_calls == 1  # the prompt
    assert got.tokens == SpeculativeDecoder(target).generate(PROMPTS[0], max_new_tokens=PAUSE - 2, temperature=1.0, seed=4)[0].tokens


# -- decisions by themselves ---------------------------------------------------------------------------------------------------------------


def seen(tokens: int, drafted: bool, seconds: float, rows: int = 1) -> History:
    history = History()
    history.add(PastRound(rows, rows, tokens, drafted, seconds))
    return history


def decisions(policy: Adaptive, rounds: int, tau: int, drafted_seconds: float, rows: int = 1) -> list[bool]:
    """Plays rounds: drafted ones take `drafted_seconds` and give `tau` tokens a row, plain ones 1 and 1."""
    out, history = [], History()
    for _ in range(rounds):
        drafts = policy.plan(history).draft
        history = seen(tau * rows, True, drafted_seconds, rows) if drafts else seen(rows, False, 1.0, rows)
        out.append(drafts)
    return out


def runs(decided: list[bool]) -> list[tuple[bool, int]]:
    out: list[tuple[bool, int]] = []
    for one in decided:
        out = [*out[:-1], (one, out[-1][1] + 1)] if out and out[-1][0] == one else [*out, (one, 1)]
    return out


def test_pauses_double_up_to_a_longest_one() -> None:
    got = runs(decisions(Adaptive(Plan(Chain())), 4000, tau=1, drafted_seconds=1.5))
    tries = [count for drafted, count in got[:-1] if drafted]
    pauses = [count for drafted, count in got[:-1] if not drafted]
    assert set(tries) == {PROBE}
    assert pauses[0] == PLAIN_PROBE + PAUSE
    assert pauses[1:7] == [32, 64, 128, 256, LONGEST_PAUSE, LONGEST_PAUSE]


def test_a_lucky_try_of_a_drafter_that_loses_does_not_bring_on_more_tries() -> None:
    """Chains of 2 with alpha .21 and .28 at 1.41 forwards a round: 0.90 of plain decoding. One try of 8 rounds in four looks good."""
    generator, policy, history = torch.Generator().manual_seed(0), Adaptive(Plan(Chain())), History()
    drafted, tokens, seconds = [], 0, 0.0
    while tokens < 20_000:
        drafted.append(policy.plan(history).draft)
        first, second = (torch.rand(2, generator=generator) < torch.tensor([0.21, 0.28])).tolist()
        gained = 1 + first + (first and second) if drafted[-1] else 1
        history = seen(gained, drafted[-1], 1.41 if drafted[-1] else 1.0)
        tokens, seconds = tokens + gained, seconds + (1.41 if drafted[-1] else 1.0)
    assert sum(drafted) / len(drafted) < 0.026
    assert tokens / seconds > 0.996


def test_it_drafts_where_tokens_a_second_are_more_and_not_where_only_the_accepted_length_is() -> None:
    for seconds, drafts in ((2.9, True), (3.1, False)):
        assert decisions(Adaptive(Plan(Chain())), PROBE + PLAIN_PROBE + 1, tau=3, drafted_seconds=seconds)[-1] is drafts


def test_plain_rounds_are_timed_anew_while_drafting_wins() -> None:
    got = runs(decisions(Adaptive(Plan(Chain())), 400, tau=3, drafted_seconds=1.5))
    assert got[:3] == [(True, PROBE), (False, PLAIN_PROBE), (True, RENEW)]


def test_a_drafter_that_becomes_good_is_found_and_one_that_becomes_bad_is_dropped() -> None:
    policy = Adaptive(Plan(Chain()))
    assert not decisions(policy, 60, tau=1, drafted_seconds=1.5)[-1]
    assert decisions(policy, 200, tau=3, drafted_seconds=1.5)[-1]
    assert not all(decisions(policy, 60, tau=1, drafted_seconds=1.5))


def test_batches_of_another_size_are_judged_by_themselves() -> None:
    policy = Adaptive(Plan(Chain()))
    decisions(policy, 30, tau=3, drafted_seconds=1.5)
    assert decisions(policy, 20, tau=3, drafted_seconds=5.0, rows=8)[-1] is False
    assert decisions(policy, 5, tau=3, drafted_seconds=1.5)[-1] is True


# -- catching up --------------------------------------------------------------------------------------------------------------------------


def test_what_is_committed_later_follows_each_rows_own_tokens() -> None:
    first = Committed(torch.tensor([[1, 2, 9], [3, 9, 9]]), torch.tensor([2, 1]), {"x": torch.tensor([[[1.0], [2], [9]], [[3], [9], [9]]])})
    later = Committed(torch.tensor([[5, 6], [7, 9]]), torch.tensor([2, 1]), {"x": torch.tensor([[[5.0], [6]], [[7], [9]]])})
    both = first.then(later)
    assert both.count.tolist() == [4, 2]
    assert both.tokens[0, :4].tolist() == both.features["x"][0, :4, 0].tolist() == [1, 2, 5, 6]
    assert both.tokens[1, :2].tolist() == both.features["x"][1, :2, 0].tolist() == [3, 7]
    assert both.tokens.shape == (2, 5)
    assert both.nodes is None
