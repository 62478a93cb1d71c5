"""Rows of files and data sets: JSON Lines, JSON, and what the library `datasets` reads (parquet, Arrow, CSV, the Hub)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafttrain.core.errors import UserError, first_line, nearest

if TYPE_CHECKING:
    from datasets import Dataset

Row = tuple[str, dict[str, Any]]
"""(where it stands, its columns)."""

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"}
"""Endings of files -> the reader of `datasets`. JSON is read here: line by line, so that a wrong line is named and rows may differ."""
JSON_NAMES = (".jsonl", ".json", ".ndjson")
SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` leaves in a folder."""


def file_rows(path: Path) -> Iterator[Row]:
    """Rows of a file, or of all files of a folder by their names. Raises `UserError` where it cannot be read."""
    if is_saved(path):
        yield from numbered(saved_rows(path, "train"), f"prompts '{path}'")
        return
    if not path.is_dir():
        yield from _one_file(path)
        return
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (*JSON_NAMES, *BUILDERS) and not _hidden(file, path))
    if not files:
        names = ", ".join((*JSON_NAMES, *BUILDERS))
        raise UserError(f"prompts '{path}': a folder without a file of prompts; expected one that ends with {names}")
    for file in files:
        yield from _one_file(file)


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((path / name).is_file() for name in SAVED)


def json_rows(path: Path) -> Iterator[Row]:
    """Objects of a file: one a line, or one list of them. The line or the item is named."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # with or without the mark that Windows writes first
    except (OSError, ValueError) as error:
        raise UserError(f"prompts '{path}': cannot be read ({error}); give a file in UTF-8") from error
    items = _whole(text)
    if items is not None:
        entries = [(f"prompts '{path}', item {number}", item) for number, item in enumerate(items, 1)]
    else:  # JSON strings may hold what `splitlines` takes for a line's end
        lines = ((f"prompts '{path}', line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        entries = ((where, _object(line, where)) for where, line in lines)  # type: ignore[assignment]
    for where, record in entries:
        if not isinstance(record, dict):
            raise UserError(f"{where}: a {type(record).__name__}; expected an object with `prompt` or `messages`")
        yield where, record


def numbered(rows: Dataset, where: str) -> Iterator[Row]:
    """Rows of a data set with their numbers."""
    for number, row in enumerate(rows):
        yield f"{where}, row {number}", dict(row)


def saved_rows(path: Path, split: str) -> Dataset:
    """One split of a folder that `save_to_disk` wrote. A lone split is what the default means."""
    from datasets import load_from_disk

    rows = _loaded(lambda: load_from_disk(str(path)), str(path))
    if not isinstance(rows, Mapping) and split == "train":
        return rows
    splits = dict(rows) if isinstance(rows, Mapping) else {str(rows.split or "train"): rows}
    if split not in splits:
        hint, known = nearest(split, splits), ", ".join(splits)
        raise UserError(f"data set '{path}': no split '{split}'{hint}; it has {known} (`limit` takes the first rows)")
    return splits[split]


def hub_rows(name: str, subset: str | None, split: str) -> Dataset:
    """One split of a data set of the Hub."""
    from datasets import load_dataset

    return _loaded(lambda: load_dataset(name, subset, split=split), name)


def split_files(folder: Path, subset: str | None, split: str) -> list[Path]:
    """The files of a split, as the library finds them by their names and by the card."""
    from datasets import load_dataset_builder

    files = _loaded(lambda: load_dataset_builder(str(folder), subset).config.data_files, str(folder)) or {}
    if split not in files:
        hint, known = nearest(split, files), ", ".join(files)
        raise UserError(f"data set '{folder}': no split '{split}'{hint}; it has {known} (`limit` takes the first rows)")
    return [Path(file) for file in files[split]]


def _one_file(path: Path) -> Iterator[Row]:
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None or not path.is_file():
        yield from json_rows(path)
        return
    from datasets import load_dataset

    options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    rows = _loaded(lambda: load_dataset(builder, data_files=str(path), split="train", **options), str(path))
    yield from numbered(rows, f"prompts '{path}'")


def _loaded(load: Any, name: str) -> Any:
    try:
        return load()
    except Exception as error:  # the library raises errors of many kinds
        raise UserError(f"data set '{name}': cannot be loaded ({first_line(error)}); check its name and split") from error


def _whole(text: str) -> list[Any] | None:
    """The items of a file that is one list, or one object over several lines; None where it is lines."""
    start = text.lstrip()
    if not start.startswith("[") and not (start.startswith("{") and _broken(start.split("\n", 1)[0])):
        return None
    try:
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None  # as lines, of which the first wrong one is named
    if isinstance(whole, list):
        return whole
    lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    is_a_row = "role" in (lists[0][0] if lists else {}) or "from" in (lists[0][0] if lists else {})
    return lists[0] if len(lists) == 1 and not is_a_row else [whole]  # {"data": [...]}, or a lone row


def _broken(line: str) -> bool:
    try:
        json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return True
    return False


def _object(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); expected one object a line") from error


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
