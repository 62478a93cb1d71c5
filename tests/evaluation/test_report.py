"""Tables, and pages that take their figures from results files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drafttrain.core.errors import UserError
from drafttrain.evaluation.journal import append_whole
from drafttrain.evaluation.report import render, results_table, stale, terminal_table
from drafttrain.evaluation.rows import Difference, Row
from drafttrain.evaluation.runners import PLAIN
from tests.evaluation.test_rows import DRAFTED, PLAINLY, SETTING, rows_of
from tests.evaluation.toys import sample

REPOSITORY = Path(__file__).parents[2]
ROWS = list(rows_of(*PLAINLY, *DRAFTED).values())
PAGE = "# Title\n\n<!-- results:quick -->\n<!-- /results:quick -->\n\nText.\n"


def line(table: str, label: str) -> dict[str, str]:
    """A line of a Markdown table by its first cell: head -> cell."""
    rows = [row.strip("|").split(" | ") for row in table.splitlines() if row.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    return dict(zip(cells[0], next(row for row in cells if row[0] == label), strict=True))


def page(folder: Path, rows: list[Row], text: str = PAGE) -> Path:
    append_whole(folder / "results" / "quick.jsonl", [row.to_json() for row in rows])
    (folder / "README.md").write_text(text)
    return folder / "README.md"


def test_the_table_shows_the_figures_of_its_rows() -> None:
    got = line(results_table(ROWS), "mine")
    assert (got["tau"], got["tau, no loops"], got["alpha_1 .."]) == ("2.50", "2.50", "1.50")
    assert (got["plain tokens/s"], got["tokens/s"]) == ("10.0", "33.3")
    assert got["speed-up [95%]"].startswith("3.33 [2.00, 4.00")
    assert (got["loop efficiency"], got["drafting / bare"], got["differ from plain"]) == ("0.80", "1.50", "0 of 2")
    assert line(results_table(ROWS), PLAIN)["speed-up [95%]"] == "1.00 [1.00, 1.00]"


def test_where_all_outputs_loop_the_columns_without_loops_are_empty() -> None:
    looping = rows_of(sample("a", PLAIN, 4.0, 40, 40, looping=True), DRAFTED[0]).values()
    got = line(results_table(looping), "mine")
    assert (got["tau, no loops"], got["speed-up, no loops [95%]"]) == ("–", "–")


def test_the_task_view_has_a_line_for_every_task_and_for_all() -> None:
    qa = [sample("q", PLAIN, 2.0, 20, 20, task="qa"), sample("q", "mine", 1.0, 20, 10, task="qa")]
    table = results_table(rows_of(*PLAINLY, *DRAFTED, *qa).values(), "tasks")
    assert [row.split(" | ")[1] for row in table.splitlines() if row.startswith("| mine")] == ["math", "qa", "all"]


def test_the_footer_names_target_suite_machine_versions_and_seed() -> None:
    table = results_table(ROWS)
    facts = ("toy (f00d, float32)", "suite mine (beef), 2 prompts", "at most 32 new tokens", "greedy", "seed 0")
    assert all(fact in table for fact in (*facts, "cpu, 2 threads", "torch 2", "2025-01-01"))


def test_the_largest_margin_of_differing_outputs_stands_in_the_table() -> None:
    other = sample("b", "mine", 0.5, 10, 10, difference=Difference(3, 0.125))
    got = line(results_table(rows_of(*PLAINLY, DRAFTED[0], other).values()), "mine")
    assert got["differ from plain"] == "1 of 2, margin <= 0.12"


def test_a_lossy_rule_is_called_so() -> None:
    lossy = [replace(row, measured=replace(row.measured, lossless=False)) for row in ROWS]
    assert line(results_table(lossy), "mine (lossy)")["tau"] == "2.50"


def test_the_last_run_of_a_setting_counts() -> None:
    later = [replace(row, run="run-2", measured=replace(row.measured, tau=1.25)) for row in ROWS]
    assert line(results_table([*ROWS, *later]), "mine")["tau"] == "1.25"


@pytest.mark.parametrize(
    "change", [{"device": "cuda"}, {"suite_hash": "other"}, {"temperature": 1.0}, {"threads": 8}, {"dtype": "bfloat16"}]
)
def test_rows_of_different_settings_never_share_a_table(change: dict[str, Any]) -> None:
    table = results_table([*ROWS, *(replace(row, **change) for row in ROWS)])
    assert table.count("| contender |") == 2


def test_the_terminal_shows_the_same_figures() -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(ROWS))
    text = console.export_text()
    assert all(figure in text for figure in ("mine", "2.50", "33.3", "3.33 [2.00, 4.00]", SETTING.suite_hash))


def test_rendering_fills_the_marks_leaves_the_rest_and_is_settled_after_once(tmp_path: Path) -> None:
    path = page(tmp_path, ROWS)
    assert render(path, tmp_path / "results")
    text = path.read_text()
    assert text.startswith("# Title\n\n<!-- results:quick -->\n| contender |")
    assert text.endswith("<!-- /results:quick -->\n\nText.\n")
    assert not render(path, tmp_path / "results")
    assert path.read_text() == text


def test_a_page_whose_figure_was_typed_in_is_stale(tmp_path: Path) -> None:
    path = page(tmp_path, ROWS)
    render(path, tmp_path / "results")
    assert stale(path, tmp_path / "results") == []
    path.write_text(path.read_text().replace("2.50", "2.60"))
    assert stale(path, tmp_path / "results") == ["quick"]


def test_an_indented_mark_is_an_example_and_stays(tmp_path: Path) -> None:
    path = page(tmp_path, ROWS, "    <!-- results:NAME -->\n    <!-- /results:NAME -->\n")
    assert not render(path, tmp_path / "results")


def test_a_mark_can_ask_for_tasks(tmp_path: Path) -> None:
    path = page(tmp_path, ROWS, PAGE.replace("results:quick -->\n<", "results:quick tasks -->\n<"))
    render(path, tmp_path / "results")
    assert "| contender | task |" in path.read_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<!-- results:quick -->\n", "no matching '<!-- /results:quick -->'"),
        ("<!-- results:quick -->\n<!-- /results:quack -->\n", "no matching"),
        ("<!-- results:quick plots -->\n<!-- /results:quick -->\n", "the view is summary or tasks"),
        ("<!-- results:gone -->\n<!-- /results:gone -->\n", "gone.jsonl': no such file"),
    ],
)
def test_a_broken_mark_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        render(page(tmp_path, ROWS, text), tmp_path / "results")


def test_this_repositorys_pages_agree_with_their_results_files() -> None:
    pages = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("model_cards/**/*.md")]
    wrong = {path.name: stale(path, REPOSITORY / "docs" / "results") for path in pages}
    assert wrong == {path.name: [] for path in pages}
