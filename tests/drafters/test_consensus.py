"""Consensus: siblings draft for each other and stay independent."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drafttrain.core.nodes import Nodes
from drafttrain.core.plan import Chain, Plan, Static
from drafttrain.core.rng import SeededRng, next_script
from drafttrain.core.sampling import Sampling
from drafttrain.core.types import Committed, Groups
from drafttrain.drafters.consensus import Consensus, ConsensusConfig, ConsensusState
from drafttrain.drafters.ngram import Ngram, NgramConfig
from drafttrain.runtime import generate
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.generate import DecodingLoop
from drafttrain.runtime.policy import Fixed
from drafttrain.runtime.rows import Request
from drafttrain.verify import RULES
from tests.contract.tables import TableTarget, probs
from tests.tiny import tiny_target

PROMPT = [5, 9, 11]


def state_of(drafter: Consensus, groups: list[int]) -> ConsensusState:
    rows = len(groups)
    state = drafter.begin(torch.tensor([PROMPT] * rows), torch.full((rows,), len(PROMPT)), {}, None, 64)  # type: ignore[arg-type]
    state.set_groups(Groups(groups, {}))
    return state


def observed(drafter: Consensus, state: ConsensusState, rows: list[list[int]]) -> None:
    count = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    drafter.observe(state, Committed(tokens, count))


def drafted(drafter: Consensus, state: ConsensusState, roots: list[int], shape: Any) -> list[Nodes]:
    rng = SeededRng(0, torch.arange(len(roots)))
    return drafter.nodes(state, torch.tensor(roots), Plan(shape), Sampling(), rng)


def consensus(**options: Any) -> Consensus:
    return Consensus(ConsensusConfig(**{"shortest": 1, **options}), tiny_target().shape)


def test_a_row_drafts_what_its_siblings_wrote_and_nothing_of_other_prompts() -> None:
    drafter = consensus()
    state = state_of(drafter, [0, 0, 1])
    observed(drafter, state, [[20, 21, 22, 23], [30], [31]])
    _, sibling, stranger = drafted(drafter, state, [20, 20, 20], Chain(length=3))
    assert sibling.tokens == [21, 22, 23]
    assert stranger.tokens == []


def test_what_more_siblings_wrote_is_likelier_and_shared_prefixes_are_one_node() -> None:
    drafter = consensus()
    state = state_of(drafter, [0, 0, 0, 0])
    observed(drafter, state, [[20, 21, 22], [20, 21, 24], [20, 21, 24], [40]])
    nodes = drafted(drafter, state, [20] * 4, Static(children=(2, 2)))[3]
    assert nodes.tokens[:3] == [21, 24, 22] and nodes.parents[:3] == [0, 1, 1]


def test_a_finished_sibling_stays_in_the_index() -> None:
    drafter = consensus()
    state = state_of(drafter, [0, 0])
    observed(drafter, state, [[20, 21, 22], []])
    alone = state.select(torch.tensor([1]))
    assert drafted(drafter, alone, [20], Chain(length=2))[0].tokens == [21, 22]


def test_rows_go_on_sharing_after_some_have_left() -> None:
    drafter = consensus()
    part = state_of(drafter, [0, 0, 0]).select(torch.tensor([1, 2]))
    assert part.rows[0].index is part.rows[1].index
    observed(drafter, part, [[20, 21], []])
    assert drafted(drafter, part, [20, 20], Chain(length=1))[1].tokens == [21]


def test_a_lone_sample_is_drafted_for_as_ngram_does() -> None:
    target, prompt = tiny_target(), [5, 9, 11, 30] * 3
    texts = []
    for drafter in (Consensus(ConsensusConfig(), target.shape), Ngram(NgramConfig(), target.shape)):
        decoder = SpeculativeDecoder(target, drafter, RuntimeConfig(shape=Chain(length=3)))
        (done,) = decoder.generate(prompt, 20, 1.0, seed=3)
        texts.append((done.tokens, done.statistics.rounds))
    assert texts[0] == texts[1]


class BothRows:
    """Every choice of every row is scripted: branches of the joint distribution."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.taken, self.probability = script, list[tuple[int, int]](), 1.0

    def substream(self, number: Any) -> None:
        pass

    def select(self, rows: Tensor) -> BothRows:
        return self

    def bernoulli(self, p: Tensor) -> Tensor:
        chosen = [self._choose([1 - x, x]) for x in p.double().clamp(0, 1).reshape(-1).tolist()]
        return torch.tensor(chosen, dtype=torch.bool).view(p.shape)

    def draw(self, probs: Tensor, k: int, replace: bool) -> Tensor:
        assert k == 1
        rows = probs.double().reshape(-1, probs.shape[-1])
        return torch.tensor([self._choose((row / row.sum()).tolist()) for row in rows]).view(*probs.shape[:-1], 1)

    def _choose(self, weights: list[float]) -> int:
        step, possible = len(self.taken), [place for place, weight in enumerate(weights) if weight > 1e-12]
        outcome = self.script[step] if step < len(self.script) else possible[0]
        self.taken.append((outcome, next((other for other in possible if other > outcome), -1)))
        self.probability *= weights[outcome]
        return outcome


