"""SpecDiff's own promises: which orders of revealing keep sampled text exact, and which do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Plan, Static
from drafttrain.core.rng import Rng, SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import TrainingBatch
from drafttrain.drafters.block import every_anchor
from drafttrain.drafters.specdiff import SpecDiff
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.replay import replay
from tests.drafters.test_block import sharp, two_tokens
from tests.families import tiny_drafter
from tests.tiny import fitted, greedy_text, packed, tiny_target

PROMPTS = [[5, 9, 11, 30, 5, 9, 11, 30, 5, 9], [40, 41, 42, 43, 44, 45, 46, 47, 48]]


@pytest.mark.parametrize("draws", ["iid", "deterministic"])
def test_slots_revealed_from_left_to_right_keep_the_targets_distribution(monkeypatch: pytest.MonkeyPatch, draws: str) -> None:
    target = tiny_target(vocab_size=3, initializer_range=0.15)
    drafter = sharp(tiny_drafter("specdiff", target, block=2, passes=2))
    assert two_tokens(monkeypatch, drafter, target, draws, Chain(length=2), Sampling(temperature=1.0)) < 1e-6


def test_slots_sampled_in_another_order_lose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second slot is drawn first, and the first one given it: each was drawn from the distribution that is recorded, and yet."""
    target = tiny_target(vocab_size=3, initializer_range=0.15)
    drafter = sharp(tiny_drafter("specdiff", target, block=2, passes=2))
    monkeypatch.setattr(SpecDiff, "propose", right_to_left)
    assert two_tokens(monkeypatch, drafter, target, "iid", Chain(length=2), Sampling(temperature=1.0)) > 1e-3


def right_to_left(drafter: Any, state: Any, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
    second = sampling.probs(drafter._logits(drafter._block(state, roots)[:, 1:], state.head))  # [1, 1, V]
    later = rng.draw(second, 1, replace=True)[:, :, 0]  # [1, 1]
    hidden = drafter._block(state, roots, torch.tensor([[False, True]]), torch.cat([later, later], 1))
    first = sampling.probs(drafter._logits(hidden[:, :1], state.head))
    tokens = torch.cat([roots[:, None], rng.draw(first, 1, replace=True)[:, :, 0], later], 1)
    parents, rows = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 0, 1]])
    return Tree(tokens, parents, tokens >= 0, "iid", 2, 1, draft_probs=torch.cat([first, second], 1), probs_row=rows)


def test_draws_that_confidence_would_spoil_and_trees_that_passes_cannot_fill_are_refused() -> None:
    target = tiny_target()
    by_confidence = tiny_drafter("specdiff", target, passes=2, order="confidence")
    surest = SpeculativeDecoder(target, by_confidence, RuntimeConfig(shape=Chain(length=3)))
    with pytest.raises(UserError, match=r"set drafter\.order to left_to_right"):
        surest.generate(PROMPTS[0], max_new_tokens=4, temperature=1.0)
    passes = SpeculativeDecoder(target, tiny_drafter("specdiff", target, passes=2), RuntimeConfig(shape=Static(children=(2, 2, 1))))
    with pytest.raises(UserError, match="chains only"):
        passes.generate(PROMPTS[0], max_new_tokens=4)


@pytest.mark.parametrize(("passes", "order"), [(2, "left_to_right"), (4, "left_to_right"), (2, "confidence"), (4, "confidence")])
def test_greedy_text_and_replay_hold_for_any_passes_and_order(passes: int, order: str) -> None:
    target = tiny_target()
    drafter = fitted(tiny_drafter("specdiff", target, passes=passes, order=order), target, PROMPTS, 24, steps=60)
    decoded = SpeculativeDecoder(target, drafter, RuntimeConfig(shape=Chain(length=4)))
    texts = [greedy_text(target.model, prompt, 24) for prompt in PROMPTS]
    served = [decoded.generate(prompt, max_new_tokens=24)[0] for prompt in PROMPTS]
    assert [one.tokens for one in served] == texts
    batch = packed(target, [prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)], [len(prompt) for prompt in PROMPTS])
    found = replay(lambda rows, K: drafter.teacher_forced_drafts(rows, target.head, K), [batch], 4)
    total = served[0].statistics + served[1].statistics
    assert (found.rounds, found.tokens) == (total.rounds, total.tokens)
    assert total.tokens > total.rounds  # something was accepted


def test_masked_slots_alone_are_learnt_and_weigh_by_how_few_they_are() -> None:
    drafter = tiny_drafter("specdiff", tiny_target())
    tokens = torch.zeros(1, 4001, dtype=torch.long)
    batch = TrainingBatch(tokens, tokens == 0, tokens, torch.arange(4001)[None])
    shown, weight = drafter.revealed(batch, every_anchor(batch), SeededRng(0, torch.arange(1)))
    assert abs(float(shown.float().mean()) - 0.5) < 0.03  # t is uniform: six standard deviations of 4,000 blocks
    few = weight[:, 0] > 4
    assert shown[few].float().mean() > 0.75  # t < 1 / 4
    assert (weight >= 1).all()
