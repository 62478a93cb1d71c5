"""Files of a store: shards, and the index that alone makes a shard count.

A file is written beside its name, synced and renamed, the index last: whenever the process dies, what the index
lists is whole.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors import SafetensorError, safe_open

from drafttrain.core.config import Config, parse
from drafttrain.core.errors import UserError, first_line
from drafttrain.core.renamed import FEATURES
from drafttrain.data.origin import Origin
from drafttrain.target.files import sha256

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
    probe: bool = False
    """Whether hidden states with the target's own logits stand beside the shards."""


def read_index(folder: Path) -> Index:
    """A folder's index, or a `UserError`."""
    path = folder / INDEX
    if not path.exists():
        raise UserError(f"store '{folder}': no {INDEX} there; give a folder that `regenerate` or `capture` wrote")
    try:
        data = json.loads(path.read_text())
        version = data["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"store '{folder}': {INDEX} is corrupt ({first_line(error)}); {MEND}") from error
    if version != FORMAT:
        raise UserError(f"store '{folder}': format {version}, but this drafttrain reads {FORMAT}; make the data again")
    if set(data.get("features", ())) & set(FEATURES):
        old = ", ".join(f"'{name}' (now '{FEATURES[name]}')" for name in data["features"] if name in FEATURES)
        raise UserError(f"store '{folder}': features {old} were stored under their former names; capture them again with this drafttrain")
    return parse(Index, data, str(path))


def write_index(folder: Path, index: Index) -> None:
    """Replaces a folder's index."""
    text = index.model_dump_json(indent=1)
    write_whole(folder / INDEX, lambda path: path.write_text(text))


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
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"shard '{path}': truncated or corrupt ({first_line(error)}); {MEND}") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission into a `UserError` that says what is safe."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors wraps the system's error in its own text
        code = error.errno if isinstance(error, OSError) else None
        full = code in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        reason = "the disk is full" if full else f"cannot write ({first_line(error)})"
        raise UserError(
            f"store '{folder}': {reason}; make room or choose another output folder, then run again: what was finished "
            f"before is intact and will not be made twice"
        ) from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """The file appears whole or not at all, and survives a crash after this call."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
