"""Conversations and features on disk. They may be appended in any order; a store hands them out by their ids.

T tokens of a conversation, F numbers of a feature, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.core.disk import load_tensors, sha256, writable, write_whole
from drafttrain.core.errors import UserError
from drafttrain.core.types import Features
from drafttrain.data.origin import Origin, check_probe
from drafttrain.data.shards import INDEX, Index, ShardEntry, check_shard, open_shard, read_index, write_index
from drafttrain.target.files import DTYPES
from drafttrain.target.head import TargetHead

PROBE = "probe.safetensors"
SHARD_BYTES = 256 << 20


@dataclass
class Conversation:
    """Token ids and which of them are answers; never text that would have to be tokenized again."""

    tokens: np.ndarray  # [T] int32
    mask: np.ndarray  # [T] bool: part of an answer
    prompt_hash: str
    meta: dict[str, Any] = field(default_factory=dict)  # anything JSON holds: domain, temperature, ...
    id: int = 0  # its place in the store

    @classmethod
    def answered(cls, tokens: Iterable[int], prompt_len: int, meta: dict[str, Any], id: int) -> Conversation:
        """One prompt of `prompt_len` tokens with its answer behind it."""
        ids = np.asarray(tokens, dtype=np.int32)
        return cls(ids, np.arange(len(ids)) >= prompt_len, prompt_hash(ids[:prompt_len]), meta, id)


def prompt_hash(tokens: np.ndarray) -> str:
    """16 hex digits over a prompt's token ids; equal prompts fall on the same side of a split."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype=np.int32).tobytes()).hexdigest()[:16]


class Store:
    """A store that is being read."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index
        self._files: dict[int, Any] = {}
        places: dict[int, tuple[int, int, int, int]] = {}  # by id: (id, shard, start, stop)
        notes: dict[int, dict[str, Any]] = {}
        for shard in range(len(index.shards)):
            file = self._file(shard)
            offsets, ids = file.get_tensor("offsets").tolist(), file.get_tensor("ids").tolist()
            places |= {id: (id, shard, offsets[at], offsets[at + 1]) for at, id in enumerate(ids)}
            notes |= dict(zip(ids, json.loads(file.metadata()["conversations"]), strict=True))
        self._places = sorted(place for id, place in places.items() if index.limit is None or id < index.limit)
        self._notes = [notes[id] for id, *_ in self._places]
        self.lengths = np.array([stop - start for _, _, start, stop in self._places], dtype=np.int64)

    @classmethod
    def open(cls, folder: Path | str, verify: bool = True) -> Store:
        """The store in `folder`.

        verify: compare every shard with the hash in the index (reads them all once), not only with its size.
        Raises `UserError` where a file is missing, truncated or corrupt.
        """
        folder = Path(folder)
        index = read_index(folder)
        for entry in index.shards:
            check_shard(folder / entry.file, entry, verify)
        return cls(folder, index)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> Conversation:
        id, shard, start, stop = self._places[i]
        file, note = self._file(shard), self._notes[i]
        tokens, mask = (file.get_slice(name)[start:stop].numpy() for name in ("tokens", "mask"))
        return Conversation(tokens, mask, note["prompt"], note["meta"], id)

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(self.index.features)

    @property
    def tokens(self) -> int:
        """Of all conversations together."""
        return int(self.lengths.sum())

    def features(self, i: int, names: Iterable[str]) -> Features:
        """Conversation i's features, {name: [T, F]}.

        The last token's may be zero: nothing is drafted after it, so no loss reads them.
        """
        _, shard, start, stop = self._places[i]
        file = self._file(shard)
        return {name: file.get_slice(name)[start:stop] for name in names}

    def require(self, names: Iterable[str]) -> None:
        """A `UserError` where a feature was not captured."""
        missing = sorted(set(names) - set(self.index.features))
        if missing:
            held = ", ".join(self.index.features) or "none"
            raise UserError(
                f"store '{self.folder}': no feature {', '.join(missing)} (it holds {held}); "
                f"run `drafttrain capture`, or train with the target loaded"
            )

    def split(self, part: Literal["train", "held_out"], fraction: float, seed: int = 0) -> list[int]:
        """Conversations of one part: a prompt is held out by its own hash, whatever else the store holds."""
        wanted = part == "held_out"
        return [i for i, note in enumerate(self._notes) if (_share(note["prompt"], seed) < fraction) == wanted]

    def answer_counts(self, vocab_size: int, indices: Iterable[int] | None = None) -> Tensor:
        """[V] how often each token stands in the answers."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for i in range(len(self)) if indices is None else indices:
            conversation = self[i]
            np.add.at(counts, conversation.tokens[conversation.mask], 1)
        return torch.from_numpy(counts)

    def check_target(self, origin: Origin) -> None:
        """A `UserError` unless this is the target, and the way of taking features, that the store was made with."""
        self.index.origin.require(origin, self.feature_names, self.folder)

    def check_head(self, head: TargetHead) -> None:
        """A `UserError` unless head(last) gives the target's own logits; a store without a probe passes."""
        if self.index.probe:
            check_probe(self.probe(), head, self.folder)

    def probe(self) -> Features:
        """What `origin.take_probe` took when the store was made."""
        path = self.folder / PROBE
        return load_tensors(path, f"'{path}'", "capture the store again")

    def _file(self, shard: int) -> Any:
        if shard not in self._files:
            self._files[shard] = open_shard(self.folder / self.index.shards[shard].file)
        return self._files[shard]


