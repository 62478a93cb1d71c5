"""Packing: every token once, documents apart, the same order for everyone who asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.types import TrainingBatch
from drafttrain.data.collate import PackedRows, batches, collate, pack
from drafttrain.data.origin import Origin
from drafttrain.data.store import Conversation, Store, StoreWriter
from drafttrain.target.adapter import Target
from tests.data.stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, target: Target) -> Store:
    return make_store(tmp_path_factory.mktemp("collate") / "s", target, count=40, features=("last_hidden_state", "aux_hidden_states"))


def documents(batch: TrainingBatch) -> list[dict[str, torch.Tensor]]:
    """Each document of a batch on its own."""
    out = []
    for row in range(len(batch.tokens)):
        for number in range(int(batch.document[row].max()) + 1):
            here = batch.document[row] == number
            parts = {"tokens": batch.tokens, "mask": batch.mask, "position": batch.position, **batch.features}
            out.append({name: value[row, here] for name, value in parts.items()})
    return out


def test_pack_takes_each_conversation_once_and_fits_the_row() -> None:
    lengths = torch.randint(1, 70, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(500))
    for row in rows:
        assert sum(min(lengths[index], 64) for index in row) <= 64
    assert sum(min(length, 64) for length in lengths) / (64 * len(rows)) > 0.9


def test_every_conversation_comes_back_whole_with_positions_from_zero(store: Store) -> None:
    packed = PackedRows(store, range(40), 2, 32, ("last_hidden_state", "aux_hidden_states"))
    seen = [document for batch in packed.batches(0) for document in documents(batch)]
    by_tokens = {tuple(document["tokens"].tolist()): document for document in seen}
    assert len(seen) == len(by_tokens) == 40
    for i in range(40):
        got = by_tokens[tuple(store[i].tokens.tolist())]
        assert np.array_equal(got["mask"].numpy(), store[i].mask)
        assert got["position"].tolist() == list(range(len(store[i].tokens)))
        for name, value in store.features(i, ("last_hidden_state", "aux_hidden_states")).items():
            assert torch.equal(got[name], value)


def test_padding_belongs_to_no_document_and_is_no_answer(store: Store) -> None:
    for batch in PackedRows(store, range(40), 3, 32).batches(0):
        padding = batch.document < 0
        assert not batch.mask[padding].any()
        assert not batch.tokens[padding].any()


def test_no_label_lies_in_another_document(store: Store) -> None:
    for batch in PackedRows(store, range(40), 2, 64).batches(0):
        for offset in (1, 2, 5):
            _, labels = batch.ahead(offset)
            row, place = labels.nonzero(as_tuple=True)
            assert (batch.document[row, place] == batch.document[row, place + offset]).all()
            assert (batch.position[row, place + offset] == batch.position[row, place] + offset).all()


def test_labels_and_what_stands_before_them_are_those_that_lie_ahead(store: Store) -> None:
    for batch in PackedRows(store, range(40), 2, 64).batches(0):
        labels = batch.labels()
        here = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
        for offset in (0, 1, 2, 5):
            tokens, supervised = batch.ahead(offset)
            row, place = supervised.nonzero(as_tuple=True)
            reaches = labels.reaches(offset)
            assert labels.row[reaches].equal(row)
            assert labels.before(here, offset)[reaches].equal(place)
            assert labels.tokens[reaches].equal(tokens[supervised])


def test_labels_are_the_answer_but_its_first_token(tmp_path: Path, target: Target) -> None:
    writer = StoreWriter(tmp_path / "s", Origin.of_target(target))
    writer.append(Conversation.answered([10, 11, 12, 20, 21, 22, 2], 3, {}, 0))
    batch = collate(writer.finish(), [[0]], 64)
    for offset in (1, 2):
        tokens, labels = batch.ahead(offset)
        assert tokens[labels].tolist() == [21, 22, 2]


def test_a_long_conversation_is_cut_not_split(tmp_path: Path, target: Target) -> None:
    writer = StoreWriter(tmp_path / "s", Origin.of_target(target))
    writer.append(Conversation.answered(range(6, 46), 3, {}, 0))
    writer.append(Conversation.answered([6, 7, 8, 9], 1, {}, 1))
    packed = PackedRows(writer.finish(), [0, 1], 4, 16)
    seen = [document["tokens"].tolist() for batch in packed.batches(0) for document in documents(batch)]
    assert sorted(seen) == [[6, 7, 8, 9], list(range(6, 22))]


def same(one: TrainingBatch, other: TrainingBatch) -> bool:
    names = ("tokens", "mask", "document", "position")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_order_depends_on_seed_and_epoch_alone(store: Store) -> None:
    def epoch(number: int, seed: int = 3) -> list[TrainingBatch]:
        return list(batches(store, range(40), 2, 32, ("last_hidden_state",), seed, number))

    assert all(same(a, b) for a, b in zip(epoch(1), epoch(1), strict=True))
    assert not all(same(a, b) for a, b in zip(epoch(1), epoch(2), strict=True))
    assert len(epoch(1)) == len(epoch(2))
    assert not all(same(a, b) for a, b in zip(epoch(1), epoch(1, seed=4), strict=False))


def test_skipping_gives_the_same_rest(store: Store) -> None:
    packed = PackedRows(store, range(40), 2, 32)
    whole, rest = list(packed.batches(5)), list(packed.batches(5, skip=3))
    assert len(whole) == len(packed)
    assert all(same(a, b) for a, b in zip(whole[3:], rest, strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_have_equally_many_batches_and_share_the_single_process_order(store: Store, world: int) -> None:
    alone = list(PackedRows(store, range(40), 2, 32).batches(1))
    ranks = [list(PackedRows(store, range(40), 2, 32, rank=rank, world=world).batches(1)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    merged = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert all(same(a, b) for a, b in zip(alone, merged, strict=False))
    assert not any(batch.mask.any() for batch in merged[len(alone) :])
    assert len({len(batch.tokens) for batch in merged}) == 1


def test_conversations_without_labels_are_left_out_and_counted(tmp_path: Path, target: Target) -> None:
    writer = StoreWriter(tmp_path / "s", Origin.of_target(target))
    writer.append(Conversation.answered([6, 7, 8, 9], 4, {}, 0))  # no answer
    writer.append(Conversation.answered([6, 7, 8, 9], 3, {}, 1))  # one token, which the prefill gives
    writer.append(Conversation.answered([6, 7, 8, 9], 2, {}, 2))
    packed = PackedRows(writer.finish(), [0, 1, 2], 1, 16)
    assert packed.rows == [[2]]
    assert packed.left_out == {"conversations without an answer token to learn": 2}


def test_masks_without_any_label_are_an_error(tmp_path: Path, target: Target) -> None:
    writer = StoreWriter(tmp_path / "s", Origin.of_target(target))
    writer.append(Conversation.answered([6, 7, 8, 9], 4, {}, 0))
    with pytest.raises(UserError, match="none of 1 conversations has an answer token to learn"):
        PackedRows(writer.finish(), [0], 1, 16)


def test_an_uncaptured_feature_is_an_error_before_any_batch(tmp_path: Path, target: Target) -> None:
    with pytest.raises(UserError, match="no feature last"):
        PackedRows(make_store(tmp_path / "s", target), range(24), 1, 16, ("last_hidden_state",))


@pytest.mark.parametrize(("answer_from", "kept"), [(14, [0]), (15, []), (20, [])])
def test_an_answer_that_a_row_cuts_off_before_its_second_token_has_no_label_and_is_left_out(
    answer_from: int, kept: list[int], tmp_path: Path, target: Target
) -> None:
    """Of 24 tokens a row takes 16: what lies behind them is no label, however much of it there is."""
    writer = StoreWriter(tmp_path / "s", Origin.of_target(target))
    writer.append(Conversation.answered([6] * 24, answer_from, {}, 0))
    writer.append(Conversation.answered([6, 7, 8, 9], 2, {}, 1))
    packed = PackedRows(writer.finish(), [0, 1], 1, 16)
    assert sorted(index for row in packed.rows for index in row) == [*kept, 1]
    late, cut = (f"{what} 16 tokens (train.row_length)" for what in ("conversations whose answer begins behind", "answers cut at"))
    assert packed.left_out == ({f"{cut}, with 8 tokens behind it": 1} if kept else {late: 1})
    assert sum(int(batch.labels().tokens.numel()) for batch in packed.batches(0)) == 1 + len(kept)
