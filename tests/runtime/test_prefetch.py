"""Prefetched drafts are the drafts that would have been made, and save the calls for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic, Static
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Verdict
from drafttrain.drafters.hybrid import HybridConfig
from drafttrain.runtime.decoder import Generation, RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.generate import RoundRecord
from drafttrain.runtime.prefetch import Prefetched, Prefetcher
from drafttrain.runtime.proposer import Prefetching
from drafttrain.runtime.rows import Request
from drafttrain.runtime.stats import Statistics
from tests.runtime.test_rounds import PROMPTS, drafter, target
from tests.tiny import greedy_text

SHAPES = {"chain": Chain(length=3), "static": Static(children=(3, 2)), "dynamic": Dynamic(depth=3, beam=2, top_k=3, nodes=7)}
NEW = 26
SHORT_FIRST = Static(choices=((0,), (1,), (1, 0), (1, 0, 0)))  # the first chain ends two levels above the tree's deepest


def decoded(shape: Any, prefetch: int, temperature: float, batch: int = 1, **more: Any) -> tuple[list[Generation], list[Tree], Statistics]:
    trees: list[Tree] = []

    def keep(record: RoundRecord) -> None:
        trees.append(record.tree)

    runtime = RuntimeConfig(shape=shape, prefetch=prefetch)
    speculative = SpeculativeDecoder(target(), drafter("small_lm"), runtime)
    out = speculative.generate(PROMPTS, NEW, temperature, seed=4, batch_size=batch, on_round=keep, **more)
    return out, trees, sum((one.statistics for one in out[1:]), out[0].statistics)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_texts_and_trees_are_those_of_decoding_without_prefetching(shape: Any, temperature: float, batch: int) -> None:
    plain, trees, without = decoded(shape, 0, temperature, batch)
    ours, ours_trees, counts = decoded(shape, 4, temperature, batch)
    assert [one.tokens for one in ours] == [one.tokens for one in plain]
    assert [tree.tokens.tolist() for tree in ours_trees] == [tree.tokens.tolist() for tree in trees]
    assert counts.drafter_calls - counts.prefetch_calls + counts.calls_saved == without.drafter_calls
    assert (without.prefetched, without.prefetch_hits, without.prefetch_calls, without.calls_saved) == (0, 0, 0, 0)
    assert 0 < counts.prefetch_hits < counts.prefetched
    if batch == 1:
        assert counts.calls_saved == shape.depth * counts.prefetch_hits
    if temperature == 0:
        assert [one.tokens for one in ours] == [greedy_text(target().model, prompt, NEW) for prompt in PROMPTS]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_first_chain_shorter_than_the_tree_is_drafted_on_from_where_it_ends(temperature: float, batch: int) -> None:
    plain, trees, _ = decoded(SHORT_FIRST, 0, temperature, batch)
    ours, ours_trees, counts = decoded(SHORT_FIRST, 4, temperature, batch)
    assert [one.tokens for one in ours] == [one.tokens for one in plain]
    assert [tree.tokens.tolist() for tree in ours_trees] == [tree.tokens.tolist() for tree in trees]
    assert counts.prefetch_hits > 0


def test_every_bet_on_a_row_is_tried_and_wider_ones_hit_more() -> None:
    shares = [stats.prefetch_hits / stats.prefetched for _, _, stats in (decoded(Chain(length=3), width, 0.0) for width in (1, 4, 64))]
    assert shares[0] <= shares[1] < shares[2]


def test_bets_are_placed_before_the_target_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    draft, score, propose = Prefetcher.draft, target().score, Prefetching._drafted

    def drafting(*given: Any) -> Any:
        order.append("prefetched draft")
        return draft(*given)

    def scoring(*given: Any) -> Any:
        order.append("score")
        return score(*given)

    def proposing(*given: Any) -> Any:
        order.append("propose")
        return propose(*given)

    monkeypatch.setattr(Prefetcher, "draft", drafting)
    monkeypatch.setattr(target(), "score", scoring)
    monkeypatch.setattr(Prefetching, "_drafted", proposing)
    decoded(Chain(length=2), 2, 0.8, batch=4)
    assert order == ["propose", "prefetched draft", "score"] * (len(order) // 3)


def test_bets_are_the_likeliest_ways_out_of_the_tree_by_the_drafters_own_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the drafter's distributions of whole texts, read afresh."""
    checked = 0
    draft = Prefetcher.draft
    lm = drafter("small_lm")

    def watched(self: Prefetcher, state: Any, tree: Tree, plan: Any, sampling: Sampling, rng: Any) -> Any:
        nonlocal checked
        prefetched = draft(self, state, tree, plan, sampling, rng)
        chain = [0]
        while int(tree.children[0, chain[-1], 0]) >= 0:
            chain.append(int(tree.children[0, chain[-1], 0]))
        context = [*PROMPTS[0], *batch.written[0][:-1]]
        ways: dict[tuple[int, int], float] = {}
        reached = 1.0
        for depth, node in enumerate(chain):
            text = context + tree.tokens[0, chain[: depth + 1]].tolist()
            position, document = torch.arange(len(text))[None], torch.zeros(1, len(text), dtype=torch.long)
            read = Packed(torch.tensor([text]), position, document)
            states = next(lm.teacher_forced_states(read, target().head, 1)).roll(1, 1)  # type: ignore[arg-type]
            probs = lm.readout(states[:, -1], 0, target().head).softmax(-1)[0]
            children = [int(child) for child in tree.children[0, node] if child >= 0]
            taken = {int(tree.tokens[0, child]) for child in children}
            ways |= {(depth, token): reached * float(probs[token]) for token in range(len(probs)) if token not in taken}
            reached *= float(probs[tree.tokens[0, chain[depth + 1]]]) if depth + 1 < len(chain) else 0
        best = sorted(ways.values(), reverse=True)[:3]
        placed = [ways[int(depth), int(token)] for depth, token in zip(prefetched.length[0], prefetched.token[0], strict=True)]
        assert sorted(placed, reverse=True) == pytest.approx(best)
        checked += 1
        return prefetched

    monkeypatch.setattr(Prefetcher, "draft", watched)
    batch = SpeculativeDecoder(target(), lm, RuntimeConfig(shape=Static(children=(2, 1, 1)), prefetch=3)).batch(Sampling())
    batch.start([Request(PROMPTS[0], 0, 16)])
    while not batch.done:
        batch.step()
    assert checked > 3


