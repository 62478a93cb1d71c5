"""Tables, and pages that take their figures from results files."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drafttrain.core.errors import UserError
from drafttrain.evaluation.journal import append_whole
from drafttrain.evaluation.rows import ALL, Difference, Row
from drafttrain.evaluation.runners import GENERATE, PLAIN
from drafttrain.evaluation.throughput import Forecast
from drafttrain.report import frontier, plots
from drafttrain.report.frontier import Finding, Measurement
from drafttrain.report.page import is_stale, open_run, renew, together, write_report
from drafttrain.report.plots import PLOTS
from drafttrain.report.tables import draw, latest, render, results_table, stale, terminal_table
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


def with_rounds() -> list[Row]:
    """The same decodings, their rounds known one by one."""
    mine = [replace(one, outcome=replace(one.outcome, kept=[1] * 40)) for one in DRAFTED]
    return list(rows_of(*PLAINLY, *mine).values())


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


def test_the_speed_up_over_the_librarys_own_decoding_is_told_without_loops_too() -> None:
    looping = [sample("b", PLAIN, 1.0, 10, 10, looping=True), DRAFTED[1]]
    peer = [sample("a", GENERATE, 2.4, 40, 40), sample("b", GENERATE, 9.0, 10, 10)]
    got = line(results_table(rows_of(PLAINLY[0], DRAFTED[0], *looping, *peer).values()), "mine")
    assert got["over generate, no loops [95%]"] == f"{2.4 / DRAFTED[0].decode_seconds:.2f}"


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


def lossy(quality: dict[str, float | None] | None) -> list[Row]:
    return [replace(row, measured=replace(row.measured, lossless=False, rule="typical", quality=quality)) for row in ROWS]


def test_a_lossy_rule_is_called_so_and_shows_its_quality() -> None:
    got = line(results_table(lossy({"checked": 8, "right": 0.25, "same_answer": None, "excess_kl": 0.0314})), "mine (lossy)")
    assert (got["tau"], got["quality"]) == ("2.50", "right 0.25, excess KL 0.0314")
    assert "quality" not in results_table(ROWS)


def test_prefetched_drafts_have_a_column_where_there_are_any() -> None:
    prefetched = {"prefetched": 1200, "prefetch_hits": 300, "prefetch_calls": 4800, "calls_saved": 900}
    table = results_table([replace(row, measured=replace(row.measured, prefetch=prefetched)) for row in ROWS])
    assert line(table, "mine")["prefetched drafts"] == "hit in 25% of 1,200 rounds, 900 calls saved for 4,800"
    assert "prefetched" not in results_table(ROWS)


def test_measured_prices_have_a_column_where_there_are_any() -> None:
    found = {"draft_cost": 0.291, "node_cost": 0.0464}
    table = results_table([replace(row, measured=replace(row.measured, hybrid_costs=found)) for row in ROWS])
    assert line(table, "mine")["hybrid_costs"] == "draft_cost 0.29, node_cost 0.046"
    assert "hybrid_costs" not in results_table(ROWS)


@pytest.mark.parametrize("unmeasured", [None, {}, {"tokens": 50.0, "right": None}])
def test_a_lossy_row_without_quality_is_refused_in_every_report(tmp_path: Path, unmeasured: dict[str, float | None] | None) -> None:
    path = page(tmp_path, lossy(unmeasured), PAGE.replace("results:quick -->\n<", "results:quick plots -->\n<"))
    for report in (
        lambda: results_table(lossy(unmeasured)), lambda: render(path, tmp_path / "results"), lambda: draw("quick", tmp_path / "results"),
        lambda: write_report([open_run(tmp_path / "results" / "quick.jsonl")], tmp_path / "report", "quick"),
    ):  # fmt: skip
        with pytest.raises(UserError, match="rule 'typical' is lossy and the row has no quality"):
            report()
    assert not (tmp_path / "report").exists()


def test_a_speed_up_over_the_librarys_own_decoding_has_a_column_where_it_was_measured() -> None:
    peer = [sample("a", GENERATE, 2.0, 40, 40), sample("b", GENERATE, 1.0, 10, 10)]
    got = line(results_table(rows_of(*PLAINLY, *DRAFTED, *peer).values()), "mine")
    assert got["over generate [95%]"].startswith("2.00 [2.00, 2.00")
    assert got["over generate, no loops [95%]"] == got["over generate [95%]"]
    assert "over generate" not in results_table(ROWS)


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


def test_a_mark_can_ask_for_accepted_lengths_alone(tmp_path: Path) -> None:
    path = page(tmp_path, ROWS, PAGE.replace("results:quick -->\n<", "results:quick lengths -->\n<"))
    render(path, tmp_path / "results")
    assert line(path.read_text(), "mine")["tau [95%]"].startswith("2.50 [")
    assert "tokens/s" not in path.read_text()


def test_a_brief_table_keeps_what_a_reader_compares_and_is_of_whole_suites(tmp_path: Path) -> None:
    path = page(tmp_path, ROWS, PAGE.replace("results:quick -->\n<", "results:quick brief -->\n<"))
    render(path, tmp_path / "results")
    brief = line(path.read_text(), "mine")
    assert {"tau", "tau, no loops", "speed-up, no loops [95%]"} < set(brief) and "yield" not in brief and "task" not in brief


def test_plots_are_linked_from_where_the_page_lies_and_are_stale_until_drawn_from_the_same_results(tmp_path: Path) -> None:
    path = page(tmp_path, ROWS, PAGE.replace("results:quick -->\n<", "results:quick alpha -->\n<"))
    render(path, tmp_path / "results")
    assert "![Conditional acceptance by depth](results/quick-alpha.svg)" in path.read_text()
    assert "quick-time.svg" not in path.read_text()
    assert stale(path, tmp_path / "results") == ["quick"]
    draw("quick", tmp_path / "results")
    assert stale(path, tmp_path / "results") == []
    svg, png = (tmp_path / "results" / f"quick-alpha{suffix}" for suffix in plots.SUFFIXES)
    drawn = png.read_bytes()
    png.write_bytes(drawn.replace(b"drafttrain results", b"drafttrain rEsults"))
    assert svg.exists()
    assert stale(path, tmp_path / "results") == ["quick"]
    png.write_bytes(drawn)
    later = [replace(row, measured=replace(row.measured, tau=1.25)) for row in ROWS]
    append_whole(tmp_path / "results" / "quick.jsonl", [row.to_json() for row in later])
    assert stale(path, tmp_path / "results") == ["quick"]


def test_a_report_holds_results_tables_plots_and_one_page_without_outside_resources(tmp_path: Path) -> None:
    page(tmp_path, with_rounds())
    written = write_report([open_run(tmp_path / "results" / "quick.jsonl")], tmp_path / "report", "quick")
    assert {path.name for path in written} == {path.name for path in (tmp_path / "report").iterdir()}
    assert {path.name for path in written} == {"quick.jsonl", "quick.md", "quick.html"} | {
        f"quick-{plot}.{kind}" for plot in PLOTS for kind in ("svg", "png")
    }
    markdown, html = ((tmp_path / "report" / f"quick.{kind}").read_text() for kind in ("md", "html"))
    assert line(markdown, "mine")["tau"] == "2.50"
    assert all(f"(quick-{plot}.svg)" in markdown and f'data-plot="{plot}"' in html for plot in PLOTS)
    assert html.count("<svg") == len(PLOTS)
    assert "3.33 [2.00, 4.00]" in html
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)""", html)
    assert stale(tmp_path / "report" / "quick.md", tmp_path / "report") == []


