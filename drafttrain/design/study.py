"""`drafttrain study`: which drafter, how deep, how wide, and how many tokens a round? (Yan et al., 2024, arXiv:2402.01528)

Every cell of a grid of recipe keys is trained (cells that differ only in `runtime` keys share a drafter), its acceptance replayed on the
target's own answers, its rounds timed, its throughput forecast; the best few are decoded for real. What is finished is kept:

    OUTPUT/study/drafters/ID/      a run for each drafter         OUTPUT/study/study.jsonl, study.md    a line for each cell
    OUTPUT/study/journal.jsonl     what was replayed and timed    OUTPUT/study/study.png, study.svg     the frontier
    OUTPUT/study/results.jsonl     the real runs
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from drafttrain import stages
from drafttrain.core.config import fingerprint
from drafttrain.core.disk import folder_fingerprint, only_writer, write_text
from drafttrain.core.errors import UserError
from drafttrain.data.shards import INDEX
from drafttrain.design.forecast import (
    answer,
    forecast,
    midway,
    parted_texts,
    replay,
    spread,
    typical_context,
)
from drafttrain.drafters.files import load_drafter
from drafttrain.evaluation import bench
from drafttrain.evaluation.journal import ResultJournal
from drafttrain.evaluation.machine import device_name, versions
from drafttrain.evaluation.rows import ALL, known_alpha
from drafttrain.evaluation.runners import PLAIN, Contender, shape_name
from drafttrain.evaluation.suites import Suite, load_suite
from drafttrain.recipe import Recipe, apply_override, check_recipe, stage_values
from drafttrain.report import plots
from drafttrain.report.frontier import Finding, Measurement, draw, page_of, write_findings
from drafttrain.runtime.costs import RoundCost, ScoreCurve, round_costs, score_curve
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.target.adapter import Target, read_shape

VARIED = ("drafter", "train", "runtime")
"""Sections whose keys a grid may hold: all cells share the target, its data and the suite."""


TIMED = "rounds from the middle of answers"
"""How rounds are timed: times taken in another way are taken again."""


@dataclass(frozen=True)
class Cell:
    """One combination of the grid's values."""

    label: str
    values: dict[str, Any]
    recipe: Recipe  # its output is the run of its drafter

    @property
    def drafter(self) -> Path:
        return self.recipe.folder / "drafter"


def study(recipe: Recipe) -> list[Finding]:
    """Brings the study to its end, or goes on where it stopped. Raises `UserError` for a grid that makes no sense."""
    if not recipe.evaluation.sampling.greedy:
        raise UserError(f"evaluation.temperature {recipe.evaluation.temperature}: a study forecasts greedy decoding; set it to 0")
    load_suite(recipe.evaluation.suite)  # a wrong name is told before anything is trained
    folder = recipe.folder / "study"
    check(recipe, cells(recipe, folder))
    for stage in ("regenerate", "capture"):
        stages.perform(stage, recipe)
    with only_writer(folder):
        made = cells(recipe, folder)  # now that their data is there
        train(made)
        found = Study(Target.load(recipe.target), recipe, made, folder).run()
        for suffix in ("png", "svg"):
            draw(found, folder / f"study.{suffix}", plots.source_of(folder / "study.jsonl"))
    return found


# -- the grid -----------------------------------------------------------------------------------------------------------------------------


def cells(recipe: Recipe, folder: Path) -> list[Cell]:
    """All combinations, the last key's values varying fastest."""
    grid = recipe.study.grid
    if not grid:
        raise UserError("study.grid is empty; give it keys and their values, such as --grid 'drafter.layers=[1, 2]'")
    for key, values in grid.items():
        if key.split(".")[0] not in VARIED:
            raise UserError(f"study.grid '{key}': cells differ in keys of {', '.join(VARIED)}; make a study of its own for each {key}")
        if not values:
            raise UserError(f"study.grid '{key}': no values; list at least one")
    combined = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    recipes = [_varied(recipe, values, folder) for values in combined]
    labels = _labels(recipes)
    return [Cell(*parts) for parts in zip(labels, combined, recipes, strict=True)]


def check(recipe: Recipe, made: Sequence[Cell]) -> None:
    """A `UserError` for a cell that could not be decoded, before anything is trained."""
    shape = read_shape(recipe.target)
    for cell in made:
        deepest = stages.new_drafter(cell.recipe, shape).max_depth
        if deepest is not None and cell.recipe.runtime.shape.depth > deepest:
            depth = cell.recipe.runtime.shape.depth
            raise UserError(f"study.grid, cell '{cell.label}': its tree is {depth} deep, its drafter reaches {deepest}; leave it out")
        if cell.recipe.runtime.policy_name != "fixed":
            raise UserError(f"runtime.policy '{cell.recipe.runtime.policy_name}': a study forecasts rounds that are alike; set it to fixed")


