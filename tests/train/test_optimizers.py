"""Muon for matrices beside AdamW for the rest, and a moving average that is what is kept."""

from __future__ import annotations

import copy

import pytest
import torch

from drafttrain.train.optimizers import Together, WeightAverage, is_hidden_matrix, new_optimizer
from tests.families import tiny_drafter
from tests.tiny import tiny_target

OPTIONS = ("muon", 1e-2, (0.9, 0.95), 0.1, 0.95)


def test_vectors_and_tables_over_a_vocabulary_stay_with_adamw() -> None:
    drafter = tiny_drafter("dspark", tiny_target())
    matrices = {name for name, weight in drafter.named_parameters() if is_hidden_matrix(weight, drafter)}
    assert {"fc.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight"} <= matrices
    assert not matrices & {"markov_w1.weight", "markov_w2.weight", "norm.weight", "mask_embedding", "confidence.weight"}
    optimizer = new_optimizer(drafter, *OPTIONS)
    assert isinstance(optimizer, Together)
    held = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert len(held) == len({id(weight) for weight in held}) == sum(weight.requires_grad for weight in drafter.parameters())


def test_each_part_steps_as_its_own_optimizer_would_at_the_rate_that_is_set() -> None:
    drafter = tiny_drafter("dflash", tiny_target())
    alone = copy.deepcopy(drafter)
    matrices = [weight for weight in alone.parameters() if is_hidden_matrix(weight, alone)]
    muon = torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizer = new_optimizer(drafter, *OPTIONS)
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    for weight, other in zip(drafter.parameters(), alone.parameters(), strict=True):
        weight.grad = torch.randn_like(weight)
        other.grad = weight.grad.clone()
    before = drafter.norm.weight.detach().clone()
    optimizer.step()
    muon.step()
    for weight, other in zip(drafter.parameters(), alone.parameters(), strict=True):
        assert is_hidden_matrix(weight, drafter) is False or weight.equal(other)
    assert (drafter.norm.weight - before).abs().max().item() == pytest.approx(3e-3, rel=1e-3)  # AdamW's first step is the rate


def test_a_state_that_is_loaded_goes_on_as_the_one_that_was_saved() -> None:
    def stepped(drafter: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for weight in drafter.parameters():
            weight.grad = torch.randn_like(weight)
        optimizer.step()

    drafter = tiny_drafter("dflash", tiny_target())
    optimizer = new_optimizer(drafter, *OPTIONS)
    stepped(drafter, optimizer, 1)
    resumed = copy.deepcopy(drafter)
    loaded = new_optimizer(resumed, *OPTIONS)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    stepped(drafter, optimizer, 2)
    stepped(resumed, loaded, 2)
    for ours, other in zip(drafter.parameters(), resumed.parameters(), strict=True):
        assert ours.equal(other)


def test_the_average_forgets_the_start_and_is_in_place_only_inside() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    average, expected = WeightAverage([weight], 0.5), 0.0
    for step, value in enumerate((1.0, 2.0, 3.0, 4.0), 1):
        weight.data.fill_(value)
        average.update()
        decay = min(0.5, step / (step + 9))
        expected = decay * expected + (1 - decay) * value
    with average.in_place():
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == 4.0
    other = WeightAverage([torch.nn.Parameter(torch.zeros(1))], 0.5)
    other.load_state_dict(average.state_dict())
    assert other.average[0].item() == pytest.approx(expected) and other.steps == 4
