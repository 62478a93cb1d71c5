"""Replaying bare forwards: which calls, how often, and that they change nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tests.evaluation.toys import contender, target

from drafttrain.core.plan import Chain
from drafttrain.core.sampling import Sampling
from drafttrain.evaluation.efficiency import TIMES, Efficiency, Replay, measure
from drafttrain.evaluation.runners import PLAIN, Contender
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder

PROMPT = [5, 9, 11, 30, 2, 7]


def watched(decoder: SpeculativeDecoder) -> tuple[list[int], Counter[str], Replay]:
    """The text, the drafter's marked calls by name, and the replay, of one decoding inside it."""
    names: Counter[str] = Counter()
    replay = Replay(decoder)
    inner = replay._after_drafter

    def counted(again: Any) -> None:
        names[again.func.__name__] += 1
        inner(again)

    replay._after_drafter = counted  # type: ignore[method-assign]
    with replay:
        (generation,) = decoder.generate([PROMPT], 20, on_round=replay.on_round)
    return generation.tokens, names, replay


@pytest.mark.parametrize("length", [1, 3])
def test_a_chain_of_k_has_k_bare_layers_and_k_bare_heads_a_round(length: int) -> None:
    decoder = SpeculativeDecoder(target(), contender().decoder.drafter, RuntimeConfig(shape=Chain(length=length)))
    rounds = decoder.generate([PROMPT], 20)[0].statistics.rounds
    _, names, replay = watched(decoder)
    assert names["_run"] == length * rounds + 1  # one over the prompt
    assert names["_logits"] == length * rounds
    assert replay.rounds == rounds - 1  # the first round comes with the prefill


def test_replaying_changes_no_token() -> None:
    tokens, _, _ = watched(contender().decoder)
    assert tokens == contender().decoder.generate([PROMPT], 20)[0].tokens


def test_each_target_forward_is_replayed_at_its_own_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    forward = target().backbone.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target().backbone, "forward", noted)
        _, _, replay = watched(contender().decoder)
    assert widths == [len(PROMPT)] * (1 + TIMES) + [4] * ((replay.rounds + 1) * (1 + TIMES))


def test_nothing_is_watched_after_a_replay() -> None:
    decoder = contender().decoder
    before = len(target().backbone._forward_hooks)
    with pytest.raises(KeyError), Replay(decoder):
        raise KeyError
    assert decoder.drafter is not None
    assert (len(target().backbone._forward_hooks), decoder.drafter.watcher) == (before, None)


def test_loop_efficiency_is_bare_forwards_over_the_round_and_drafting_is_over_its_own() -> None:
    efficiency = Efficiency(round=0.10, draft=0.03, bare_target=0.06, bare_drafter=0.02)
    assert efficiency.loop == pytest.approx(0.8)
    assert efficiency.drafting == pytest.approx(1.5)


def test_plain_decoding_has_an_efficiency_and_no_drafting() -> None:
    found = measure(Contender(PLAIN, SpeculativeDecoder(target())), [PROMPT], Sampling(), 0)
    assert found is not None
    assert found.drafting is None
    assert found.bare_target > 0
