"""`drafttrain study` and `drafttrain tune` on a tiny random target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic
from drafttrain.design import study as studying
from drafttrain.design import tune as tuning
from drafttrain.design.forecast import ReplayedLength
from drafttrain.drafters.hybrid import HybridConfig
from drafttrain.evaluation import bench
from drafttrain.evaluation.bench import read_rows
from drafttrain.evaluation.throughput import Forecast
from drafttrain.recipe import RESOLVED, load_recipe
from drafttrain.report.frontier import Finding, Measurement, markdown
from drafttrain.report.tables import render, stale
from drafttrain.runtime import decoder as decoder_module
from drafttrain.runtime.costs import RoundCost, ScoreCurve
from drafttrain.train import loop
from tests.cli.test_cli import complaint, drafttrain, snapshot, write_inputs

DRAFTERS = 'drafter=[{name: medusa, heads: 2}, {name: eagle3, ttt_steps: 2}]'
GRID = ("--grid", DRAFTERS, "--grid", "runtime.shape.length=[1, 2]")
SMALL = ("train.steps=4", "study.timed=1", "evaluation.max_new_tokens=12", "evaluation.limit=1")
LABELS = ["medusa chain-1", "medusa chain-2", "eagle3 chain-1", "eagle3 chain-2"]


def found(folder: str = "runs/tiny") -> dict[str, dict[str, Any]]:
    lines = (Path(folder) / "study" / "study.jsonl").read_text().splitlines()
    return {one["label"]: one for one in map(json.loads, lines)}


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a study of four cells was finished."""
    folder = tmp_path_factory.mktemp("studied")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_inputs()
        result = drafttrain("study", "tiny.yaml", *GRID, *SMALL, "study.confirm=2")
    assert result.exit_code == 0, result.output
    assert all(label in result.stdout for label in LABELS)
    return folder


