"""The distribution a token is drawn from: temperature, then the cuts, applied alike to target and drafter.

The order is transformers': temperature, top-n-sigma, top-k, top-p, min-p, typical-p. What depends on the text before a token as well,
such as penalties, is in `processing.py`.

p target's distribution, q drafter's distribution; both are what stands after this file, in fp32.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from drafttrain.core.errors import UserError


def _number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


class Sampling(NamedTuple):
    """How tokens are drawn. The default is greedy decoding."""

    temperature: float = 0.0
    """0 is greedy (the argmax, lowest id on ties)."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens that holds at least this mass; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest (Nguyen et al., 2024, arXiv:2407.01082); 0 keeps all."""
    typical_p: float = 1.0
    """Keep the tokens whose surprisal is nearest to the entropy, until they hold this mass (Meister et al., 2022, arXiv:2202.00666);
    1 keeps all."""
    top_n_sigma: float = 0.0
    """Keep logits within so many standard deviations of the largest (Tang et al., 2024, arXiv:2411.07641); 0 keeps all."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def check(self) -> Sampling:
        """Itself, or a `UserError` that names the value out of range."""
        temperature, top_k, top_p, min_p, typical_p, top_n_sigma = self
        if not (_number(temperature, Real) and 0 <= temperature < math.inf):  # also where it is not a number
            raise UserError(f"temperature {temperature!r} is not 0 or a finite positive number; use 0 for greedy decoding, or 0.7")
        if not (_number(top_k, Integral) and top_k >= 0):
            raise UserError(f"top_k {top_k!r} is not a whole number from 0 up; use 0 to keep every token")
        if not (_number(top_p, Real) and 0 < top_p <= 1):
            raise UserError(f"top_p {top_p!r} is outside (0, 1]; use 1 to keep every token")
        if not (_number(min_p, Real) and 0 <= min_p <= 1):
            raise UserError(f"min_p {min_p!r} is outside [0, 1]; use 0 to keep every token, or 0.05")
        if not (_number(typical_p, Real) and 0 < typical_p <= 1):
            raise UserError(f"typical_p {typical_p!r} is outside (0, 1]; use 1 to keep every token")
        if not (_number(top_n_sigma, Real) and 0 <= top_n_sigma < math.inf):
            raise UserError(f"top_n_sigma {top_n_sigma!r} is not 0 or a finite positive number; use 0 to keep every token, or 1")
        return self

    def probs(self, logits: Tensor) -> Tensor:
        """[..., V] logits -> [..., V] probabilities in fp32 that sum to 1."""
        if self.greedy:
            return one_hot(likeliest(logits), logits.shape[-1])
        logits = logits.to(torch.float32, copy=True).div_(max(self.temperature, COLDEST))
        if self.top_n_sigma > 0:
            logits = within_sigmas(logits, self.top_n_sigma)
        if 0 < self.top_k < logits.shape[-1]:
            threshold = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < threshold, float("-inf"))
        probs = logits.softmax(-1)
        probs = probs if self.top_p >= 1 else nucleus(probs, self.top_p)
        if self.min_p > 0:
            probs = normalise(probs * (probs >= self.min_p * probs.amax(-1, keepdim=True)))
        return probs if self.typical_p >= 1 else typical(probs, self.typical_p)


COLDEST = 1e-30
"""Temperatures below it give its distribution, greedy but for ties and differences below 1e-28: dividing by less would overflow."""


def within_sigmas(logits: Tensor, sigmas: float) -> Tensor:
    """[..., V] -> [..., V] with -inf below max - sigmas * std. Tokens forbidden before (-inf) have no part in the deviation."""
    real = logits > float("-inf")
    count = real.sum(-1, keepdim=True).clamp_min(1)
    mean = logits.masked_fill(~real, 0).sum(-1, keepdim=True) / count
    spread = (logits - mean).masked_fill(~real, 0).square().sum(-1, keepdim=True).div(count).sqrt()
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) - sigmas * spread, float("-inf"))


def typical(probs: Tensor, mass: float) -> Tensor:
    """The tokens whose surprisal is nearest to the entropy until they hold `mass`, and all as near as the last: [..., V] -> [..., V]."""
    surprisal = -probs.log()  # inf where a token cannot come
    entropy = torch.special.entr(probs).sum(-1, keepdim=True)
    distance = (surprisal - entropy).abs()
    nearest, order = distance.sort(dim=-1)
    held = probs.gather(-1, order).cumsum(-1)
    last = (held < mass).sum(-1, keepdim=True).clamp_max(probs.shape[-1] - 1)
    return normalise(probs * (distance <= nearest.gather(-1, last)))


BLOCK = 256  # logits looked at together


def likeliest(logits: Tensor) -> Tensor:
    """[..., V] -> [...] ids of the largest, the lowest id on ties: `argmax`, but 8 times faster in bf16 on a CPU.

    (There `argmax` is not vectorised and `amax` is: find the block first, then the place in it.)
    """
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    short = -logits.shape[-1] % BLOCK
    blocks = (F.pad(logits, (0, short), value=float("-inf")) if short else logits).unflatten(-1, (-1, BLOCK))
    best = blocks.amax(-1).argmax(-1)
    return best * BLOCK + blocks.take_along_dim(best[..., None, None], -2).squeeze(-2).argmax(-1)


def one_hot(tokens: Tensor, vocab: int) -> Tensor:
    """[...] ids -> [..., V] fp32."""
    nothing = torch.zeros(*tokens.shape, vocab, device=tokens.device)
    return nothing.scatter_(-1, tokens[..., None], 1.0)  # torch's own `one_hot` has the host look at the ids


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens that holds `top_p`, renormalised: [..., V] -> [..., V]. Ties keep the lower id.

    Large vocabularies are not sorted: the least probability that stays is found digit by digit of its bits, by the mass at or above each
    digit; on a CPU among the likeliest few, where they hold enough.
    """
    if probs.shape[-1] <= SMALL:
        return _nucleus_by_sorting(probs, top_p)
    return _nucleus_on_host(probs, top_p) if probs.device.type == "cpu" else _nucleus_by_digits(probs, top_p)


