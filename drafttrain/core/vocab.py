"""Reduced draft vocabularies: which target tokens a drafter can propose. Vd draft vocabulary, V the target's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draft_vocab(counts: Tensor, size: int, forced: Sequence[int] = ()) -> Tensor:
    """The `size` most frequent tokens, ascending: [V] counts -> [Vd] ids. Ties go to the lower id; `forced` ids are always in.

    forced: ids such as end-of-turn, without which a drafter could never propose an end.
    """
    rank = counts.double().clone()
    if forced:
        rank[list(forced)] = float("inf")
    return rank.sort(descending=True, stable=True).indices[:size].sort().values


def d2t(vocab: Tensor) -> Tensor:
    """[Vd] ids -> [Vd] offsets, as engines store them: target id = draft id + offset."""
    return vocab - torch.arange(len(vocab), device=vocab.device)


def t2d(vocab: Tensor, size: int) -> Tensor:
    """[Vd] ids -> [V] bool: the target token is in the draft vocabulary."""
    return torch.zeros(size, dtype=torch.bool, device=vocab.device).index_fill_(0, vocab, True)


def draft_index(tokens: Tensor, vocab: Tensor | None) -> tuple[Tensor, Tensor]:
    """Target ids as draft ids: [...] -> ([...] draft ids, [...] bool: the token is in the draft vocabulary)."""
    if vocab is None:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    index = torch.searchsorted(vocab, tokens).clamp_max(len(vocab) - 1)
    return index, vocab[index] == tokens