def _share(prompt: str, seed: int) -> float:
    """A number in [0, 1) that belongs to this prompt and seed."""
    return int(hashlib.sha256(f"{seed}:{prompt}".encode()).hexdigest()[:13], 16) / 16**13


class StoreWriter:
    """A store that is being written. Opened on a folder with an unfinished store, it goes on behind what is there."""

    def __init__(
        self,
        folder: Path | str,
        origin: Origin,
        features: dict[str, int] | None = None,
        stage: str = "",
        probe: Features | None = None,
        shard_bytes: int = SHARD_BYTES,
        licences: Mapping[str, str] | None = None,
        left_out: Mapping[str, int] | None = None,
    ) -> None:
        """features: names and numbers a token (`feature_widths`). stage: fingerprint of what the content depends on. licences: by part.
        left_out: what did not become a conversation, by reason.

        Raises `UserError` where the folder holds a store of another target, stage or feature set.
        """
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self.lengths: dict[int, int] = {}  # tokens of each conversation by id, safe on disk or waiting in memory
        self.tokens = 0  # of all of them
        self.pending: list[tuple[Conversation, Features]] = []
        self.pending_bytes = 0
        self.index = Index(
            origin=origin, features=features or {}, stage=stage, probe=probe is not None, licences=dict(licences or {}),
            left_out=dict(left_out or {}),
        )  # fmt: skip
        if (self.folder / INDEX).exists():
            self._resume()
        else:
            self._begin(probe)

    def append(self, conversation: Conversation, features: Features | None = None) -> None:
        """Adds a conversation, with {name: [T, F]} where the store has features. It is safe after the next `flush`.

        Raises `UserError` where token ids do not fit the target's vocabulary, or the disk is full.
        """
        T, kept = len(conversation.tokens), features or {}
        assert set(kept) == set(self.index.features), f"features {sorted(kept)}, expected {sorted(self.index.features)}"
        assert all(len(value) == T for value in kept.values()), f"{T} tokens, {[v.shape for v in kept.values()]}"
        assert conversation.id not in self.lengths, f"conversation {conversation.id} is in the store already"
        check_vocabulary(conversation, self.index.origin)
        self.lengths[conversation.id] = T
        self.tokens += T
        self.pending.append((conversation, kept))
        self.pending_bytes += T * 5 + sum(value.numel() * value.element_size() for value in kept.values())
        if self.pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what waits in memory as one shard, and then the index that lists it."""
        if not self.pending:
            return
        path = self.folder / f"shard-{len(self.index.shards):05d}.safetensors"
        tensors, notes = self._shard()
        with writable(self.folder):
            write_whole(path, lambda partial: save_file(tensors, partial, {"conversations": json.dumps(notes)}))
            entry = ShardEntry(
                file=path.name,
                bytes=path.stat().st_size,
                sha256=sha256(path),
                conversations=len(notes),
                tokens=len(tensors["tokens"]),
            )
            self.index = self.index.model_copy(update={"shards": (*self.index.shards, entry)})
            write_index(self.folder, self.index)
        self.pending, self.pending_bytes = [], 0

    def take(self, part: Store) -> None:
        """Adds the shards of another store of the same stage, as files; those that are here already are left out."""
        held = {entry.sha256 for entry in self.index.shards}
        for entry in part.index.shards:
            if entry.sha256 in held:
                continue  # a killed process added it, and could not remove the part
            path = self.folder / f"shard-{len(self.index.shards):05d}.safetensors"
            with writable(self.folder):
                path.unlink(missing_ok=True)
                try:
                    os.link(part.folder / entry.file, path)
                except OSError:  # a file system without hard links
                    shutil.copyfile(part.folder / entry.file, path)
                mine = entry.model_copy(update={"file": path.name})
                self.index = self.index.model_copy(update={"shards": (*self.index.shards, mine)})
                write_index(self.folder, self.index)
        everything = Store(self.folder, self.index.model_copy(update={"limit": None}))
        self.lengths = {id: stop - start for id, _, start, stop in everything._places}
        self.tokens = everything.tokens

    def finish(self, limit: int | None = None) -> Store:
        """Marks the store complete and opens it. limit: see `Index.limit`."""
        self.flush()
        self.index = self.index.model_copy(update={"complete": True, "limit": limit})
        with writable(self.folder):
            write_index(self.folder, self.index)
        return Store.open(self.folder, verify=False)

    def _shard(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        conversations = [conversation for conversation, _ in self.pending]
        stops = np.cumsum([len(conversation.tokens) for conversation in conversations])
        tensors = {
            "tokens": torch.from_numpy(np.concatenate([c.tokens for c in conversations]).astype(np.int32)),
            "mask": torch.from_numpy(np.concatenate([c.mask for c in conversations]).astype(bool)),
            "offsets": torch.tensor([0, *stops], dtype=torch.int64),
            "ids": torch.tensor([c.id for c in conversations], dtype=torch.int64),
        }
        for name in self.index.features:
            tensors[name] = torch.cat([features[name].cpu() for _, features in self.pending])
        return tensors, [{"prompt": c.prompt_hash, "meta": c.meta} for c in conversations]

    def _begin(self, probe: Features | None) -> None:
        with writable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if probe is not None:
                tensors = {name: value.cpu().contiguous() for name, value in probe.items()}
                write_whole(self.folder / PROBE, lambda partial: save_file(tensors, partial))
            write_index(self.folder, self.index)

    def _resume(self) -> None:
        known, fresh = Store.open(self.folder), self.index
        known.index.origin.require(fresh.origin, tuple(fresh.features), self.folder)
        if known.index.stage != fresh.stage or known.index.features != fresh.features:
            raise UserError(
                f"store '{self.folder}' was begun with other options (stage '{known.index.stage}', features "
                f"{known.index.features}; now '{fresh.stage}', {fresh.features}); choose another output folder, or "
                f"delete this one"
            )
        self.index = known.index.model_copy(update={"limit": None, "complete": False, "left_out": fresh.left_out})
        everything = Store(self.folder, self.index)
        self.lengths = {id: stop - start for id, _, start, stop in everything._places}
        self.tokens = everything.tokens


def check_vocabulary(conversation: Conversation, origin: Origin) -> None:
    """A `UserError` where a token id is none of the target's."""
    tokens = conversation.tokens
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < origin.vocab_size:
        raise UserError(
            f"conversation {conversation.id}: token id {tokens.max()} is outside the vocabulary of {origin.vocab_size} "
            f"of target '{origin.name}'; it was tokenized for another model: use that one, or make the data again"
        )


def feature_widths(needs: Iterable[str], hidden_size: int, aux_layers: int) -> dict[str, int]:
    """Numbers a token of each feature in `needs`. aux_layers: how many layers `aux_hidden_states` concatenates."""
    known = {"last_hidden_state": hidden_size, "aux_hidden_states": hidden_size * aux_layers}
    return {name: known[name] for name in sorted(needs)}


def bytes_per_token(needs: Iterable[str], hidden_size: int, aux_layers: int, dtype: str) -> int:
    """Bytes on disk for each token: its id, its mask, and the features in `needs` (and `teacher_needs`)."""
    return 5 + sum(feature_widths(needs, hidden_size, aux_layers).values()) * DTYPES[dtype].itemsize