@pytest.mark.parametrize("family", [Consensus, Ngram])
def test_two_samples_that_draft_for_each_other_are_independent(monkeypatch: pytest.MonkeyPatch, family: Any) -> None:
    """Exact enumeration of both rows through the real loop: the joint distribution of their next two tokens is the product."""
    vocab, prompt = 2, [0, 1, 1]
    table, own = TableTarget(vocab), Sampling(1.0)
    drafter = family(family.Config(), tiny_target().shape)
    rule = RULES["recursive"](RULES["recursive"].Config(name="recursive"))
    joint, shared = np.zeros((vocab,) * 4), 0
    script: list[int] | None = []
    while script is not None:
        rng = BothRows(script)
        monkeypatch.setattr(generate, "SeededRng", lambda seed, ids, rng=rng: rng)
        loop = DecodingLoop(table, drafter, rule, Fixed(Plan(Static(children=(2,)), "deterministic")), own, seed=0)  # type: ignore[arg-type]
        loop.start([Request(prompt, 0, 3, group=0), Request(prompt, 1, 3, group=0)])
        while not loop.done:
            shared += loop.rows is not None and len(loop.rows) == 2
            loop.step()
        joint[tuple(loop.written[0][1:3] + loop.written[1][1:3])] += rng.probability
        script = next_script(rng.taken)
    assert joint.sum() == pytest.approx(1) and shared

    def chance(*context: int) -> np.ndarray:
        return probs(1, context, vocab)

    first = loop.written[0][0]
    single = np.array([[chance(*prompt, first)[a] * chance(*prompt, first, a)[b] for b in range(vocab)] for a in range(vocab)])
    expected = np.zeros_like(joint)
    for a, b, c, d in product(range(vocab), repeat=4):
        expected[a, b, c, d] = single[a, b] * single[c, d]
    assert np.abs(joint - expected).sum() / 2 < 1e-6


def test_samples_of_one_prompt_accept_more_than_with_their_own_text_alone() -> None:
    target = tiny_target()
    target.model.lm_head.weight.mul_(30)  # sharp enough that samples resemble each other
    rounds = []
    for drafter in (Consensus(ConsensusConfig(), target.shape), Ngram(NgramConfig(), target.shape)):
        decoder = SpeculativeDecoder(target, drafter, RuntimeConfig(shape=Static(children=(2, 1, 1))))
        done = decoder.generate(PROMPT, 16, 1.0, n=6, batch_size=2, seed=1)
        rounds.append(sum(one.statistics.rounds for one in done))
    assert rounds[0] < rounds[1]
