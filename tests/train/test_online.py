"""Online learning: texts stay exact, nothing is evaluated after it was learnt from, and a killed stream goes on to the same figures."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.losses import OnlineMix, forward_kl, jsd, reverse_kl, tempered
from drafttrain.core.plan import Chain, Plan, Static
from drafttrain.core.rng import branches
from drafttrain.core.sampling import Sampling
from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.base import Drafter
from drafttrain.evaluation.streams import StreamItem, StreamRow, pooled_tau
from drafttrain.runtime import generate
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.generate import DecodingLoop
from drafttrain.runtime.policy import Fixed
from drafttrain.runtime.rows import Request
from drafttrain.target.adapter import Target
from drafttrain.train.online import CHECKPOINT, METHODS, Learner, OnlineConfig, Position, StreamRun, check_online, merged, read_checkpoint
from drafttrain.train.transcripts import Recording, Transcript, training_batch
from tests.contract.tables import TableDrafter, TableTarget
from tests.contract.test_rules import made, target_law
from tests.families import REPRESENTATIVES, TRAINABLE, slow_beyond, tiny_drafter
from tests.tiny import fitted, greedy_text, tiny_target

PROMPTS = [[5, 9, 11], [1, 2, 3], [40, 41], [7, 7, 8], [12, 3], [50, 2, 9]]
NEW = 10
LEARNERS = [name for name in TRAINABLE if "loss" in DRAFTERS[name].Config.model_fields]
"""Families whose loss is a divergence that can be chosen; others are refused by name."""


@lru_cache
def target() -> Target:
    return tiny_target()


@lru_cache
def plain_texts() -> list[list[int]]:
    return [greedy_text(target().model, prompt, NEW) for prompt in PROMPTS]


def items() -> list[StreamItem]:
    return [StreamItem(str(place), "ab"[place // 3], prompt) for place, prompt in enumerate(PROMPTS)]


def stream(folder: Path, method: str = "osd", family: str = "eagle3", temperature: float = 0.0, **options: Any) -> StreamRun:
    config = OnlineConfig(**{"every": 2, "least": 1, "lr": 5e-3, "rows": 2, **options})
    decoder = SpeculativeDecoder(target(), tiny_drafter(family, target()), {"shape": Chain(length=3)})
    return StreamRun(decoder, items(), method, config, Sampling(temperature), NEW, folder, batch_size=2)


def figures(rows: list[StreamRow]) -> list[dict[str, Any]]:
    """Without times."""
    return [row.model_dump(exclude={"method", "decode_seconds", "learn_seconds"}) for row in rows]


def weights(run: StreamRun) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in run.learner.serving.parameters()]


@pytest.mark.parametrize("family", slow_beyond(LEARNERS, [name for name in REPRESENTATIVES if name in LEARNERS]))
@pytest.mark.parametrize("caches", ["rebuild", "age"])
def test_greedy_texts_are_the_targets_own_while_weights_are_swapped_within_requests(tmp_path: Path, family: str, caches: str) -> None:
    run = stream(tmp_path, "replay", family, rounds=2, caches=caches, every=6)
    rows = run.run()
    assert [run.answers[place] for place in range(len(PROMPTS))] == plain_texts()
    assert any(row.last_version > row.version for row in rows)  # weights did change in mid-request
    assert run.learner.updates > 2


@pytest.mark.parametrize("method", [*METHODS])
def test_every_method_keeps_the_texts_and_says_which_weights_drafted_them(tmp_path: Path, method: str) -> None:
    run = stream(tmp_path, method)
    before = weights(run)
    rows = run.run()
    assert [run.answers[place] for place in range(len(PROMPTS))] == plain_texts()
    learns = METHODS[method].learns != "nothing"
    assert [row.version for row in rows] == ([0, 0, 1, 1, 2, 2] if learns else [0] * 6)  # by weights that saw earlier chunks alone
    assert [row.last_version for row in rows] == [row.version for row in rows]
    changed = any(not torch.equal(one, other) for one, other in zip(before, weights(run), strict=True))
    assert changed is learns


def test_a_rows_version_is_that_of_the_weights_that_drafted_it_as_the_rounds_say(tmp_path: Path) -> None:
    run, seen = stream(tmp_path), []
    learn = run.learner.update

    def update() -> bool:
        seen.append([torch.equal(a, b) for a, b in zip(run.learner.serving.parameters(), start, strict=True)])
        return learn()

    start = weights(run)
    run.learner.update = update  # type: ignore[method-assign]
    run.run()
    assert all(seen[0])  # the first chunk was decoded before anything was learnt
    assert not all(seen[1])


@pytest.mark.parametrize("method", ["ensemble", "optimistic"])
def test_with_learning_rate_0_the_curve_is_flat_to_the_last_digit(tmp_path: Path, method: str) -> None:
    rows = stream(tmp_path / "learning", method, lr=0.0).run()
    frozen = stream(tmp_path / "frozen", "frozen").run()
    without_versions = [{**figure, "version": 0, "last_version": 0} for figure in figures(rows)]
    assert without_versions == figures(frozen)
    assert rows[-1].version > 0


class Killed(Exception):  # noqa: N818 (it is no mistake)
    pass


@pytest.mark.parametrize(
    ("method", "options"), [("optimistic", {}), ("osd", {"rounds": 2, "least": 12}), pytest.param("ensemble", {}, marks=pytest.mark.slow)]
)
def test_a_killed_stream_goes_on_to_the_same_rows_and_weights(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    whole = stream(tmp_path / "whole", method, **options)
    expected = whole.run()
    killed = stream(tmp_path / "killed", method, **options)

    def kill(position: Position) -> None:
        raise Killed

    with pytest.raises(Killed):
        killed.run(kill)
    cut_off = stream(tmp_path / "killed", method, **options)
    cut_off._save = lambda: (_ for _ in ()).throw(Killed())  # type: ignore[method-assign]
    with pytest.raises(Killed):  # in the middle of the second chunk: decoded and learnt, not saved
        cut_off.run()
    again = stream(tmp_path / "killed", method, **options)
    assert figures(again.run()) == figures(expected)
    assert all(torch.equal(one, other) for one, other in zip(weights(whole), weights(again), strict=True))
    assert again.learner.updates == whole.learner.updates > 1


def test_labels_that_are_too_few_wait_in_the_buffer_and_survive_a_kill(tmp_path: Path) -> None:
    run = stream(tmp_path, least=10_000)
    with pytest.raises(Killed):
        run.run(lambda position: (_ for _ in ()).throw(Killed()))
    again = stream(tmp_path, least=10_000)
    again._resume()
    assert again.learner.waiting == run.learner.waiting > 0
    assert [text.rejected for text in again.learner.buffer] == [text.rejected for text in run.learner.buffer]
    assert all(
        torch.equal(one.features(name), other.features(name))
        for one, other in zip(again.learner.buffer, run.learner.buffer, strict=True) for name in one.parts
    )  # fmt: skip


def test_when_the_stream_has_ended_no_token_of_it_is_on_disk_unless_a_log_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        stream(tmp_path / "a").run(lambda position: (_ for _ in ()).throw(Killed()))
    assert read_checkpoint(tmp_path / "a" / CHECKPOINT)["learner"]["memory"]  # a run that is not over needs them
    stream(tmp_path / "a").run()
    learner = read_checkpoint(tmp_path / "a" / CHECKPOINT)["learner"]
    assert learner["buffer"] == learner["memory"] == []
    assert not (tmp_path / "a" / "log").exists()


def transcripts(drafter: Drafter, new_tokens: int = NEW) -> list[Transcript]:
    """Of greedy decoding."""
    decoder = SpeculativeDecoder(target(), drafter, {"shape": Chain(length=3)})
    rule, plan = decoder.runtime.fitted(Sampling(), decoder.drafter)
    proposer = Recording(drafter)
    loop = DecodingLoop(target(), proposer, rule, Fixed(plan), Sampling(), 0)
    requests = [Request(prompt, place, new_tokens) for place, prompt in enumerate(PROMPTS[:3])]
    for _ in generate.served(loop, requests, 2):
        pass
    for place, text in proposer.texts.items():
        text.tokens = text.tokens[: text.prompt] + loop.written[place]
    return [proposer.texts[place] for place in range(3)]


def test_recorded_features_are_those_of_a_plain_pass_over_the_text() -> None:
    for text in transcripts(tiny_drafter("eagle3", target())):
        tokens = torch.tensor([text.tokens])
        order = torch.arange(len(text.tokens))[None]
        theirs = target().encode(tokens, order, order * 0, {"aux_hidden_states", "last_hidden_state"})
        for name in text.parts:
            gap = (text.features(name)[:-1] - theirs[name][0, :-1]).abs().max()
            assert gap < 1e-4  # fp32, tokens in other batches


def test_rejected_positions_are_those_where_the_drafter_alone_would_have_gone_on_otherwise() -> None:
    drafter = tiny_drafter("eagle3", target())
    for text in transcripts(drafter):
        assert text.rejected
        assert all(text.prompt < position < len(text.tokens) for position in text.rejected)
        batch = training_batch([text], sorted(text.parts), 1, torch.device("cpu"))
        with torch.no_grad():
            guesses = drafter.teacher_forced_drafts(batch, target().head, 3)[0]
        for position in text.rejected:  # drafted from one of the three roots before it
            assert any(int(guesses[position - 2 - depth, depth]) != text.tokens[position] for depth in range(3) if position - 2 >= depth)


def test_only_rejected_labels_move_the_weights() -> None:
    drafter = tiny_drafter("eagle3", target())
    [text, *_] = transcripts(drafter)
    batch = training_batch([text], sorted(text.parts), 1, torch.device("cpu"))
    assert sorted(batch.labels().place.tolist()) == sorted(text.rejected)
    text.rejected = []
    empty = training_batch([text], sorted(text.parts), 1, torch.device("cpu"))
    loss = drafter.loss(empty, target().head)
    loss.sum.backward()
    assert float(loss.count) == 0
    assert all(weight.grad is None or not weight.grad.any() for weight in drafter.parameters())


def test_a_rebuilt_state_drafts_what_a_fresh_one_would() -> None:
    drafter = tiny_drafter("eagle3", target())
    decoder = SpeculativeDecoder(target(), drafter, {"shape": Chain(length=3)})
    rule, plan = decoder.runtime.fitted(Sampling(), drafter)
    proposer = Recording(drafter)
    loop = DecodingLoop(target(), proposer, rule, Fixed(plan), Sampling(), 0)
    loop.start([Request(PROMPTS[0], 0, 30), Request(PROMPTS[2], 1, 30)])
    for _ in range(4):
        loop.step()
    other = tiny_drafter("eagle3", target(), seed=5)
    drafter.load_state_dict(other.state_dict())
    proposer.rebuild(target().head)
    assert loop.rows is not None
    with torch.inference_mode():  # as the loop's own rounds
        tree = proposer.propose(loop.rows, plan, Sampling())
    for row, place in enumerate(proposer.places):
        text = proposer.texts[place]
        tokens, size = torch.tensor([text.tokens]), torch.tensor([len(text.tokens)])
        features = {name: text.features(name)[None] for name in drafter.needs}
        with torch.inference_mode():
            state = other.begin(tokens, size, features, target().head, 60)
            fresh = other.propose(state, loop.rows.roots[row : row + 1], plan, Sampling(), loop.rows.rng)
        assert fresh.tokens[0].tolist() == tree.tokens[row].tolist()


@pytest.mark.parametrize(
    ("rule", "shape", "draws"),
    [("rejection", Chain(length=1), "iid"), ("recursive", Static(children=(2,)), "without_replacement")],
)
def test_the_targets_distribution_comes_out_across_a_swap_in_mid_request(
    monkeypatch: pytest.MonkeyPatch, rule: str, shape: Any, draws: Any
) -> None:
    """Three tokens over two rounds, with other weights in the second: summed over every branch of the real rounds."""
    vocab, prompt, sampling = 2, [1, 1], Sampling(temperature=1.0)
    out = np.zeros((vocab, vocab))
    total = 0.0
    for rng in branches(1, 0):
        monkeypatch.setattr(generate, "SeededRng", lambda seed, ids, rng=rng: rng)
        table, drafter = TableTarget(vocab), TableDrafter(vocab, 2)
        drafter.teacher_needs = frozenset()  # type: ignore[attr-defined]
        proposer = Recording(drafter)  # type: ignore[arg-type]
        loop = DecodingLoop(table, proposer, made(rule), Fixed(Plan(shape, draws, record_probs=True)), sampling, seed=0)  # type: ignore[arg-type]
        loop.start([Request(prompt, 0, 3)])
        loop.step()
        drafter.seed, drafter.weight_version = 7, 1
        while not loop.done:
            loop.step()
        assert proposer.texts[0].versions in ([0], [0, 1])
        out[tuple(loop.written[0][1:3])] += rng.probability
        total += rng.probability
    assert abs(total - 1) < 1e-9
    root = [*prompt, 0]
    after = np.array([target_law(TableTarget(vocab), [*root, first], sampling) for first in range(vocab)])
    expected = target_law(TableTarget(vocab), root, sampling)[:, None] * after
    assert np.abs(out - expected).sum() / 2 < 1e-6


def test_learning_from_its_rejections_a_drafter_is_accepted_more(tmp_path: Path) -> None:
    """Twice the same prompts: the second time the drafter has learnt from the first."""
    decoder = SpeculativeDecoder(target(), tiny_drafter("eagle3", target()), {"shape": Chain(length=3)})
    asked = [StreamItem(f"{turn}-{place}", "a", prompt) for turn in range(2) for place, prompt in enumerate(PROMPTS)]
    config = OnlineConfig(every=6, least=1, lr=5e-3, rows=2, epochs=10)
    rows = StreamRun(decoder, asked, "osd", config, Sampling(), NEW, tmp_path, batch_size=3).run()
    first, second = sum(row.rounds for row in rows[:6]), sum(row.rounds for row in rows[6:])
    assert second < 0.8 * first


SHIFTED = [[20, 21], [33, 4, 18], [60, 1], [14, 15, 16], [27, 28], [9, 55, 3]]


@lru_cache
def drafter_of(first: bool) -> Drafter:
    """Trained offline on the target's texts of one kind of prompts."""
    return fitted(tiny_drafter("eagle3", target()), target(), PROMPTS if first else SHIFTED, NEW, 40)


