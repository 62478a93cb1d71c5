"""Decision models: what they learn from, and what the policy does with them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic, Plan, Static
from drafttrain.core.sampling import Sampling
from drafttrain.runtime.decision import load_decision
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.policy import DecisionConfig, Fixed
from drafttrain.runtime.rounds import LoggedProbs, RoundLog, joined, log_rounds
from drafttrain.train.decision import DecisionTraining, Fitted, examples, fit
from drafttrain.train.heads import auroc
from tests.contract import test_rules as contract
from tests.runtime.test_rounds import PROMPTS, decoder, drafter, target
from tests.tiny import greedy_text

FOLDER = TemporaryDirectory()  # trained models, for all tests
WARM = Sampling(temperature=0.8)
SHAPES = {"chain": Chain(length=3), "static": Static(children=(3, 2)), "dynamic": Dynamic(depth=3, beam=2, top_k=3, nodes=7)}


def logged(folder: Path, family: str, shape: Any, sampling: Sampling, new: int = 30, times: int = 1) -> tuple[RoundLog, LoggedProbs]:
    log = log_rounds(decoder(family, shape), PROMPTS * times, sampling, new, folder, "d", states=True)
    return log, LoggedProbs(log.info, drafter(family), target().head)


@pytest.mark.parametrize("sampling", [WARM, Sampling()], ids=["sampled", "greedy"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_soft_labels_are_acceptance_probabilities_and_hard_ones_the_targets_argmax(shape: Any, sampling: Sampling, tmp_path: Path) -> None:
    log, logged_probs = logged(tmp_path, "small_lm", shape, sampling)
    rounds = joined(list(log.parts()))
    soft, hard = examples(log, logged_probs, "soft"), examples(log, logged_probs, "hard")
    tree, target_logits = logged_probs.tree(rounds), logged_probs.logits(rounds)
    p, own = sampling.probs(target_logits), logged_probs.drafter_logits(rounds)
    at = 0
    for row in range(len(rounds)):
        for node in range(1, rounds.tokens.shape[1]):
            if not rounds.live[row, node]:
                continue
            parent, token, source = (int(each[row, node]) for each in (rounds.parents, rounds.tokens, rounds.probs_row))
            q = 1.0 if tree.draws == "deterministic" else float(tree.draft_probs[row, source, token])
            assert float(soft.label[at]) == pytest.approx(min(1.0, float(p[row, parent, token]) / q), abs=1e-4)
            assert float(hard.label[at]) == float(target_logits[row, parent].argmax() == token)
            probs = own[row, source].softmax(-1)
            assert float(hard.inputs[at, 0]) == pytest.approx(float(-(probs * probs.log()).nansum()), abs=1e-4)
            assert float(hard.inputs[at, 1]) == pytest.approx(float(probs.max()), abs=1e-5)
            assert torch.equal(soft.inputs[at], torch.cat([hard.inputs[at], rounds.states[row, source]]))
            assert int(soft.prompt[at]) == int(rounds.prompt[row])
            at += 1
    assert at == len(soft.label) == len(hard.label)
    assert 0 < float(hard.label.mean()) < 1


def test_auroc_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    score, label = rng.integers(0, 6, 40).astype(float), rng.random(40)
    pairs = [(label[i] * (1 - label[j]), (score[i] > score[j]) + 0.5 * (score[i] == score[j])) for i in range(40) for j in range(40)]
    weight = sum(w for w, _ in pairs)
    assert auroc(score, label) == pytest.approx(sum(w * right for w, right in pairs) / weight)
    assert auroc(np.array([0.1, 0.9]), np.array([0.0, 1.0])) == 1.0
    assert auroc(np.zeros(4), np.array([0.0, 1.0, 1.0, 0.0])) == 0.5


@lru_cache
def trained(labels: Any, temperature: float = 0.0) -> tuple[Fitted, Path]:
    folder = Path(FOLDER.name) / f"{labels}-{temperature}"
    log, logged_probs = logged(
        folder / "log", "small_lm, two layers", Chain(length=4), Sampling(temperature), new=40, times=1 if temperature == 0 else 12
    )
    fitted = fit(log, logged_probs, DecisionTraining(labels=labels, epochs=20, held_out=0.3))
    fitted.model.save(folder / "model")
    return fitted, folder / "model"


@pytest.mark.parametrize(("labels", "floor"), [("soft", 0.54), ("hard", 0.62)])  # a soft label of 0.5 is a toss even for the best score
def test_a_trained_model_tells_what_will_stand_on_prompts_it_has_not_seen(labels: str, floor: float) -> None:
    fitted, _ = trained(labels, 0.8)
    assert fitted.auroc > floor
    assert fitted.auroc > fitted.entropy_auroc
    assert fitted.held_out > 100
    if labels == "soft":
        assert fitted.loss < fitted.prior_loss


def test_hard_examples_are_balanced_and_the_best_epoch_is_kept(tmp_path: Path) -> None:
    log, logged_probs = logged(tmp_path, "small_lm", Chain(length=3), Sampling())
    one = fit(log, logged_probs, DecisionTraining(labels="hard", epochs=1, held_out=0.3))
    many = fit(log, logged_probs, DecisionTraining(labels="hard", epochs=40, lr=0.05, held_out=0.3))  # it overfits
    whole = examples(log, logged_probs, "hard")
    assert one.trained_on % 2 == 0
    assert one.trained_on < len(whole.label) - one.held_out
    assert many.loss <= fit(log, logged_probs, DecisionTraining(labels="hard", epochs=1, lr=0.05, held_out=0.3)).loss


def text_and_counts(threshold: float, labels: str, shape: Any, **more: Any) -> tuple[list[list[int]], int, int]:
    policy = DecisionConfig(path=str(trained(labels)[1]), threshold=threshold, **more)
    answers = [decoder("small_lm", shape, policy=policy).generate(prompt, max_new_tokens=30)[0] for prompt in PROMPTS]
    counts = [(one.statistics.rounds, one.statistics.drafter_calls) for one in answers]
    return [one.tokens for one in answers], sum(rounds for rounds, _ in counts), sum(calls for _, calls in counts)


@pytest.mark.parametrize("labels", ["soft", "hard"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_policy_changes_how_much_is_drafted_and_never_the_text(labels: str, shape: Any) -> None:
    expected = [greedy_text(target().model, prompt, 30) for prompt in PROMPTS]
    counts = [text_and_counts(threshold, labels, shape) for threshold in (0.0, 0.5, 1.0)]
    assert all(text == expected for text, *_ in counts)
    whole = [decoder("small_lm", shape).generate(prompt, max_new_tokens=30)[0].statistics for prompt in PROMPTS]
    prefills = len(PROMPTS)
    assert counts[0][1:] == (sum(one.rounds for one in whole), sum(one.drafter_calls for one in whole))
    assert counts[2][2] == counts[2][1] + prefills  # one call a round: a level is always drafted
    assert counts[0][2] / counts[0][1] > counts[1][2] / counts[1][1] > counts[2][2] / counts[2][1]


def test_levels_that_are_always_drafted() -> None:
    _, rounds, calls = text_and_counts(1.0, "soft", Chain(length=4), at_least=3)
    assert calls == 3 * rounds + len(PROMPTS)


@pytest.mark.parametrize("draws", ["deterministic", "iid", "without_replacement"])
@pytest.mark.parametrize(("rule", "tree"), [("rejection", "1-1"), ("recursive", "1-1"), ("recursive", "2-1")])
def test_ending_a_tree_by_the_distribution_it_was_drawn_from_keeps_the_targets_distribution(
    monkeypatch: pytest.MonkeyPatch, draws: Any, rule: str, tree: str
) -> None:
    ended: list[bool] = []

    def enough(level: int, logits: torch.Tensor, states: torch.Tensor | None) -> torch.Tensor:
        ended.append(bool((logits.amax((1, 2)).exp() > 0.6).all()))
        return logits.amax((1, 2)).exp() > 0.6

    monkeypatch.setattr(contract, "Fixed", lambda plan: Fixed(replace(plan, enough=enough)))
    for seed in (2, 3, 4):
        given = (monkeypatch, rule, draws, contract.TREES[tree], Sampling(1.0), 3)
        assert contract.distance(contract.two_tokens(*given, seed=seed)) < 1e-6
    assert len(set(ended)) == 2


def test_a_model_for_other_sampling_or_of_another_drafter_or_none_is_refused(tmp_path: Path) -> None:
    _, folder = trained("soft")
    runtime = RuntimeConfig(shape=Chain(length=3), policy=DecisionConfig(path=str(folder)))
    with pytest.raises(UserError, match=r"learnt from rounds with temperature 0\.0.*decoding uses temperature 0\.7"):
        runtime.fitted(Sampling(0.7))
    with pytest.raises(UserError, match="reads states of 32 numbers, this drafter gives 16"):
        SpeculativeDecoder(target(), drafter("small_lm, narrow"), runtime).generate(PROMPTS[0], max_new_tokens=8)
    with pytest.raises(UserError, match=r"no config\.json there"):
        RuntimeConfig(policy=DecisionConfig(path=str(tmp_path))).fitted(Sampling())
    with pytest.raises(UserError, match="options without a default"):
        RuntimeConfig(policy="decision").planner(Plan(Chain(length=2)))
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="truncated or corrupt"):
        load_decision(folder)
    trained.cache_clear()
