"""The block and what is shared by all that draft with it: attention, anchors, the cache of the context, exact draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drafttrain.core.layers import block_attention
from drafttrain.core.plan import Chain, Plan, Static
from drafttrain.core.rng import SeededRng, branches
from drafttrain.core.sampling import Sampling
from drafttrain.core.types import Committed, TrainingBatch
from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.block import BlockDrafter, BlockLabels, every_anchor, sampled_anchors
from drafttrain.runtime import generate
from drafttrain.runtime.generate import DecodingLoop, Request
from drafttrain.runtime.policy import Fixed
from drafttrain.target.adapter import Target
from drafttrain.verify import RULES
from tests.families import tiny_drafter
from tests.tiny import packed, tiny_target

FAMILIES = sorted(name for name, family in DRAFTERS.items() if issubclass(family, BlockDrafter))


# -- attention ----------------------------------------------------------------------------------------------------------


def plain_attention(
    query: Tensor, keys: Tensor, values: Tensor, text: Tensor, text_values: Tensor, row: Tensor, first: Tensor, last: Tensor, causal: bool
) -> Tensor:
    """Block by block, slot by slot."""
    out = torch.zeros_like(query)
    groups = query.shape[1] // keys.shape[1]
    for n in range(len(query)):
        for head in range(query.shape[1]):
            for slot in range(query.shape[2]):
                own = slice(0, slot + 1 if causal else query.shape[2])
                seen = slice(int(first[n]), int(last[n]))
                key = torch.cat([text[row[n], head // groups, seen], keys[n, head // groups, own]])
                value = torch.cat([text_values[row[n], head // groups, seen], values[n, head // groups, own]])
                out[n, head, slot] = (query[n, head, slot] @ key.T * query.shape[-1] ** -0.5).softmax(-1) @ value
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 64])
def test_attention_of_all_blocks_at_once_equals_that_of_each_alone(causal: bool, blocks: int) -> None:
    torch.manual_seed(0)
    N, S, T = 6, 3, 11
    query, keys, values = torch.randn(N, 4, S, 8), torch.randn(N, 2, S, 8), torch.randn(N, 2, S, 8)
    text, text_values = torch.randn(2, 2, T, 8), torch.randn(2, 2, T, 8)
    row, first, last = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 5, 0, 4, 4]), torch.tensor([1, 4, 9, 2, 5, 11])
    tensors = [tensor.requires_grad_() for tensor in (query, keys, values, text, text_values)]
    found = block_attention(*tensors, row, first, last, causal, blocks)
    expected = plain_attention(*tensors, row, first, last, causal)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    both = [torch.autograd.grad((output * weight).sum(), tensors) for output in (found, expected)]
    for ours, plain in zip(*both, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_no_mask_of_text_by_text_ever_stands_in_memory() -> None:
    T, N, S = 4000, 16, 2
    text, slots = torch.randn(1, 1, T, 2), torch.randn(N, 1, S, 2)
    place = torch.arange(N) * 200 + 500
    sizes: list[int] = []
    original = F.scaled_dot_product_attention

    def watched(*given: Any, attn_mask: Tensor) -> Tensor:
        sizes.append(attn_mask.numel())
        return original(*given, attn_mask=attn_mask)

    F.scaled_dot_product_attention = watched
    try:
        block_attention(slots, slots, slots, text, text, torch.zeros(N, dtype=torch.long), torch.zeros_like(place), place, False, blocks=4)
    finally:
        F.scaled_dot_product_attention = original
    assert len(sizes) == 4 and max(sizes) <= 4 * S * (T + 4 * S)


# -- anchors and labels ----------------------------------------------------------------------------------------------------------


def documents(lengths: list[int], answers_from: int = 3) -> TrainingBatch:
    number = torch.tensor([[index for index, length in enumerate(lengths) for _ in range(length)]])
    position = torch.tensor([[place for length in lengths for place in range(length)]])
    tokens = torch.arange(number.shape[1])[None]
    last = torch.randn(1, number.shape[1], 4)
    return TrainingBatch(tokens, position >= answers_from, number, position, {"last_hidden_state": last})


def test_anchors_are_drawn_in_every_document_however_long_its_neighbours_are() -> None:
    batch = documents([200, 9, 50])
    anchors = sampled_anchors(batch, 5, SeededRng(0, torch.tensor([0])))
    assert batch.document[0, anchors.place].bincount().tolist() == [5, 5, 5]
    assert (anchors.place[1:] > anchors.place[:-1]).all()  # none twice, in the order of the text
    assert (batch.position[0, anchors.place] >= 3).all()  # roots are answer tokens
    everything = sampled_anchors(batch, 1000, SeededRng(0, torch.tensor([0])))
    assert everything.place.equal(batch.ahead(1)[1].nonzero()[:, 1])


def test_anchors_come_from_the_rng_and_each_root_is_as_likely_as_another() -> None:
    batch = documents([23, 8])
    first, same = (sampled_anchors(batch, 4, SeededRng(7, torch.tensor([0]))).place for _ in range(2))
    assert first.equal(same)
    rng = SeededRng(1, torch.tensor([0]))
    drawn = torch.cat([sampled_anchors(batch, 4, rng).place for _ in range(2000)]).bincount(minlength=31)
    roots = batch.ahead(1)[1][0] & (batch.document[0] == 0)
    expected = 2000 * 4 / int(roots.sum())
    assert (drawn[roots.nonzero()[:, 0]] - expected).abs().max() < 5 * expected**0.5  # binomial: five standard deviations


def test_labels_of_a_block_end_where_the_answer_does() -> None:
    batch = documents([6, 8])
    anchors = every_anchor(batch)
    labels = BlockLabels.of(batch, anchors, 3)
    assert anchors.place.tolist() == [3, 4, 5, 9, 10, 11, 12, 13]
    assert labels.tokens[0].tolist()[:2] == [4, 5] and labels.previous[0].tolist()[:2] == [3, 4]
    assert labels.real.sum(1).tolist() == [2, 1, 0, 3, 3, 2, 1, 0]
    assert labels.teacher[4].equal(batch.features["last_hidden_state"][0, [10, 11, 12]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_labels_gives_every_weight_a_gradient_of_zeros(family: str) -> None:
    """Ranks wait for each other's gradients, weight by weight."""
    target = tiny_target()
    drafter = tiny_drafter(family, target).train()
    batch = packed(target, [[5, 9, 11, 30]], [4])
    loss = drafter.loss(batch, target.head)
    loss.sum.backward()
    assert (float(loss.sum), float(loss.count)) == (0, 0)
    assert all(weight.grad is not None and not weight.grad.any() for weight in drafter.parameters() if weight.requires_grad)


