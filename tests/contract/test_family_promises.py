"""Every registered family keeps its promises about its own distributions, and families that break one are seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.plan import Chain, Dynamic, Plan, Shape, Static
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Tree
from drafttrain.core.types import Labels, TrainingBatch
from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.base import Drafter, DrafterState
from drafttrain.drafters.grow import Frontier
from drafttrain.drafters.medusa import Medusa
from drafttrain.drafters.small_lm import SmallLM
from drafttrain.target.adapter import Target
from tests.contract.promises import check_node_distributions, check_sampled_texts, check_training_alpha
from tests.families import TINY, TRAINABLE, bare_drafter, tiny_drafter, trained_drafter
from tests.tiny import greedy_text, packed, tiny_target

PROMPTS = [[5, 9, 11, 30, 5, 9, 11, 30, 5, 9], [1, 2, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
SMALL_VOCAB = 6
PROMPT = [1, 2, 3, 4]
TREES: list[Shape] = [Static(children=(2, 2, 1)), Dynamic(depth=3, beam=2, top_k=2, nodes=7)]
SAMPLED: list[tuple[Shape, Draws]] = [(Chain(length=2), "iid"), (Static(children=(2, 1)), "without_replacement")]


@lru_cache
def target() -> Target:
    return tiny_target()


@lru_cache
def small_target() -> Target:
    """Of few tokens, so that a few thousand texts show their distribution."""
    return tiny_target(3, vocab_size=SMALL_VOCAB)


@lru_cache
def texts() -> TrainingBatch:
    own = [greedy_text(target().model, prompt, 24) for prompt in PROMPTS]
    return packed(target(), [prompt + text for prompt, text in zip(PROMPTS, own, strict=True)], [len(prompt) for prompt in PROMPTS])


def unsure(family: str) -> Drafter:
    """For `small_target`: not the target's own distribution, nor far from it."""
    drafter = tiny_drafter(family, small_target())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return drafter


MASKED = {"specdiff"}  # training hides some tokens of a block at random: its alpha is of those alone


@pytest.mark.parametrize("family", sorted(set(TRAINABLE) - MASKED))
def test_training_reports_the_hits_of_its_own_teacher_forced_drafts(family: str) -> None:
    assert check_training_alpha(trained_drafter(family, target(), PROMPTS, steps=10), texts(), target()) >= 1


@pytest.mark.parametrize(("shape", "draws"), SAMPLED, ids=["chain", "tree"])
@pytest.mark.parametrize("family", TRAINABLE)
def test_sampled_texts_have_the_targets_distribution(family: str, shape: Shape, draws: Draws) -> None:
    assert draws in DRAFTERS[family].draws
    check_sampled_texts(unsure(family), small_target(), shape, draws, PROMPT)


@pytest.mark.parametrize("shape", TREES, ids=lambda shape: shape.shape)
@pytest.mark.parametrize("family", TRAINABLE)
def test_each_node_has_the_distribution_of_its_path_drafted_as_a_chain(family: str, shape: Shape) -> None:
    assert check_node_distributions(trained_drafter(family, target(), PROMPTS, steps=10), target(), shape, PROMPTS) >= 7


@pytest.mark.parametrize("family", [name for name in TRAINABLE if "draft_vocab_size" in DRAFTERS[name].Config.model_fields])
def test_end_tokens_are_in_every_draft_vocabulary_however_rare(family: str) -> None:
    ends = tiny_target(eos_token_id=[60, 63])
    drafter = bare_drafter(family, ends, **{**TINY[family], "draft_vocab_size": 8})
    drafter.start_from(ends.head, torch.arange(ends.vocab_size).flip(0))  # the last tokens are the rarest
    assert drafter.draft_ids is not None
    assert drafter.draft_ids.tolist() == [0, 1, 2, 3, 4, 5, 60, 63]


# -- families that are wrong on purpose ----------------------------------------------------------------------------------------------------


@contextmanager
def labels_one_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training reads the state after the one that a label hangs on; drafting does not."""
    before = Labels.before

    def late(self: Labels, values: Tensor, offset: int) -> Tensor:
        return before(self, values, offset - 1 if offset >= 2 else offset)

    with monkeypatch.context() as patch:
        patch.setattr(Labels, "before", late)
        yield


def test_labels_one_off_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = trained_drafter("medusa", target(), PROMPTS, steps=10)
    loss = drafter.loss

    def mistaken(*given: Any) -> Any:
        with labels_one_off(monkeypatch):
            return loss(*given)

    monkeypatch.setattr(drafter, "loss", mistaken)
    with pytest.raises(AssertionError, match="alpha_0 counts other drafts"):
        check_training_alpha(drafter, texts(), target())


class Overstated(Medusa):
    """Takes the likeliest tokens and says that it drew them."""

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Any) -> Tree:
        chosen = super().propose(state, roots, replace(plan, draws="deterministic", record_probs=True), sampling, rng)
        return replace(chosen, draws=plan.draws)


@pytest.mark.parametrize(("shape", "draws"), SAMPLED, ids=["chain", "tree"])
def test_likeliest_tokens_that_are_declared_drawn_are_seen(shape: Shape, draws: Draws) -> None:
    right = unsure("medusa")
    wrong = Overstated(right.config, small_target().shape)  # type: ignore[arg-type]
    wrong.load_state_dict(right.state_dict())
    with pytest.raises(AssertionError, match="p = "):
        check_sampled_texts(wrong.eval(), small_target(), shape, draws, PROMPT)


class Swapped(SmallLM):
    """Grows the children of a level's nodes from each other's states."""

    def _expand(self, state: Any, frontier: Frontier, depth: Tensor) -> Tensor:
        return super()._expand(state, frontier, depth).flip(1)


@pytest.mark.parametrize("shape", TREES, ids=lambda shape: shape.shape)
def test_children_that_grow_from_the_wrong_parent_are_seen(shape: Shape) -> None:
    wrong = Swapped(tiny_drafter("small_lm", target()).config, target().shape)  # type: ignore[arg-type]
    wrong.load_state_dict(tiny_drafter("small_lm", target()).state_dict())
    with pytest.raises(AssertionError, match="node "):
        check_node_distributions(wrong.eval(), target(), shape, PROMPTS)
