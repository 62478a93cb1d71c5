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


class ScoringLayer(Protocol):
    """What turns a drafter's states into logits."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What it is made of, trained or not."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., Vd]."""
        ...

    def guesses(self, hidden: Tensor, vocab: Tensor | None, chunk: int) -> Tensor:
        """[..., D] -> [...] the likeliest target token at each state; logits of `chunk` states stand in memory at a time."""
        ...


def guesses(layer: ScoringLayer, hidden: Tensor, vocab: Tensor | None, chunk: int) -> Tensor:
    """`ScoringLayer.guesses`."""
    best = torch.cat([likeliest(layer.logits(part)) for part in hidden.flatten(0, -2).split(chunk)])
    return (best if vocab is None else vocab[best]).unflatten(0, hidden.shape[:-1])


class OutputLayer(NamedTuple):
    """One matrix."""

    weight: Tensor  # [Vd, D]
    bias: Tensor | None = None  # [Vd]
    finish: Callable[[Tensor], Tensor] | None = None  # what some model families do to their logits: a scale, a soft cap

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., Vd]."""
        logits = linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return logits if self.finish is None else self.finish(logits)

    def guesses(self, hidden: Tensor, vocab: Tensor | None, chunk: int) -> Tensor:
        """[..., D] -> [...] the likeliest target token at each state; logits of `chunk` states stand in memory at a time."""
        return guesses(self, hidden, vocab, chunk)


def soft_cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """-sum p log q, the forward KL but for p's own entropy: [..., V] -> [...]."""
    return -(p * log_q).sum(-1)


def forward_kl(p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q): [..., V] -> [...]."""
    return torch.special.xlogy(p, p).sum(-1) + soft_cross_entropy(p, log_q)


def reverse_kl(p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p): [..., V] -> [...]; p is floored where it is 0."""
    return (log_q.exp() * (log_q - p.clamp_min(1e-12).log())).sum(-1)