class Packed:
    """What `teacher_forced_states` reads of a batch."""

    def __init__(self, tokens: torch.Tensor, position: torch.Tensor, document: torch.Tensor) -> None:
        self.tokens, self.position, self.document = tokens, position, document


def test_a_bet_on_one_branch_is_not_won_by_another_of_the_same_length_and_next_token() -> None:
    tree = Tree(torch.zeros(1, 3).long(), torch.zeros(1, 3).long(), torch.ones(1, 3).bool(), "deterministic", 1, 2)
    prefetched = Prefetched(None, tree, torch.tensor([[1]]), torch.tensor([[1, 0]]), torch.tensor([[7, 7]]), 0)  # type: ignore[arg-type]
    one, seven = torch.tensor([1]), torch.tensor([7])
    assert prefetched.hits(Verdict(torch.tensor([[1]]), one, seven)).tolist() == [0]
    assert prefetched.hits(Verdict(torch.tensor([[2]]), one, seven)).tolist() == [-1]
    assert prefetched.hits(Verdict(torch.tensor([[0]]), one - 1, seven)).tolist() == [1]
    assert prefetched.hits(Verdict(torch.tensor([[1]]), one, seven - 1)).tolist() == [-1]


def test_rows_near_their_end_bet_past_it_without_harm() -> None:
    for new in (2, 3, 5):
        runtime = RuntimeConfig(shape=Chain(length=6), prefetch=3)
        got = SpeculativeDecoder(target(), drafter("small_lm"), runtime).generate([[3] * 120], new)
        assert len(got[0].tokens) == new


def test_a_row_that_ends_throws_its_bets_away() -> None:
    end = decoded(Chain(length=3), 0, 0.0)[0][0].tokens[9]
    plain = SpeculativeDecoder(target(), drafter("small_lm"), RuntimeConfig(shape=Chain(length=3)))
    ours = SpeculativeDecoder(target(), drafter("small_lm"), RuntimeConfig(shape=Chain(length=3), prefetch=8))
    before = target().eos_ids
    try:
        target().eos_ids = (end,)
        assert [one.tokens for one in ours.generate(PROMPTS, NEW)] == [one.tokens for one in plain.generate(PROMPTS, NEW)]
        assert ours.generate(PROMPTS[0], NEW)[0].tokens[-1] == end
    finally:
        target().eos_ids = before


def test_a_drafter_that_reads_the_target_cannot_bet() -> None:
    with pytest.raises(UserError, match=r"runtime.prefetch 2: a eagle3 drafter reads the target's features \(aux_hidden_states\)"):
        SpeculativeDecoder(target(), drafter("eagle3"), RuntimeConfig(shape=Chain(length=2), prefetch=2))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hybrid": HybridConfig()}, "no distributions to prefetch by"),
        ({"corrupt": 0.5}, "no distribution to prefetch by"),
        ({"policy": "adaptive"}, "policy 'adaptive' plans a round from the one before"),
    ],
)
def test_what_leaves_nothing_to_bet_on_is_refused_before_decoding(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"runtime.prefetch 2: .*{reason}"):
        SpeculativeDecoder(target(), drafter("small_lm"), RuntimeConfig(shape=Chain(length=2), prefetch=2, **options))
