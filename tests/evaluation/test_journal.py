"""Lines of JSON on disk."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import pytest

from drafttrain.core.errors import UserError
from drafttrain.evaluation.journal import ResultJournal, append_whole, parse_lines, read_lines
from drafttrain.evaluation.rule_rows import read_rule_rows
from drafttrain.report.frontier import page_of

ENTRIES = [{"id": f"a{separator}b"} for separator in ("\u2028", "\u2029", "\x85", "\n", "\r\n")]


def test_what_was_written_is_read_back_whatever_its_strings_hold(tmp_path: Path) -> None:
    journal = ResultJournal(tmp_path / "journal.jsonl")
    for entry in ENTRIES:
        journal.append(entry)
    assert ResultJournal(tmp_path / "journal.jsonl").entries == ENTRIES
    append_whole(tmp_path / "whole.jsonl", ENTRIES)
    text = (tmp_path / "whole.jsonl").read_text(encoding="utf-8")
    assert parse_lines(text, tmp_path) == parse_lines(text.removesuffix("\n"), tmp_path) == ENTRIES
    assert parse_lines("", tmp_path) == []


UNREADABLE = [(b"{}\n\xff\n", "not UTF-8"), (b"{}\n{\n", "line 2: not JSON"), (b"{}\n5\n", "line 2: int, not an object")]


@pytest.mark.parametrize(("content", "reason"), UNREADABLE)
def test_lines_that_cannot_be_read_are_refused_with_the_file(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    for read in (read_lines, ResultJournal, page_of, read_rule_rows):
        with pytest.raises(UserError, match=f"journal.jsonl'.*{reason}"):
            read(path)


def adds(path: Path, who: str) -> None:
    for number in range(20):
        append_whole(path, [{"who": who, "number": number}])


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    path, context = tmp_path / "results.jsonl", get_context("fork")
    both = [context.Process(target=adds, args=(path, who)) for who in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join()
    entries = parse_lines(path.read_text(), path)
    assert [[one["number"] for one in entries if one["who"] == who] for who in "ab"] == [[*range(20)]] * 2


def test_whoever_opens_a_journal_that_another_writes_cuts_nothing_and_reads_all_once_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"id":1}\n{"id"')  # another process is half through its line
    late = ResultJournal(path)
    assert (late.entries, path.read_bytes()) == ([{"id": 1}], b'{"id":1}\n{"id"')
    path.write_bytes(b'{"id":1}\n{"id":2}\n{"torn')
    with late.alone():
        assert late.entries == [{"id": 1}, {"id": 2}]
        late.append({"id": 3})
    assert path.read_bytes() == b'{"id":1}\n{"id":2}\n{"id":3}\n'


def test_a_journal_is_one_processs_at_a_time_and_free_again_afterwards(tmp_path: Path) -> None:
    first, second = ResultJournal(tmp_path / "journal.jsonl"), ResultJournal(tmp_path / "journal.jsonl")
    with first.alone(), pytest.raises(UserError, match="another process writes it now"), second.alone():
        raise AssertionError("both were let in")
    with second.alone():
        second.append({"id": 1})
