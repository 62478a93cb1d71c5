"""Whatever a file holds: it is read, or refused in one line that says what to do; never a traceback."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from drafttrain.core.errors import UserError
from drafttrain.data.shards import read_index
from drafttrain.drafters.files import load_drafter
from drafttrain.evaluation.bench import read_rows
from drafttrain.evaluation.suites import load_suite
from drafttrain.recipe import load_recipe

RECIPE: dict[str, Any] = {
    "name": "fuzz", "target": {"model": "smollm2-demo"}, "drafter": {"name": "eagle3"}, "train": {"steps": 3},
    "evaluation": {"temperature": 0.0, "max_new_tokens": 8},
}  # fmt: skip
ODD = [
    "", "\ud83d", "\x00", "a" * 3_000, "..", "../x", "[/INST]", "\x1b]0;x\x07", "2024-02-30", "0x_", "on", "1e999", "nan", "~", "!!int x",
]  # fmt: skip
scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(10**30, 10**31) | st.floats() | st.text(max_size=8) | st.sampled_from(ODD)
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)


values = st.recursive(scalars, nested, max_leaves=6)
SECTIONS = ["name", "output", "seed", "target", "data", "drafter", "train", "runtime", "evaluation", "export", "study"]
NARROW, WIDE = 40, 500


def fuzz(examples: int) -> Any:
    def decorate(test: Any) -> Any:
        quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
        return seed(19)(settings(max_examples=examples, deadline=None, database=None, suppress_health_check=quiet)(test))

    return decorate


def read(reader: Any, *arguments: Any) -> None:
    """Reads, or is told what is wrong."""
    with contextlib.suppress(UserError):
        reader(*arguments)


def recipe_read(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))  # JSON is YAML
    read(load_recipe, path)


@st.composite
def changed_recipes(draw: st.DrawFn) -> dict[str, Any]:
    data = json.loads(json.dumps(RECIPE))
    section = draw(st.sampled_from(SECTIONS))
    keys = {
        "target": ["model", "dtype", "device", "aux_layers", "trust_remote_code"], "data": ["sources", "temperatures", "tokens", "capture"],
        "drafter": ["name", "layers", "ttt_steps"], "train": ["steps", "minutes", "lr", "betas", "batch_rows", "row_length"],
        "runtime": ["shape", "draws", "rule", "policy", "hybrid", "prefetch"],
        "evaluation": ["suite", "temperature", "contenders", "top_k"],
        "export": ["formats", "folder"], "study": ["grid", "confirm"],
    }  # fmt: skip
    if section in keys and draw(st.booleans()):
        data.setdefault(section, {})
        data[section][draw(st.sampled_from(keys[section]))] = draw(values)
    else:
        data[section] = draw(values)
    return data


LINE = {"id": "1", "task": "t", "prompt": "Why?", "answer": "4", "options": ["a"], "header": "x", "check": "word"}


@st.composite
def lines(draw: st.DrawFn) -> Any:
    if draw(st.integers(0, 4)) == 0:
        return draw(values)
    line = dict(LINE)
    key = draw(st.sampled_from([*LINE, "turns", "messages"]))
    line[key] = draw(values)
    if key in ("turns", "messages"):
        del line["prompt"]
    return line


def written(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def check_recipes(examples: int, folder: Path) -> None:
    @fuzz(examples)
    @given(changed_recipes())
    def check(data: dict[str, Any]) -> None:
        recipe_read(folder / "recipe.yaml", data)

    check()


def check_overrides(examples: int, folder: Path) -> None:
    path = written(folder / "recipe.yaml", RECIPE)

    keys = ["name", "train.steps", "train.betas", "runtime.shape", "x", "evaluation.contenders.0.label"]

    @fuzz(examples)
    @given(st.sampled_from(keys), st.text() | st.sampled_from(ODD))
    def check(key: str, text: str) -> None:
        read(load_recipe, path, [f"{key}={text}"])

    check()


def check_suites(examples: int, folder: Path) -> None:
    @fuzz(examples)
    @given(st.lists(lines(), min_size=1, max_size=2))
    def check(items: list[Any]) -> None:
        path = folder / "suite.jsonl"
        path.write_text("\n".join(json.dumps(item) for item in items))
        read(load_suite, str(path))

    check()


def check_folders(examples: int, folder: Path) -> None:
    @fuzz(examples)
    @given(st.sampled_from(["format", "origin", "shards", "drafter", "target", "features", "weights_sha256", None]), values)
    def check(key: str | None, value: Any) -> None:
        index = {"format": 1, "origin": {}, "shards": []}
        config = {"format": 1, "drafter": {"name": "eagle3"}, "target": {}}
        written(folder / "store" / "index.json", value if key is None else index | {key: value})
        written(folder / "drafter" / "config.json", value if key is None else config | {key: value})
        read(read_index, folder / "store")
        read(load_drafter, folder / "drafter")

    check()


def check_results(examples: int, folder: Path) -> None:
    @fuzz(examples)
    @given(values | st.dictionaries(st.sampled_from(["run", "measured", "task", "target"]), values))
    def check(row: Any) -> None:
        read(read_rows, written(folder / "results.jsonl", row))

    check()


CHECKS = [check_recipes, check_overrides, check_suites, check_folders, check_results]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_malformed_input_is_refused_in_one_line(check: Any, tmp_path: Path) -> None:
    check(NARROW, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_malformed_input_is_refused_in_one_line_wide(check: Any, tmp_path: Path) -> None:
    check(WIDE, tmp_path)


DEEP = "[" * 5_000 + "]" * 5_000


UNREADABLE = ["name: 2024-02-30", "name: !!int x", "seed: 0x_", f"seed: {'9' * 5_000}", f"name: {DEEP}", "name: ..", "\x00"]
UNREADABLE += ['{"\\ud83d": 1}']


@pytest.mark.parametrize("text", UNREADABLE)
def test_a_recipe_that_yaml_cannot_read_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="recipe"):
        load_recipe(path)


@pytest.mark.parametrize("override", ["train.steps=true", "train.steps='3'", "target.trust_remote_code='on'", "target.trust_remote_code=1"])
def test_a_value_of_another_kind_is_not_converted(tmp_path: Path, override: str) -> None:
    path = written(tmp_path / "recipe.yaml", RECIPE)
    with pytest.raises(UserError, match=r"where .* belongs"):
        load_recipe(path, [override])


def test_code_of_a_target_is_trusted_by_the_callers_word_alone(tmp_path: Path) -> None:
    trusting = RECIPE | {"target": {"model": "smollm2-demo", "trust_remote_code": True}}
    own, received = tmp_path / "recipe.yaml", tmp_path / "run" / "recipe.resolved.yaml"
    received.parent.mkdir()
    for path in (own, received):
        path.write_text(yaml.safe_dump(trusting))
    assert load_recipe(own).target.trust_remote_code
    assert not load_recipe(received.parent).target.trust_remote_code
    assert not load_recipe(received).target.trust_remote_code
    assert load_recipe(received.parent, ["target.trust_remote_code=true"]).target.trust_remote_code
