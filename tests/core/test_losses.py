"""Distances between distributions, and their sum in chunks beside the plain one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drafttrain.core.config import parse
from drafttrain.core.errors import UserError
from drafttrain.core.losses import (
    LossMix,
    OutputLayer,
    confidence_bce,
    decay_weights,
    distill,
    distill_plain,
    dpace_weights,
    forward_kl,
    l1,
    label_cross_entropy,
    lk_hybrid,
    nla,
    overlap,
    reverse_kl,
    soft_cross_entropy,
    summed_in_chunks,
    tv,
)
from drafttrain.core.vocab import draft_index

STEPS, ROWS, SIZE, VOCAB = 3, 23, 6, 40
MIXES = [
    LossMix(),
    LossMix(forward_kl=0.5),
    LossMix(forward_kl=0, reverse_kl=1),
    LossMix(forward_kl=0, tv=1),
    LossMix(forward_kl=0, ce=1),
    LossMix(forward_kl=0, l1=0.9, ce=0.1),
    LossMix(forward_kl=0, nla=1),
    LossMix(forward_kl=0, lk_hybrid=1),
    LossMix(forward_kl=0.3, reverse_kl=0.2, tv=0.7, ce=0.1, l1=0.2, nla=0.4, lk_hybrid=0.6),
]
SUBSET = torch.tensor([0, 3, 4, 9, 11, 17, 18, 25, 33, 39])


class Head:
    """A target's output head."""

    def __init__(self) -> None:
        self.weight = torch.randn(VOCAB, SIZE)
        self.asked = 0

    def logits(self, last: Tensor, rows: Tensor | None = None) -> Tensor:
        self.asked += len(last)
        weight = self.weight if rows is None else self.weight[rows]
        return F.linear(last.to(weight.dtype), weight)


def capped(logits: Tensor) -> Tensor:
    return 2 * torch.tanh(logits / 2)


def distributions() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 9).softmax(-1), torch.randn(5, 9).log_softmax(-1)


def given(
    vocab: Tensor | None, finish: Callable[[Tensor], Tensor] | None = None, biased: bool = False, layers: int = 1
) -> dict[str, Any]:
    """Arguments of `distill` that ask for every gradient."""
    torch.manual_seed(1)
    width = VOCAB if vocab is None else len(vocab)
    output_layers = [
        OutputLayer(torch.randn(width, SIZE).requires_grad_(), torch.randn(width).requires_grad_() if biased else None, finish)
        for _ in range(layers)
    ]
    return {
        "hidden": [torch.randn(ROWS, SIZE).requires_grad_() for _ in range(STEPS)], "output_layers": output_layers,
        "weight": torch.rand(STEPS, ROWS) * (torch.rand(STEPS, ROWS) > 0.2), "teacher": torch.randn(ROWS, SIZE), "head": Head(),
        "labels": torch.randint(0, VOCAB, (ROWS,)), "vocab": vocab,
    }  # fmt: skip