def _varied(recipe: Recipe, values: dict[str, Any], folder: Path) -> Recipe:
    """The recipe with these values; its run is named after what its drafter depends on."""
    data = recipe.model_dump(mode="json", exclude={"study"})
    for key, value in values.items():
        apply_override(data, f"{key}={json.dumps(value)}")
    data["data"]["existing"] = str(_conversations(recipe))
    made = check_recipe(data, f"study.grid {values}")
    trained = fingerprint(stage_values(made, "train"))
    return made.model_copy(update={"output": str(folder / "drafters" / f"{made.drafter.name}-{trained[:8]}")})


def _conversations(recipe: Recipe) -> Path:
    """The features of the study's own recipe where they were captured, else its conversations."""
    features = recipe.folder / "features"
    return features if (features / INDEX).exists() else stages.conversations_folder(recipe)


def _labels(made: Sequence[Recipe]) -> list[str]:
    """`eagle3 intermediate_size=768 chain-4`: what was set and differs between the cells of a family."""
    sections = [{f"{section}.{key}": value for section in VARIED for key, value in _set(one, section).items()} for one in made]
    labels: list[str] = []
    for one, values in zip(made, sections, strict=True):
        family = [other for other, its in zip(sections, made, strict=True) if its.drafter.name == one.drafter.name]
        differs = [key for key in values if any(other.get(key) != values[key] for other in family)]
        told = [f"{key.split('.')[1]}={values[key]}" for key in differs if not isinstance(values[key], dict)]
        label = " ".join([one.drafter.name, *told, shape_name(one.runtime.shape)])
        labels.append(label if label not in labels else f"{label} ({sum(label == other.split(' (')[0] for other in labels) + 1})")
    return labels


def _set(recipe: Recipe, section: str) -> dict[str, Any]:
    """What a section sets beyond its defaults, its name and shape aside."""
    part = recipe.model_dump(mode="json", exclude_defaults=True).get(section, {})
    return {key: value for key, value in part.items() if key not in ("name", "shape")}


def train(made: Sequence[Cell]) -> None:
    """Every drafter that is not there yet."""
    distinct = {cell.recipe.folder: cell.recipe for cell in made}
    for number, one in enumerate(distinct.values(), 1):
        stages.console.print(Text.assemble((f"drafter {number} of {len(distinct)}", "bold"), f": {one.folder.name}"))
        for stage in ("regenerate", "capture", "train"):
            stages.perform(stage, one)


# -- what is measured ---------------------------------------------------------------------------------------------------------------------


