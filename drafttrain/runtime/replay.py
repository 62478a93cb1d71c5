"""Offline replay: the accepted length that greedy decoding would measure, read off the target's own texts without decoding.

Greedy acceptance is a function of the target's text alone: from each root, the drafter's guesses count up to the first wrong one.
B rows, T time, K draft length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.types import Batch
from drafttrain.runtime.stats import Statistics

Walk = Callable[[Batch, int], Tensor]
"""(batch, K) -> [B, T, K] guesses, as `Drafter.walk` gives them."""


@torch.no_grad()
def replay(walk: Walk, batches: Iterable[Batch], length: int) -> Statistics:
    """Chains of `length` over every answer in `batches`.

    Only texts that the target wrote greedily give the figure that greedy decoding measures; choose the conversations accordingly.
    """
    out = Statistics(attempts=[0] * length, accepts=[0] * length)
    for batch in batches:
        runs = matching_runs(batch, walk(batch, length)).cpu().numpy()
        for row, start, stop in answers(batch):
            _walk_answer(out, runs[row], start, stop)
    return out


def matching_runs(batch: Batch, guesses: Tensor) -> Tensor:
    """[B, T, K] guesses -> [B, T] how many of them, from the first on, are what the text says after token t + 1."""
    right = []
    for step in range(guesses.shape[-1]):
        following, _ = batch.ahead(step + 2)
        right.append(guesses[..., step] == following)
    return torch.stack(right, -1).long().cumprod(-1).sum(-1)


def answers(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """(row, start, stop) of every stretch of answer tokens within one document."""
    mask, document = batch.mask.cpu().numpy(), batch.document.cpu().numpy()
    for row in range(len(mask)):
        inside = mask[row] & (document[row] >= 0)
        new = inside & ~(np.roll(inside, 1) & (np.roll(document[row], 1) == document[row]))
        if len(inside):
            new[0] = inside[0]
        for start in np.nonzero(new)[0]:
            stop = start
            while stop < len(inside) and inside[stop] and document[row, stop] == document[row, start]:
                stop += 1
            yield row, int(start), int(stop)


def _walk_answer(out: Statistics, runs: np.ndarray, start: int, stop: int) -> None:
    """One answer: its first token comes from the prefill and is the first root; each round keeps the right guesses and one more."""
    root, depth = start, len(out.attempts)
    while root + 1 < stop:
        left = stop - 1 - root
        accepted = min(int(runs[root - 1]), left) if root > 0 else 0
        kept = min(accepted + 1, left)
        tried = accepted + (kept > accepted and accepted < depth)
        for level in range(tried):
            out.attempts[level] += 1
            out.accepts[level] += level < accepted
        out.rounds, out.tokens = out.rounds + 1, out.tokens + kept
        root += kept
