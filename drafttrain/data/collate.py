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
from torch import Tensor

from drafttrain.core.config import fingerprint
from drafttrain.core.errors import UserError
from drafttrain.core.types import Batch
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
class Packed:
    """A part of a store as batches.

    Conversations without a single label are left out; `dropped` counts them.
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
    dropped: int = field(init=False)

    def __post_init__(self) -> None:
        self.store.require(self.features)
        kept = [i for i in self.indices if label_count(self.store[i].mask[: self.row_length]) > 0]
        self.dropped = len(self.indices) - len(kept)
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

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from batch `skip` on.

        Batch s of rank r is batch s * world + r of a single process with the same rows a batch.
        """
        order = shuffled(len(self.rows), self.seed, epoch)
        for step in range(skip, len(self)):
            first = (step * self.world + self.rank) * self.rows_per_batch
            yield self.collate([self.rows[at] for at in order[first : first + self.rows_per_batch]])

    def collate(self, rows: list[list[int]]) -> Batch:
        """Some rows of conversations as one batch of `rows_per_batch` rows."""
        used = max((sum(self._cut(i) for i in row) for row in rows), default=1)
        R, T = self.rows_per_batch, min(-(-used // ROUND_TO) * ROUND_TO, max(self.row_length, used))
        widths = {name: self.store.index.features[name] for name in self.features}
        batch = _empty(R, T, widths, DTYPES[self.store.index.origin.dtype])
        for row, members in enumerate(rows):
            start = 0
            for document, i in enumerate(members):
                start = self._fill(batch, row, start, document, i)
        return batch

    def _fill(self, batch: Batch, row: int, start: int, document: int, i: int) -> int:
        conversation, length = self.store[i], self._cut(i)
        here = slice(start, start + length)
        batch.tokens[row, here] = torch.from_numpy(conversation.tokens[:length]).long()
        batch.mask[row, here] = torch.from_numpy(conversation.mask[:length])
        batch.document[row, here] = document
        batch.position[row, here] = torch.arange(length)
        for name, value in self.store.features(i, self.features).items():
            batch.features[name][row, here] = value[:length]
        return start + length

    def _cut(self, i: int) -> int:
        return min(int(self.store.lengths[i]), self.row_length)


def _empty(R: int, T: int, widths: dict[str, int], dtype: torch.dtype) -> Batch:
    zeros: Tensor = torch.zeros(R, T, dtype=torch.long)
    features = {name: torch.zeros(R, T, width, dtype=dtype) for name, width in widths.items()}
    return Batch(zeros, zeros.bool(), zeros - 1, zeros.clone(), features=features)


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
) -> Iterator[Batch]:
    """One epoch of `Packed`."""
    packed = Packed(store, indices, rows_per_batch, row_length, tuple(features), seed, rank, world)
    return packed.batches(epoch)
