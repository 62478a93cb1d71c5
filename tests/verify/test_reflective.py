"""Reflective verification: what each appended token sees, that the draft is not disturbed by it, and that nothing of it is kept."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Plan
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.generate import DecodingLoop
from drafttrain.runtime.policy import Fixed
from drafttrain.runtime.rows import Request
from drafttrain.target.cache import TreeCache
from drafttrain.verify.reflective import Reflective, ReflectiveConfig
from tests.tiny import greedy_text
from tests.verify.logged import COLD, PROMPTS, SHAPES, WARM, Round, decoded, drafter, lengths, rounds, target

PROMPT = (60, 61, 62)
NEXT_TO_NOTHING = 1e-12


def reflective(alpha: float, **options: Any) -> Reflective:
    rule = Reflective(ReflectiveConfig(alpha=alpha, prompt=PROMPT, **options))
    rule.prepare(target())
    return rule


def read(prompts: list[list[int]]) -> TreeCache:
    cache = target().new_cache(len(prompts), 128)
    width = max(map(len, prompts))
    padded = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    target().prefill(cache, padded, torch.tensor([len(prompt) for prompt in prompts]))
    cache.set_lengths([len(prompt) for prompt in prompts])
    return cache


@pytest.mark.parametrize("shape", SHAPES)
def test_the_drafts_own_logits_are_what_they_would_be_without_all_that_is_appended(shape: str) -> None:
    tree = rounds(shape, COLD)[0].tree
    alone = target().score(read(PROMPTS), tree.layout(), Sampling()).logits
    within = target().score(read(PROMPTS), reflective(0.3).layout(tree), Sampling()).logits
    N = tree.tokens.shape[1]
    assert within.shape[1] == 2 * N + len(PROMPT)
    gap = (within[:, :N] - alone).abs()
    assert gap[tree.live].max() < 1e-4  # fp32, other shapes of products


def test_the_copys_logits_are_those_of_the_whole_text_read_plainly() -> None:
    tree = rounds("chain", COLD)[0].tree
    N = tree.tokens.shape[1]
    copy = target().score(read(PROMPTS), reflective(0.3).layout(tree), Sampling()).logits[:, -N:]
    for row, prompt in enumerate(PROMPTS):
        draft = tree.tokens[row].tolist()  # the root first
        plain = target().model(torch.tensor([[*prompt, *draft, *PROMPT, *draft]])).logits[0, -N:]
        torch.testing.assert_close(copy[row], plain, atol=1e-4, rtol=1e-4)  # fp32, other shapes of products


def test_in_a_tree_reflection_and_copy_see_every_live_node_and_the_copy_its_own_path() -> None:
    parents = torch.tensor([[0, 0, 0, 1, 0]])
    tree = Tree(torch.tensor([[9, 1, 2, 3, 4]]), parents, torch.tensor([[True, True, True, True, False]]), "deterministic", 2, 3)
    layout = reflective(0.3).layout(tree)
    assert layout.tokens[0].tolist() == [9, 1, 2, 3, 4, *PROMPT, 9, 1, 2, 3, 4]
    assert layout.depth[0].tolist() == [0, 1, 1, 2, 1, 3, 4, 5, 6, 7, 7, 8, 7]
    sees = [row.nonzero()[:, 0].tolist() for row in layout.mask[0]]
    assert sees[:4] == [[0], [0, 1], [0, 2], [0, 1, 3]]
    assert sees[5:8] == [[0, 1, 2, 3, *range(5, last)] for last in (6, 7, 8)]
    assert sees[8:12] == [[0, 1, 2, 3, 5, 6, 7, *path] for path in ([8], [8, 9], [8, 10], [8, 9, 11])]


@pytest.mark.parametrize("shape", SHAPES)
def test_with_next_to_no_weight_the_text_is_greedy_so_nothing_appended_stays_in_the_cache(shape: str) -> None:
    rule = ReflectiveConfig(alpha=NEXT_TO_NOTHING, prompt=PROMPT)
    assert decoded(COLD, RuntimeConfig(shape=SHAPES[shape], rule=rule)) == [greedy_text(target().model, prompt, 24) for prompt in PROMPTS]


@pytest.mark.parametrize("shape", SHAPES)
def test_after_each_round_the_cache_holds_the_committed_tokens_and_no_more_in_one_forward_a_round(shape: str) -> None:
    batch = DecodingLoop(target(), drafter(), reflective(0.4), Fixed(Plan(SHAPES[shape])), COLD, seed=0)
    before = target().forwards
    batch.start([Request(prompt, index, 20) for index, prompt in enumerate(PROMPTS)])
    count = 1
    while not batch.done:
        assert batch.cache.lengths.tolist() == [len(PROMPTS[row]) + len(batch.written[row]) - 1 for row in batch.rows.numbers]
        batch.step()
        count += 1
    assert target().forwards - before == count


@pytest.mark.parametrize("sampling", [COLD, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", ["chain", "dynamic"])
def test_rows_of_a_batch_are_decoded_as_if_alone(shape: str, sampling: Sampling) -> None:
    decoder = SpeculativeDecoder(target(), drafter(), RuntimeConfig(shape=SHAPES[shape], rule=ReflectiveConfig(alpha=0.4, prompt=PROMPT)))
    together = decoder.generate(PROMPTS, 20, *sampling[:3], seed=5)
    one_by_one = decoder.generate(PROMPTS, 20, *sampling[:3], seed=5, batch_size=1)
    assert [one.tokens for one in together] == [one.tokens for one in one_by_one]


def test_a_second_look_changes_what_stands() -> None:
    runtime = RuntimeConfig(shape=SHAPES["chain"])
    second = runtime.model_copy(update={"rule": ReflectiveConfig(alpha=0.6, prompt=PROMPT)})
    made = SpeculativeDecoder(target(), drafter(), second).generate(PROMPTS, 24)
    assert [one.tokens for one in made] != decoded(COLD, runtime)


@pytest.mark.parametrize("sampling", [COLD, WARM], ids=["greedy", "sampled"])
def test_where_the_second_look_agrees_with_the_draft_more_weight_accepts_no_less(sampling: Sampling) -> None:
    steps = []
    for alpha in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        steps.append(lengths(reflective(alpha), [agreeing(one) for one in rounds("chain", sampling)]))
    for less, more in pairwise(steps):
        assert (more >= less).all()
    assert len({int(step.sum()) for step in steps}) >= 3
    assert set(steps[-1].tolist()) == {4}


def agreeing(logged: Round) -> Round:
    """The round with a copy at which the target says what was drafted."""
    first, tokens = logged.scored.logits, logged.tree.tokens
    said = torch.zeros_like(first).scatter(-1, tokens.roll(-1, 1)[..., None], 40.0)
    return Round(logged.tree, Scored(torch.cat([first, first[:, : len(PROMPT)], said], 1), logged.scored.sampling))


def test_a_prompt_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(UserError, match=r"has no tokenizer; give runtime\.rule\.prompt as token ids"):
        Reflective(ReflectiveConfig()).prepare(target())
    with pytest.raises(UserError, match=r"prompt \[3, 64\] holds ids outside of the target's vocabulary \(0 to 63\)"):
        Reflective(ReflectiveConfig(prompt=(3, 64))).prepare(target())
    with pytest.raises(ValueError, match="the reflection prompt is empty"):
        ReflectiveConfig(prompt="")
