"""Streams with a shift: how requests are arranged, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drafttrain.core.errors import UserError
from drafttrain.data.origin import Origin
from drafttrain.data.store import Conversation, StoreWriter
from drafttrain.evaluation.streams import StreamItem, StreamRow, arranged, load_stream, shifts
from drafttrain.report.stream_plots import moving_tau, stream_table
from tests.data.stores import make_target

ITEMS = [StreamItem(str(number), "ab"[number % 2], f"prompt {number}") for number in range(20)]


def tasks(pattern: Any, chosen: tuple[str, ...] = ("a", "b"), count: int = 12) -> str:
    return "".join(item.task for item in arranged(ITEMS, pattern, chosen, count, seed=0))


def test_blocks_shift_once_and_alternating_streams_at_every_request() -> None:
    assert tasks("blocks") == "a" * 6 + "b" * 6
    assert tasks("blocks", ("b", "a")) == "b" * 6 + "a" * 6
    assert tasks("alternating") == "ab" * 6
    assert tasks("given") == "ab" * 6


def test_a_mixture_begins_with_the_first_task_and_ends_with_the_last() -> None:
    mixed = tasks("mixture", count=16)
    assert mixed[:3].count("a") > mixed[-3:].count("a")
    assert mixed[0] == "a"
    assert mixed[-1] == "b"
    assert set(mixed[4:12]) == {"a", "b"}


def test_no_request_is_asked_twice() -> None:
    for pattern in ("given", "blocks", "alternating"):
        asked = [item.id for item in arranged(ITEMS, pattern, (), 20, seed=0)]  # type: ignore[arg-type]
        assert len(set(asked)) == 20


def test_shifts_are_where_another_task_begins_and_none_are_marked_in_a_mixture() -> None:
    assert shifts(list("aaabbbcc")) == [3, 6]
    assert shifts(list("ab" * 10)) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ("c",)}, "no task 'c'"),
        ({"count": 21}, "has 20 requests"),
        ({"tasks": ("a", "b"), "pattern": "blocks", "count": 12, "items": ITEMS[:13:2] + ITEMS[1:10:2]}, "takes 6 requests of task 'b'"),
    ],
)
def test_a_stream_that_cannot_be_arranged_is_refused(options: dict[str, Any], said: str) -> None:
    given = {"items": ITEMS, "pattern": "given", "tasks": (), "count": None, "seed": 0, **options}
    with pytest.raises(UserError, match=said):
        arranged(**given)


def test_a_stream_that_repeats_ids_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stream.jsonl"
    path.write_text('{"id": "1", "task": "a", "prompt": "x"}\n{"id": "1", "task": "b", "prompt": "y"}\n')
    with pytest.raises(UserError, match="two items have the id '1'"):
        load_stream(str(path), Origin.of_target(make_target()), "given", (), None, 0)


def test_a_stores_domains_are_the_tasks_and_each_prompt_is_asked_once(tmp_path: Path) -> None:
    target = make_target()
    writer = StoreWriter(tmp_path / "store", Origin.of_target(target))
    for id, (prompt, domain) in enumerate([([1, 2], "chat"), ([1, 2], "chat"), ([3, 4, 5], "code")]):
        writer.append(Conversation.answered(np.array([*prompt, 7, 8]), len(prompt), {"domain": domain}, id))
    writer.finish()
    items = load_stream(str(tmp_path / "store"), Origin.of_target(target), "given", (), None, 0)
    assert [(item.task, item.prompt) for item in items] == [("chat", [1, 2]), ("code", [3, 4, 5])]
    with pytest.raises(UserError, match="its target is"):
        load_stream(str(tmp_path / "store"), Origin.of_target(make_target(fingerprint="other")), "given", (), None, 0)


def row(place: int, task: str, rounds: int, tokens: int) -> StreamRow:
    return StreamRow(
        method="osd", place=place, id=str(place), task=task, version=place, last_version=place, rounds=rounds, tokens=tokens, attempts=(),
        accepts=(), decode_seconds=1.0, learn_seconds=0.5,
    )  # fmt: skip


def test_the_curve_pools_its_window_and_does_not_mix_what_lies_on_both_sides_of_a_shift() -> None:
    rows = [row(0, "a", 10, 20), row(1, "a", 10, 40), row(2, "b", 10, 10), row(3, "b", 10, 30)]
    assert moving_tau(rows, 2) == [2.0, 3.0, 1.0, 2.0]
    heads, [cells] = stream_table({"osd": rows})
    assert dict(zip(heads, cells, strict=True)) == {
        "method": "osd", "tau": "2.500", "a 0-1": "3.000", "b 2-3": "2.000", "updates": "3", "decoding s": "4.0", "learning s": "2.0",
    }  # fmt: skip
