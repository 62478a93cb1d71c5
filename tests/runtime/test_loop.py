"""The loop's rows: finished ones make room for the next requests, samples of a prompt stay together, and what `on_round` is handed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from drafttrain.core.plan import Chain, Plan
from drafttrain.core.sampling import Sampling
from drafttrain.core.types import Groups
from drafttrain.drafters.base import Drafter, DrafterState
from drafttrain.drafters.lookup import LookupState
from drafttrain.drafters.ngram import Ngram, NgramConfig
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.runtime.generate import DecodingLoop, RoundRecord, served
from drafttrain.runtime.policy import Fixed
from drafttrain.runtime.rows import Request
from drafttrain.target.adapter import Target
from drafttrain.verify import RULES
from tests.families import trained_drafter
from tests.tiny import greedy_text, tiny_target

PROMPTS = [[5, 9, 11, 30, 5, 9], [1, 2, 3], [40, 41, 42, 43, 44, 45, 46], [7, 7], [12, 3, 9], [50, 2]]
SHORT = [3, 17, 6, 22, 9, 4]


@lru_cache
def target() -> Target:
    return tiny_target()


@lru_cache
def trained(family: str) -> Drafter:
    return trained_drafter(family, target(), PROMPTS[:3])


def requests() -> list[Request]:
    return [Request(prompt, number, limit) for number, (prompt, limit) in enumerate(zip(PROMPTS, SHORT, strict=True))]


def loop_of(family: str, temperature: float = 0.0, **options: Any) -> DecodingLoop:

    return SpeculativeDecoder(target(), trained(family), {"shape": Chain(length=3)}).batch(Sampling(temperature), seed=3, **options)


@pytest.mark.parametrize("family", ["eagle3", "medusa", "ngram", "small_lm"])
def test_rows_that_enter_in_the_middle_write_what_they_write_alone(family: str) -> None:
    loop = loop_of(family)
    widest = 0
    for _ in served(loop, requests(), 2):
        widest = max(widest, loop.running)
    assert loop.written == [greedy_text(target().model, prompt, limit) for prompt, limit in zip(PROMPTS, SHORT, strict=True)]
    assert widest == 2


def test_the_batch_stays_full_while_requests_wait() -> None:
    """Fixed groups of two would take as many rounds as the longer of each pair."""
    loop, rounds = loop_of("medusa"), 0
    for _ in served(loop, [Request(PROMPTS[1], 0, limit) for limit in (2, 30, 2, 30, 2, 30)], 2):
        rounds += 1
    fixed = loop_of("medusa")
    in_groups = 0
    for limits in ((2, 30), (2, 30), (2, 30)):
        fixed.start([Request(PROMPTS[1], 0, limit) for limit in limits])
        in_groups += 1
        while not fixed.done:
            fixed.step()
            in_groups += 1
    assert rounds < 0.8 * in_groups


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_sampled_texts_do_not_depend_on_when_a_row_enters(batch_size: int) -> None:
    one_by_one = loop_of("small_lm", 1.0)
    together = loop_of("small_lm", 1.0)
    for loop, rows in ((one_by_one, 1), (together, batch_size)):
        for _ in served(loop, requests(), rows):
            pass
    assert together.written == one_by_one.written


def test_samples_of_one_prompt_enter_together_whatever_the_batch_size() -> None:
    seen: list[RoundRecord] = []
    speculative = SpeculativeDecoder(target(), trained("medusa"), {"shape": Chain(length=2)})
    speculative.generate(PROMPTS[:3], 8, 1.0, n=3, batch_size=2, on_round=seen.append)
    first = {number: next(index for index, record in enumerate(seen) if number in record.rows) for number in range(9)}
    assert [len({first[3 * prompt + sample] for sample in range(3)}) for prompt in range(3)] == [1, 1, 1]


class Reading(Ngram):
    """Looks at what its siblings have written each time it proposes."""

    seen: list[list[int]]

    def begin(self, *given: Any) -> LookupState:
        state = super().begin(*given)
        return Sibling(state.rows)

    def propose(self, state: DrafterState, *given: Any) -> Any:
        assert isinstance(state, Sibling) and state.groups is not None
        self.seen.append([len(state.groups.texts[state.groups.group[0]][sample]) for sample in range(2)])
        return super().propose(state, *given)


class Sibling(LookupState):
    groups: Groups | None = None

    def set_groups(self, groups: Groups) -> None:
        self.groups = groups

    def select(self, rows: torch.Tensor) -> Sibling:
        part = Sibling(super().select(rows).rows)
        part.groups = None if self.groups is None else self.groups.select(rows)
        return part


def test_a_finished_siblings_text_stays_readable_to_the_drafter() -> None:

    drafter = Reading(NgramConfig(), target().shape)
    drafter.seen = []
    rule = RULES["greedy"](RULES["greedy"].Config(name="greedy"))
    loop = DecodingLoop(target(), drafter, rule, Fixed(Plan(Chain(length=2))), Sampling(), seed=0)
    loop.start([Request(PROMPTS[0], 0, 4, group=0), Request(PROMPTS[0], 1, 20, group=0)])
    while not loop.done:
        loop.step()
    assert drafter.seen[-1][0] == 4  # the first one has long left the batch
    assert drafter.seen[-1][1] > 15


def test_the_record_of_a_round_says_what_was_kept_of_which_request_and_by_which_weights() -> None:
    seen: list[RoundRecord] = []
    drafter = trained("medusa")
    speculative = SpeculativeDecoder(target(), drafter, {"shape": Chain(length=3)})

    def look(record: RoundRecord) -> None:
        seen.append(record)
        drafter.weight_version += 1

    out = speculative.generate(PROMPTS[:3], 11, on_round=look, batch_size=2)
    kept = [0, 0, 0]
    for record in seen:
        assert "last_hidden_state" in record.features
        for number, count, alive in zip(record.rows, record.kept.tolist(), record.alive.tolist(), strict=True):
            assert alive or count == 0
            kept[number] += count
    assert kept == [len(one.tokens) - 1 for one in out] == [one.statistics.tokens for one in out]
    versions = [record.weight_versions[0] for record in seen]
    assert versions == list(range(versions[0], versions[0] + len(seen)))