SMALL = 1024
"""Largest vocabulary that is sorted: counting digits costs as much for few tokens as for many."""


def _nucleus_by_sorting(probs: Tensor, top_p: float) -> Tensor:
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    mass = ranked.double()
    return normalise(torch.zeros_like(probs).scatter_(-1, order, torch.where(mass.cumsum(-1) - mass < top_p, ranked, 0.0)))


FEW = 512
"""Tokens that mostly hold a nucleus; 92% of those of the demo target at temperature 0.9 and top-p 0.95."""


def _nucleus_on_host(probs: Tensor, top_p: float) -> Tensor:
    rows = probs.reshape(-1, probs.shape[-1])
    ranked = rows.topk(FEW).values.double()
    mass = ranked.cumsum(-1)
    least = ranked.gather(-1, (mass < top_p).sum(-1, keepdim=True).clamp_max(FEW - 1))
    cut = least.float()
    if bool(((rows == cut).sum(-1) > 1).any()):
        found = _from_least(rows, cut, ranked.masked_fill(ranked <= least, 0).sum(-1, keepdim=True), top_p)
    else:
        found = normalise(rows * (rows >= cut))
    wide = (mass[:, -1] < top_p).nonzero()[:, 0]
    if len(wide):
        found[wide] = _nucleus_by_digits(rows[wide], top_p)
    return found.view_as(probs)


def _nucleus_by_digits(probs: Tensor, top_p: float) -> Tensor:
    bits = probs.view(torch.int32)  # of non-negative numbers: in the numbers' own order
    mass = probs.double()
    least, likelier = torch.zeros_like(bits[..., :1]), mass[..., :1]
    for shift, width in DIGITS:
        digits = 1 << width
        place = (bits >> shift).sub_(least >> shift).clamp_(-1, digits).add_(1)  # 0: below all of them; digits + 1: above
        held = torch.zeros(*probs.shape[:-1], digits + 2, dtype=torch.float64, device=probs.device).scatter_add_(-1, place.long(), mass)
        held = held.flip(-1).cumsum(-1).flip(-1)  # from each place upwards
        digit = ((held[..., 1:-1] >= top_p).sum(-1, keepdim=True) - 1).clamp_min(0)
        least = least | (digit << shift).int()
        likelier = held.gather(-1, digit + 2)  # mass above the digit found
    return _from_least(probs, least.view(torch.float32), likelier, top_p)


def _from_least(probs: Tensor, least: Tensor, likelier: Tensor, top_p: float) -> Tensor:
    """The nucleus whose least probability is known, [..., 1], and the mass above it: of equals, the elder ones come before."""
    equal = probs == least
    before = likelier + (equal.cumsum(-1) - 1) * least.double()
    return normalise(probs * ((probs > least) | (equal & (before < top_p))))


DIGITS = ((23, 8), (15, 8), (7, 8), (0, 7))
"""(shift, width) of a probability's 31 bits, the highest first."""


def normalise(weights: Tensor) -> Tensor:
    """[..., V] non-negative -> [..., V] summing to 1; an all-zero row (an event of probability 0) becomes uniform."""
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(1e-38), 1.0 / weights.shape[-1])
