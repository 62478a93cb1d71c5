"""What every registered drafter family promises, alone and beside a lookup: exact text, batches, states, files, replay."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.plan import Chain, Dynamic, Plan, Static
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed
from drafttrain.drafters.base import Drafter, DrafterState
from drafttrain.drafters.files import load_drafter, save_drafter
from drafttrain.drafters.hybrid import HybridConfig
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.replay import replay
from drafttrain.target.adapter import Target
from tests.families import FAMILIES, TINY, TRAINABLE, tiny_drafter, trained_drafter
from tests.tiny import VOCAB, greedy_text, packed, tiny_target

SHAPES = [Chain(length=3), Static(children=(2, 2, 1)), Dynamic(depth=3, beam=3, top_k=3, nodes=9)]
PROMPTS = [[5, 9, 11, 30, 5, 9, 11, 30, 5, 9], [1, 2, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
HYBRIDS = {"alone": None, "hybrid": HybridConfig(draft_cost=0.1)}


@lru_cache
def target() -> Target:
    return tiny_target()


@lru_cache
def trained(family: str) -> Drafter:
    return trained_drafter(family, target(), PROMPTS)


@lru_cache
def own_texts() -> list[list[int]]:
    return [greedy_text(target().model, prompt, 24) for prompt in PROMPTS]


def decoder(family: str, shape: Any, **options: Any) -> SpeculativeDecoder:
    return SpeculativeDecoder(target(), trained(family), RuntimeConfig(shape=shape, **options))


def test_every_family_is_tested() -> None:
    assert sorted(TINY) == FAMILIES


@pytest.mark.parametrize("beside", HYBRIDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.shape)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_targets_own_alone_and_in_a_ragged_batch(family: str, shape: Any, beside: str) -> None:
    speculative = decoder(family, shape, hybrid=HYBRIDS[beside])
    together = speculative.generate(PROMPTS, max_new_tokens=24)
    alone = [speculative.generate(prompt, max_new_tokens=24)[0] for prompt in PROMPTS]
    assert [one.tokens for one in together] == own_texts()
    assert [one.tokens for one in alone] == own_texts()
    if family in TRAINABLE:
        assert sum(one.statistics.tokens for one in alone) > sum(one.statistics.rounds for one in alone)  # something was accepted


@pytest.mark.parametrize("beside", HYBRIDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_text_does_not_depend_on_the_batch(family: str, beside: str) -> None:
    speculative = decoder(family, Dynamic(depth=3, beam=3, top_k=3, nodes=9), hybrid=HYBRIDS[beside])
    together = speculative.generate(PROMPTS, max_new_tokens=16, temperature=1.0, seed=3, n=2)
    one_by_one = speculative.generate(PROMPTS, max_new_tokens=16, temperature=1.0, seed=3, n=2, batch_size=1)
    assert [one.tokens for one in together] == [one.tokens for one in one_by_one]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.shape)
@pytest.mark.parametrize("family", FAMILIES)
def test_trees_have_parents_before_children_within_the_plan(family: str, shape: Any) -> None:
    tree = proposed(trained(family), begun(trained(family), PROMPTS), shape)
    N = tree.tokens.shape[1]
    assert shape.nodes + 1 >= N
    assert (tree.parents[:, 1:] < torch.arange(1, N)).all()
    assert tree.live[:, 0].all()
    assert (tree.depth.max() <= tree.max_depth) and (tree.children >= 0).sum(-1).max() <= tree.max_children
    assert (tree.tokens[tree.live] >= 0).all() and (tree.tokens < VOCAB).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_states_select_and_join_as_if_the_rows_had_always_been_so(family: str) -> None:
    drafter, shape = trained(family), Chain(length=3)
    whole, first = begun(drafter, PROMPTS), begun(drafter, PROMPTS)
    expected = proposed(drafter, whole, shape).tokens
    joined = first.select(torch.tensor([2])).join(first.select(torch.tensor([0, 1])))
    torch.testing.assert_close(proposed(drafter, joined, shape).tokens, expected[[2, 0, 1]][:, : expected.shape[1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_token_by_token_equals_beginning_with_the_longer_prompt(family: str) -> None:
    """However many tokens an idle drafter learns of at once."""
    drafter, text, shape = trained(family), PROMPTS[2] + own_texts()[2][:8], Chain(length=3)
    expected = proposed(drafter, begun(drafter, [text]), shape).tokens
    for cuts in ([9], [9, 10, 11, 15], [9, 13]):
        state = begun(drafter, [text[: cuts[0]]])
        for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True):
            with torch.inference_mode():
                drafter.observe(state, committed(text, start, stop))
        torch.testing.assert_close(proposed(drafter, state, shape).tokens, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_drafter_proposes_the_same(family: str, tmp_path: Path) -> None:
    save_drafter(trained(family), tmp_path / "drafter")
    loaded = load_drafter(tmp_path / "drafter", target().fingerprint)
    for shape in SHAPES:
        ours, theirs = (proposed(drafter, begun(drafter, PROMPTS), shape) for drafter in (trained(family), loaded))
        torch.testing.assert_close(theirs.tokens, ours.tokens)
        torch.testing.assert_close(theirs.parents, ours.parents)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_counts_what_greedy_decoding_of_chains_counts(family: str, length: int) -> None:
    speculative = decoder(family, Chain(length=length))
    served = [one.statistics for one in speculative.generate(PROMPTS, max_new_tokens=24)]
    texts = [prompt + own for prompt, own in zip(PROMPTS, own_texts(), strict=True)]
    batch = packed(target(), texts, [len(prompt) for prompt in PROMPTS])
    found = replay(lambda rows, K: trained(family).teacher_forced_drafts(rows, target().head, K), [batch], length)
    total = served[0] + served[1] + served[2]
    assert (found.rounds, found.tokens) == (total.rounds, total.tokens)
    if family in TRAINABLE:  # a lookup that found nothing was no attempt; a replayed one was
        assert (found.attempts, found.accepts) == (total.attempts, total.accepts)


@pytest.mark.parametrize("family", TRAINABLE)
def test_a_loss_reaches_every_weight_and_no_borrowed_one(family: str) -> None:
    drafter = tiny_drafter(family, target()).train()
    for parameter in drafter.parameters():  # fresh heads say what the target says: a zero start may have a zero gradient
        torch.nn.init.normal_(parameter, std=0.05)
    batch = packed(target(), [prompt + own for prompt, own in zip(PROMPTS, own_texts(), strict=True)], [4, 1, 3])
    loss = drafter.loss(batch, target().head)
    assert loss.count > 0
    loss.sum.backward()
    without = [name for name, weight in drafter.named_parameters() if weight.requires_grad and not weight.grad.abs().sum() > 0]  # type: ignore[union-attr]
    assert without == []
    assert all(weight.grad is None for weight in target().model.parameters())


def begun(drafter: Drafter, prompts: list[list[int]]) -> DrafterState:
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    features = _features(padded)
    with torch.inference_mode():
        return drafter.begin(padded, lengths, {name: features[name] for name in drafter.needs}, target().head, 64)


def committed(text: list[int], start: int, stop: int) -> Committed:
    tokens = torch.tensor([text])
    part = slice(start, stop)
    return Committed(tokens[:, part], torch.tensor([stop - start]), {name: value[:, part] for name, value in _features(tokens).items()})


def proposed(drafter: Drafter, state: DrafterState, shape: Any) -> Tree:
    rows = torch.arange(state_rows(state))
    with torch.inference_mode():
        return drafter.propose(state, torch.full_like(rows, 7), Plan(shape), Sampling(), SeededRng(0, rows))


def state_rows(state: DrafterState) -> int:
    """How many rows a state of any family has."""
    for value in vars(state).values():
        if isinstance(value, torch.Tensor):
            return len(value)
        if isinstance(value, list):
            return len(value)
    raise AssertionError(f"{type(state).__name__} holds no rows")


def _features(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    return target().encode(tokens, position, torch.zeros_like(tokens), {"aux_hidden_states", "last_hidden_state"})
