"""DSpark's own parts: the token before a position, and a confidence that ends drafts before they are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drafttrain.core.config import parse
from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Plan
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.drafters.block import BlockLabels, every_anchor
from drafttrain.drafters.dspark import DSparkConfig
from tests.families import tiny_drafter
from tests.tiny import fitted, greedy_text, packed, tiny_target

PROMPTS = [[5, 9, 11, 30, 5, 9, 11, 30, 5, 9], [40, 41, 42, 43, 44, 45, 46, 47, 48]]


def drafted(drafter: Any, roots: list[int]) -> Tree:
    target = tiny_target()
    prompts = torch.tensor([PROMPTS[1], PROMPTS[1]])
    features = target.encode(prompts, torch.arange(9).expand(2, -1), torch.zeros_like(prompts), {"aux_hidden_states"})
    with torch.inference_mode():
        state = drafter.begin(prompts, torch.tensor([9, 9]), features, target.head, 64)
        plan = Plan(Chain(length=4), record_probs=True)
        return drafter.propose(state, torch.tensor(roots), plan, Sampling(), SeededRng(0, torch.arange(2)))


def test_the_token_before_a_position_moves_its_distribution() -> None:
    drafter = tiny_drafter("dspark", tiny_target())
    with torch.no_grad():
        for weight in (drafter.markov_w1.weight, drafter.markov_w2.weight):
            torch.nn.init.normal_(weight, std=0.5)
        still = drafted(drafter, [3, 3]).draft_probs
        drafter.markov_w1.weight[3].neg_()
        moved = drafted(drafter, [3, 3]).draft_probs
        expected = 2 * drafter.markov_w2(drafter.markov_w1.weight[3])  # [Vd] between W2 (-w) and W2 w
    assert still is not None and moved is not None
    difference = (moved[0, 0].log() - still[0, 0].log())[drafter.draft_ids]
    torch.testing.assert_close(difference - difference[0], expected - expected[0], rtol=1e-3, atol=1e-3)  # logits, but for a constant


def test_an_unlikely_draft_ends_before_its_next_token_is_drawn() -> None:
    drafter = tiny_drafter("dspark", tiny_target(), stop_below=0.5)
    with torch.no_grad():
        drafter.confidence.weight.zero_()
        for bias, nodes in ((2.0, 5), (0.9, 3), (0.0, 2), (-0.1, 1)):  # c = .88, .71, .50, .48: the last power of it that is at least .5
            drafter.confidence.bias.fill_(bias)
            assert drafted(drafter, [3, 3]).live.sum(1).tolist() == [nodes, nodes]


def test_a_threshold_without_a_confidence_is_refused() -> None:
    with pytest.raises(UserError, match="stop_below ends drafts by the confidence"):
        parse(DSparkConfig, {"confidence": 0, "stop_below": 0.5}, "recipe")


def test_the_confidence_learns_how_likely_tokens_are_accepted() -> None:
    target = tiny_target()
    texts = [prompt + greedy_text(target.model, prompt, 30) for prompt in PROMPTS]
    drafter = fitted(tiny_drafter("dspark", target), target, PROMPTS, 30, steps=60)
    batch = packed(target, texts, [0, 0])
    anchors = every_anchor(batch)
    labels = BlockLabels.of(batch, anchors, 4)
    with torch.no_grad():
        states = torch.stack([state[anchors.row, anchors.place - 1] for state in drafter.teacher_forced_states(batch, target.head, 4)], 1)
        q = drafter.readout(states, 0, target.head).softmax(-1)
        p = target.head.logits(labels.teacher, drafter.draft_ids).softmax(-1)
        accepted = torch.minimum(p, q).sum(-1)[labels.real]
        said = drafter.score(states).sigmoid()[labels.real]
    assert (said - accepted).abs().mean() < (accepted.mean() - accepted).abs().mean()  # better than saying the mean