class Study:
    """Trained cells on one target, and a journal of what was found of them."""

    def __init__(self, target: Target, recipe: Recipe, made: Sequence[Cell], folder: Path) -> None:
        self.target, self.config, self.evaluation, self.cells, self.folder = target, recipe.study, recipe.evaluation, made, folder
        self.suite: Suite = recipe.evaluation.chosen(load_suite(recipe.evaluation.suite))
        drafters = {cell.drafter: load_drafter(cell.drafter, target.fingerprint) for cell in made}
        self.decoders = [SpeculativeDecoder(target, drafters[cell.drafter], cell.recipe.runtime) for cell in made]
        reader = SpeculativeDecoder(target)
        self.prompts = [reader.tokenize(item.opening()) for item in self.suite.items]
        self.asked = fingerprint(target.fingerprint, str(target.dtype), self.suite.hash, recipe.evaluation.max_new_tokens)
        self.where = fingerprint(TIMED, self.asked, device_name(target.device), torch.get_num_threads(), versions(), recipe.study.timed)
        weights = {path: folder_fingerprint(path) for path in drafters}
        self.keys = [fingerprint(self.asked, weights[cell.drafter], cell.recipe.runtime) for cell in made]
        self.journal = ResultJournal(folder / "journal.jsonl")
        self.entries = [*self.journal.entries]

    def run(self) -> list[Finding]:
        """Replays, times, forecasts, decodes the best few, and writes the lines and the table."""
        answers = self._answers()
        self._replay(answers)
        self._time(answers)
        found = self._findings()
        self._confirm(found)
        found = self._findings()
        write_findings(found, self._measured_on(), self.folder / "study.jsonl")
        text = page_of(self.folder / "study.jsonl")
        write_text(self.folder / "study.md", text)
        return found

    def _keep(self, entry: dict[str, Any]) -> None:
        self.journal.append(entry)
        self.entries.append(entry)

    def _held(self, kind: str, **wanted: str) -> list[dict[str, Any]]:
        """Journal entries of a kind, made under the same circumstances."""
        return [one for one in self.entries if one["kind"] == kind and all(one[key] == value for key, value in wanted.items())]

    def _answers(self) -> list[list[int]]:
        """The target's own to the suite."""
        if not self._held("answers", asked=self.asked):
            written = answer(self.target, self.prompts, self.evaluation.max_new_tokens)
            self._keep({"kind": "answers", "asked": self.asked, "answers": written})
        return self._held("answers", asked=self.asked)[-1]["answers"]

    def _replay(self, answers: list[list[int]]) -> None:
        waiting = [place for place, key in enumerate(self.keys) if not self._held("replay", key=key)]
        if not waiting:
            return
        drafters = [decoder.drafter for decoder in self.decoders if decoder.drafter is not None]
        texts = parted_texts(self.target, self.prompts, answers, drafters)
        for place in waiting:
            found = replay(self.decoders[place], *texts)
            stages.console.print(f"{self.cells[place].label}: tau {found.tau:.2f}")
            self._keep({"kind": "replay", "key": self.keys[place], **asdict(found)})

    def _time(self, answers: list[list[int]]) -> None:
        """All cells that wait, by turns with plain decoding."""
        timed = {key for entry in self._held("times", where=self.where) for key in entry["cells"]}
        waiting = [place for place, key in enumerate(self.keys) if key not in timed]
        if not waiting:
            return
        decoders = [self.decoders[place] for place in waiting]
        needs = frozenset().union(*(decoder.drafter.needs for decoder in decoders if decoder.drafter is not None))
        curve = score_curve(self.target, typical_context(self.prompts, answers), needs)
        some, limit = spread(midway(self.prompts, answers), self.config.timed), self.evaluation.max_new_tokens
        plain, *costs = round_costs([SpeculativeDecoder(self.target), *decoders], some, limit)
        known = {self.keys[place]: asdict(cost) for place, cost in zip(waiting, costs, strict=True)}
        self._keep({"kind": "times", "where": self.where, "curve": asdict(curve), "plain": asdict(plain), "cells": known})

    def _confirm(self, found: Sequence[Finding]) -> None:
        """The fastest by forecast, side by side with plain decoding."""
        order = sorted(range(len(found)), key=lambda place: -found[place].forecast.tokens_per_second)
        waiting = [place for place in order[: self.config.confirm] if found[place].measured is None]
        if not waiting:
            return
        runs = [Contender(self.cells[place].label, self.decoders[place]) for place in waiting]
        rows = bench.evaluate(self.target, runs, self.suite, self.evaluation, self.folder / "results.jsonl")
        over_all = {(row.measured.label, row.measured.outputs): row.measured for row in rows if row.measured.task == ALL}
        for place in waiting:
            label = self.cells[place].label
            row, straight = over_all[label, "all"], over_all.get((label, "not_looping"))
            not_looping = None if straight is None else straight.speedups[PLAIN].value
            measured = Measurement(row.tau, row.tokens_per_second, row.speedups[PLAIN].value, not_looping)
            self._keep({"kind": "measured", "key": self.keys[place], "where": self.where, **asdict(measured)})

    def _findings(self) -> list[Finding]:
        return [self._finding(*parts) for parts in zip(self.cells, self.keys, strict=True)]

    def _finding(self, cell: Cell, key: str) -> Finding:
        accepted = self._held("replay", key=key)[-1]
        times = next(entry for entry in self._held("times", where=self.where) if key in entry["cells"])
        curve = ScoreCurve(*(tuple(values) for values in times["curve"].values()))
        cost, plain = (RoundCost(**{**found, "nodes": tuple(found["nodes"])}) for found in (times["cells"][key], times["plain"]))
        measured = [Measurement(one["tau"], one["tokens_per_second"], one["speedup"], one.get("speedup_not_looping"))
                    for one in self._held("measured", key=key, where=self.where)]  # fmt: skip
        foretold = forecast(accepted["tau"], cost, plain, curve, accepted.get("tau_not_looping"))
        budget = _budget(cell.recipe)
        return Finding(
            cell.label, cell.values, str(cell.drafter), budget, foretold, known_alpha(accepted["alpha"]), measured[-1] if measured else None
        )  # fmt: skip

    def _measured_on(self) -> str:
        target, limit = self.target, self.evaluation.max_new_tokens
        return (
            f"Target {target.name} ({target.fingerprint}, {str(target.dtype).removeprefix('torch.')}); suite {self.suite.name}, "
            f"{len(self.prompts)} prompts, at most {limit} new tokens, greedy, batch 1; {device_name(target.device)}, "
            f"{torch.get_num_threads()} threads; {', '.join(f'{name} {version}' for name, version in versions().items())}."
        )


def _budget(recipe: Recipe) -> str:
    """`trained for 1.5 minutes`."""
    config = recipe.train
    if config.minutes is not None:
        return f"trained for {config.minutes:g} minutes each"
    return f"trained for {config.steps:,} steps each" if config.steps is not None else f"trained for {config.epochs:g} epochs each"