def jsd(p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence: the mean of KL(p || m) and KL(q || m), m = (p + q) / 2. Symmetric: [..., V] -> [...]."""
    q = log_q.exp()
    log_m = (0.5 * (p + q)).clamp_min(1e-30).log()
    return 0.5 * (forward_kl(p, log_m) + (q * (log_q - log_m)).sum(-1))


def tempered(p: Tensor, log_q: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """p and log q at another temperature: what a softmax of their logits over `temperature` gives."""
    return (p.clamp_min(1e-30).log() / temperature).softmax(-1), (log_q / temperature).log_softmax(-1)


def tv(p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation, 1 - sum min(p, q): one minus the acceptance probability: [..., V] -> [...]."""
    return 1 - torch.minimum(p, log_q.exp()).sum(-1)


def l1(p: Tensor, log_q: Tensor) -> Tensor:
    """||p - q||_1, twice the total variation: [..., V] -> [...]."""
    return (p - log_q.exp()).abs().sum(-1)


def overlap(p: Tensor, log_q: Tensor) -> Tensor:
    """sum min(p, q), the probability that a token drawn from q is accepted: [..., V] -> [...]."""
    return torch.minimum(p, log_q.exp()).sum(-1)


def nla(p: Tensor, log_q: Tensor) -> Tensor:
    """Negative log acceptance, -log sum min(p, q) (LK losses, 2026, arXiv:2602.23881): [..., V] -> [...]."""
    return -overlap(p, log_q).clamp_min(1e-12).log()


def lk_hybrid(p: Tensor, log_q: Tensor, sharpness: float = 3.0) -> Tensor:
    """l KL(p || q) + (1 - l) (1 - a), a = sum min(p, q), l = exp(-sharpness a) held fixed (arXiv:2602.23881): [..., V] -> [...].

    A drafter that is rarely accepted learns by KL, whose gradient does not vanish there; a good one by the acceptance itself.
    """
    accepted = overlap(p, log_q)
    share = (-sharpness * accepted.detach()).exp()
    return share * forward_kl(p, log_q) + (1 - share) * (1 - accepted)


def dpace_weights(label_probs: Tensor, real: Tensor, smoothing: float = 0.5) -> Tensor:
    """D-PACE (2026, arXiv:2605.18810): how much each position of a draft weighs, [N, K] -> [N, K], without gradient.

    label_probs: q of each label; real: where there is one. With s = (1 - smoothing) q + smoothing, position j weighs
    sum_{m >= j} prod_{i <= m} s_i: how much of the expected accepted length hangs on it.
    """
    stands = (1 - smoothing) * label_probs.detach() + smoothing
    reached = stands.cumprod(-1) * real
    return reached.flip(-1).cumsum(-1).flip(-1) * real


def decay_weights(steps: int, gamma: float, device: torch.device | None = None) -> Tensor:
    """exp(-k / gamma) for k = 0 .. steps - 1 (DFlash): [steps]."""
    return (-torch.arange(steps, device=device, dtype=torch.float32) / gamma).exp()


def confidence_bce(score: Tensor, accepted: Tensor) -> Tensor:
    """Cross entropy of a confidence sigmoid(score) with how likely the token is accepted, which gets no gradient: [...] twice -> [...]."""
    return F.binary_cross_entropy_with_logits(score.float(), accepted.detach().float(), reduction="none")


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
    l1: float = Field(default=0.0, ge=0)
    """||p - q||_1, twice the total variation (DSpark: 0.9, beside 0.1 of `ce`)."""
    nla: float = Field(default=0.0, ge=0)
    """-log of the acceptance probability."""
    lk_hybrid: float = Field(default=0.0, ge=0)
    """KL where the drafter is rarely accepted, total variation where it mostly is."""

    @model_validator(mode="after")
    def _some(self) -> LossMix:
        if not any(weight for _, weight in self):
            raise ValueError(f"every weight is 0; give at least one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def only_forward_kl(self) -> bool:
        return not any(weight for name, weight in self if name != "forward_kl")

    def of(self, logits: Tensor, teacher: Tensor, labels: Tensor, vocab: Tensor | None) -> Tensor:
        """[R, Vd] drafter's and teacher's logits, [R] labels -> [R]."""
        return self.between(teacher.float().softmax(-1), logits.float().log_softmax(-1), labels, vocab)

    def between(self, p: Tensor, log_q: Tensor, labels: Tensor, vocab: Tensor | None) -> Tensor:
        """The same of distributions: [R, Vd] p and log q, [R] labels -> [R]."""
        loss = torch.zeros_like(log_q[..., 0])
        if self.forward_kl:
            loss = loss + self.forward_kl * forward_kl(p, log_q)
        if self.reverse_kl:
            loss = loss + self.reverse_kl * reverse_kl(p, log_q)
        if self.tv:
            loss = loss + self.tv * tv(p, log_q)
        if self.ce:
            loss = loss + self.ce * label_cross_entropy(*draft_index(labels, vocab), log_q)
        if self.l1:
            loss = loss + self.l1 * l1(p, log_q)
        if self.nla:
            loss = loss + self.nla * nla(p, log_q)
        if self.lk_hybrid:
            loss = loss + self.lk_hybrid * lk_hybrid(p, log_q)
        return loss

    def with_gradient(
        self, logits: Tensor, teacher: Tensor, labels: Tensor, vocab: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The sum of `weight` ([R]) times `of` over the rows, and its gradient by the logits ([R, Vd], in their dtype)."""
        if self.only_forward_kl:
            return forward_kl_with_gradient(logits, teacher, self.forward_kl * weight)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            total = (self.of(leaf, teacher, labels, vocab) * weight).sum()  # autocast would take a product of vectors in bf16
            return total.detach(), torch.autograd.grad(total, leaf)[0]


class OnlineMix(LossMix):
    """The distances that a drafter learns by while it serves, at the temperature it serves at."""

    jsd: float = Field(default=0.0, ge=0)
    """Jensen-Shannon divergence."""
    temperature: float = Field(default=1.0, gt=0)
    """Of both distributions."""

    @property
    def only_forward_kl(self) -> bool:
        return self.temperature == 1 and not self.jsd and not any(self.model_dump(exclude={"forward_kl", "jsd", "temperature"}).values())

    def between(self, p: Tensor, log_q: Tensor, labels: Tensor, vocab: Tensor | None) -> Tensor:
        if self.temperature != 1:
            p, log_q = tempered(p, log_q, self.temperature)
        loss = super().between(p, log_q, labels, vocab)
        return loss + self.jsd * jsd(p, log_q) if self.jsd else loss


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


ChunkLoss = Callable[..., Tensor]
"""(a part of each tensor of rows) -> [M]: the loss of these rows, and figures to log; figures that carry no gradient."""


def summed_in_chunks(
    loss: ChunkLoss, rows: Sequence[Tensor], parameters: Sequence[Tensor], chunk: int, figures: int = 0
) -> tuple[Tensor, Tensor]:
    """The sum of `loss(part of rows, ...)` over chunks of rows: the loss (scalar) and its figures ([figures]).

    rows: tensors of equal length, of which those that require gradients get them. parameters: what else `loss` reads and is to be
    trained. The gradient is taken while a chunk's logits are there, so that none of them has to be kept or computed again.
    """
    return _InChunks.apply(loss, len(rows), chunk, figures, *rows, *parameters)


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: ChunkLoss, count: int, chunk: int, figures: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        rows, parameters = tensors[:count], tensors[count:]
        wanted = ctx.needs_input_grad[4:]
        d_rows = [torch.zeros_like(one) if need else None for one, need in zip(rows, wanted[:count], strict=True)]
        trained = [one for one, need in zip(parameters, wanted[count:], strict=True) if need]
        d_trained = [torch.zeros_like(one) for one in trained]
        sums = torch.zeros(1 + figures, device=rows[0].device)
        for start in range(0, len(rows[0]), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                given = [one[part].detach().requires_grad_(gradient is not None) for one, gradient in zip(rows, d_rows, strict=True)]
                found = loss(*given)
                leaves = [one for one in given if one.requires_grad]
                gradients = torch.autograd.grad(found[0], [*leaves, *trained], allow_unused=True) if leaves or trained else ()
            sums += found.detach()
            into = [gradient[part] for gradient in d_rows if gradient is not None] + d_trained
            for sum_so_far, gradient in zip(into, gradients, strict=True):
                if gradient is not None:
                    sum_so_far.add_(gradient)
        found_trained = iter(d_trained)
        ctx.save_for_backward(*d_rows, *(next(found_trained) if need else None for need in wanted[count:]))
        total, logged = sums[0].clone(), sums[1:].clone()
        ctx.mark_non_differentiable(logged)
        return total, logged

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *[None] * 4, *(None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)


def distill_plain(
    hidden: Sequence[Tensor],
    output_layers: Sequence[ScoringLayer],
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
    output_layers: Sequence[ScoringLayer],
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
    matrices = [layer for layer in output_layers if isinstance(layer, OutputLayer)]
    if len(matrices) < len(output_layers):
        return _distill_by_parts(hidden, output_layers, weight, teacher, head, labels, mix, vocab, chunk)
    finishes = [output_layer.finish for output_layer in matrices]
    layers = [tensor for output_layer in matrices for tensor in (output_layer.weight, output_layer.bias)]
    return _Distill.apply(weight, finishes, teacher, head, labels, mix, vocab, chunk, *hidden, *layers)


def _distill_by_parts(
    hidden: Sequence[Tensor],
    output_layers: Sequence[ScoringLayer],
    weight: Tensor,
    teacher: Tensor,
    head: OutputHead,
    labels: Tensor,
    mix: LossMix,
    vocab: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """`distill` for layers that are more than a matrix."""

    def loss(teacher: Tensor, labels: Tensor, weight: Tensor, *hidden: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = head.logits(teacher, vocab)
        total, hits = weight.new_zeros(()), []
        for step, states in enumerate(hidden):
            logits = output_layers[step % len(output_layers)].logits(states)
            total = total + (mix.of(logits, theirs, labels, vocab) * weight[:, step]).sum()
            hits.append(_hits(logits.detach(), labels, vocab, weight[:, step]))
        return torch.stack([total, *hits])

    parameters = [tensor for layer in output_layers for tensor in layer.parameters]
    return summed_in_chunks(loss, [teacher, labels, weight.T, *hidden], parameters, chunk, figures=len(hidden))


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
