"""Lines of JSON on disk."""

from __future__ import annotations

from pathlib import Path

from drafttrain.evaluation.journal import Journal, append_whole, parse_lines

ENTRIES = [{"id": f"a{separator}b"} for separator in ("\u2028", "\u2029", "\x85", "\n", "\r\n")]


def test_what_was_written_is_read_back_whatever_its_strings_hold(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for entry in ENTRIES:
        journal.append(entry)
    assert Journal(tmp_path / "journal.jsonl").entries == ENTRIES
    append_whole(tmp_path / "whole.jsonl", ENTRIES)
    text = (tmp_path / "whole.jsonl").read_text(encoding="utf-8")
    assert parse_lines(text, tmp_path) == parse_lines(text.removesuffix("\n"), tmp_path) == ENTRIES
    assert parse_lines("", tmp_path) == []
