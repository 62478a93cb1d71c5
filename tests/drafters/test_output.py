"""Output heads: which low-rank matrix is best, exact scores of the best few, and families that take them by configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.config import parse
from drafttrain.core.errors import UserError
from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.output import LowRankHead, OutputHead, low_rank
from drafttrain.export import FORMATS
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.target.adapter import Target
from tests.families import tiny_drafter
from tests.tiny import fitted, greedy_text, packed, tiny_target

PROMPTS = [[5, 9, 11, 30, 5, 9, 11, 30, 5, 9], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
LOW_RANK = {"kind": "low_rank", "rank": 12, "candidates": 6}
OPTIONS: dict[str, dict[str, Any]] = {
    "eagle3": {"draft_vocab_size": None, "output": LOW_RANK},
    "medusa": {"output": LOW_RANK},
    "dflash": {"output": LOW_RANK},
    "dspark": {"output": LOW_RANK},
}


def states_of(weight: Tensor) -> Tensor:
    """States that vary mostly in few directions, not those in which the matrix is largest."""
    torch.manual_seed(1)
    scale = torch.logspace(0, -2, weight.shape[1])
    return torch.randn(400, weight.shape[1]) * scale


def error(weight: Tensor, states: Tensor, product: tuple[Tensor, Tensor], rows: Tensor | None = None) -> float:
    down, up = product
    wrong = states @ weight.T - states @ down.T @ up.T
    return float((wrong if rows is None else wrong * rows).norm())


def test_a_matrix_fitted_to_states_is_the_best_of_its_rank_for_them() -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 16)
    states = states_of(weight)
    ours, plain = low_rank(weight, 4, states), low_rank(weight, 4)
    U, S, V = torch.linalg.svd(states @ weight.T, full_matrices=False)  # the best rank-4 stand-in for the logits themselves
    best = float((states @ weight.T - U[:, :4] * S[:4] @ V[:4]).norm())
    assert error(weight, states, ours) == pytest.approx(best, rel=1e-3)
    assert error(weight, states, plain) > 1.5 * best


def test_a_matrix_weighted_by_frequency_errs_less_on_frequent_tokens() -> None:
    torch.manual_seed(0)
    weight, counts = torch.randn(2000, 16), torch.zeros(2000)
    counts[:10] = 100
    states = states_of(weight)
    often = (counts > 0).float()
    weighted, even = (error(weight, states, low_rank(weight, 4, states, seen), often) for seen in (counts, None))
    assert weighted < even


def test_the_whole_rank_gives_the_matrix_itself() -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 16)
    down, up = low_rank(weight, 16, states_of(weight), torch.arange(50))
    torch.testing.assert_close(up @ down, weight, rtol=1e-3, atol=1e-3)


def test_the_best_candidates_have_the_targets_own_logits_and_the_others_the_thin_ones() -> None:
    target = tiny_target()
    head = OutputHead(LowRankHead(rank=4, candidates=5), target.shape)
    head.start_from(target.head, torch.arange(target.vocab_size))
    states = torch.randn(3, 2, 32)
    thin = states @ head.down.weight.T @ head.up.weight.T
    exact, found = target.head.logits(states), head.logits(states, target.head)
    best = torch.zeros_like(thin, dtype=torch.bool).scatter_(-1, thin.topk(5, -1).indices, True)
    torch.testing.assert_close(found, torch.where(best, exact, thin), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(exact, thin, atol=0.1)


def test_a_rank_beyond_the_states_is_refused() -> None:
    with pytest.raises(UserError, match="states have 32 numbers"):
        OutputHead(LowRankHead(rank=33), tiny_target().shape)


@pytest.mark.parametrize(("family", "beside"), [("eagle3", "draft_vocab_size"), ("medusa", "draft_vocab_size")])
def test_a_draft_vocabulary_beside_a_low_rank_output_is_refused(family: str, beside: str) -> None:
    with pytest.raises(UserError, match=f"leave {beside} out"):
        parse(DRAFTERS[family].Config, {"name": family, beside: 40, "output": LOW_RANK}, "recipe")


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("family", OPTIONS)
def test_families_learn_and_draft_through_a_low_rank_output(family: str, trained: bool) -> None:
    target = tiny_target()
    drafter = tiny_drafter(family, target, **{**OPTIONS[family], "output": {**LOW_RANK, "trained": trained}})
    drafter.start_output(target.head, torch.arange(target.vocab_size), own_states(target))
    before = drafter.output.up.weight.clone()
    fitted(drafter, target, PROMPTS, 24, steps=40)
    assert drafter.output.up.weight.equal(before) is not trained
    decoded = SpeculativeDecoder(target, drafter, RuntimeConfig(shape={"shape": "dynamic", "depth": 3, "beam": 3, "top_k": 3, "nodes": 9}))
    for prompt in PROMPTS:
        (one,) = decoded.generate(prompt, max_new_tokens=24)
        assert one.tokens == greedy_text(target.model, prompt, 24)
        assert one.statistics.tokens > one.statistics.rounds  # something was accepted


def own_states(target: Target) -> Tensor:
    batch = packed(target, [prompt + greedy_text(target.model, prompt, 24) for prompt in PROMPTS], [0, 0])
    return batch.features["last_hidden_state"].flatten(0, 1)


@pytest.mark.parametrize(("family", "form"), [("eagle3", "speculators"), ("eagle3", "sglang"), ("eagle3", "gguf"), ("medusa", "medusa")])
def test_engines_formats_refuse_a_low_rank_output(family: str, form: str) -> None:
    config = DRAFTERS[family].Config(name=family, output=LOW_RANK)
    with pytest.raises(UserError, match="low-rank output"):
        FORMATS[form](name=form).check(config, tiny_target().shape)
