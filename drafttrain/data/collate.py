"""Packs conversations into rows and rows into batches, in an order that depends on (seed, epoch) alone.

Documents of a row are numbered, positions start at 0 in each, nothing attends across. Which conversations share a row
depends on the seed, the order of the rows also on the epoch. Every epoch and every rank has the same number of batches.
R rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from drafttrain.core.config import fingerprint
from drafttrain.core.errors import UserError
from drafttrain.core.types import TrainingBatch
from drafttrain.data.store import Store
from drafttrain.target.files import DTYPES

OPEN_ROWS = 32  # rows that still take conversations while packing
ROUND_TO = 64  # batches end at a multiple of this, so that few shapes occur


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Indices of conversations by row, first fit in the given order; a longer one fills a row alone (cut)."""
    done: list[list[int]] = []
    rows: list[tuple[int, list[int]]] = []  # (tokens still free, members)
    for index, length in enumerate(lengths):
        need = min(length, row_length)
        at = next((at for at, (free, _) in enumerate(rows) if free >= need), None)
        if at is not None:
            free, members = rows[at]
            rows[at] = (free - need, [*members, index])
            continue
        if len(rows) == OPEN_ROWS:
            fullest = min(range(OPEN_ROWS), key=lambda at: rows[at][0])
            done.append(rows.pop(fullest)[1])
        rows.append((row_length - need, [index]))
    return done + [members for _, members in rows]


def shuffled(count: int, *key: int) -> list[int]:
    """0..count - 1 in an order that belongs to `key`."""
    generator = torch.Generator().manual_seed(int(fingerprint(*key)[:15], 16))
    return torch.randperm(count, generator=generator).tolist()


def label_count(mask: np.ndarray) -> int:
    """Answer tokens that could have been drafted: those behind another answer token."""
    return int((mask[1:] & mask[:-1]).sum())


@dataclass
class PackedRows:
    """A part of a store as batches.

    Conversations without a single label are left out, longer ones than a row are cut: `left_out` says how many of which.
    """

    store: Store
    indices: Sequence[int]
    rows_per_batch: int
    row_length: int
    features: tuple[str, ...] = ()
    seed: int = 0
    rank: int = 0
    world: int = 1
    rows: list[list[int]] = field(init=False)  # conversations by row
    left_out: dict[str, int] = field(init=False)
    """By reason; only what there is."""

    def __post_init__(self) -> None:
        self.store.require(self.features)
        kept, self.left_out = learnable(self.store, self.indices, self.row_length)
        if not kept:
            raise UserError(
                f"store '{self.store.folder}': none of {len(self.indices)} conversations has an answer token to learn "
                f"within {self.row_length} tokens; check the loss masks (`doctor` shows one) or use longer rows"
            )
        kept = [kept[at] for at in shuffled(len(kept), self.seed)]
        lengths = [int(self.store.lengths[i]) for i in kept]
        self.rows = [[kept[at] for at in row] for row in pack(lengths, self.row_length)]

    def __len__(self) -> int:
        """Batches an epoch on each rank; the last ones are filled up with empty rows, so nothing is left out."""
        return math.ceil(len(self.rows) / (self.rows_per_batch * self.world))

    @property
    def tokens(self) -> int:
        """An epoch's, on all ranks together."""
        return sum(min(int(self.store.lengths[i]), self.row_length) for row in self.rows for i in row)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[TrainingBatch]:
        """This rank's batches of an epoch, from batch `skip` on.

        Batch s of rank r is batch s * world + r of a single process with the same rows a batch.
        """
        order = shuffled(len(self.rows), self.seed, epoch)
        for step in range(skip, len(self)):
            first = (step * self.world + self.rank) * self.rows_per_batch
            rows = [self.rows[at] for at in order[first : first + self.rows_per_batch]]
            yield collate(self.store, rows, self.row_length, self.features, self.rows_per_batch)


def collate(
    store: Store, rows: Sequence[Sequence[int]], row_length: int, features: Sequence[str] = (), at_least: int = 0
) -> TrainingBatch:
    """Conversations by row as one batch, each cut at `row_length`. at_least: rows to fill up to, with empty ones."""
    lengths = [[min(int(store.lengths[i]), row_length) for i in row] for row in rows]
    used = max((sum(row) for row in lengths), default=1)
    widths = {name: store.index.features[name] for name in features}
    batch = _empty(max(len(rows), at_least), round_up(used, ROUND_TO), widths, DTYPES[store.index.origin.dtype])
    for row, members in enumerate(rows):
        start = 0
        for document, (i, length) in enumerate(zip(members, lengths[row], strict=True)):
            here = (row, slice(start, start + length))
            conversation = store[i]
            batch.tokens[here] = torch.from_numpy(conversation.tokens[:length]).long()
            batch.mask[here] = torch.from_numpy(conversation.mask[:length])
            batch.document[here] = document
            batch.position[here] = torch.arange(length)
            for name, value in store.features(i, features).items():
                batch.features[name][here] = value[:length]
            start += length
    return batch


def learnable(store: Store, indices: Sequence[int], row_length: int) -> tuple[list[int], dict[str, int]]:
    """Which of these have something to learn within a row, and what is left out of them, by reason: conversations whole, or their ends."""
    masks = {i: store[i].mask for i in indices}
    labels = {i: label_count(mask[:row_length]) for i, mask in masks.items()}
    kept = [i for i in indices if labels[i] > 0]
    cut = sum(label_count(masks[i]) > labels[i] for i in kept)
    lost = sum(label_count(masks[i]) - labels[i] for i in kept)
    late = sum(labels[i] == 0 and label_count(masks[i]) > 0 for i in indices)
    counts = {
        f"conversations whose answer begins behind {row_length:,} tokens (train.row_length)": late,
        "conversations without an answer token to learn": len(masks) - len(kept) - late,
        f"answers cut at {row_length:,} tokens (train.row_length), with {lost:,} tokens behind it": cut,
    }
    return kept, {reason: count for reason, count in counts.items() if count}


def round_up(count: int, multiple: int) -> int:
    """The least multiple that is not below `count`."""
    return -(-count // multiple) * multiple


def _empty(R: int, T: int, widths: dict[str, int], dtype: torch.dtype) -> TrainingBatch:
    zeros = torch.zeros(R, T, dtype=torch.long)
    features = {name: torch.zeros(R, T, width, dtype=dtype) for name, width in widths.items()}
    return TrainingBatch(zeros, zeros.bool(), zeros - 1, zeros.clone(), features=features)


def batches(
    store: Store,
    indices: Sequence[int],
    rows_per_batch: int,
    row_length: int,
    features: Sequence[str] = (),
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[TrainingBatch]:
    """One epoch of `Packed`."""
    packed = PackedRows(store, indices, rows_per_batch, row_length, tuple(features), seed, rank, world)
    return packed.batches(epoch)
