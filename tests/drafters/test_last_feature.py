"""EAGLE-1 and MTP: a decoder layer over the target's last state, against their formulas written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drafttrain.core.layers import RMSNorm
from drafttrain.drafters.eagle import Eagle
from drafttrain.drafters.feature import LastFeatureDrafter
from drafttrain.drafters.mtp import MTP
from drafttrain.target.adapter import Target
from tests.families import stirred_drafter
from tests.tiny import packed, tiny_target

TEXT = [5, 9, 11, 30, 2, 7, 8, 12]


def stirred(family: str, target: Target, **options: object) -> LastFeatureDrafter:
    drafter = stirred_drafter(family, target, **options)
    assert isinstance(drafter, LastFeatureDrafter)
    return drafter


def layer_plain(drafter: LastFeatureDrafter, pairs: Tensor) -> Tensor:
    """Joined pairs [T, D] -> the layer's output at the last one [D], position by position."""
    layer, T = drafter.layer, len(pairs)
    read = torch.stack([layer.input_layernorm(pair) for pair in pairs])
    query, key, value = (layer.self_attn[name](read).unflatten(-1, (-1, drafter.head_dim)) for name in ("q_proj", "k_proj", "v_proj"))

    def turned(x: Tensor, place: int) -> Tensor:
        angle = place * drafter.rotary.frequency
        first, second = x.chunk(2, -1)
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    mixed = []
    for head in range(drafter.query_heads):
        own = head // drafter.groups
        asked = turned(query[-1, head], T - 1)
        scores = torch.stack([asked @ turned(key[place, own], place) for place in range(T)]) / drafter.head_dim**0.5
        mixed.append(scores.softmax(0) @ value[:, own])
    hidden = pairs[-1] + layer.self_attn["o_proj"](torch.cat(mixed))
    normed = layer.post_attention_layernorm(hidden)
    return hidden + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))


def joined_plain(drafter: LastFeatureDrafter, embedded: Tensor, feature: Tensor) -> Tensor:
    if isinstance(drafter, Eagle):
        return drafter.fc.weight @ torch.cat([embedded, feature]) + drafter.fc.bias
    assert isinstance(drafter, MTP)
    return drafter.eh_proj.weight @ torch.cat([drafter.enorm(embedded), drafter.hnorm(feature)])


@pytest.mark.parametrize("family", ["eagle", "mtp"])
def test_each_step_reads_the_target_state_or_its_own_output_beside_the_next_token(family: str) -> None:
    target = tiny_target()
    drafter = stirred(family, target)
    batch = packed(target, [TEXT], [3])
    states = list(drafter.teacher_forced_states(batch, target.head, 2))
    last = batch.features["last_hidden_state"][0]
    embedded = target.head.embed(torch.tensor(TEXT))
    pairs = [joined_plain(drafter, embedded[place + 1], last[place]) for place in range(4)]
    first = layer_plain(drafter, torch.stack(pairs))
    torch.testing.assert_close(states[0][0, 3], first, atol=1e-4, rtol=1e-4)  # fp32 in another order
    second = layer_plain(drafter, torch.stack([*pairs, joined_plain(drafter, embedded[5], first)]))
    torch.testing.assert_close(states[1][0, 3], second, atol=1e-4, rtol=1e-4)


def test_eagles_output_is_read_as_a_state_and_mtps_through_its_norm() -> None:
    target = tiny_target()
    state = torch.randn(target.shape.hidden_size)
    eagle, mtp = stirred("eagle", target), stirred("mtp", target)
    assert isinstance(mtp, MTP) and isinstance(mtp.norm, RMSNorm)
    torch.testing.assert_close(eagle.readout(state, 0, target.head), target.head.output @ state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mtp.readout(state, 0, target.head), target.head.output @ mtp.norm(state), atol=1e-5, rtol=1e-5)


def test_eagles_loss_is_the_distance_of_states_beside_that_of_distributions() -> None:
    """Both written out: labels are the answer's tokens whose predecessor is one too."""
    target = tiny_target()
    drafter = stirred("eagle", target, regression=2.0, loss={"forward_kl": 0.1})
    batch = packed(target, [TEXT], [3])
    loss = drafter.loss(batch, target.head)
    (states,) = drafter.teacher_forced_states(batch, target.head, 1)
    last, expected = batch.features["last_hidden_state"][0], 0.0
    for place in range(4, len(TEXT)):
        predicted, true = states[0, place - 2], last[place - 1]
        difference = (predicted - true).abs()
        smooth = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()
        p, q = (target.head.output @ predicted).log_softmax(-1), (target.head.output @ true).log_softmax(-1)
        expected += (2.0 * smooth + 0.1 * (q.exp() * (q - p)).sum()).item()
    assert float(loss.count) == len(TEXT) - 4
    assert float(loss.sum.detach()) == pytest.approx(expected, rel=1e-4)
