"""Reduced draft vocabularies."""

from __future__ import annotations

import torch

from drafttrain.core.vocab import d2t, draft_index, draft_vocab, t2d

COUNTS = torch.tensor([5, 0, 7, 5, 5, 1, 0])


def test_the_most_frequent_tokens_are_taken_and_stand_ascending() -> None:
    assert draft_vocab(COUNTS, 3).tolist() == [0, 2, 3]


def test_ties_go_to_the_lower_id() -> None:
    assert draft_vocab(torch.zeros(50), 4).tolist() == [0, 1, 2, 3]
    assert draft_vocab(COUNTS, 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_forced_tokens_are_in_even_if_never_seen() -> None:
    assert draft_vocab(COUNTS, 3, [6]).tolist() == [0, 2, 6]


def test_offsets_and_membership_describe_the_same_vocabulary() -> None:
    vocab = draft_vocab(COUNTS, 4, [6])
    assert (torch.arange(4) + d2t(vocab)).equal(vocab)
    assert t2d(vocab, 7).nonzero()[:, 0].equal(vocab)


def test_target_ids_are_found_in_the_draft_vocabulary_or_marked_outside() -> None:
    vocab = torch.tensor([2, 5, 6])
    index, inside = draft_index(torch.tensor([[5, 0], [6, 9]]), vocab)
    assert inside.tolist() == [[True, False], [True, False]]
    assert index[inside].tolist() == [1, 2]
    assert draft_index(vocab, None)[1].all()
