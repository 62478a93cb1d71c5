"""The residual distribution at a node while draft tokens are rejected there one after the other; for rules that try them one by one.

P is the target's distribution and Q the draft distribution, both as they were. With the residual normalised, a rejection subtracts Q and
whatever goes below zero:

    residual <- max(w residual - Q, 0) / S,  S its sum,  w <= 1 a weight that some rules put on the node.

Since max(max(P - s Q, 0) - t Q, 0) = max(P - (s + t) Q, 0), any number of rejections is one number c: residual = max(P - c Q, 0) / total.
Without replacement a rejected token leaves Q and keeps what it then had of P; a `deterministic` one took all it had. So nothing of a
vocabulary's size is stored, and a rejection costs one pass over it. B rows, W nodes side by side, V vocabulary, F rejections; scalars in
fp64.
"""

from __future__ import annotations

from functools import cached_property
from math import gcd

import torch
from torch import Tensor

from drafttrain.core.sampling import BLOCK, normalise
from drafttrain.core.tree import Draws

MOST = 1e30
"""Where c ends: the node can't be accepted any more."""


class Residual:
    """What rejections left of P at some nodes, as one number a node. P and Q are read, never written."""

    def __init__(self, P: Tensor, Q: Tensor | None, draws: Draws, tokens: Tensor) -> None:
        """P [B, W, V]; Q [B, W, V], None where drafts were chosen with certainty; tokens: [B, W, F] the drafts in the order of trying."""
        B, W, _ = P.shape
        self.P, self.Q, self.draws, self.tokens, self.count = P, Q, draws, tokens, 0
        self.c = torch.zeros(B, W, dtype=torch.float64, device=P.device)
        self.total = torch.ones_like(self.c)  # sum of max(P - c Q, 0)
        self.rest = torch.ones_like(self.c) if Q is None or draws == "iid" else _sums(Q, tokens)  # what Q has left
        self.p = P.gather(-1, tokens).double()  # [B, W, F], as they were
        self.q = None if Q is None else Q.gather(-1, tokens).double()
        self.kept = self.p.new_full(tokens.shape, float("inf") if Q is None else 0.0)  # what each rejected one kept; no bound for others

    def reject(self, rejected: Tensor, weight: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """The next draft of the first n nodes is rejected where `rejected` [B, n] says so. weight: [B, n] w.

        Returns what was left of P there over what was left of Q, both normalised, and S; both [B, n] fp64.
        """
        n, k = rejected.shape[1], self.count
        before, rest, p, kept = self.total[:, :n], self.rest[:, :n], self.p[:, :n], self.kept[:, :n]
        if self.Q is None or self.q is None:
            duplicates = self.tokens[:, :n, :k] == self.tokens[:, :n, k, None]
            share = torch.where((duplicates & (kept[..., :k] == 0)).any(-1), 0.0, p[..., k])  # an elder duplicate took it
            ratio, after = share / before.clamp_min(1e-300), (before - share).clamp_min(0)
            kept[..., k] = torch.where(rejected, 0.0, float("inf"))
        else:
            q, c = self.q[:, :n], self.c[:, :n]
            ratio = (p[..., k] - c * q[..., k]).clamp_min(0) * rest / (before * q[..., k]).clamp_min(1e-300)
            c = torch.where(rejected, (c + before / (weight * rest).clamp_min(1e-300)).clamp_max(MOST), c)
            c = c.to(self.P.dtype).double()  # as `what_is_left` reads it
            self.c = _renewed(self.c, c)
            after = what_is_left(self.P[:, :n], self.Q[:, :n], c, None, self._space[:, :n]).sum(-1).double()
            if self.draws == "without_replacement":
                now = (p - c[..., None] * q).clamp_min(0)
                kept[..., k] = torch.where(rejected, now[..., k], 0.0)
                after = after + (kept - now).clamp_min(0).sum(-1)
                self.rest = _renewed(self.rest, torch.where(rejected, rest - q[..., k], rest))
        self.total = _renewed(self.total, torch.where(rejected, after, before))
        self.count += 1
        return ratio, weight * after / before.clamp_min(1e-300)

    def probs(self) -> Tensor:
        """[B, W, V] what is left, normalised."""
        kept = self.kept.to(self.P.dtype)
        if self.Q is None:
            return normalise(self.P.scatter_reduce(-1, self.tokens, kept, "amin"))
        rejected_tokens = None if self.draws == "iid" else (self.tokens, kept)
        return normalise(what_is_left(self.P, self.Q, self.c, rejected_tokens, self._space))

    @cached_property
    def _space(self) -> Tensor:
        return torch.empty_like(self.P)


def what_is_left(P: Tensor, Q: Tensor, c: Tensor, rejected_tokens: tuple[Tensor, Tensor] | None, out: Tensor | None = None) -> Tensor:
    """[B, W, V] not normalised, of distributions [B, W, V] and c [B, W].

    rejected: tokens that left Q and what each kept, [B, W, F] both, 0 where none was rejected; None where drafts are put back.
    """
    left = torch.addcmul(P, Q, c[..., None].to(P.dtype), value=-1, out=out).relu_()
    return left if rejected_tokens is None else left.scatter_reduce_(-1, *rejected_tokens, "amax")


def _sums(Q: Tensor, tokens: Tensor) -> Tensor:
    """[B, W, V] -> [B, W] fp64, block by block: those of `tokens` in fp64, since of a distribution that is all but certain little is left
    once its token is rejected; the others in fp32, off by rounding of what they hold themselves."""
    blocks = Q.unflatten(-1, (-1, gcd(Q.shape[-1], BLOCK)))
    own = tokens // blocks.shape[-1]  # [B, W, F]
    exact = blocks.gather(-2, own[..., None].expand(*own.shape, blocks.shape[-1])).double().sum(-1)
    return blocks.sum(-1).double().scatter_(-1, own, exact).sum(-1)


def _renewed(whole: Tensor, first: Tensor) -> Tensor:
    """[B, W] with its first n replaced by [B, n]."""
    n = first.shape[1]
    return first if n == whole.shape[1] else torch.cat([first, whole[:, n:]], 1)