# -- the cache of the context ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_after_any_rounds_equals_one_made_from_scratch(family: str) -> None:
    """Blocks write their own keys behind the committed ones, and rounds commit any number of tokens."""
    target = tiny_target()
    drafter = tiny_drafter(family, target)
    torch.manual_seed(3)
    text = torch.randint(0, 64, (2, 40))
    position = torch.arange(40).expand(2, -1)
    features = target.encode(text, position, torch.zeros_like(text), {"aux_hidden_states"})["aux_hidden_states"]
    lengths, rng = torch.tensor([5, 3]), np.random.default_rng(0)
    with torch.inference_mode():
        state = drafter.begin(text[:, :5], lengths, {"aux_hidden_states": features[:, :5]}, target.head, 64)
        for _ in range(6):
            propose(drafter, state, text.gather(1, lengths[:, None])[:, 0])
            count = torch.tensor(rng.integers(0, 5, 2))
            place = (lengths[:, None] + torch.arange(5)).clamp_max(39)
            row = torch.arange(2)[:, None]
            drafter.observe(state, Committed(text[row, place], count, {"aux_hidden_states": features[row, place]}))
            lengths = lengths + count
            state.set_lengths(lengths.tolist())
            longest = int(lengths.max())
            begun = {"aux_hidden_states": features[:, :longest]}
            fresh = drafter.begin(text[:, :longest], lengths, begun, target.head, 64)
            for index in range(2):
                n = int(fresh.lengths[index])  # type: ignore[attr-defined]
                assert n == int(state.lengths[index]) >= int(lengths[index]) - 1  # type: ignore[attr-defined]
                torch.testing.assert_close(state.keys[index, :, :, :n], fresh.keys[index, :, :, :n])  # type: ignore[attr-defined]
                torch.testing.assert_close(state.values[index, :, :, :n], fresh.values[index, :, :, :n])  # type: ignore[attr-defined]
            roots = text.gather(1, lengths[:, None])[:, 0]
            assert propose(drafter, state, roots).equal(propose(drafter, fresh, roots))