def tau_at_the_end(folder: Path, method: str, drafter: Drafter, **options: Any) -> float:
    """Accepted length of the last pass over the second kind, in a stream of the first kind once and then the second five times."""
    turns = [("a", PROMPTS), *[("b", SHIFTED)] * 5]
    asked = [
        StreamItem(f"{turn}-{place}", task, prompt) for turn, (task, prompts) in enumerate(turns) for place, prompt in enumerate(prompts)
    ]
    config = OnlineConfig(**{"every": 6, "least": 1, "rows": 2, "lr": 5e-3, "epochs": 3, "replay_share": 0.0, **options})
    decoder = SpeculativeDecoder(target(), copy.deepcopy(drafter), {"shape": Chain(length=3)})
    return pooled_tau(StreamRun(decoder, asked, method, config, Sampling(), NEW, folder, batch_size=6).run()[-6:])


@pytest.mark.slow
def test_after_a_shift_half_of_the_gap_to_offline_training_is_recovered(tmp_path: Path) -> None:
    frozen = tau_at_the_end(tmp_path / "frozen", "frozen", drafter_of(True))
    offline = tau_at_the_end(tmp_path / "offline", "frozen", drafter_of(False))
    for method in ("osd", "replay", "plain", "ensemble", "optimistic"):
        options = {"optimistic": {"lr": 0.05}, "ensemble": {"lr": 2e-3}}.get(method, {})
        online = tau_at_the_end(tmp_path / method, method, drafter_of(True), **options)
        assert online > frozen + 0.5 * (offline - frozen), (method, frozen, online, offline)


