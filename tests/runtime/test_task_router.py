"""Router `task`: prompts are told apart by the target's states, a request keeps its drafter, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.drafters.consensus import Consensus, ConsensusConfig
from drafttrain.runtime.classifier import fit_classifier, held_out_accuracy, load_classifier, prompt_states
from drafttrain.runtime.decoder import SpeculativeDecoder
from tests.tiny import greedy_text, tiny_target

LOW, HIGH = [[token, token + 1, token] for token in range(3, 18)], [[token, token - 1, token] for token in range(30, 45)]


def classifier(path: Path, fingerprint: str | None = None) -> Path:
    target = tiny_target()
    arms = torch.tensor([0] * len(LOW) + [1] * len(HIGH))
    fit_classifier(prompt_states(target, LOW + HIGH), arms, fingerprint or target.fingerprint).save(path)
    return path


def decoder(path: Path, threshold: float = 0.5) -> SpeculativeDecoder:
    target = tiny_target()
    router = {"name": "task", "classifier": str(path), "threshold": threshold}
    runtime = {"drafters": ["ngram"], "router": router, "shape": {"shape": "chain", "length": 3}}
    return SpeculativeDecoder(target, Consensus(ConsensusConfig(), target.shape), runtime)


def test_a_request_is_drafted_for_by_the_drafter_of_its_prompt_and_the_text_is_the_targets(tmp_path: Path) -> None:
    speculative = decoder(classifier(tmp_path / "tasks.safetensors"))
    prompts = [HIGH[3], [*LOW[4], 3], LOW[0]]  # a ragged batch
    out = speculative.generate(prompts, 12)
    assert [one.tokens for one in out] == [greedy_text(tiny_target().model, prompt, 12) for prompt in prompts]
    for one, own, other in zip(out, ("ngram", "consensus", "consensus"), ("consensus", "ngram", "ngram"), strict=True):
        assert one.statistics.by_drafter[own]["rounds"] == one.statistics.rounds
        assert not one.statistics.by_drafter[other].get("rounds")


def test_an_unsure_classifier_falls_back_to_the_first_drafter(tmp_path: Path) -> None:
    (out,) = decoder(classifier(tmp_path / "tasks.safetensors"), threshold=1.0).generate(HIGH[3], 12)
    assert out.statistics.by_drafter["consensus"]["rounds"] == out.statistics.rounds


def test_a_saved_classifier_says_the_same_and_prompts_that_were_held_out_are_told_apart(tmp_path: Path) -> None:
    target = tiny_target()
    states, arms = prompt_states(target, LOW + HIGH), torch.tensor([0] * len(LOW) + [1] * len(HIGH))
    fitted = fit_classifier(states, arms, target.fingerprint)
    loaded = load_classifier(classifier(tmp_path / "tasks.safetensors"))
    torch.testing.assert_close(loaded.probabilities(states), fitted.probabilities(states))
    assert held_out_accuracy(states, arms, "t") > 0.7
    shuffled = arms[torch.randperm(len(arms), generator=torch.Generator().manual_seed(0))]
    assert held_out_accuracy(states, shuffled, "t") < 0.8  # labels that say nothing teach nothing


def test_what_does_not_fit_is_refused_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "tasks.safetensors"
    with pytest.raises(UserError, match="no such file"):
        decoder(path)
    classifier(path, "another")
    with pytest.raises(UserError, match="states of target another"):
        decoder(path)
    target, states = tiny_target(), torch.randn(6, 8)
    fit_classifier(states, torch.tensor([0, 5] * 3), target.fingerprint).save(path)
    with pytest.raises(UserError, match="chooses arm 5"):
        decoder(path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(UserError, match=r"runtime\.router\.classifier"):
        decoder(path)
    with pytest.raises(UserError, match="nothing to tell apart"):
        fit_classifier(states, torch.zeros(6), "t")
    with pytest.raises(UserError, match="options without a default"):
        SpeculativeDecoder(target, Consensus(ConsensusConfig(), target.shape), {"drafters": ["ngram"], "router": "task"})
