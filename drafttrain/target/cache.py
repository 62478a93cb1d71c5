"""The target's KV cache: one storage tensor per head shape, per-row slots, commit as one gather-scatter.

L layers, B rows, H key-value heads, M slots, N tokens of a forward. Slot s of a row holds the token at position s once it is committed;
the nodes of a round stand behind them until `commit` moves the accepted ones down and forgets the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

BUCKET = 64
"""Attention reads a prefix of the storage rounded up to this many slots, so that short contexts do not pay for M."""


class KVShape(NamedTuple):
    """One layer's heads."""

    heads: int
    key_dim: int
    value_dim: int


class Aim(NamedTuple):
    """Where a forward writes: slots [B, N], and the first of them where they are the same consecutive ones in all rows; slots it reads."""

    slots: Tensor
    start: int | None
    visible: int


class TreeLayer(CacheLayerMixin):
    """One layer's view of the storage, as transformers calls it."""

    is_compileable = True
    is_sliding = False

    def __init__(self, owner: TreeCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.owner, self.keys, self.values, self.is_initialized = owner, keys, values, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The storage stands from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Writes [B, H, N, d] at the forward's slots and returns the visible prefix of the storage."""
        owner = self.owner
        assert self.keys is not None and self.values is not None
        if owner.start is not None:  # all rows at the same slots: a plain copy
            stop = owner.start + key_states.shape[2]
            self.keys[:, :, owner.start : stop] = key_states
            self.values[:, :, owner.start : stop] = value_states
        else:
            row = torch.arange(len(owner.slots), device=key_states.device)[:, None]
            self.keys[row, :, owner.slots] = key_states.transpose(1, 2)  # indexed: [B, N, H, d]
            self.values[row, :, owner.slots] = value_states.transpose(1, 2)
        return self.keys[:, :, : owner.visible], self.values[:, :, : owner.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.visible, 0

    def get_seq_length(self) -> int:
        return self.owner.max_length

    def get_max_length(self) -> int:
        return self.owner.capacity


class TreeCache(Cache):
    """Keys and values of B rows that may stand at different lengths."""

    def __init__(self, shapes: list[KVShape], batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        """shapes: each layer's heads; capacity: slots a row (committed tokens and one round's nodes)."""
        self.shapes, self.capacity = shapes, -(-capacity // BUCKET) * BUCKET
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # committed tokens
        self.max_length = 0  # host's upper bound on `lengths`
        self.slots = self.lengths[:, None]  # [B, N] where the current forward writes
        self.start: int | None = None  # ... or the first of consecutive slots, the same for all rows
        self.visible = BUCKET
        self.storage: list[Tensor] = []
        views: dict[int, tuple[Tensor, Tensor]] = {}
        for shape in dict.fromkeys(shapes):
            members = [index for index, other in enumerate(shapes) if other == shape]
            extent = (len(members), batch, shape.heads, self.capacity)
            keys = torch.zeros(*extent, shape.key_dim, device=device, dtype=dtype)
            values = torch.zeros(*extent, shape.value_dim, device=device, dtype=dtype)
            self.storage += [keys, values]
            views |= {layer: (keys[place], values[place]) for place, layer in enumerate(members)}
        super().__init__(layers=[TreeLayer(self, *views[index]) for index in range(len(shapes))])

    def aim(self, width: int, behind: int = 0) -> Tensor:
        """Prepares a forward of `width` nodes, `behind` slots after each row's committed tokens; returns their slots [B, N]."""
        nodes = torch.arange(behind, behind + width, device=self.lengths.device)
        self.start, self.slots = None, self.lengths[:, None] + nodes
        if len(self.lengths) == 1 and self.exact:
            self.start = self.max_length + behind
        self.visible = self._bucket(self.max_length + behind + width)
        return self.slots

    @property
    def aimed(self) -> Aim:
        """Where the current forward writes and what it reads."""
        return Aim(self.slots, self.start, self.visible)

    def aim_as(self, aim: Aim) -> None:
        """Prepares the same forward once more."""
        self.slots, self.start, self.visible = aim

    exact = False
    """Whether `reach` is every row's length (known by the host): a lone row then writes by plain copies."""

    def aim_at(self, start: int, width: int) -> Tensor:
        """Prepares a forward of `width` tokens at slots start, start + 1, ... of every row (prefill)."""
        self.start, self.visible = start, self._bucket(start + width)
        self.slots = torch.arange(start, start + width, device=self.lengths.device).expand(len(self.lengths), -1)
        return self.slots

    def _bucket(self, slots: int) -> int:
        assert slots <= self.capacity, f"{slots} slots wanted, the cache holds {self.capacity}"
        return min(self.capacity, -(-slots // BUCKET) * BUCKET)

    def commit(self, nodes: Tensor, kept: Tensor, moved: bool) -> None:
        """Keeps each row's first `kept` ([B]) of `nodes` ([B, T], indices into the last forward, ascending) and forgets the rest.

        moved: False where `nodes` is 0, 1, 2, ... anyway (chains): nothing needs to be copied.
        """
        if moved:
            B, T = nodes.shape
            row = torch.arange(B, device=nodes.device)[:, None]
            source = self.lengths[:, None] + nodes
            goal = (self.lengths[:, None] + torch.arange(T, device=nodes.device)).clamp_max(self.capacity - 1)
            for part in self.storage:  # [L, B, H, M, d]: all layers at once
                part[:, row, :, goal] = part[:, row, :, source]
        self.lengths = self.lengths + kept
        self.exact = False

    def set_lengths(self, lengths: list[int]) -> None:
        """Tells the cache what the host has learnt of the rows' lengths (a loop's one synchronisation)."""
        self.max_length = max(lengths, default=0)
        self.exact = len(lengths) == 1

    def select(self, rows: Tensor) -> TreeCache:
        """A cache of these rows only."""
        part = TreeCache(self.shapes, len(rows), self.capacity, self.lengths.device, self.storage[0].dtype)
        for mine, ours in zip(part.storage, self.storage, strict=True):
            mine.copy_(ours[:, rows])
        part.lengths, part.max_length = self.lengths[rows], self.max_length
        return part

    def join(self, other: TreeCache) -> TreeCache:
        """These rows followed by the other's, in a new cache with room for both."""
        slots = max(self.capacity, other.capacity)
        both = TreeCache(self.shapes, len(self.lengths) + len(other.lengths), slots, self.lengths.device, self.storage[0].dtype)
        for whole, *parts in zip(both.storage, self.storage, other.storage, strict=True):
            for part, rows in zip(parts, (slice(0, len(self.lengths)), slice(len(self.lengths), None)), strict=True):
                whole[:, rows, :, : part.shape[3]] = part
        both.lengths, both.max_length = torch.cat([self.lengths, other.lengths]), max(self.max_length, other.max_length)
        return both

    def open_with(self, other: TreeCache, tokens: int) -> None:
        """Gives every row of this empty cache the first `tokens` tokens of the other's only row."""
        for mine, theirs in zip(self.storage, other.storage, strict=True):
            mine[:, :, :, :tokens] = theirs[:, :, :, :tokens]

    def put(self, rows: Tensor, other: TreeCache) -> None:
        """Replaces these rows ([R]) by the rows of `other` (new conversations in place of finished ones)."""
        slots = min(other.capacity, self.capacity)
        for mine, theirs in zip(self.storage, other.storage, strict=True):
            mine[:, rows, :, :slots] = theirs[:, :, :, :slots]
        self.lengths[rows] = other.lengths
