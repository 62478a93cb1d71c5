"""Lookup: which place is found, what is read off it, and what is learnt from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drafttrain.core.config import parse
from drafttrain.core.errors import UserError
from drafttrain.core.nodes import from_nodes, to_nodes
from drafttrain.core.plan import Chain, Dynamic, Plan, Shape
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.drafters.ngram import Ngram, NgramConfig, Text, expected
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from tests.tiny import tiny_target


def text(*tokens: int, longest: int = 3) -> Text:
    out = Text(longest)
    out.extend(tokens)
    return out


def tree(rows: list[list[int]], root: int, shape: Shape, sampling: Sampling | None = None, **options: int) -> Tree:
    drafter, target = Ngram(NgramConfig(**options), tiny_target().shape), tiny_target()
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    state = drafter.begin(padded, lengths, {}, target.head, 64)
    roots = torch.full((len(rows),), root)
    return drafter.propose(state, roots, Plan(shape), sampling or Sampling(), SeededRng(0, torch.arange(len(rows))))


def test_the_longest_match_wins_and_of_those_the_newest() -> None:
    (match,) = text(1, 2, 3, 40, 9, 2, 3, 50, 7, 3, 60, 1, 2).matches(3, 1, 1, 2)
    assert (match.tokens, match.length) == ((40, 9), 3)  # 1 2 3 stood once; 2 3 and 3 stood later, too
    (match,) = text(2, 3, 40, 2, 3, 50, 2).matches(3, 1, 1, 1)
    assert (match.tokens, match.length) == ((50,), 2)


def test_the_newest_tokens_do_not_match_themselves() -> None:
    assert text(1, 2, 3).matches(4, 1, 1, 3) == []


def test_a_draft_past_the_end_goes_on_with_its_own_tokens() -> None:
    (match,) = text(8, 1, 2, 3, 1, 2).matches(3, 1, 1, 7)
    assert match.tokens == (1, 2, 3, 1, 2, 3, 1)
    (match,) = text(5, 5).matches(5, 1, 1, 4)
    assert match.tokens == (5, 5, 5, 5)


def test_matches_shorter_than_asked_are_not_drafted() -> None:
    assert text(1, 7, 2, 9).matches(7, 2, 1, 3) == []
    assert len(text(1, 7, 2, 9).matches(7, 1, 1, 3)) == 1


def test_branches_begin_differently_and_share_a_prefix_in_no_node_twice() -> None:
    grown = tree([[3, 40, 41, 3, 50, 51, 3, 40, 42]], 3, Dynamic(depth=2, beam=2, top_k=2, nodes=6), branches=3)
    assert sorted(grown.tokens[0, grown.parents[0] == 0].tolist()) == [3, 40, 50]  # the root, and one node for each beginning
    assert grown.draws == "deterministic"


def test_a_row_without_a_match_drafts_nothing_and_the_tree_is_as_wide_as_the_widest_row() -> None:
    assert tree([[1, 2, 3]], 9, Chain(length=4)).tokens.shape == (1, 1)
    both = tree([[1, 2, 3], [9, 5, 6]], 9, Chain(length=2))
    assert both.live.tolist() == [[True, False, False], [True, True, True]]


def test_sampling_pads_to_the_plan_so_that_a_rows_draws_do_not_depend_on_the_others() -> None:
    assert tree([[1, 2, 3]], 9, Chain(length=4), Sampling(1.0)).tokens.shape == (1, 5)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
def test_nodes_handed_over_on_the_host_are_those_of_the_tree(sampling: Sampling) -> None:
    drafter, rows, shape = Ngram(NgramConfig(branches=2), tiny_target().shape), [[5, 6, 7, 5, 8, 5], [1, 2, 3, 4, 1]], Dynamic(nodes=6)

    def given() -> tuple[Any, ...]:
        tokens, lengths = torch.tensor([[*row, *[0] * (6 - len(row))] for row in rows]), torch.tensor([len(row) for row in rows])
        state = drafter.begin(tokens, lengths, {}, None, 64)  # type: ignore[arg-type]
        return state, torch.tensor([6, 2]), Plan(shape), sampling, SeededRng(0, torch.arange(2))

    found, tree = drafter.nodes(*given()), drafter.propose(*given())
    for here, there in zip(found, to_nodes(tree), strict=True):
        assert here.tokens and (here.tokens, here.parents, here.proposer) == (there.tokens, there.parents, there.proposer)
        assert here.path_prob == pytest.approx(there.path_prob)  # a tensor's are fp32
    again = from_nodes(tree.tokens[:, 0], found, (tree.tokens.shape[1] - 1, 2))
    assert all(torch.equal(vars(again)[name], vars(tree)[name]) for name in ("tokens", "parents", "live", "proposer"))


def test_reliability_is_learnt_from_what_became_of_the_guess() -> None:
    row = text(1, 2, 3, 1, 2)
    (branch,) = row.branches(3, 1, 1, 3)  # guesses 1 2 3 after a match of 3
    assert branch.path_prob[0] == pytest.approx(expected(3))
    row.extend([3, 1, 9])  # the root, one right guess, one wrong
    row.branches(4, 1, 1, 3)
    assert row.reliability.of(3) > expected(3)  # lengths 2 and 3 are judged together
    assert row.reliability.of(4) < expected(4)


def test_a_loop_is_drafted_whole_once_it_is_seen() -> None:
    target = tiny_target()
    target.model.lm_head.weight.zero_()  # every logit equal: token 0 for ever
    drafter = Ngram(NgramConfig(), target.shape)
    decoder = SpeculativeDecoder(target, drafter, RuntimeConfig(shape=Chain(length=8)))
    statistics = decoder.generate([[1, 2, 3]], max_new_tokens=40)[0].statistics
    assert statistics.rounds == 7  # two that find nothing, then 37 tokens, 9 a round
    assert statistics.drafter_calls == statistics.rounds


def test_training_and_other_draws_are_refused() -> None:
    drafter = Ngram(NgramConfig(), tiny_target().shape)
    with pytest.raises(UserError, match="'ngram' has no weights"):
        drafter.loss(None, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"runtime.draws 'iid': this drafter makes deterministic draws only"):
        RuntimeConfig(shape=Chain(), draws="iid").fitted(Sampling(1.0), Ngram)
    with pytest.raises(UserError, match="shortest 4 is more than longest 3"):
        parse(NgramConfig, {"shortest": 4}, "drafter")
