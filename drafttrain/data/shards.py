"""Files of a store: shards, and the index that alone makes a shard count.

Each file is written whole (`core/disk.py`), the index last: whenever the process dies, what the index lists is whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from drafttrain.core.config import Config, parse
from drafttrain.core.disk import check_format, open_tensors, read_json, sha256, write_text
from drafttrain.core.errors import UserError
from drafttrain.core.renamed import FEATURES
from drafttrain.data.origin import Origin

FORMAT = 1
INDEX = "index.json"
MEND = "delete the store's folder and make the data again, or restore the file from a copy"


class ShardEntry(Config):
    """One shard as the index knows it."""

    file: str
    bytes: int
    sha256: str
    conversations: int
    tokens: int


class Index(Config):
    """`index.json`."""

    format: int = FORMAT
    origin: Origin
    stage: str = ""
    """Fingerprint of everything the stage that writes this store depends on."""
    features: dict[str, int] = Field(default_factory=dict)
    """Captured features and how many numbers a token each has."""
    shards: tuple[ShardEntry, ...] = ()
    limit: int | None = None
    """Conversations with this id and above are left over from a larger batch and not part of the store."""
    complete: bool = False
    """Whether the stage that writes this store has finished."""
    licences: dict[str, str] = Field(default_factory=dict)
    """What the target and the sources of the prompts stand under; empty in stores of earlier versions."""
    left_out: dict[str, int] = Field(default_factory=dict)
    """What did not become a conversation, by reason: rows of data sets, equal prompts, turns, prompts that are too long."""
    probe: bool = False
    """Whether hidden states with the target's own logits stand beside the shards."""


def read_index(folder: Path) -> Index:
    """A folder's index, or a `UserError`."""
    path = folder / INDEX
    if not path.exists():
        raise UserError(f"store '{folder}': no {INDEX} there; give a folder that `regenerate` or `capture` wrote")
    data = read_json(path, f"store '{folder}'", MEND)
    check_format(data, FORMAT, f"store '{folder}'", "make the data again")
    features = data.get("features")
    renamed = [name for name in features if name in FEATURES] if isinstance(features, dict) else []
    if renamed:
        old = ", ".join(f"'{name}' (now '{FEATURES[name]}')" for name in renamed)
        raise UserError(f"store '{folder}': features {old} were stored under their former names; capture them again with this drafttrain")
    return parse(Index, data, str(path))


def write_index(folder: Path, index: Index) -> None:
    """Replaces a folder's index."""
    write_text(folder / INDEX, index.model_dump_json(indent=1))


def check_shard(path: Path, entry: ShardEntry, verify: bool) -> None:
    """A `UserError` where a shard is not what the index says. verify: compare its hash too, not only its size."""
    if not path.exists():
        raise UserError(f"shard '{path}' is missing, though the index lists it; {MEND}")
    size = path.stat().st_size
    if size != entry.bytes:
        raise UserError(f"shard '{path}': {size} bytes, expected {entry.bytes} (truncated or overwritten); {MEND}")
    if verify and sha256(path) != entry.sha256:
        raise UserError(f"shard '{path}' is corrupt: its content differs from the hash in the index; {MEND}")


def open_shard(path: Path) -> Any:
    """A shard's tensors, read when asked for; or a `UserError`."""
    return open_tensors(path, f"shard '{path}'", MEND)
