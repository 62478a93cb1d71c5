"""Several drafters in one loop keep the text what it is, whoever is chosen when: greedy identity and enumeration over random schedules, and
a drafter that was idle drafts as a fresh one would."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic, Plan, Static
from drafttrain.core.rng import SeededRng, branches
from drafttrain.core.sampling import Sampling
from drafttrain.core.types import Committed
from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.ngram import Ngram, NgramConfig
from drafttrain.drafters.pool import DrafterPool
from drafttrain.evaluation.runners import Contender
from drafttrain.runtime import generate
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.runtime.generate import DecodingLoop
from drafttrain.runtime.policy import Fixed
from drafttrain.runtime.pool import Routed
from drafttrain.runtime.router import Router, RouterConfig
from drafttrain.runtime.rows import Request
from drafttrain.target.adapter import Target
from drafttrain.verify import RULES
from tests.contract.tables import TableDrafter, TableTarget, probs
from tests.families import REPRESENTATIVES, TRAINABLE, tiny_drafter, trained_drafter
from tests.tiny import greedy_text, tiny_target

PROMPTS = [[5, 9, 11, 30, 5, 9, 11, 30, 5, 9], [1, 2, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
SHAPES = [Chain(length=3), Static(children=(2, 2)), Dynamic(depth=3, beam=3, top_k=3, nodes=9)]


class Scheduled(Router):
    """A random choice each round, plain decoding among them; or always the same schedule."""

    Config = RouterConfig

    def __init__(self, arms: int, seed: int, schedule: list[int] | None = None, counterfactual: bool = False) -> None:
        super().__init__(RouterConfig(name="scheduled", plain=True), [1.0] * arms, 3, np.random.default_rng(seed))
        self.schedule, self.counterfactual = schedule, counterfactual  # type: ignore[misc]

    def choose(self) -> int:
        return self.schedule.pop(0) if self.schedule else int(self.rng.integers(self.arms))


@lru_cache
def target() -> Target:
    return tiny_target()


@lru_cache
def trained(family: str) -> Drafter:
    return trained_drafter(family, target(), PROMPTS)


def pool(*families: str) -> DrafterPool:
    return DrafterPool([trained(family) for family in families or sorted(DRAFTERS)])


def rule(name: str) -> Any:
    return RULES[name](RULES[name].Config(name=name))


@pytest.mark.parametrize("families", [REPRESENTATIVES, pytest.param(tuple(DRAFTERS), marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("counterfactual", [False, True], ids=["observing", "scoring"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.shape)
def test_greedy_text_is_the_targets_own_whatever_is_chosen_row_by_row(
    shape: Any, counterfactual: bool, families: tuple[str, ...]
) -> None:
    drafters, length = pool(*families), 6 * len(families)  # long enough for each to have its turn
    trainable = [family for family in families if family in TRAINABLE]
    arms = len(drafters.members) + 1
    routed = Routed(drafters, lambda stream: Scheduled(arms, stream, counterfactual=counterfactual))
    loop = DecodingLoop(target(), routed, rule("greedy"), Fixed(Plan(shape)), Sampling(), seed=0)
    loop.start([Request(prompt, number, length) for number, prompt in enumerate(PROMPTS)])
    while not loop.done:
        loop.step()
    assert loop.written == [greedy_text(target().model, prompt, length) for prompt in PROMPTS]
    total = loop.statistics()[0] + loop.statistics()[1] + loop.statistics()[2]
    assert {label for label, counts in total.by_drafter.items() if counts["rounds"]} == {*drafters.labels, "plain"}
    assert sum(counts["rounds"] for counts in total.by_drafter.values()) == total.rounds
    assert sum(counts.get("calls", 0) for counts in total.by_drafter.values()) == total.drafter_calls
    assert all(total.by_drafter[label]["bytes"] > 0 for label in trainable)
    assert counterfactual or any(total.by_drafter[label]["catch_ups"] for label in trainable)


@pytest.mark.parametrize(
    ("name", "draws", "shape"),
    [
        ("rejection", "iid", Chain(length=1)),
        ("recursive", "deterministic", Static(children=(2,))),
        ("recursive", "without_replacement", Static(children=(2,))),
    ],
)
@pytest.mark.parametrize("arm", [0, 1, 2])
def test_every_schedule_keeps_the_targets_distribution(
    monkeypatch: pytest.MonkeyPatch, name: str, draws: Any, shape: Any, arm: int
) -> None:
    """Two rows that choose differently, the watched one each drafter in turn and none; exact enumeration of two tokens, across a switch."""
    vocab, watch = 2, 1
    table = TableTarget(vocab)
    out, total = np.zeros((vocab, vocab)), 0.0
    own = Sampling(1.0)

    def target_probs(*context: int) -> np.ndarray:
        return probs(1, context, vocab)

    for rng in branches(2, watch):
        monkeypatch.setattr(generate, "SeededRng", lambda seed, ids, rng=rng: rng)
        drafters = TablePool(vocab)
        schedules = {0: [0, 2], 1: [arm, 1 - arm if arm < 2 else 0]}
        routed = Routed(drafters, lambda stream, schedules=schedules: Scheduled(3, 0, schedules[stream]))  # type: ignore[arg-type]
        loop = DecodingLoop(table, routed, rule(name), Fixed(Plan(shape, draws, record_probs=True)), own, seed=0)  # type: ignore[arg-type]
        loop.start([Request([0, 1, 1], 0, 9), Request([1, 1], 1, 9)])
        while len(loop.written[watch]) < 3:
            loop.step()
        tokens = loop.written[watch][1:3]
        out[tokens[0], tokens[1]] += rng.probability
        total += rng.probability
    assert abs(total - 1) < 1e-9
    expected = np.array([[target_probs(1, 1, 0)[a] * target_probs(1, 1, 0, a)[b] for b in range(vocab)] for a in range(vocab)])
    assert np.abs(out - expected).sum() / 2 < 1e-6


class TablePool:
    """Two tables behind the members of a real pool."""

    def __init__(self, vocab: int) -> None:
        self.members = [TableDrafter(vocab, 2), TableDrafter(vocab, 5)]
        self.labels, self.needs = ("one", "other"), frozenset[str]()


@pytest.mark.parametrize("family", TRAINABLE)
def test_after_switches_a_drafters_distributions_are_those_of_a_fresh_prefill(family: str) -> None:
    """Each of two rows drafts with it, idles, drafts and idles again, at times of its own; then its draft is compared with one begun on the
    whole text. It is untrained, and the other one is right where it is wrong: what was accepted is not what it drafted."""
    drafter = tiny_drafter(family, target(), seed=3)
    helper = trained("small_lm" if family == "medusa" else "medusa")
    drafters, prompts = DrafterPool([drafter, helper]), [PROMPTS[0], PROMPTS[2]]
    for schedule in ([0, 1, 1, 0, 2, 1], [1, 0, 0, 1, 0, 0], [0, 0, 2, 2, 1, 0]):
        plans = {0: schedule, 1: schedule[::-1]}
        routed = Routed(drafters, lambda stream, plans=plans: Scheduled(3, 0, [*plans[stream]]))
        loop = DecodingLoop(target(), routed, rule("greedy"), Fixed(Plan(Chain(length=3))), Sampling(), seed=0)
        loop.start([Request(prompt, number, 40) for number, prompt in enumerate(prompts)])
        for _ in schedule:
            loop.step()
        texts = [prompt + written for prompt, written in zip(prompts, loop.written, strict=True)]
        plan, rng = Plan(Chain(length=3), record_probs=True), SeededRng(0, torch.arange(2))
        with torch.inference_mode():
            roots = torch.tensor([text[-1] for text in texts])
            ours = drafter.propose(routed.states[0], roots, plan, Sampling(), rng).draft_probs
            for row, text in enumerate(texts):
                fresh = begun(drafter, text[:-1])
                alone = drafter.propose(fresh, roots[row : row + 1], plan, Sampling(), rng).draft_probs
                assert ours is not None and alone is not None
                torch.testing.assert_close(ours[row], alone[0], atol=2e-5, rtol=1e-4)  # fp32 sums in another order


@pytest.mark.parametrize("proposed", [False, True], ids=["idle", "proposing"])
@pytest.mark.parametrize("family", sorted(DRAFTERS))
def test_teacher_forced_logits_are_what_running_the_drafter_there_gives(family: str, proposed: bool) -> None:
    drafter, text = trained(family), PROMPTS[0] + greedy_text(target().model, PROMPTS[0], 12)
    start, stop = 12, 17
    state = begun(drafter, text[:start])
    roots, rng = torch.tensor([text[start]]), SeededRng(0, torch.arange(1))
    with torch.inference_mode():
        if proposed:
            drafter.propose(state, roots, Plan(Chain(length=2)), Sampling(), rng)
        logits = drafter.teacher_forced_logits(state, committed(drafter, text, start, stop))[0]
        for place in range(start, stop):
            first = Plan(Chain(length=1), record_probs=drafter.gives_draft_probs)
            tree = drafter.propose(begun(drafter, text[:place]), torch.tensor([text[place]]), first, Sampling(), rng)
            ours, theirs = logits[place - start], drafter._first_logits(tree)[0]
            if family == "ngram" and (theirs == float("-inf")).all():
                assert (ours == float("-inf")).all()
            else:
                torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), atol=2e-5, rtol=1e-4)
        after = drafter.propose(state, torch.tensor([text[stop]]), Plan(Chain(length=3)), Sampling(), rng).tokens
        fresh = drafter.propose(begun(drafter, text[:stop]), torch.tensor([text[stop]]), Plan(Chain(length=3)), Sampling(), rng).tokens
    assert after.tolist() == fresh.tolist()  # it has observed them too


def begun(drafter: Drafter, text: list[int]) -> Any:
    tokens = torch.tensor([text])
    features = {name: value for name, value in encoded(tokens).items() if name in drafter.needs}
    with torch.inference_mode():
        return drafter.begin(tokens, torch.tensor([len(text)]), features, target().head, 90)


def committed(drafter: Drafter, text: list[int], start: int, stop: int) -> Committed:
    tokens = torch.tensor([text])
    features = {name: value[:, start:stop] for name, value in encoded(tokens).items() if name in drafter.needs}
    return Committed(tokens[:, start:stop], torch.tensor([stop - start]), features)


def encoded(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    position = torch.arange(tokens.shape[1])[None]
    return target().encode(tokens, position, torch.zeros_like(tokens), {"aux_hidden_states", "last_hidden_state"})


@pytest.mark.parametrize("router", ["fixed", "ucb", "exp3", "halving", "hedge"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_router_decodes_the_targets_text_and_names_who_drafted(router: str, temperature: float) -> None:
    runtime = {"drafters": ["ngram"], "router": {"name": router, "plain": True}, "shape": {"shape": "chain", "length": 3}}
    speculative = SpeculativeDecoder(target(), trained("medusa"), runtime)
    out = speculative.generate(PROMPTS, 20, temperature, seed=1, batch_size=2)
    again = speculative.generate(PROMPTS, 20, temperature, seed=1, batch_size=2)
    assert [one.tokens for one in out] == [one.tokens for one in again]  # a router's choices come from the seed too
    if temperature == 0:
        assert [one.tokens for one in out] == [greedy_text(target().model, prompt, 20) for prompt in PROMPTS]
    assert set(out[0].statistics.by_drafter) == {"medusa", "ngram", "plain"}
    facts = Contender("pool", speculative).facts(Sampling(temperature))
    assert facts.options is not None and facts.options["router"]["name"] == router
    assert (facts.options["drafters"], facts.draws) == (["ngram"], "deterministic")


def test_scoring_takes_no_further_target_forward() -> None:
    one = SpeculativeDecoder(target(), trained("medusa"), {"router": {"name": "hedge", "plain": True}})
    (made,) = one.generate([PROMPTS[0]], 20)
    assert made.statistics.target_forwards == made.statistics.rounds + 1


def test_impossible_pools_are_refused_by_one_line() -> None:
    other = Ngram(NgramConfig(), tiny_target(seed=3).shape)
    other.target = type(other.target)(**{**vars(other.target), "fingerprint": "another"})
    with pytest.raises(UserError, match="was made for target another"):
        DrafterPool([trained("medusa"), other])
    for runtime, said in (
        ({"router": "ucb"}, "a pool of one drafter leaves nothing to choose"),
        ({"drafters": ["medusa"]}, "is a family that is trained"),
        ({"drafters": ["ngram"], "hybrid": {}}, "runtime.hybrid drafts beside one drafter"),
        ({"drafters": ["ngram"], "prefetch": 2}, "runtime.prefetch"),
        ({"drafters": ["ngram"], "router": {"name": "ucb", "costs": [1.0]}}, "one number above 0 for each of the 2"),
        ({"drafters": ["ngram"], "router": {"name": "fixed", "arm": 4}}, "the pool's arms are 0 to 1"),
    ):
        with pytest.raises(UserError, match=said):
            SpeculativeDecoder(target(), trained("medusa"), runtime)
    with pytest.raises(UserError, match="there is no drafter to choose"):
        SpeculativeDecoder(target(), None, {"router": "ucb"})


def test_scores_go_on_from_request_to_request_and_from_process_to_process(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    runtime = {"drafters": ["ngram"], "router": {"name": "ucb", "remember": True, "scores": str(path)}}
    first = SpeculativeDecoder(target(), trained("medusa"), runtime)
    assert not path.exists()
    first.generate(PROMPTS, 16)
    rounds = [sum(json.loads(path.read_text())["state"]["count"])]
    for _ in first.stream(PROMPTS[0], 16):
        pass
    rounds.append(sum(json.loads(path.read_text())["state"]["count"]))
    SpeculativeDecoder(target(), trained("medusa"), runtime).generate(PROMPTS[:1], 16)
    rounds.append(sum(json.loads(path.read_text())["state"]["count"]))
    assert 0 < rounds[0] < rounds[1] < rounds[2]
    with pytest.raises(UserError, match="is of router 'ucb' over medusa, ngram"):
        SpeculativeDecoder(target(), trained("medusa"), {**runtime, "router": {**runtime["router"], "plain": True}})  # type: ignore[dict-item]