def test_a_report_written_again_keeps_the_text_of_its_page_and_gives_the_same_bytes(tmp_path: Path) -> None:
    page(tmp_path, ROWS)
    run = open_run(tmp_path / "results" / "quick.jsonl")
    write_report([run], tmp_path / "report", "quick")
    mine = (tmp_path / "report" / "quick.md").read_text() + "\nMy words.\n"
    (tmp_path / "report" / "quick.md").write_text(mine)
    before = {path: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert (tmp_path / "report" / "quick.jsonl").read_bytes() == run.file.read_bytes()
    write_report([run], tmp_path / "report", "quick")
    assert {path: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before


def test_the_speed_up_plot_draws_every_contender_on_every_task_at_its_figure() -> None:
    qa = [sample("q", PLAIN, 2.0, 20, 20, task="qa"), sample("q", "mine", 1.0, 20, 10, task="qa")]
    measured = [row.measured for row in rows_of(*PLAINLY, *DRAFTED, *qa).values() if row.measured.outputs == "all"]
    (axes,) = plots.figure("speedup", measured).axes
    assert [round(bar.get_height(), 4) for bar in axes.patches] == [3.3333, 2.0, 2.8]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["math", "qa", "all"]


def test_the_time_plot_stacks_the_phases_end_to_end_to_the_time_of_a_token() -> None:
    mine = next(row.measured for row in ROWS if row.measured.label == "mine" and row.measured.task == "all")
    row = replace(mine, seconds={**mine.seconds, "draft": 0.5, "commit": 0.25})
    (axes,) = plots.figure("time", [row]).axes
    assert [(round(bar.get_x(), 6), round(bar.get_width(), 6)) for bar in axes.patches] == [(0, 10), (10, 30), (40, 0), (40, 5), (45, 0)]


def test_curves_of_alpha_end_where_too_few_rounds_are_behind_them_and_no_marker_is_cut() -> None:
    mine = next(row.measured for row in ROWS if row.measured.label == "mine" and row.measured.task == "all")
    row = replace(mine, alpha=(1.0, 0.0, 1.0, None), attempts=(90, 20, 19, 0))
    (axes,) = plots.figure("alpha", [row]).axes
    assert [list(line.get_xydata().ravel()) for line in axes.lines] == [[1, 1.0, 2, 0.0]]
    low, high = axes.get_ylim()
    assert low < 0
    assert high > 1
    assert line(results_table([replace(ROWS[-2], measured=row)]), "mine")["alpha_1 .."] == "1.00 .00 1.00 –"


def test_where_every_draft_stands_the_curve_along_the_answers_is_flat_though_the_length_limit_cuts_their_last_rounds() -> None:
    answers = [sample(str(n), "mine", 1.0, 127, 26) for n in range(20)]
    mine = [replace(one, outcome=replace(one.outcome, kept=[5] * 25 + [2])) for one in answers]
    plain = [sample(one.item, PLAIN, 4.0, 127, 127) for one in mine]
    rows = [replace(row, max_new_tokens=128).uncut for row in rows_of(*plain, *mine).values() if row.measured.outputs == "all"]
    (axes,) = plots.figure("position", rows).axes
    assert list(axes.lines[0].get_ydata()) == [5.0] * 7


def covering_texts(axes: Any) -> list[tuple[str, str]]:
    """Pairs of an axes' texts that stand on each other."""
    axes.figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in axes.texts]
    return [(one, two) for (one, a), (two, b) in combinations(boxes, 2) if a.overlaps(b)]


def test_names_of_tasks_stand_beside_each_other_where_their_points_are_close() -> None:
    tasks = ("math", "qa", "chat", "code", "summarization", "translation", "reasoning", "writing")
    plain = [sample(task, PLAIN, 4.0, 40, 40, task) for task in tasks]
    mine = [sample(task, "mine", 2.0 + 0.01 * n, 40, 20, task) for n, task in enumerate(tasks)]
    measured = [row.measured for row in rows_of(*plain, *mine).values() if row.measured.outputs == "all"]
    (axes,) = plots.figure("tau-time", measured).axes
    assert set(tasks) < {text.get_text() for text in axes.texts}
    assert covering_texts(axes) == []


def test_a_marker_on_another_is_smaller_so_that_both_show() -> None:
    rows = rows_of(*(sample(str(n), label, seconds, 40, 20) for n in range(3) for label, seconds in ((PLAIN, 4.0), ("mine", 2.0))))
    plain, mine = (rows[label, ALL, "all"].measured for label in (PLAIN, "mine"))
    measured = [plain, mine, replace(mine, label="twin"), replace(mine, label="longer", tau=mine.tau * 1.5)]
    (axes,) = plots.figure("tau-time", measured).axes
    size = {markers.get_label(): markers.get_sizes()[0] for markers in axes.collections}
    assert size["twin"] < size["mine"] == size["longer"] == size[PLAIN]
    assert {handle.get_sizes()[0] for handle in axes.get_legend().legend_handles} == {90}


def test_numbers_of_a_studys_cells_stand_beside_each_other_where_their_points_are_close(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = Measurement(2.0, 1.9, 1.9)
    cells = [Finding("cell", {}, "", "", Forecast(2.0, 0.001 * n, 1.0, 0.0, 1.0), (0.5,), reached) for n in range(12)]
    kept: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, *_: kept.append(figure))
    frontier.draw(cells, Path("study.svg"), "")
    for axes in kept[0].axes:
        assert {str(n) for n in range(1, 13)} < {text.get_text() for text in axes.texts}
        assert covering_texts(axes) == []


def test_a_plot_that_the_rows_have_no_data_for_is_left_out() -> None:
    measured = [row.measured for row in ROWS]
    assert "position" in plots.shown([row.measured for row in with_rounds()])
    assert "position" not in plots.shown(measured)  # rows of before had no positions
    assert plots.shown([row for row in measured if row.label == PLAIN]) == ["time"]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page(tmp_path, ROWS)
    with pytest.raises(UserError, match=r"pip install 'drafttrain\[plots\]'"):
        draw("quick", tmp_path / "results")


def test_contenders_of_the_same_name_in_two_runs_are_told_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        append_whole(tmp_path / name / "results.jsonl", [row.to_json() for row in ROWS])
    rows = together([open_run(tmp_path / "one"), open_run(tmp_path / "two" / "results.jsonl")])
    assert {row.measured.label for row in latest(rows)} == {PLAIN, "one: mine", "two: mine"}


def test_runs_of_one_name_are_told_apart_by_number(tmp_path: Path) -> None:
    folders = [tmp_path / place / "quick" for place in "ab"]
    for folder in folders:
        append_whole(folder / "results.jsonl", [row.to_json() for row in ROWS])
    rows = together([open_run(folder) for folder in folders])
    assert {row.measured.label for row in latest(rows)} == {PLAIN, "quick: mine", "quick (2): mine"}


def test_a_run_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        open_run(tmp_path / "gone")
    with pytest.raises(UserError, match="drafttrain eval"):
        open_run(tmp_path)
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(UserError, match="are empty"):
        open_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<!-- results:quick -->\n", "no matching '<!-- /results:quick -->'"),
        ("<!-- results:quick -->\n<!-- /results:quack -->\n", "no matching"),
        ("<!-- results:quick graphs -->\n<!-- /results:quick -->\n", "summary, tasks, brief, lengths, rules, figures, study, engines"),
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
    assert "<!-- results:quickstart" in (REPOSITORY / "README.md").read_text()  # its figures are rendered, not typed


def test_the_committed_studys_plot_was_drawn_from_its_cells() -> None:
    folder = REPOSITORY / "docs" / "results"
    source = plots.source_of(folder / "study.jsonl").encode()
    assert all(source in (folder / f"study{suffix}").read_bytes() for suffix in plots.SUFFIXES)


def test_this_repositorys_html_reports_agree_with_their_results_files() -> None:
    files = [*REPOSITORY.glob("docs/**/*.html")]
    assert files
    assert [file.name for file in files if is_stale(file, REPOSITORY / "docs" / "results")] == []


def test_an_html_report_whose_figure_was_typed_in_is_stale(tmp_path: Path) -> None:
    page(tmp_path, ROWS)
    html, *_ = write_report([open_run(tmp_path / "results" / "quick.jsonl")], tmp_path / "results", "quick")
    assert not is_stale(html, tmp_path / "results")
    html.write_text(html.read_text().replace("2.50", "2.60"))
    assert is_stale(html, tmp_path / "results")
    assert renew(html, tmp_path / "results")
    assert not renew(html, tmp_path / "results")