def gradients(loss: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    layers = [tensor for output_layer in arguments["output_layers"] for tensor in output_layer[:2] if tensor is not None]
    return list(torch.autograd.grad(loss, [*arguments["hidden"], *layers]))


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("vocab", [None, SUBSET], ids=["whole", "reduced"])
@pytest.mark.parametrize(("finish", "biased"), [(None, False), (capped, True)], ids=["linear", "capped and biased"])
@pytest.mark.parametrize("layers", [1, STEPS], ids=["one layer", "a layer each"])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunked_value_hits_and_gradients_equal_the_plain_ones(
    mix: LossMix, vocab: Tensor | None, finish: Callable[[Tensor], Tensor] | None, biased: bool, layers: int, chunk: int
) -> None:
    arguments = given(vocab, finish, biased, layers)
    expected, hits = distill_plain(**arguments, mix=mix)
    found, found_hits = distill(**arguments, mix=mix, chunk=chunk)
    torch.testing.assert_close(found, expected)
    assert found_hits.equal(hits)
    for ours, plain in zip(gradients(3 * found, arguments), gradients(3 * expected, arguments), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)  # sums in another order


def test_the_target_gives_each_label_its_distribution_once_for_all_steps() -> None:
    arguments = given(None)
    distill(**arguments, mix=LossMix(), chunk=8)
    assert arguments["head"].asked == ROWS


def test_frozen_output_matrices_get_no_gradient() -> None:
    arguments = given(None)
    (output_layer,) = arguments["output_layers"]
    arguments["output_layers"] = [OutputLayer(output_layer.weight.detach())]
    distill(**arguments, mix=LossMix(), chunk=8)[0].backward()
    assert output_layer.weight.grad is None
    assert all(hidden.grad.abs().sum() > 0 for hidden in arguments["hidden"])


@pytest.mark.parametrize("mix", [MIXES[0], MIXES[-1]], ids=str)
def test_autocast_computes_matrices_in_bfloat16_and_stays_near_the_exact_gradient(mix: LossMix) -> None:
    arguments = given(None)
    exact = gradients(distill_plain(**arguments, mix=mix)[0], arguments)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = distill(**arguments, mix=mix, chunk=8)
    for ours, expected in zip(gradients(loss, arguments), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - expected).norm() < 0.03 * expected.norm()  # bf16 has 8 bits: about 0.4 % an element


class Widest(TorchDispatchMode):
    """Remembers the most elements any tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_no_more_than_a_chunk_of_logits_ever_stands_in_memory() -> None:
    arguments = given(None)
    with Widest() as seen:
        distill(**arguments, mix=MIXES[-1], chunk=8)[0].backward()
    assert seen.elements <= 8 * 256  # `likeliest` pads to blocks of 256


def test_no_labels_give_no_loss_and_no_gradient() -> None:
    arguments = given(None)
    arguments |= {name: arguments[name][:0] for name in ("teacher", "labels")} | {"weight": arguments["weight"][:, :0]}
    hidden = arguments["hidden"][0]
    loss, hits = distill(**{**arguments, "hidden": [hidden[:0]] * STEPS}, mix=MIXES[-1], chunk=8)
    assert (float(loss.detach()), hits.tolist()) == (0, [0] * STEPS)
    loss.backward()
    assert not hidden.grad.any()


def test_forward_kl_equals_the_library() -> None:
    p, log_q = distributions()
    torch.testing.assert_close(forward_kl(p, log_q), F.kl_div(log_q, p, reduction="none").sum(-1))
    torch.testing.assert_close(soft_cross_entropy(p, log_q), F.cross_entropy(log_q, p, reduction="none"))


def test_reverse_kl_is_the_forward_one_with_roles_exchanged_and_finite_on_zeros() -> None:
    p, log_q = distributions()
    torch.testing.assert_close(reverse_kl(p, log_q), F.kl_div(p.log(), log_q.exp(), reduction="none").sum(-1))
    assert reverse_kl(F.one_hot(torch.arange(5), 9).float(), log_q).isfinite().all()


def test_total_variation_is_half_the_distance_and_one_minus_acceptance() -> None:
    p, log_q = distributions()
    torch.testing.assert_close(tv(p, log_q), (p - log_q.exp()).abs().sum(-1) / 2)


def gradient_of(distance: Callable[[Tensor, Tensor], Tensor], p: Tensor, logits: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(distance(p, leaf.log_softmax(-1)).sum(), leaf)[0]


def same_value_and_gradient(ours: Callable[[Tensor, Tensor], Tensor], plain: Callable[[Tensor, Tensor], Tensor]) -> None:
    p, logits = distributions()
    torch.testing.assert_close(ours(p, logits), plain(p, logits))
    torch.testing.assert_close(gradient_of(ours, p, logits), gradient_of(plain, p, logits))


def test_l1_is_twice_the_total_variation() -> None:
    same_value_and_gradient(l1, lambda p, log_q: 2 * (1 - torch.stack([p, log_q.exp()]).amin(0).sum(-1)))


def test_nla_is_the_negative_log_of_the_acceptance_and_finite_where_nothing_is_accepted() -> None:
    same_value_and_gradient(nla, lambda p, log_q: -torch.log(1 - 0.5 * (p - log_q.exp()).abs().sum(-1)))
    far = torch.tensor([[0.0, -300.0]])
    assert nla(torch.tensor([[0.0, 1.0]]), far).isfinite().all()


def test_lk_hybrid_mixes_kl_and_variation_by_an_acceptance_that_gets_no_gradient() -> None:
    def plain(p: Tensor, log_q: Tensor) -> Tensor:
        distance = (p - log_q.exp()).abs().sum(-1) / 2
        share = torch.exp(-3 * (1 - distance)).detach()
        return share * (p * (p.log() - log_q)).sum(-1) + (1 - share) * distance

    same_value_and_gradient(lk_hybrid, plain)
    p, log_q = distributions()
    assert (lk_hybrid(p, log_q, sharpness=0) - forward_kl(p, log_q)).abs().max() < 1e-6  # a share of 1: KL alone
    assert (lk_hybrid(p, log_q, sharpness=1e4) - tv(p, log_q)).abs().max() < 1e-6


def test_overlap_is_how_likely_rejection_sampling_accepts() -> None:
    p, log_q = distributions()
    q = log_q.exp()
    torch.testing.assert_close(overlap(p, log_q), (q * (p / q).clamp_max(1)).sum(-1))


def test_dpace_weights_are_what_hangs_on_each_position_and_carry_no_gradient() -> None:
    label_probs = torch.tensor([[0.5, 0.2, 0.9], [1.0, 0.0, 0.3]]).requires_grad_()
    real = torch.tensor([[True, True, True], [True, True, False]])
    found = dpace_weights(label_probs, real)
    s = [[0.75, 0.6, 0.95], [1.0, 0.5, 0.65]]
    first = [s[0][0], s[0][0] * s[0][1], s[0][0] * s[0][1] * s[0][2]]
    expected = [[sum(first), first[1] + first[2], first[2]], [1.0 + 0.5, 0.5, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert not found.requires_grad


def test_decay_weights_fall_by_e_every_gamma_positions() -> None:
    found = decay_weights(9, 4.0)
    torch.testing.assert_close(found[4:] / found[:-4], torch.full((5,), math.exp(-1)))
    assert found[0] == 1


def test_confidence_learns_how_likely_a_token_is_accepted() -> None:
    score, accepted = torch.tensor([0.3, -1.0]).requires_grad_(), torch.tensor([0.9, 0.2]).requires_grad_()
    c = score.sigmoid()
    torch.testing.assert_close(confidence_bce(score, accepted), -(accepted * c.log() + (1 - accepted) * (1 - c).log()))
    confidence_bce(score, accepted).sum().backward()
    torch.testing.assert_close(score.grad, (c - accepted).detach())
    assert accepted.grad is None


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_loss_summed_in_chunks_has_the_value_and_the_gradients_of_the_whole(chunk: int) -> None:
    torch.manual_seed(3)
    x, y, weight = torch.randn(9, 4).requires_grad_(), torch.randn(9), torch.randn(4).requires_grad_()
    frozen = torch.randn(4)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        out = torch.tanh(x @ weight + x @ frozen)
        return torch.stack([(out * y).sum(), (y > 0).sum().float()])

    expected = loss(x, y)
    found, figures = summed_in_chunks(loss, [x, y], [weight, frozen], chunk, figures=1)
    torch.testing.assert_close(found, expected[0])
    assert figures.tolist() == expected[1:].tolist()
    for ours, plain in zip(torch.autograd.grad(2 * found, [x, weight]), torch.autograd.grad(2 * expected[0], [x, weight]), strict=True):
        torch.testing.assert_close(ours, plain)


def test_every_distance_is_zero_between_equal_distributions() -> None:
    p, _ = distributions()
    for distance in (forward_kl, reverse_kl, tv, l1, nla, lk_hybrid):
        torch.testing.assert_close(distance(p, p.log()), torch.zeros(5))


def test_label_cross_entropy_skips_labels_outside_the_draft_vocabulary() -> None:
    _, log_q = distributions()
    vocab = torch.tensor([1, 2, 5, 7, 10, 11, 12, 20, 30])
    labels = torch.tensor([5, 6, 30, 31, 0])
    found = label_cross_entropy(*draft_index(labels, vocab), log_q)
    assert found.tolist() == [-float(log_q[0, 2]), 0, -float(log_q[2, 8]), 0, 0]


def test_a_reduced_vocabulary_learns_the_target_distribution_renormalised_over_it() -> None:
    arguments = given(SUBSET)
    head, teacher = arguments["head"], arguments["teacher"]
    arguments |= {"hidden": [teacher] * STEPS, "output_layers": [OutputLayer(head.weight[SUBSET])]}  # q = p, cut and renormalised
    assert distill(**arguments, mix=LossMix(), chunk=8)[0].abs() < 1e-4
    assert distill(**arguments, mix=LossMix(forward_kl=0, tv=1), chunk=8)[0].abs() < 1e-4


def test_hits_count_likeliest_tokens_that_are_the_label_and_never_labels_outside_the_vocabulary() -> None:
    arguments = given(SUBSET)
    output_layers, weight = [OutputLayer(torch.eye(len(SUBSET)))], torch.ones(1, len(SUBSET))
    teacher = torch.randn(len(SUBSET), SIZE)
    arguments |= {"hidden": [torch.eye(len(SUBSET))], "output_layers": output_layers, "weight": weight, "teacher": teacher}
    for labels, expected in ((SUBSET, 10), (torch.arange(10), 1), (torch.tensor([0, 3, 4, 9, 1, 2, 5, 6, 7, 8]), 4)):
        assert distill(**{**arguments, "labels": labels}, mix=LossMix(), chunk=3)[1] == expected


def test_guesses_are_the_likeliest_target_tokens_whatever_the_chunk() -> None:
    torch.manual_seed(2)
    hidden, output_layer = torch.randn(2, 5, SIZE), OutputLayer(torch.randn(len(SUBSET), SIZE), torch.randn(len(SUBSET)), capped)
    expected = SUBSET[(F.linear(hidden, *output_layer[:2])).argmax(-1)]
    for chunk in (1, 3, 64):
        assert output_layer.guesses(hidden, SUBSET, chunk).equal(expected)


def test_a_mix_without_weights_and_a_misspelt_weight_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="every weight is 0"):
        parse(LossMix, {"forward_kl": 0}, "recipe")
    with pytest.raises(UserError, match=r"unknown key 'reverse_kd' .*did you mean 'reverse_kl'"):
        parse(LossMix, {"reverse_kd": 1}, "recipe")


class Thin(NamedTuple):
    """A layer that is more than a matrix."""

    down: Tensor
    up: Tensor

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.down, self.up

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden @ self.down.T) @ self.up.T

    def guesses(self, hidden: Tensor, vocab: Tensor | None, chunk: int) -> Tensor:
        return self.logits(hidden).argmax(-1)


@pytest.mark.parametrize("mix", [MIXES[0], MIXES[-1]], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_layers_that_are_more_than_a_matrix_are_learnt_in_chunks_too(mix: LossMix, chunk: int) -> None:
    arguments = given(None)
    layer = Thin(torch.randn(3, SIZE).requires_grad_(), torch.randn(VOCAB, 3).requires_grad_())
    arguments |= {"output_layers": [layer]}
    expected, hits = distill_plain(**arguments, mix=mix)
    found, found_hits = distill(**arguments, mix=mix, chunk=chunk)
    torch.testing.assert_close(found, expected)
    assert found_hits.equal(hits)
    leaves = [*arguments["hidden"], *layer.parameters]
    for ours, plain in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)  # sums in another order
