"""Streams: prompts in the order in which they arrive, whose kind may shift, and the rows that decoding one leaves behind.

Prompts come from a JSONL file (as suites have them, see `suites.py`) or from the conversations of a store, whose tasks are its domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from drafttrain.core.config import Config, fingerprint
from drafttrain.core.errors import UserError, nearest
from drafttrain.data.collate import shuffled
from drafttrain.data.origin import Origin
from drafttrain.data.shards import INDEX
from drafttrain.data.store import Store
from drafttrain.evaluation.suites import load_suite

Pattern = Literal["given", "blocks", "alternating", "mixture"]


@dataclass(frozen=True)
class StreamItem:
    """One request that arrives."""

    id: str
    task: str
    prompt: Any  # as `SpeculativeDecoder.tokenize` takes it: a text, messages, or token ids


class StreamRow(Config):
    """What one request of a stream took. It names no word of the prompt or the answer."""

    method: str
    """How the drafter learnt."""
    place: int
    """In the stream, from 0."""
    id: str
    task: str
    version: int
    """Of the weights that drafted its first round: how many updates they had seen. Its own tokens were in none of them."""
    last_version: int
    """Of those that drafted its last round; another one where weights were swapped within the request."""
    rounds: int
    tokens: int
    """Kept in rounds."""
    attempts: tuple[int, ...]
    accepts: tuple[int, ...]
    decode_seconds: float
    """Of the batch it was decoded in, shared out by tokens."""
    learn_seconds: float
    """Of the updates before the next request, shared out among the requests they learnt from."""

    @property
    def tau(self) -> float:
        """Accepted length."""
        return self.tokens / self.rounds if self.rounds else 0.0


def pooled_tau(rows: Sequence[StreamRow]) -> float:
    """Accepted length over all of them; 0 where nothing was decoded in rounds."""
    rounds = sum(row.rounds for row in rows)
    return sum(row.tokens for row in rows) / rounds if rounds else 0.0


def load_stream(source: str, target: Origin, pattern: Pattern, tasks: Sequence[str], count: int | None, seed: int) -> list[StreamItem]:
    """The requests of a JSONL file or a store, arranged by `pattern`.

    Raises `UserError` where there is none, two have one id, a task is unknown, or the store is another target's.
    """
    if (Path(source) / INDEX).exists():
        items = _of_store(Path(source), target)
    else:
        items = [StreamItem(item.id, item.task, item.opening()) for item in load_suite(source).items]
    return arranged(items, pattern, tasks, count, seed)


def _of_store(folder: Path, target: Origin) -> list[StreamItem]:
    store, items, seen = Store.open(folder, verify=False), list[StreamItem](), set[str]()
    store.check_target(target)
    for index in range(len(store)):
        conversation = store[index]
        if conversation.prompt_hash in seen or not conversation.mask.any():
            continue  # answered at several temperatures, or never
        seen.add(conversation.prompt_hash)
        first = int(conversation.mask.argmax())
        items.append(StreamItem(str(conversation.id), str(conversation.meta.get("domain", "all")), conversation.tokens[:first].tolist()))
    return items


def arranged(items: Sequence[StreamItem], pattern: Pattern, tasks: Sequence[str], count: int | None, seed: int) -> list[StreamItem]:
    """A stream of `count` requests of these tasks (none named: all, in order of appearance), each request once."""
    known = list(dict.fromkeys(item.task for item in items))
    for task in tasks:
        if task not in known:
            raise UserError(f"online.tasks: the stream has no task '{task}'{nearest(task, known)}; its tasks: {', '.join(known)}")
    chosen = list(tasks) or known
    waiting = {task: [item for item in items if item.task == task] for task in chosen}
    total = sum(map(len, waiting.values()))
    size = total if count is None else count
    if size > total:
        raise UserError(f"online.count {size}: the stream has {total} requests of {', '.join(chosen)}; ask for fewer, or give more prompts")
    if pattern == "given":
        return [item for item in items if item.task in chosen][:size]
    order = _order(pattern, chosen, size, seed)
    for task in chosen:
        if order.count(task) > len(waiting[task]):
            raise UserError(
                f"online.pattern '{pattern}' takes {order.count(task)} requests of task '{task}', the stream has {len(waiting[task])}; "
                f"lower online.count, or give more prompts"
            )
    return [waiting[task].pop(0) for task in order]


def _order(pattern: Pattern, tasks: Sequence[str], size: int, seed: int) -> list[str]:
    """The task of each request."""
    number = len(tasks)
    if pattern == "blocks":
        return [tasks[place * number // size] for place in range(size)]
    if pattern == "alternating":
        return [tasks[place % number] for place in range(size)]
    draws, order = [draw / size for draw in shuffled(size, seed, 1)], list[str]()
    for place, draw in enumerate(draws):  # one task fades into the next
        along = place / max(1, size - 1) * (number - 1)
        order.append(tasks[min(int(along) + int(draw < along - int(along)), number - 1)])
    return order


def shifts(tasks: Sequence[str], most: int = 8) -> list[int]:
    """Places at which another task begins; none where tasks change more often than `most` times, as in mixtures."""
    places = [place for place in range(1, len(tasks)) if tasks[place] != tasks[place - 1]]
    return places if len(places) <= most else []


def stream_hash(items: Sequence[StreamItem]) -> str:
    """Of everything that is asked, in order."""
    return fingerprint([[item.id, item.task, item.prompt] for item in items])
