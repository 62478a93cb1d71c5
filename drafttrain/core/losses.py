"""What a drafter learns: distances between the target's distribution p and its own q, unreduced, and their sum over rows in chunks.

R rows (labels), K draft steps, D hidden, V vocabulary, Vd draft vocabulary. With a reduced vocabulary p is the target's distribution
restricted to it and renormalised; labels outside it are skipped by the label's cross entropy and count as misses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from drafttrain.core.config import Config
from drafttrain.core.packed import linear
from drafttrain.core.sampling import likeliest
from drafttrain.core.vocab import draft_index


class OutputHead(Protocol):
    """The target's frozen output head (`target.head.TargetHead`)."""

    def logits(self, last: Tensor, rows: Tensor | None = None) -> Tensor:
        """[..., D] normed states -> [..., V] logits, or those of the vocabulary `rows` alone."""
        ...


class OutputLayer(NamedTuple):
    """What turns a drafter's states into logits."""

    weight: Tensor  # [Vd, D]
    bias: Tensor | None = None  # [Vd]
    finish: Callable[[Tensor], Tensor] | None = None  # what some model families do to their logits: a scale, a soft cap

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., Vd]."""
        logits = linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return logits if self.finish is None else self.finish(logits)

    def guesses(self, hidden: Tensor, vocab: Tensor | None, chunk: int) -> Tensor:
        """[..., D] -> [...] the likeliest target token at each state; logits of `chunk` states stand in memory at a time."""
        best = torch.cat([likeliest(self.logits(part)) for part in hidden.flatten(0, -2).split(chunk)])
        return (best if vocab is None else vocab[best]).unflatten(0, hidden.shape[:-1])


def soft_cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """-sum p log q, the forward KL but for p's own entropy: [..., V] -> [...]."""
    return -(p * log_q).sum(-1)


def forward_kl(p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q): [..., V] -> [...]."""
    return torch.special.xlogy(p, p).sum(-1) + soft_cross_entropy(p, log_q)


def reverse_kl(p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p): [..., V] -> [...]; p is floored where it is 0."""
    return (log_q.exp() * (log_q - p.clamp_min(1e-12).log())).sum(-1)


