"""Drafts spoilt on purpose: which tokens are swapped, and that a lossless rule writes its own text all the same."""

from __future__ import annotations

import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic, Plan
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.corrupt import Corrupt
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from tests.tiny import VOCAB, fitted, greedy_text, tiny_eagle3, tiny_target

PROMPTS = [[1, 2, 3], [9, 8, 7, 6], [20, 21]]
TARGET = tiny_target()
DRAFTER = fitted(tiny_eagle3(TARGET), TARGET, PROMPTS)


def tokens(probability: float, rows: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, N] the clean tree's tokens and the spoilt one's."""
    prompt, length = torch.tensor([PROMPTS[0]] * rows), torch.tensor([3] * rows)
    read = TARGET.prefill(TARGET.new_cache(rows, 32), prompt, length, DRAFTER.needs)
    out = []
    for drafter in (DRAFTER, Corrupt(probability, DRAFTER)):
        state = drafter.begin(prompt, length, read.features, TARGET.head, 32)
        out.append(
            drafter.propose(
                state, prompt[:, -1], Plan(Chain(length=4), "deterministic"), Sampling(), SeededRng(0, torch.arange(rows))
            ).tokens
        )
    return out[0], out[1]


def test_a_share_of_the_drafted_tokens_is_random_and_the_root_never() -> None:
    with torch.inference_mode():
        clean, spoilt = tokens(0.4)
    assert torch.equal(clean[:, 0], spoilt[:, 0])
    changed = (clean != spoilt)[:, 1:]
    assert abs(float(changed.float().mean()) - 0.4 * (1 - 1 / VOCAB)) < 0.06  # 800 tokens: three deviations
    assert len(spoilt[:, 1:][changed].unique()) > VOCAB // 2


@pytest.mark.parametrize("shape", [Chain(length=4), Dynamic(depth=3, beam=2, top_k=2, nodes=6)], ids=["chain", "tree"])
def test_a_lossless_rule_writes_the_targets_own_text_from_spoilt_drafts_and_accepts_less(shape: Chain | Dynamic) -> None:
    decoders = {share: SpeculativeDecoder(TARGET, DRAFTER, RuntimeConfig(shape=shape, corrupt=share)) for share in (0.0, 0.5, 1.0)}
    made = {share: decoder.generate(PROMPTS, 26) for share, decoder in decoders.items()}
    for answers in made.values():
        assert [one.tokens for one in answers] == [greedy_text(TARGET.model, prompt, 26) for prompt in PROMPTS]
    taus = [sum(one.statistics.tokens for one in answers) / sum(one.statistics.rounds for one in answers) for answers in made.values()]
    assert taus[0] > taus[1] > taus[2] >= 1.0


def test_spoilt_tokens_came_from_no_distribution_and_are_not_taken_for_drawn_ones() -> None:
    decoder = SpeculativeDecoder(TARGET, DRAFTER, RuntimeConfig(shape=Chain(length=2), draws="iid", corrupt=0.5))
    with pytest.raises(UserError, match="deterministic draws only"):
        decoder.generate(PROMPTS, 4, temperature=1.0)
