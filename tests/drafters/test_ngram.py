"""Lookup: which continuations are found, what is learnt from them, where drafting ends, and past outputs on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.config import parse
from drafttrain.core.errors import UserError
from drafttrain.core.nodes import from_nodes, to_nodes
from drafttrain.core.plan import Chain, Dynamic, Plan, Shape
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.suffix import SuffixAutomaton
from drafttrain.core.tree import Tree
from drafttrain.drafters.datastore import save_datastore
from drafttrain.drafters.lookup import Text, expected, lookup_tree
from drafttrain.drafters.ngram import Ngram, NgramConfig
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.generate import RoundRecord
from tests.tiny import VOCAB, greedy_text, tiny_target


def text(*tokens: int, shortest: int = 1) -> Text:
    out = Text(SuffixAutomaton(), shortest)
    out.extend(tokens)
    return out


def chain(row: Text, root: int, length: int, ends: frozenset[int] = frozenset()) -> list[int]:
    return lookup_tree(row, root, length, 1, length, ends).tokens


def tree(rows: list[list[int]], root: int, shape: Shape, sampling: Sampling | None = None, left: int | None = None, **options: Any) -> Tree:
    target = tiny_target()
    drafter = Ngram(NgramConfig(**{"shortest": 1, **options}), target.shape)
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    state = drafter.begin(padded, lengths, {}, target.head, 64)
    roots = torch.full((len(rows),), root)
    plan = Plan(shape, left=None if left is None else torch.full((len(rows),), left))
    return drafter.propose(state, roots, plan, sampling or Sampling(), SeededRng(0, torch.arange(len(rows))))


def test_the_longest_match_wins_and_shorter_ones_come_beside_it() -> None:
    row = text(1, 2, 3, 40, 9, 2, 3, 50, 7, 3, 60, 1, 2)
    likely = row.likely(row.after(row.position, 3))  # 1 2 3 stood once; 2 3 and 3 stood later, too
    assert list(likely) == [40, 50, 60]
    assert likely[40] > likely[50] > likely[60]


def test_of_equal_counts_the_newest_continuation_is_likelier() -> None:
    row = text(2, 3, 40, 9, 2, 3, 50, 2)
    assert chain(row, 3, 1) == [50]


def test_the_newest_tokens_do_not_match_themselves() -> None:
    assert chain(text(1, 2, 3), 4, 3) == []


def test_a_loop_is_drafted_past_the_end_of_the_text() -> None:
    assert chain(text(8, 1, 2, 3, 1, 2), 3, 7) == [1, 2, 3, 1, 2, 3, 1]


def test_matches_shorter_than_asked_are_not_drafted_and_none_are_needed_for_the_commonest_tokens() -> None:
    assert chain(text(1, 7, 2, 9, shortest=2), 7, 3) == []
    assert chain(text(1, 7, 2, 9), 7, 1) == [2]
    assert chain(text(1, 7, 7, 9, shortest=0), 30, 1) == [7]


def test_branches_share_a_prefix_in_no_node_twice() -> None:
    grown = tree([[3, 40, 41, 3, 50, 51, 3, 40, 42]], 3, Dynamic(depth=2, beam=2, top_k=2, nodes=6), branches=3)
    below_root = grown.tokens[0, 1:][grown.parents[0, 1:] == 0].tolist()
    assert sorted(below_root) == [40, 50]
    pairs = list(zip(grown.parents[0, 1:].tolist(), grown.tokens[0, 1:].tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert grown.draws == "deterministic"


def test_a_row_without_a_match_drafts_nothing_and_the_tree_is_as_wide_as_the_widest_row() -> None:
    assert tree([[1, 2, 3]], 9, Chain(length=4)).tokens.shape == (1, 1)
    both = tree([[1, 2, 3], [9, 5, 6]], 9, Chain(length=2))
    assert both.live.tolist() == [[True, False, False], [True, True, True]]


def test_sampling_pads_to_the_plan_so_that_a_rows_draws_do_not_depend_on_the_others() -> None:
    assert tree([[1, 2, 3]], 9, Chain(length=4), Sampling(1.0)).tokens.shape == (1, 5)


def test_nothing_is_drafted_below_an_end_token_or_past_the_rows_limit() -> None:
    assert chain(text(1, 2, 3, 4, 1), 2, 3, frozenset({3})) == [3]
    assert tree([[1, 2, 3, 4, 1]], 2, Chain(length=3), left=3).tokens.tolist() == [[2, 3, 4]]  # the third token is the target's
    assert tree([[1, 2, 3, 4, 1]], 2, Chain(length=3), left=1).tokens.tolist() == [[2]]


def test_a_decoding_drafts_no_node_that_its_limit_or_its_end_would_cut() -> None:
    target, seen = tiny_target(), list[RoundRecord]()
    prompt = [5, 9, 11, 30] * 4
    own = greedy_text(target.model, prompt, 20)
    decoder = SpeculativeDecoder(target, Ngram(NgramConfig(), target.shape), RuntimeConfig(shape=Dynamic(nodes=8)))
    assert decoder.generate(prompt, 20, on_round=seen.append)[0].tokens == own
    left = len(own) - 1
    for record in seen:
        assert int(record.tree.depth.max()) < left
        left -= int(record.kept[0])
    assert left == 0


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


def test_reliability_is_learnt_from_every_token() -> None:
    repeats, changes = text(*[1, 2, 3] * 6), text(1, 2, 1, 3, 1, 4, 1, 5, 1, 6)
    assert repeats.reliability.of((False, 3, 1), 4) > expected(4)
    assert changes.reliability.of((False, 1, 3), 1) < expected(1)


def test_a_loop_is_drafted_whole_once_it_is_seen() -> None:
    target = tiny_target()
    target.model.lm_head.weight.zero_()  # every logit equal: token 0 for ever
    decoder = SpeculativeDecoder(target, Ngram(NgramConfig(), target.shape), RuntimeConfig(shape=Chain(length=8)))
    statistics = decoder.generate([[1, 2, 3]], max_new_tokens=40)[0].statistics
    assert statistics.rounds <= 7
    assert statistics.drafter_calls == statistics.rounds


def test_training_other_draws_and_options_out_of_range_are_refused() -> None:
    drafter = Ngram(NgramConfig(), tiny_target().shape)
    with pytest.raises(UserError, match="'ngram' has no weights"):
        drafter.loss(None, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"runtime.draws 'iid': this drafter makes deterministic draws only"):
        RuntimeConfig(shape=Chain(), draws="iid").fitted(Sampling(1.0), Ngram)
    with pytest.raises(UserError, match="drafter: confidence"):
        parse(NgramConfig, {"confidence": 0}, "drafter")


# -- past outputs --------------------------------------------------------------------------------------------------------------------


def datastore(path: Path, texts: list[list[int]], target: str | None = None) -> Path:
    shape = tiny_target().shape
    save_datastore([np.array(one) for one in texts], path, target or shape.fingerprint, "tokenizer", shape.vocab_size)
    return path


def test_past_outputs_are_drafted_where_the_text_itself_has_nothing(tmp_path: Path) -> None:
    store = datastore(tmp_path / "past.safetensors", [[20, 21, 22, 23], [30, 21, 22, 24], [31, 21, 22, 24]])
    grown = tree([[1, 20]], 21, Chain(length=2), datastore=str(store))
    assert grown.tokens.tolist() == [[21, 22, 23]]  # 20 21 22 stood once; 21 22 went on with 24 twice
    grown = tree([[1, 2]], 21, Chain(length=2), datastore=str(store))
    assert grown.tokens.tolist() == [[21, 22, 24]]
    assert tree([[1, 2]], 23, Chain(length=2), datastore=str(store)).tokens.tolist() == [[23]]  # a text ends there


def test_a_decoding_with_past_outputs_writes_the_same_text_in_fewer_rounds(tmp_path: Path) -> None:
    target, prompt = tiny_target(), [5, 9, 11, 30]
    own = greedy_text(target.model, prompt, 24)
    store = datastore(tmp_path / "past.safetensors", [[*prompt, *own]])
    runtime = RuntimeConfig(shape=Chain(length=4))
    rounds = {}
    for path in (None, str(store)):
        drafter = Ngram(NgramConfig(datastore=path), target.shape)
        (done,) = SpeculativeDecoder(target, drafter, runtime).generate(prompt, 24)
        assert done.tokens == own
        rounds[path] = done.statistics.rounds
    assert rounds[str(store)] < rounds[None]


def test_a_datastore_that_is_missing_damaged_or_of_another_target_is_refused(tmp_path: Path) -> None:
    shape, path = tiny_target().shape, tmp_path / "past.safetensors"

    def load() -> None:
        Ngram(NgramConfig(datastore=str(path)), shape)

    with pytest.raises(UserError, match="no such file"):
        load()
    with pytest.raises(UserError, match="no text"):
        datastore(path, [])
    datastore(path, [[1, 2, 3]], "another")
    with pytest.raises(UserError, match="outputs of target another"):
        load()
    datastore(path, [[1, 2, VOCAB - 1]])
    load()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="datastore"):
        load()
