"""The engines' table says what the results file does, the last row of a setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drafttrain.core.errors import UserError
from drafttrain.report.engine_tables import engines_table
from drafttrain.report.tables import render, stale

ROW: dict[str, Any] = {
    "engine": "vllm", "version": "0.32.0", "format": None, "length": 3, "max_new_tokens": 40, "suite": "builtin", "differs": False,
    "causes": [],
    "prompts": 4, "texts_equal": 4, "rounds": 125, "accepted": [27, 4, 1], "engine_rounds": 126, "engine_accepted": [28, 4, 1],
}  # fmt: skip
ROOT = Path(__file__).parents[2]


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps({**ROW, **row}) + "\n" for row in rows))
    return path


def test_the_last_row_of_a_setting_stands_in_the_table(tmp_path: Path) -> None:
    together = {"engine": "llamacpp", "version": "xllamacpp 2026.10 (llama.cpp)", "engine_accepted": [31], "differs": True}
    table = engines_table(written(tmp_path / "engines.jsonl", {"rounds": 1}, {}, together))
    assert "| vLLM 0.32.0 | its own | 3 | 4 x 40 | 4 | 125 / 126 | 27 4 1 / 28 4 1 | equal |" in table
    assert "| llama.cpp 2026.10 | its own | 3 | 4 x 40 | 4 | 125 / 126 | 32 / 31 | differs: no known fault" in table
    assert len(table.splitlines()) == 4


def test_a_page_is_stale_until_it_is_rendered(tmp_path: Path) -> None:
    written(tmp_path / "engines.jsonl", {})
    page = tmp_path / "page.md"
    page.write_text("# Engines\n\n<!-- results:engines engines -->\n<!-- /results:engines -->\n")
    assert stale(page, tmp_path) == ["engines"]
    assert render(page, tmp_path)
    assert stale(page, tmp_path) == []


def test_the_engines_page_shows_the_results_that_lie_beside_it() -> None:
    page = ROOT / "docs" / "engines.md"
    assert "<!-- results:engines engines -->" in page.read_text()
    assert stale(page, ROOT / "docs" / "results") == []


def test_a_file_of_other_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"label": "plain"}\n')
    for name in ("other", "missing"):
        with pytest.raises(UserError, match="no results of `drafttrain verify"):
            engines_table(tmp_path / f"{name}.jsonl")