# -- the mathematics --------------------------------------------------------------------------------------------------------------------


def test_jensen_shannon_is_symmetric_and_agrees_with_its_definition() -> None:
    p, q = (torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)).softmax(-1) for seed in (1, 2))
    middle = (p + q) / 2
    assert torch.allclose(jsd(p, q.log()), jsd(q, p.log()), atol=1e-6)
    assert torch.allclose(jsd(p, q.log()), 0.5 * forward_kl(p, middle.log()) + 0.5 * reverse_kl(middle, q.log()), atol=1e-6)
    assert torch.allclose(jsd(p, p.log()), torch.zeros(5), atol=1e-6)


def test_distributions_are_tempered_as_their_logits_would_be() -> None:
    p, q = (torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    found_p, found_q = tempered(p.softmax(-1), q.log_softmax(-1), 0.7)
    assert torch.allclose(found_p, (p / 0.7).softmax(-1), atol=1e-6)
    assert torch.allclose(found_q, (q / 0.7).log_softmax(-1), atol=1e-5)
    mix = OnlineMix(forward_kl=1, temperature=0.7)
    assert not mix.only_forward_kl
    assert OnlineMix().only_forward_kl


def test_merging_equal_learners_is_the_identity_and_weights_follow_losses() -> None:
    weight = torch.randn(4, 4)
    assert torch.equal(merged([weight, weight, weight], [1 / 3] * 3), weight)
    drafter = tiny_drafter("medusa", target())
    learner = Learner(drafter, target().head, METHODS["ensemble"], OnlineConfig(), Sampling(), 3)
    assert learner.weights == [1 / 3] * 3
    learner._merge([1.0, 2.0, 3.0])
    assert abs(sum(learner.weights) - 1) < 1e-12
    assert learner.weights == sorted(learner.weights, reverse=True)


def test_the_momentum_of_optimistic_updates_lasts_and_the_moments_of_plain_ones_do_not() -> None:
    lasting = {}
    for method in ("optimistic", "plain"):
        drafter = tiny_drafter("eagle3", target())
        learner = Learner(drafter, target().head, METHODS[method], OnlineConfig(least=1), Sampling(), 3)
        before = learner.optimizers[0]
        learner.add(transcripts(drafter)[0])
        assert learner.update()
        lasting[method] = learner.optimizers[0] is before and bool(before.state)
    assert lasting == {"optimistic": True, "plain": False}


# -- bad input --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "runtime", "said"),
    [
        ({"temperature": 0}, {}, "online.temperature 0"),
        ({"methods": ("osd", "osd")}, {}, "name each method once"),
        ({"methods": ("ensemble",), "rates": (1.0,)}, {}, "two learning rates or more"),
        ({}, {"hybrid": {"name": "hybrid"}}, "leave runtime.hybrid out"),
        ({}, {"drafters": ("ngram",)}, "serves one drafter"),
        ({}, {"policy": "adaptive"}, "use fixed or confidence"),
    ],
)
def test_what_cannot_be_learnt_online_is_refused(options: dict[str, Any], runtime: dict[str, Any], said: str) -> None:
    drafter = tiny_drafter("eagle3", target())
    given = {name: ({} if name == "hybrid" else value) for name, value in runtime.items()}
    with pytest.raises(UserError, match=said):
        check_online(OnlineConfig(**options), RuntimeConfig(**given), Sampling(), type(drafter))


def test_families_without_a_choice_of_divergence_are_refused() -> None:
    for name in sorted(set(DRAFTERS) - set(LEARNERS)):
        with pytest.raises(UserError, match=r"no weights|loss of its own"):
            check_online(OnlineConfig(), RuntimeConfig(), Sampling(), DRAFTERS[name])


def test_a_folder_of_another_stream_is_refused(tmp_path: Path) -> None:
    stream(tmp_path).run()
    with pytest.raises(UserError, match="another stream"):
        stream(tmp_path, lr=1e-3).run()


def test_the_learner_leaves_the_drafters_configuration_as_it_was() -> None:
    drafter = tiny_drafter("eagle3", target())
    before = copy.deepcopy(drafter.config)
    Learner(drafter, target().head, METHODS["osd"], OnlineConfig(divergence="tv"), Sampling(), 3)
    assert drafter.config == before
