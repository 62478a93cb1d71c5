"""Replaying bare forwards: which calls, how often, and that they change nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from drafttrain.core.plan import Chain
from drafttrain.core.sampling import Sampling
from drafttrain.evaluation import efficiency
from drafttrain.evaluation.efficiency import TIMES, RecordedRound, RoundReplay, measure
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.generate import DecodingLoop
from drafttrain.runtime.rows import Request
from tests.evaluation.toys import contender, target

PROMPT = [5, 9, 11, 30, 2, 7]


def started(decoder: SpeculativeDecoder, limit: int = 20) -> DecodingLoop:
    batch = decoder.batch(Sampling())
    batch.start([Request(PROMPT, 0, limit)])
    return batch


@pytest.mark.parametrize("length", [1, 3])
def test_a_round_of_a_chain_of_k_replays_k_layers_k_heads_and_one_fusion(length: int) -> None:
    decoder = SpeculativeDecoder(target(), contender().decoder.drafter, RuntimeConfig(shape=Chain(length=length)))
    batch, replay, names = started(decoder), RoundReplay(decoder), Counter[str]()
    with replay:
        batch.step()
    names.update(again.func.__name__ for again in replay.calls)  # type: ignore[attr-defined]
    assert names == {"_run": length, "_logits": length, "_read_feature": 1}
    assert replay.drafter_seconds > 0


def test_replaying_every_round_changes_no_token() -> None:
    decoder = contender().decoder
    batch = started(decoder)
    while not batch.done:
        with RoundReplay(decoder):
            batch.step()
    assert batch.written[0] == decoder.generate([PROMPT], 20)[0].tokens


def test_every_target_forward_is_replayed_at_its_own_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    forward = target().backbone.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    rounds = contender().decoder.generate([PROMPT], 20)[0].statistics.rounds
    with monkeypatch.context() as patch:
        patch.setattr(target().backbone, "forward", noted)
        measure(contender().decoder, [PROMPT], Sampling(), 0, new_tokens=20)
    assert widths == [len(PROMPT)] + [4] * (rounds * (1 + TIMES))


def test_nothing_is_watched_after_a_replay() -> None:
    decoder = contender().decoder
    before = len(target().backbone._forward_hooks)
    with pytest.raises(KeyError), RoundReplay(decoder):
        raise KeyError
    assert decoder.drafter is not None
    assert (len(target().backbone._forward_hooks), decoder.drafter.watcher) == (before, None)


def test_loop_efficiency_is_bare_forwards_over_the_round_and_drafting_is_over_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [RecordedRound(0.10, 0.03, 0.06, 0.02), RecordedRound(0.20, 0.03, 0.10, 0.02), RecordedRound(0.05, 0.001, 0.045, 0.0)]
    monkeypatch.setattr(efficiency, "_rounds", lambda *given: rounds)
    found = measure(contender().decoder, [PROMPT], Sampling(), 0)
    assert found is not None
    assert (found.round, found.loop, found.drafting) == (pytest.approx(0.10), pytest.approx(0.8), pytest.approx(1.5))


def test_plain_decoding_has_an_efficiency_and_no_drafting() -> None:
    found = measure(SpeculativeDecoder(target()), [PROMPT], Sampling(), 0)
    assert found is not None
    assert found.drafting is None
    assert found.loop > 0


def test_no_round_gives_no_efficiency() -> None:
    assert measure(contender().decoder, [PROMPT], Sampling(), 0, new_tokens=1) is None
