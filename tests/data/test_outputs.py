"""Past outputs for a datastore: read from stores and JSONL, refused where they are of another target or no texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from drafttrain.core.errors import UserError
from drafttrain.data.origin import Origin
from drafttrain.data.outputs import past_outputs
from drafttrain.data.store import StoreWriter
from tests.data.stores import conversation, make_target


def test_a_stores_conversations_and_a_files_lines_are_read_as_token_ids(tmp_path: Path) -> None:
    target = make_target()
    origin, tokenizer = Origin.of_target(target), target.tokenizer
    assert tokenizer is not None
    writer = StoreWriter(tmp_path / "run" / "data", origin)
    written = [conversation(id, np.random.default_rng(id)) for id in range(3)]
    for one in written:
        writer.append(one)
    writer.finish()
    for folder in (tmp_path / "run", tmp_path / "run" / "data"):
        assert [text.tolist() for text in past_outputs(folder, origin, tokenizer)] == [one.tokens.tolist() for one in written]
    lines = tmp_path / "past.jsonl"
    lines.write_text('{"text": "w3 w4"}\n{"tokens": [7, 8]}\n')
    assert [text.tolist() for text in past_outputs(lines, origin, tokenizer)] == [[9, 10], [7, 8]]


def test_another_targets_store_and_lines_without_text_are_refused(tmp_path: Path) -> None:
    target = make_target()
    origin, tokenizer = Origin.of_target(target), target.tokenizer
    assert tokenizer is not None
    StoreWriter(tmp_path / "store", Origin.of_target(make_target(fingerprint="another"))).finish()
    with pytest.raises(UserError, match="its target is"):
        past_outputs(tmp_path / "store", origin, tokenizer)
    with pytest.raises(UserError, match="no store in this folder"):
        past_outputs(tmp_path, origin, tokenizer)
    lines = tmp_path / "past.jsonl"
    for line in ('{"tokens": [7, 64]}', '{"words": "w3"}'):
        lines.write_text(line)
        with pytest.raises(UserError, match="line 1: expected `text`"):
            past_outputs(lines, origin, tokenizer)
