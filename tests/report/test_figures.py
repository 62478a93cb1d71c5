"""One figure of a results file inside a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drafttrain.core.errors import UserError
from drafttrain.report.tables import render, stale

LINES = [
    {"label": "a", "task": "all", "tau": 1.23456, "speedups": {"plain": {"value": 1.1, "low": 1.0, "high": 1.25}}, "alpha": [0.5, 0.25]},
    {"label": "b", "task": "all", "tau": 9.0},
    {"label": "a", "task": "all", "tau": 2.34567, "speedups": {"plain": {"value": 1.2, "low": 1.1, "high": 1.3}}, "alpha": [0.75, 0.25]},
]


def page(tmp_path: Path, text: str) -> Path:
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(line) for line in LINES))
    (tmp_path / "page.md").write_text(text)
    return tmp_path / "page.md"


@pytest.mark.parametrize(("path", "said"), [("tau", "2.35"), ("speedups.plain", "1.2 [1.1, 1.3]"), ("alpha.0", "0.75"), ("label", "a")])
def test_the_last_fitting_line_gives_the_figure_and_a_typed_one_is_stale(tmp_path: Path, path: str, said: str) -> None:
    written = page(tmp_path, f"| x | <!-- figure:r label=a; task=all -> {path} -->typed<!-- /figure --> |\n")
    assert stale(written, tmp_path) == ["r"]
    assert render(written, tmp_path)
    assert f"-->{said}<!-- /figure -->" in written.read_text()
    assert stale(written, tmp_path) == [] and not render(written, tmp_path)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("figure:gone label=a -> tau -->x<!-- /figure -->", "no such file"),
        ("figure:r label=c -> tau -->x<!-- /figure -->", "no line with label=c"),
        ("figure:r label=a -> quality -->x<!-- /figure -->", "nothing at 'quality'"),
        ("figure:r label -> tau -->x<!-- /figure -->", "no KEY=VALUE"),
        ("figure:r label=a -> tau -->x", "not of the form"),
    ],
)
def test_a_figure_that_is_not_there_is_named(tmp_path: Path, mark: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        render(page(tmp_path, f"<!-- {mark}\n"), tmp_path)