def propose(drafter: Any, state: Any, roots: Tensor) -> Tensor:
    return drafter.propose(state, roots, Plan(Chain(length=4)), Sampling(), SeededRng(0, torch.arange(len(roots)))).tokens


# -- exact draws ----------------------------------------------------------------------------------------------------------


def two_tokens(monkeypatch: pytest.MonkeyPatch, drafter: Any, target: Target, draws: Any, shape: Any, sampling: Sampling) -> float:
    """Total variation between the two tokens after the first one as decoding gives them, every branch walked, and the target's own."""
    V, prompt, rule = target.vocab_size, [1, 0, 1], RULES["recursive"](RULES["recursive"].Config(name="recursive"))

    def law(context: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return sampling.probs(target.model(torch.tensor([context])).logits[0, -1]).double().numpy()

    found, expected = np.zeros((V, V, V)), np.zeros((V, V, V))
    for rng in branches(1, 0):
        monkeypatch.setattr(generate, "SeededRng", lambda seed, ids, rng=rng: rng)
        loop = DecodingLoop(target, drafter, rule, Fixed(Plan(shape, draws)), sampling, seed=0)
        loop.start([Request(prompt, 0, 9)])
        loop.step()
        tokens = loop.written[0][:3]
        after = law(prompt + tokens) if len(tokens) == 2 else np.eye(V)[tokens[2]]
        found[tokens[0], tokens[1]] += rng.probability * after
    for first in range(V):
        for second in range(V):
            expected[first, second] = law(prompt)[first] * law([*prompt, first])[second] * law([*prompt, first, second])
    return float(np.abs(found - expected).sum() / 2)


@pytest.mark.parametrize("shape", [Chain(length=2), Static(children=(2, 1))], ids=["chain", "tree"])
@pytest.mark.parametrize("draws", ["deterministic", "iid", "without_replacement"])
@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_of_every_declared_draw_keep_the_targets_distribution(
    monkeypatch: pytest.MonkeyPatch, family: str, draws: str, shape: Any
) -> None:
    target = tiny_target(vocab_size=3 if shape.shape == "chain" else 2, initializer_range=0.15)
    if draws not in DRAFTERS[family].draws:
        pytest.skip(f"{family} does not declare {draws}")
    drafter = sharp(tiny_drafter(family, target, **SMALL.get(family, {})))
    assert two_tokens(monkeypatch, drafter, target, draws, shape, Sampling(temperature=1.0)) < 1e-6


SMALL: dict[str, dict[str, Any]] = {"dspark": {"output": {"kind": "full"}, "stop_below": 0.3}, "dflash2": {"selector_candidates": 2}}
"""Options with which families are walked over two or three tokens."""


def sharp(drafter: Any) -> Any:
    """All weights drawn at random, so that every part says something."""
    torch.manual_seed(5)
    for parameter in drafter.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4)
    return drafter