def tv(p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation, 1 - sum min(p, q): one minus the acceptance probability: [..., V] -> [...]."""
    return 1 - torch.minimum(p, log_q.exp()).sum(-1)


def label_cross_entropy(index: Tensor, inside: Tensor, log_q: Tensor) -> Tensor:
    """-log q of the label, 0 where it is outside the draft vocabulary: [...] and [..., V] -> [...]."""
    return -log_q.gather(-1, index[..., None])[..., 0] * inside


class LossMix(Config):
    """Weights of the distances that make up a loss."""

    forward_kl: float = Field(default=1.0, ge=0)
    """KL(p || q): learn the whole distribution (the usual distillation)."""
    reverse_kl: float = Field(default=0.0, ge=0)
    """KL(q || p): prefer the distribution's modes."""
    tv: float = Field(default=0.0, ge=0)
    """Total variation: one minus the acceptance probability itself."""
    ce: float = Field(default=0.0, ge=0)
    """Cross entropy of the token the target wrote."""

    @model_validator(mode="after")
    def _some(self) -> LossMix:
        if self.forward_kl + self.reverse_kl + self.tv + self.ce == 0:
            raise ValueError("every weight is 0; give at least one of forward_kl, reverse_kl, tv, ce")
        return self

    def of(self, logits: Tensor, teacher: Tensor, labels: Tensor, vocab: Tensor | None) -> Tensor:
        """[R, Vd] drafter's and teacher's logits, [R] labels -> [R]."""
        log_q, p = logits.float().log_softmax(-1), teacher.float().softmax(-1)
        loss = torch.zeros_like(log_q[:, 0])
        if self.forward_kl:
            loss = loss + self.forward_kl * forward_kl(p, log_q)
        if self.reverse_kl:
            loss = loss + self.reverse_kl * reverse_kl(p, log_q)
        if self.tv:
            loss = loss + self.tv * tv(p, log_q)
        if self.ce:
            loss = loss + self.ce * label_cross_entropy(*draft_index(labels, vocab), log_q)
        return loss

    def with_gradient(
        self, logits: Tensor, teacher: Tensor, labels: Tensor, vocab: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The sum of `weight` ([R]) times `of` over the rows, and its gradient by the logits ([R, Vd], in their dtype)."""
        if self.forward_kl and not (self.reverse_kl or self.tv or self.ce):
            return forward_kl_with_gradient(logits, teacher, self.forward_kl * weight)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            total = (self.of(leaf, teacher, labels, vocab) * weight).sum()  # autocast would take a product of vectors in bf16
            return total.detach(), torch.autograd.grad(total, leaf)[0]


def forward_kl_with_gradient(logits: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum over rows of KL(p || q) and its gradient by the drafter's logits, weight (q - p): [R, Vd] twice, [R] -> scalar, [R, Vd].

    On a CPU a few rows at a time, so that a block stays in the cache through all of its passes.
    """
    total, gradient = torch.zeros((), device=logits.device), torch.empty_like(logits)
    for rows in torch.arange(len(logits), device=logits.device).split(len(logits) if logits.is_cuda else 32):
        x, t = logits[rows].float(), teacher[rows].float()
        lse_x, lse_t = x.logsumexp(-1, keepdim=True), t.logsumexp(-1, keepdim=True)
        p = (t - lse_t).exp_()
        total += (((p * t.sub_(x)).sum(-1) + (lse_x - lse_t)[:, 0]) * weight[rows]).sum()
        gradient[rows] = x.sub_(lse_x).exp_().sub_(p).mul_(weight[rows, None]).to(gradient.dtype)
    return total, gradient


def distill_plain(
    hidden: Sequence[Tensor],
    output_layers: Sequence[OutputLayer],
    weight: Tensor,
    teacher: Tensor,
    head: OutputHead,
    labels: Tensor,
    mix: LossMix,
    vocab: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`distill`, with all [R, Vd] logits in memory at once and the target's anew for each step."""
    total, hits = torch.zeros((), device=weight.device), torch.zeros(len(hidden), device=weight.device)
    for step, states in enumerate(hidden):
        logits = output_layers[step % len(output_layers)].logits(states)
        with torch.no_grad():
            theirs = head.logits(teacher, vocab)
            hits[step] = _hits(logits, labels, vocab, weight[step])
        total = total + (mix.of(logits, theirs, labels, vocab) * weight[step]).sum()
    return total, hits


def distill(
    hidden: Sequence[Tensor],
    output_layers: Sequence[OutputLayer],
    weight: Tensor,
    teacher: Tensor,
    head: OutputHead,
    labels: Tensor,
    mix: LossMix,
    vocab: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of `mix` over K steps and R rows, and at how many rows of weight each step's likeliest token is the label ([K]).

    hidden: each step's states [R, D]; readouts: each step's output layer, or one for all; weight: [K, R] fp32, 0 where a step has
    no state for a row; teacher: [R, D] the target's normed states whose distribution every step learns, computed once for them; labels: [R]
    the tokens the target wrote; vocab: [Vd] ascending ids of the draft vocabulary, None for all. Logits of `chunk` rows stand in memory
    at a time.
    """
    finishes = [output_layer.finish for output_layer in output_layers]
    layers = [tensor for output_layer in output_layers for tensor in (output_layer.weight, output_layer.bias)]
    return _Distill.apply(weight, finishes, teacher, head, labels, mix, vocab, chunk, *hidden, *layers)


class _Distill(torch.autograd.Function):
    """Takes the gradient while a chunk's logits are there, so that none has to be kept or computed again."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, finishes: list[Callable[[Tensor], Tensor] | None], teacher: Tensor, head: OutputHead, labels: Tensor,
        mix: LossMix, vocab: Tensor | None, chunk: int, *tensors: Any,
    ) -> tuple[Tensor, Tensor]:
        K, device, wanted = len(weight), weight.device, ctx.needs_input_grad[-len(tensors) :]
        hidden, layers = tensors[:K], tensors[K:]
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden[0].dtype
        own: list[Any] = [None if layer is None else layer.detach().to(dtype) for layer in layers]
        output_layers = [OutputLayer(*layer) for layer in zip(own[::2], own[1::2], finishes, strict=True)]
        total, hits = torch.zeros((), device=device), torch.zeros(K, device=device)
        d_hidden = [torch.empty_like(states) if needed else None for states, needed in zip(hidden, wanted[:K], strict=True)]
        d_layers = [
            torch.zeros_like(layer, dtype=torch.float32) if layer is not None and needed else None
            for layer, needed in zip(layers, wanted[K:], strict=True)
        ]
        for rows in torch.arange(len(labels), device=device).split(chunk):
            theirs = head.logits(teacher[rows], vocab)
            for step, (states, d_states) in enumerate(zip(hidden, d_hidden, strict=True)):
                at = step % len(output_layers)
                part = states[rows].detach().to(dtype)
                loss, d_logits, right = _chunk(part, output_layers[at], theirs, labels[rows], mix, vocab, weight[step, rows])
                total, d_weight, d_bias = total + loss, d_layers[2 * at], d_layers[2 * at + 1]
                hits[step] += right
                if d_states is not None:
                    d_states[rows] = (d_logits @ output_layers[at].weight).to(d_states.dtype)
                if d_weight is not None:
                    d_weight += d_logits.T @ part
                if d_bias is not None:
                    d_bias += d_logits.sum(0, dtype=torch.float32)
                del d_logits  # or it would stand beside the next step's
            del theirs
        ctx.save_for_backward(*d_hidden, *d_layers)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *[None] * 8, *(None if saved is None else (saved * grad.to(saved.dtype)).to(dtype) for saved, dtype in pairs)


def _chunk(
    hidden: Tensor, output_layer: OutputLayer, teacher: Tensor, labels: Tensor, mix: LossMix, vocab: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of the losses of a few rows [R, D], its gradient [R, Vd] by what the output matrix gives, and the hits."""
    with torch.enable_grad():
        raw = F.linear(hidden, output_layer.weight, output_layer.bias).requires_grad_()
        logits = raw if output_layer.finish is None else output_layer.finish(raw)
    loss, gradient = mix.with_gradient(logits.detach(), teacher, labels, vocab, weight)
    return loss, torch.autograd.grad(logits, raw, gradient)[0], _hits(logits.detach(), labels, vocab, weight)


def _hits(logits: Tensor, labels: Tensor, vocab: Tensor | None, weight: Tensor) -> Tensor:
    """At how many rows of weight the likeliest token is the label: [R, Vd], [R], [R] -> scalar fp32."""
    guess = likeliest(logits)
    return (((guess if vocab is None else vocab[guess]) == labels) & (weight > 0)).sum().float()