@pytest.fixture
def workplace(studied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(studied, folder)
    monkeypatch.chdir(folder)
    return folder


def test_cells_that_differ_in_runtime_keys_share_a_drafter_and_all_are_forecast(workplace: Path) -> None:
    cells = found()
    assert list(cells) == LABELS
    assert len({one["drafter"] for one in cells.values()}) == len(list(Path("runs/tiny/study/drafters").iterdir())) == 2
    for one in cells.values():
        known = one["forecast"]
        assert known["round"] == pytest.approx(known["draft"] + known["score"] + known["other"])
        assert known["tokens_per_second"] == pytest.approx(known["tau"] / known["round"])
        assert one["budget"] == "trained for 4 steps each"


def test_the_fastest_by_forecast_are_decoded_for_real_with_the_tau_that_was_replayed(workplace: Path) -> None:
    order = sorted(found().values(), key=lambda one: -one["forecast"]["tokens_per_second"])
    assert [one["measured"] is not None for one in order] == [True, True, False, False]
    for one in order[:2]:
        assert one["measured"]["tau"] == one["forecast"]["tau"]  # greedy, in fp32
        assert one["error"] == pytest.approx(one["forecast"]["tokens_per_second"] / one["measured"]["tokens_per_second"] - 1)
    every = [row.measured for row in read_rows(Path("runs/tiny/study/results.jsonl"))]
    rows = {(row.label, row.task, row.outputs): row for row in every}
    assert {label for label, *_ in rows} == {"plain", *(one["label"] for one in order[:2])}
    for one in order[:2]:
        assert one["measured"]["speedup_not_looping"] == rows[one["label"], "all", "not_looping"].speedups["plain"].value
        assert one["forecast"]["tau_not_looping"] == one["forecast"]["tau"]  # answers of 12 tokens are too short to loop


def test_table_and_plots_show_every_cell(workplace: Path) -> None:
    folder = Path("runs/tiny/study")
    table = (folder / "study.md").read_text()
    assert all(f"| {label} |" in table for label in LABELS)
    assert "trained for 4 steps each" in table
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
    assert "eagle3 chain-2" in (folder / "study.svg").read_text()


def test_a_page_can_show_a_studys_cells_from_its_file(workplace: Path) -> None:
    folder, page = Path("runs/tiny/study"), Path("page.md")
    page.write_text("<!-- results:study study -->\n<!-- /results:study -->\n")
    render(page, folder)
    assert page.read_text().split("-->\n", 1)[1].startswith((folder / "study.md").read_text())
    assert stale(page, folder) == []
    page.write_text(page.read_text().replace("trained for 4 steps", "trained for 5 steps"))
    assert stale(page, folder) == ["study"]
    (folder / "study.jsonl").write_text('{"label": "no cell"}\n')
    with pytest.raises(UserError, match="not the cells of a study"):
        render(page, folder)


def test_a_finished_study_trains_replays_and_decodes_nothing_again(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot("runs")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("done already")

    for module, name in ((loop, "train"), (bench, "evaluate")):
        monkeypatch.setattr(module, name, never)
    result = drafttrain("study", "tiny.yaml", *GRID, *SMALL, "study.confirm=2")
    assert result.exit_code == 0, result.output
    assert snapshot("runs").keys() == before.keys()
    assert Path("runs/tiny/study/journal.jsonl").read_bytes() == before[Path("runs/tiny/study/journal.jsonl")][1]


def test_a_study_that_was_cut_off_goes_on_and_a_larger_one_keeps_what_is_there(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    train = loop.train
    monkeypatch.setattr(loop, "train", lambda drafter, *rest, **more: trained.append(drafter.config.name) or train(drafter, *rest, **more))
    journal = Path("runs/tiny/study/journal.jsonl")
    kept = [line for line in journal.read_text().splitlines() if json.loads(line)["kind"] in ("answers", "replay")][:3]
    journal.write_text("\n".join(kept) + "\n" + '{"kind": "repl')  # killed while writing
    shutil.rmtree(next(Path("runs/tiny/study/drafters").glob("eagle3*")))
    larger = ("--grid", DRAFTERS, "--grid", "runtime.shape.length=[1, 2, 3]")
    assert "drafts 3 tokens deep, but this medusa drafter gives 2 at most" in complaint("study", "tiny.yaml", *larger, *SMALL)
    result = drafttrain("study", "tiny.yaml", *GRID, *SMALL, "study.confirm=4")
    assert result.exit_code == 0, result.output
    assert trained == ["eagle3"]
    assert journal.read_text().splitlines()[: len(kept)] == kept
    assert all(one["measured"] for one in found().values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "study.grid is empty"),
        (("--grid", "target.dtype=[float32]"), "cells differ in keys of drafter, train, runtime"),
        (("--grid", "drafter.ttt_stps=[1]"), "did you mean 'ttt_steps'"),
        (("--grid", "drafter.ttt_steps=2"), "expected KEY=[VALUES]"),
        (("--grid", "drafter.ttt_steps=[]"), "no values"),
        (("--grid", "drafter.ttt_steps=[1]", "evaluation.temperature=1"), "a study forecasts greedy decoding"),
        (("--grid", "runtime.policy=[adaptive]"), "set it to fixed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_grid_that_makes_no_sense_is_refused_before_any_work(
    words: Sequence[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs()
    assert said in complaint("study", "tiny.yaml", *words)
    assert not Path("runs/tiny/data").exists()


def test_the_table_names_the_fastest_and_the_largest_error() -> None:
    def cell(label: str, tau: float, draft: float, measured: float | None) -> Finding:
        known = Forecast(tau, draft, 1.0, 0.0, 1.0)
        return Finding(label, {}, "", "b", known, (0.5,), None if measured is None else Measurement(tau, measured, 1.0))

    text = markdown([cell("deep", 3.0, 2.0, 1.25), cell("shallow", 2.0, 0.5, 1.3), cell("idle", 1.0, 0.5, None)], "here")
    assert "**shallow**" in text  # though deep has the best tau
    assert "2 cells measured for real are off by at most 20.0%" in text
    assert text.index("| shallow |") < text.index("| deep |") < text.index("| idle |")


def test_the_table_tells_what_was_reached_without_looping_outputs_and_a_dash_where_that_is_not_known() -> None:
    known = Finding("new", {}, "", "b", Forecast(3.0, 0.0, 1.0, 0.0, 1.0, 2.0), (0.5,), Measurement(3.0, 1.0, 2.5, 1.5))
    before = known.to_json()
    del before["forecast"]["tau_not_looping"], before["measured"]["speedup_not_looping"]
    older = Finding.from_json({**before, "label": "older"})
    assert Finding.from_json(known.to_json()) == known
    head, *lines = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in markdown([known, older], "here").splitlines()[:4])
    rows = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    columns = ("tau, no loops", "speed-up, no loops", "measured speed-up, no loops")
    assert [rows["new"][name] for name in columns] == ["2.00", "2.00", "1.50"]
    assert [rows["older"][name] for name in columns] == ["–"] * 3


# -- tune ---------------------------------------------------------------------------------------------------------------------------------


def tunable(folder: Path) -> Path:
    """The study's eagle3 drafter's run."""
    return next((folder / "runs/tiny/study/drafters").glob("eagle3*"))


def pretend(monkeypatch: pytest.MonkeyPatch, costs: Any) -> None:
    """Forecasts by a rule: costs(decoder) -> (tau, seconds a round), a plain round taking 1."""

    def round_costs(decoders: Any, *_: Any) -> list[RoundCost]:
        return [RoundCost(costs(decoder)[1] if decoder.drafter else 1.0, 0.0, (1,), score=1.0) for decoder in decoders]

    monkeypatch.setattr(tuning, "round_costs", round_costs)
    monkeypatch.setattr(tuning, "score_curve", lambda *_: ScoreCurve((1, 2), (1e-9, 1e-9)))
    monkeypatch.setattr(tuning, "replay", lambda decoder, *_: ReplayedLength(costs(decoder)[0], None, []))


def test_tune_measures_every_candidate_and_writes_the_fastest_into_the_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TREES", ((8, 3),))
    monkeypatch.setattr(tuning, "CHAINS", (1, 3))
    run = tunable(workplace)
    before = load_recipe(run)
    result = drafttrain("tune", run, "evaluation.limit=2", "evaluation.max_new_tokens=10", "train.lr=0.5")
    assert result.exit_code == 0, result.output
    assert "speed-up, no loops" in result.stdout
    for label in ("chain-1", "chain-2", "chain-3", "tree-8, 2 deep", "tree-8, 4 deep", "tree-8, 6 deep"):
        assert label in result.stdout
    best = next(line for line in result.stdout.splitlines() if f"{run.name}: eagle3" in line)
    kept = load_recipe(run).model_copy(update={"runtime": before.runtime})
    assert kept == before  # what it was tuned on is nobody else's affair
    shape = load_recipe(run).runtime.shape
    assert f"eagle3 {tuning.named(shape)} " in best
    assert drafttrain("generate", run, "w3 w4", "--max-new-tokens", 6).exit_code == 0


def test_tune_refuses_a_temperature_that_its_forecasts_would_not_know(workplace: Path) -> None:
    result = drafttrain("tune", tunable(workplace), "evaluation.temperature=0.7")
    assert result.exit_code == 2
    assert "tune forecasts greedy decoding; set it to 0" in result.stderr


def test_tune_takes_the_most_tokens_a_second_not_the_best_tau_and_leaves_the_run_when_told_where_to_write(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, lambda decoder: (1 + 0.5 * decoder.runtime.shape.depth, 1 + 0.25 * decoder.runtime.shape.nodes))
    run = tunable(workplace)
    before = (run / RESOLVED).read_bytes()
    assert drafttrain("tune", run, "--write", "tuned.yaml").exit_code == 0
    tuned = load_recipe(Path("tuned.yaml"))
    assert (tuned.runtime.shape, tuned.runtime.policy, tuned.folder) == (Chain(length=8), "fixed", run)
    assert (run / RESOLVED).read_bytes() == before


def test_tune_chooses_among_drafters_and_asks_for_the_fallback_where_all_lose(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda decoder: (1.0, 2.0 if decoder.drafter.config.name == "eagle3" else 1.5))
    run, other = tunable(workplace), next(Path("runs/tiny/study/drafters").glob("medusa*"))
    before = (run / RESOLVED).read_bytes()
    result = drafttrain("tune", run, "--also", other)
    assert result.exit_code == 0, result.output
    assert "policy is adaptive" in result.stdout
    assert yaml.safe_load((other / RESOLVED).read_text())["runtime"]["policy"] == "adaptive"
    assert (run / RESOLVED).read_bytes() == before


def test_no_candidate_is_deeper_than_the_drafter_and_the_runs_own_shape_is_one() -> None:
    own = Dynamic(depth=3, beam=2, top_k=2, nodes=5)
    made = tuning.shapes(4, own)
    assert made[0] == own
    assert {shape.depth for shape in made} == {1, 2, 3, 4}
    assert len(set(made)) == len(made)


def test_candidates_that_the_rule_would_not_verify_are_left_out(workplace: Path) -> None:
    recipe = load_recipe(tunable(workplace), ["runtime.rule=rejection", "evaluation.temperature=1"])
    kept = [shape for shape in tuning.shapes(None, Chain()) if tuning.fits(recipe.runtime.model_copy(update={"shape": shape}), recipe)]
    assert {shape.shape for shape in kept} == {"chain"}


def test_tune_measures_a_hybrids_prices_for_every_shape_and_writes_them(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What drafting a shape takes alone, and what its nodes add to the target's forward, in forwards of one token."""
    pretend(monkeypatch, lambda _: (2.0, 1.0))
    monkeypatch.setattr(tuning, "score_curve", lambda *_: ScoreCurve((1, 2, 64), (2.0, 2.1, 8.3)))  # 0.1 s a node: 0.05 forwards
    asked = []

    def round_costs(decoders: Any, *_: Any) -> list[RoundCost]:
        asked.append({decoder.drafter and decoder.drafter.config.name for decoder in decoders})
        depths = [(decoder.runtime.hybrid, decoder.runtime.shape.depth, decoder.runtime.shape.nodes) for decoder in decoders]
        return [RoundCost(10.0 - nodes if hybrid else 0.5 * depth, 0.0, (1,), score=4.0) for hybrid, depth, nodes in depths]

    monkeypatch.setattr(tuning, "round_costs", round_costs)
    monkeypatch.setattr(decoder_module, "measured_hybrid_costs", lambda *_: pytest.fail("`tune` measures all prices itself"))
    run = tunable(workplace)
    assert drafttrain("tune", run, "runtime.hybrid={draft_gain: 1.5, node_cost: auto}", "runtime.shape.length=2").exit_code == 0
    tuned = load_recipe(run).runtime
    assert tuned.shape == Chain(length=8)
    assert tuned.hybrid == HybridConfig(draft_gain=1.5, draft_cost=0.5 * 8 / 4.0, node_cost=0.05)
    assert asked == [{None, "eagle3"}, {None, "eagle3+ngram"}]  # the drafter alone, without the lookup, goes first


def test_tune_leaves_a_run_without_a_lookup_unpriced(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda decoder: (2.0, 1.0))
    monkeypatch.setattr(tuning, "hybrid_costs", lambda *_: pytest.fail("nothing has a price"))
    run = tunable(workplace)
    assert drafttrain("tune", run).exit_code == 0
    assert load_recipe(run).runtime.hybrid is None


UNITS = ["answer", "score_curve", "round_costs", "round_costs", "replay", "replay", "replay"]


def counted(monkeypatch: pytest.MonkeyPatch, most: int | None = None) -> list[str]:
    """What tune measures from here on; before it measures more than `most` it is stopped."""
    made: list[str] = []

    def count(name: str, measure: Any) -> Any:
        def counting(*given: Any) -> Any:
            if len(made) == most:
                raise KeyboardInterrupt
            made.append(name)
            return measure(*given)

        return counting

    for name in set(UNITS):
        monkeypatch.setattr(tuning, name, count(name, getattr(tuning, name)))
    return made


@pytest.fixture
def command(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """Tunes three shapes beside a lookup, all of which lose."""
    monkeypatch.setattr(tuning, "TREES", ())
    monkeypatch.setattr(tuning, "CHAINS", (1, 2, 3))
    pretend(monkeypatch, lambda decoder: (1 + 0.1 * decoder.runtime.shape.depth, 2.0))
    return ("tune", tunable(workplace), "runtime.hybrid={}", "runtime.shape.length=2")


def test_a_tune_stopped_again_and_again_measures_everything_once_and_finds_the_same(
    command: tuple[object, ...], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drafttrain(*command, "--write", "whole.yaml")
    assert whole.exit_code == 0, whole.output
    shutil.rmtree(tunable(workplace) / "tune")
    made: list[str] = []
    for _ in UNITS:
        assert not Path("parts.yaml").exists()
        with monkeypatch.context() as patch:
            part = counted(patch, most=1)
            last = drafttrain(*command, "--write", "parts.yaml")
            made += part
    assert (made, last.exit_code) == (UNITS, 0)
    assert last.stdout == whole.stdout.replace("whole.yaml", "parts.yaml")
    assert Path("parts.yaml").read_bytes() == Path("whole.yaml").read_bytes()


def test_a_finished_tune_measures_nothing_again_though_it_has_written_shape_policy_and_prices(
    command: tuple[object, ...], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert drafttrain(*command).exit_code == 0
    written = load_recipe(tunable(workplace)).runtime
    assert (written.shape, written.policy_name, written.hybrid != HybridConfig()) == (Chain(length=3), "adaptive", True)
    made = counted(monkeypatch)
    assert drafttrain(*command[:2]).exit_code == 0
    assert (made, load_recipe(tunable(workplace)).runtime) == ([], written)


def test_what_was_measured_of_other_answers_or_of_another_drafter_is_measured_again(
    command: tuple[object, ...], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert drafttrain(*command).exit_code == 0
    made = counted(monkeypatch)
    assert drafttrain(*command, "evaluation.max_new_tokens=11").exit_code == 0
    assert made == UNITS
    made.clear()
    (tunable(workplace) / "drafter" / "note").write_text("other weights")
    assert drafttrain(*command).exit_code == 0
    assert made == UNITS[2:]


@pytest.mark.slow
def test_every_cell_of_which_drafter_can_be_decoded_on_the_demo_target(tmp_path: Path) -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "which-drafter.yaml", [f"output={tmp_path}"])
    made = studying.cells(recipe, tmp_path / "study")
    studying.check(recipe, made)
    assert len({cell.recipe.drafter.name for cell in made}) == len(made) > 10
