"""Logged rounds: what is kept is enough to have every distribution again."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic, Plan, Static
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.drafters import build
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.hybrid import HybridConfig
from drafttrain.drafters.ngram import NgramConfig
from drafttrain.runtime import rounds as logging
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.generate import RoundRecord
from drafttrain.runtime.rounds import LoggedProbs, RoundLog, RoundRecorder, joined, log_rounds
from drafttrain.target.adapter import Target
from tests.families import GIVES_STATES, REPRESENTATIVES, TINY, bare_drafter, slow_beyond
from tests.tiny import VOCAB, fitted, tiny_target

PROMPTS = [[5, 9, 11, 30, 2, 7], [1, 2, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48], [7, 7]]
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, TINY[family]) for family in GIVES_STATES},
    "medusa, own heads": ("medusa", {"heads": 3, "own_heads": True, "draft_vocab_size": 40}),
    "small_lm, two layers": ("small_lm", {"layers": 2}),
    "small_lm, narrow": ("small_lm", {"layers": 1, "hidden_size": 16}),
}
"""Every family whose distributions can be computed again, and its further ways: label -> family, options."""
FAST = [name for name in WAYS if name in REPRESENTATIVES or name not in GIVES_STATES]
RAGGED = Static(choices=((0,), (1,), (0, 0), (1, 0), (1, 1), (1, 1, 0)))
HOT = Sampling(temperature=0.9, top_k=20, top_p=0.95)


@lru_cache
def target() -> Target:
    return tiny_target(3)


@lru_cache
def drafter(name: str) -> Drafter:
    family, options = WAYS[name]
    made = bare_drafter(family, target(), 1, **options)
    made.start_from(target().head, torch.arange(VOCAB))
    return fitted(made, target(), PROMPTS, new_tokens=16, steps=10)


def decoder(name: str, shape: Any, **runtime: Any) -> SpeculativeDecoder:
    return SpeculativeDecoder(target(), drafter(name), RuntimeConfig(shape=shape, **runtime))


def test_a_lookups_rounds_are_logged_as_the_deterministic_draws_they_are(tmp_path: Path) -> None:
    """Its distributions cannot be recorded, and at a temperature `auto` means drawn tokens for other families."""
    lookup = SpeculativeDecoder(target(), build(NgramConfig(), target().shape), RuntimeConfig(shape=Chain(length=3)))
    log = log_rounds(lookup, [(prompt * 6)[:30] for prompt in PROMPTS], Sampling(0.7), 12, tmp_path, "d")
    assert (log.info.draws, log.info.states) == ("deterministic", False)
    assert len(log) > 0


def test_trees_beside_a_lookup_are_logged_with_their_own_depth_and_width(tmp_path: Path) -> None:
    """A lookup's branch may be as deep as the plan has nodes, however shallow the plan's shape."""
    beside = decoder("medusa", Dynamic(depth=2, beam=2, top_k=2, nodes=9), hybrid=HybridConfig(draft_cost=0.0, node_cost=0.0))
    prompts = [(prompt * 6)[:30] for prompt in PROMPTS]
    log = log_rounds(beside, prompts, Sampling(0.7), 24, tmp_path, "d")
    rounds = joined(list(log.parts()))
    depth = torch.zeros_like(rounds.parents)
    for node in range(1, rounds.parents.shape[1]):
        depth[:, node] = depth.gather(1, rounds.parents[:, node : node + 1])[:, 0] + 1
    assert log.info.max_depth == int(depth.masked_fill(~rounds.live, 0).max()) > 2
    again = log_rounds(beside, prompts, Sampling(0.7), 24, tmp_path, "d")
    assert again.info == log.info


class Spy(RoundRecorder):
    """Keeps the distributions themselves too, as the round used them."""

    seen: list[tuple[Tree, torch.Tensor]]

    def __call__(self, record: RoundRecord) -> None:
        tree, scored = record.tree, record.scored
        if not hasattr(self, "seen"):
            self.seen = []
        alive = record.alive
        kept = {name: vars(tree)[name][alive] for name in ("tokens", "parents", "live", "draft_probs", "probs_row", "draft_states")}
        self.seen.append((replace(tree, **kept), scored.target_probs[alive]))
        super().__call__(record)


@pytest.mark.parametrize("shape", [Chain(length=3), Static(children=(3, 2)), RAGGED], ids=["chain", "3-2", "ragged"])
@pytest.mark.parametrize("name", slow_beyond(WAYS, FAST))
def test_distributions_recomputed_from_logged_states_are_those_the_rounds_used(
    name: str, shape: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spies: list[Spy] = []
    monkeypatch.setattr(logging, "RoundRecorder", lambda *given: spies.append(Spy(*given)) or spies[-1])
    log = log_rounds(decoder(name, shape, drafter_temperature=1.3), PROMPTS, HOT, 12, tmp_path / "log", "d", batch_size=3)
    logged_probs = LoggedProbs(log.info, drafter(name), target().head)
    logged = joined(list(log.parts()))
    again = logged_probs.tree(logged)
    used = [pair for spy in spies for pair in spy.seen]
    tokens, p = torch.cat([tree.tokens for tree, _ in used]), torch.cat([p for _, p in used])
    assert len(log) == len(tokens) > 8
    assert torch.equal(again.tokens, tokens)
    used_q = torch.cat([tree.draft_probs.gather(1, tree.probs_row[..., None].expand(-1, -1, VOCAB)) for tree, _ in used])[:, 1:]
    found_q = again.draft_probs.gather(1, again.probs_row[..., None].expand(-1, -1, VOCAB))[:, 1:]
    torch.testing.assert_close(found_q, used_q, atol=1e-5, rtol=0)
    torch.testing.assert_close(HOT.probs(logged_probs.logits(logged)), p, atol=1e-5, rtol=0)
    assert logged_probs.check(logged) < 1e-5
    assert used_q.max() > used_q.mean() * 3  # these distributions are not flat


def test_rounds_logged_are_the_rounds_of_rows_that_go_on(tmp_path: Path) -> None:
    speculative = decoder("eagle3", Static(children=(2, 2)))
    log = log_rounds(speculative, PROMPTS, HOT, 40, tmp_path / "log", "d", seed=6, batch_size=4)
    answers = speculative.generate(PROMPTS, 40, *HOT[:3], seed=6)
    counts = torch.cat([part.prompt for part in log.parts()]).bincount(minlength=4).tolist()
    assert counts == [one.statistics.rounds for one in answers]
    assert sorted(counts)[0] < sorted(counts)[1]  # one row waits, ended, beside three that go on


def test_a_finished_log_is_opened_again_and_one_of_other_settings_is_made_anew(tmp_path: Path) -> None:
    speculative = decoder("medusa", Chain(length=2))
    first = log_rounds(speculative, PROMPTS, HOT, 8, tmp_path / "log", "d")
    before = speculative.target.forwards
    assert len(log_rounds(speculative, PROMPTS, HOT, 8, tmp_path / "log", "d")) == len(first)
    assert speculative.target.forwards == before
    log_rounds(speculative, PROMPTS, HOT, 8, tmp_path / "log", "d", seed=1)
    assert speculative.target.forwards > before


def test_shards_together_hold_what_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speculative = decoder("small_lm", Chain(length=2))
    whole = log_rounds(speculative, PROMPTS, HOT, 8, tmp_path / "one", "d", batch_size=1)
    monkeypatch.setattr(logging, "SHARD_BYTES", 1)
    many = log_rounds(speculative, PROMPTS, HOT, 8, tmp_path / "many", "d", batch_size=1)
    assert len(whole.info.shards) == 1 < len(many.info.shards)
    for name, value in joined(list(whole.parts())).tensors().items():
        assert torch.equal(joined(list(many.parts())).tensors()[name], value), name


def test_a_log_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(logging.RoundWriter, "finish", stopped)
    with pytest.raises(KeyboardInterrupt):
        log_rounds(decoder("medusa", Chain(length=2)), PROMPTS, HOT, 8, tmp_path / "log", "d")
    with pytest.raises(UserError, match=r"no index.json.*--replay-rules"):
        RoundLog.open(tmp_path / "log")


def test_distributions_of_another_drafter_are_refused(tmp_path: Path) -> None:
    cold = Sampling(temperature=0.3)
    log = log_rounds(decoder("medusa", Chain(length=2)), PROMPTS, cold, 16, tmp_path / "log", "d")
    with pytest.raises(UserError, match="another drafter or target"):
        LoggedProbs(log.info, drafter("medusa"), tiny_target(9).head).check(joined(list(log.parts())))


@pytest.mark.parametrize("shape", [Chain(length=3), Static(children=(3, 2)), Dynamic(depth=3, beam=2, top_k=3, nodes=7)])
@torch.inference_mode()
def test_states_of_deterministic_trees_give_the_logits_their_tokens_were_the_likeliest_of(shape: Any) -> None:
    for name in ("eagle3", "small_lm"):
        made, head = drafter(name), target().head
        prompts, lengths = torch.tensor([PROMPTS[0], PROMPTS[0]]), torch.tensor([6, 4])
        cache = target().new_cache(2, 40)
        read = target().prefill(cache, prompts, lengths, made.needs)
        state = made.begin(prompts, lengths, read.features, head, 40)
        plan = Plan(shape, "deterministic", keep_states=True)
        tree = made.propose(state, torch.tensor([4, 8]), plan, Sampling(), SeededRng(0, torch.arange(2)))
        assert tree.draft_states is not None and tree.probs_row is not None
        logits = made.readout(tree.draft_states, 0, head)
        ids = made.draft_ids if made.draft_ids is not None else torch.arange(VOCAB)
        for row in range(2):
            for node in range(1, tree.tokens.shape[1]):
                likeliest = ids[logits[row, tree.probs_row[row, node]].topk(3).indices].tolist()
                assert tree.tokens[row, node] in likeliest


def test_a_log_holds_states_and_not_distributions(tmp_path: Path) -> None:
    log = log_rounds(decoder("eagle3", Static(children=(3, 2))), PROMPTS, HOT, 12, tmp_path / "log", "d")
    rounds = joined(list(log.parts()))
    nodes, states = 1 + 3 + 6, 1 + 3
    assert rounds.last.shape[1:] == (nodes, 32)
    assert rounds.states is not None and rounds.states.shape[1:] == (states, 32)
    assert all(VOCAB not in value.shape[1:] for value in rounds.tensors().values())
