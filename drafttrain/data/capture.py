"""Features of given conversations: one target pass over them, packed, and nothing else.

R rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from contextlib import ExitStack
from pathlib import Path

from drafttrain.core.config import fingerprint
from drafttrain.core.disk import only_writer
from drafttrain.core.errors import UserError
from drafttrain.core.types import Features
from drafttrain.data.collate import collate, pack
from drafttrain.data.journal import FLUSH_SECONDS, StoreJournal
from drafttrain.data.origin import Origin, take_probe
from drafttrain.data.share import ALL, Share, completed, joined, part_of, refuse_others, sweep, take_up
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
    share: Share = ALL,
) -> Store | None:
    """The conversations of `source` with `features` beside them, in `folder`, which may hold a part of them or all.

    rows, row_length: of one pass; they set its memory and change no result beyond rounding. share: of the passes, where several processes
    work; None comes back where other shares are missing still and it does not wait for them.
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
    ids = [source[i].id for i in range(len(source))]
    row_length = max(row_length, longest)
    packed = pack(source.lengths.tolist(), row_length)
    groups = [packed[start : start + rows] for start in range(0, len(packed), rows)]  # a pass gives the same numbers again

    def opened(place: Path) -> StoreWriter:
        return StoreWriter(place, origin, widths, stage, take_probe(target), licences=source.index.licences)

    def write(writer: StoreWriter, done: Container[int]) -> None:
        with StoreJournal(writer, "features", source.tokens // share.count, writer.tokens, "tokens", flush_seconds) as journal:
            for number, group in enumerate(groups):
                missing = {i for row in group for i in row if ids[i] not in done} if share.mine(number) else set()
                encoded = _encode(target, source, group, row_length, names) if missing else {}
                for i in sorted(missing):
                    journal.add(source[i], encoded[i], int(source.lengths[i]))
                journal.show(writer.tokens)

    if share.whole:
        with only_writer(folder):
            writer = opened(folder)
            refuse_others(folder, share)
            take_up(folder, writer)
            write(writer, set(writer.lengths))
            store = writer.finish()
            sweep(folder)
            return store
    with ExitStack() as held:
        with joined(folder, share, lambda: opened(folder)) as writer:
            done = set(writer.lengths)
            part = held.enter_context(part_of(folder, share))
        write(opened(part), done)
    with joined(folder, share, lambda: opened(folder)) as writer:
        if writer.lengths.keys() >= set(ids):
            writer.finish()
            sweep(folder)
    return completed(folder, share)


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
