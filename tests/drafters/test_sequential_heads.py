"""Hydra and the MLP speculator: heads that read the tokens drafted before them, against their formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drafttrain.core.plan import Chain, Plan
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.hydra import Hydra
from drafttrain.drafters.last_state import SequentialHeads
from drafttrain.drafters.mlp_speculator import MLPSpeculator, MLPSpeculatorConfig
from drafttrain.export.mlp_speculator import stored_config, stored_key
from drafttrain.target.adapter import Target
from tests.families import stirred_drafter
from tests.tiny import packed, tiny_target

TEXT = [5, 9, 11, 30, 2, 7, 8, 12]


def stirred(family: str, target: Target, **options: object) -> SequentialHeads:
    drafter = stirred_drafter(family, target, **options)
    assert isinstance(drafter, SequentialHeads)
    return drafter


def hydra_plain(drafter: Hydra, last: Tensor, tokens: list[int], target: Target) -> Tensor:
    """The state of the last of len(tokens) heads, [D]."""
    read = [last]
    for token in tokens:
        embedded = target.head.embed(torch.tensor(token))
        read.append(embedded / (embedded.pow(2).mean() + torch.finfo(torch.float32).eps).sqrt())
    hidden = last
    for index, layer in enumerate(drafter.heads[len(tokens) - 1].layers):
        given = torch.cat(read) if index == 0 else hidden
        hidden = hidden + F.silu(layer.weight @ given + layer.bias)
    return hidden


def mlp_plain(drafter: MLPSpeculator, last: Tensor, tokens: list[int], target: Target) -> Tensor:
    K, r = drafter.config.heads, drafter.state_size
    w_s = 0.5 ** (1 / (2 * K))
    w_e = math.sqrt(1 - w_s**2)
    state = last if not drafter.config.scale_input else last / (last.square().mean() + 1e-6).sqrt() / math.sqrt(2)
    for level, token in enumerate(tokens):
        at = 0 if drafter.config.tie_weights else level
        projection = drafter.proj[min(level, len(drafter.proj) - 1)].weight
        z = drafter.emb[at].weight[token] * w_e * math.sqrt(r / 2)
        mixed = projection @ state * w_s + z
        normed = mixed / (mixed.square().mean() + 1e-6).sqrt() * drafter.ln[at].weight + drafter.ln[at].bias
        state = 0.5 * normed * (1 + torch.erf(normed / math.sqrt(2)))
    return state


PLAIN = {
    "hydra, four layers": ("hydra", {"layers": 4}, hydra_plain),
    "mlp, tied": ("mlp_speculator", {"inner_size": 24}, mlp_plain),
    "mlp, untied, scaled": ("mlp_speculator", {"tie_weights": False, "scale_input": True}, mlp_plain),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_state_is_what_the_formula_says_of_the_state_and_the_tokens_after_it(name: str) -> None:
    family, options, plain = PLAIN[name]
    target = tiny_target()
    drafter = stirred(family, target, heads=3, **options)
    batch = packed(target, [TEXT], [3])
    states = list(drafter.teacher_forced_states(batch, target.head, 3))
    last = batch.features["last_hidden_state"][0]
    for level, place in ((0, 0), (1, 2), (2, 3)):
        expected = plain(drafter, last[place], TEXT[place + 1 : place + 2 + level], target)
        torch.testing.assert_close(states[level][0, place], expected, atol=1e-4, rtol=1e-4)  # fp32 in another order


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_drafting_token_by_token_gives_the_states_of_training(name: str) -> None:
    family, options, _ = PLAIN[name]
    target = tiny_target()
    drafter = stirred(family, target, heads=3, **options)
    batch = packed(target, [TEXT], [3])
    features = {key: value[:, :4] for key, value in batch.features.items()}
    state = drafter.begin(torch.tensor([TEXT[:4]]), torch.tensor([4]), features, target.head, 32)
    plan = Plan(Chain(length=3), keep_states=True)
    tree = drafter.propose(state, torch.tensor([TEXT[4]]), plan, Sampling(), SeededRng(0, torch.arange(1)))
    drafted = packed(target, [[*TEXT[:4], *tree.tokens[0].tolist()]], [3])
    drafted.features["last_hidden_state"] = F.pad(batch.features["last_hidden_state"][:, :4], (0, 0, 0, 4))
    trained = list(drafter.teacher_forced_states(drafted, target.head, 3))
    assert tree.draft_states is not None
    for level in range(3):
        torch.testing.assert_close(tree.draft_states[0, level], trained[level][0, 3], atol=1e-5, rtol=1e-5)


def test_half_of_what_the_last_head_reads_is_still_the_targets_state() -> None:
    drafter = stirred("mlp_speculator", tiny_target(), heads=5)
    assert isinstance(drafter, MLPSpeculator)
    assert drafter.state_weight ** (2 * 5) == pytest.approx(0.5)


def test_tied_weights_are_one_of_each() -> None:
    target = tiny_target()
    tied, untied = (stirred("mlp_speculator", target, heads=4, tie_weights=tie) for tie in (True, False))
    for drafter, counts in ((tied, [1, 1, 2, 1]), (untied, [4, 4, 4, 4])):
        assert isinstance(drafter, MLPSpeculator)
        assert [len(part) for part in (drafter.emb, drafter.ln, drafter.proj, drafter.lm_heads)] == counts


@pytest.mark.parametrize("options", [{"own_heads": False}, {"output": {"kind": "low_rank"}}])
def test_an_mlp_speculator_without_an_output_matrix_of_its_own_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"output matrices of its own|leave own_heads out"):
        MLPSpeculatorConfig.model_validate(options)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"inner_size": 24}, {"tie_weights": False, "scale_input": True}], ids=["tied", "untied, scaled"])
def test_an_exported_mlp_speculator_says_in_the_engines_own_formula_what_it_drafts(options: dict[str, object]) -> None:
    """vLLM's: the projected state plus the embedding times the weights' ratio, a root-mean-square norm with scale and shift, GELU."""
    target = tiny_target()
    drafter = stirred("mlp_speculator", target, heads=3, **options)
    weights = {stored_key(key): value for key, value in drafter.state_dict().items()}
    config = stored_config(drafter, "float32")  # type: ignore[arg-type]
    batch = packed(target, [TEXT], [3])
    state = batch.features["last_hidden_state"][0, 2]
    if config["scale_input"]:
        state = state * torch.rsqrt(state.pow(2).mean() + 1e-6) / 2**0.5
    w_s = 0.5 ** (0.5 / config["n_predict"])
    ratio = math.sqrt((1 - w_s**2) * (config["inner_dim"] / 2)) / w_s
    for level, states in enumerate(drafter.teacher_forced_states(batch, target.head, 3)):
        at, projection = (0, min(level, 1)) if config["tie_weights"] else (level, level)
        mixed = weights[f"proj.{projection}.weight"] @ state + ratio * weights[f"emb.{at}.weight"][TEXT[3 + level]]
        normed = mixed * torch.rsqrt(mixed.pow(2).mean() + 1e-6)
        state = F.gelu(weights[f"ln.{at}.weight"] * normed + weights[f"ln.{at}.bias"])
        logits = drafter.readout(states[0, 2], level, target.head)
        torch.testing.assert_close(logits, weights[f"head.{at}.weight"] @ state, atol=1e-4, rtol=1e-4)  # fp32 in another order
