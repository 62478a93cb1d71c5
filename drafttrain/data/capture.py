"""Features of given conversations: one target pass over them, packed, and nothing else.

R rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from drafttrain.core.config import fingerprint
from drafttrain.core.disk import only_writer
from drafttrain.core.errors import UserError
from drafttrain.core.types import Features
from drafttrain.data.collate import collate, pack
from drafttrain.data.journal import FLUSH_SECONDS, StoreJournal
from drafttrain.data.origin import Origin, take_probe
from drafttrain.data.store import Store, StoreWriter, feature_widths
from drafttrain.target.adapter import Target


def capture(
    target: Target,
    source: Store,
    folder: Path,
    features: Iterable[str],
    rows: int = 4,
    row_length: int = 1024,
    flush_seconds: float = FLUSH_SECONDS,
) -> Store:
    """The conversations of `source` with `features` beside them, in `folder`, which may hold a part of them or all.

    rows, row_length: of one pass; they set its memory and change no result beyond rounding.
    Raises `UserError` where the conversations are another target's or longer than its context.
    """
    origin, names = Origin.of_target(target), tuple(sorted(features))
    source.index.origin.require(origin, (), source.folder)
    longest = int(source.lengths.max(initial=0))
    if longest > target.max_context:
        raise UserError(
            f"store '{source.folder}': a conversation of {longest} tokens exceeds the target's context of "
            f"{target.max_context}; remove it, or use a target with a longer context"
        )
    widths = feature_widths(names, target.shape.hidden_size, len(target.aux_layers))
    shards = [(shard.sha256, shard.conversations) for shard in source.index.shards]
    stage = fingerprint("capture", shards, source.index.limit, names, rows, row_length)
    with only_writer(folder):
        known = source.index
        writer = StoreWriter(folder, origin, widths, stage, take_probe(target), licences=known.licences, left_out=known.left_out)
        ids = [source[i].id for i in range(len(source))]
        row_length = max(row_length, longest)
        packed = pack(source.lengths.tolist(), row_length)
        with StoreJournal(writer, "features", source.tokens, writer.tokens, "tokens", flush_seconds) as journal:
            for start in range(0, len(packed), rows):
                group = packed[start : start + rows]  # the same in a run that goes on: a pass gives the same numbers again
                missing = {i for row in group for i in row if ids[i] not in writer.lengths}
                encoded = _encode(target, source, group, row_length, names) if missing else {}
                for i in sorted(missing):
                    journal.add(source[i], encoded[i], int(source.lengths[i]))
                journal.show(writer.tokens)
        return writer.finish()


def _encode(
    target: Target, source: Store, rows: list[list[int]], row_length: int, names: tuple[str, ...]
) -> dict[int, Features]:
    """One pass: {name: [T, F]} of each conversation in these rows."""
    batch = collate(source, rows, row_length).to(target.device)
    got = target.encode(batch.tokens, batch.position, batch.document, names)
    out = {}
    for row, members in enumerate(rows):
        start = 0
        for i in members:
            stop = start + int(source.lengths[i])
            out[i] = {name: value[row, start:stop].cpu() for name, value in got.items()}
            start = stop
    return out
