"""The law a token is drawn from: temperature, then top-k, then top-p, applied alike to target and drafter.

p target's law, q drafter's law; both are what stands after this file, in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from drafttrain.core.errors import UserError


class Sampling(NamedTuple):
    """How tokens are drawn. The default is greedy decoding."""

    temperature: float = 0.0
    """0 is greedy (the argmax, lowest id on ties)."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens that holds at least this mass; 1 keeps all."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def check(self) -> Sampling:
        """Itself, or a `UserError` that names the value out of range."""
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature} is negative; use 0 for greedy decoding, or a positive value")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} is negative; use 0 to keep every token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is outside (0, 1]; use 1 to keep every token")
        return self

    def law(self, logits: Tensor) -> Tensor:
        """[..., V] logits -> [..., V] probabilities in fp32 that sum to 1."""
        if self.greedy:
            return one_hot(likeliest(logits), logits.shape[-1])
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            threshold = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < threshold, float("-inf"))
        law = logits.softmax(-1)
        return law if self.top_p >= 1 else nucleus(law, self.top_p)


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
    return F.one_hot(tokens, vocab).float()


PREFIX = 1024  # likeliest tokens among which a nucleus is looked for first


def nucleus(law: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens that holds `top_p`, renormalised: [..., V] -> [..., V]. Ties keep the lower id.

    On a CPU, where a whole sort costs more than the target's forward, the likeliest `PREFIX` tokens are looked at first; where they hold
    less than `top_p` in some row, everything is sorted.
    """
    if law.device.type == "cpu" and law.shape[-1] > PREFIX:
        ranked = law.topk(PREFIX).values
        before = ranked.cumsum(-1) - ranked
        if bool((before[..., -1] >= top_p).all()):
            return _first(law, ranked, (before < top_p).sum(-1, keepdim=True))
    return _sorted_nucleus(law, top_p)


def _first(law: Tensor, ranked: Tensor, count: Tensor) -> Tensor:
    """The `count` [..., 1] likeliest tokens, renormalised; ranked: [..., K] the likeliest probabilities, the last ones kept among them."""
    least = ranked.gather(-1, count - 1)  # the least probability that stays
    spare = count - (ranked > least).sum(-1, keepdim=True)  # how many of those equal to it stay
    equal = law == least
    return normalise(law * ((law > least) | (equal & (equal.cumsum(-1) <= spare))))


def _sorted_nucleus(law: Tensor, top_p: float) -> Tensor:
    """The same by a whole sort."""
    ranked, order = law.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked  # mass of the likelier tokens
    kept = ranked.masked_fill(before >= top_p, 0.0)
    return normalise(torch.zeros_like(law).scatter_(-1, order, kept))


def normalise(weights: Tensor) -> Tensor:
    """[..., V] non-negative -> [..., V] summing to 1; an all-zero row (an event of probability 0) becomes uniform."""
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(1e-38), 1.0 / weights.shape[-1])
