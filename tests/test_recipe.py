"""Recipes: what is refused and how it is said, overrides, the resolved file, and what stages depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from drafttrain.core.errors import UserError
from drafttrain.drafters import DRAFTERS
from drafttrain.recipe import DEPENDS, FREE, RESOLVED, VERSIONS, Recipe, keys_of, load_recipe, stage_fingerprint, write_resolved
from drafttrain.verify import RULES

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SMALLEST = {"drafter": {"name": "eagle3"}, "train": {"steps": 1}}


def write(folder: Path, data: dict[str, Any] | str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def refusal(folder: Path, data: dict[str, Any] | str, *overrides: str) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(UserError) as caught:
        load_recipe(write(folder, data), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluaton": {}}, "unknown key 'evaluaton' (did you mean 'evaluation'?)"),
        ({"train": {"step": 3}}, "train: unknown key 'step' (did you mean 'steps'?)"),
        ({"drafter": {"name": "eagle3", "ttt_stps": 3}}, "drafter: unknown key 'ttt_stps' (did you mean 'ttt_steps'?)"),
        ({"drafter": {"name": "eagle3", "loss": {"forward_k": 1}}}, "drafter.loss: unknown key 'forward_k' (did you mean 'forward_kl'?)"),
        ({"data": {"sources": [{"kind": "self", "cout": 3}]}}, "data.sources.0: unknown key 'cout' (did you mean 'count'?)"),
        ({"runtime": {"shape": {"shape": "dynamic", "dept": 3}}}, "runtime.shape: unknown key 'dept' (did you mean 'depth'?)"),
        ({"runtime": {"rule": {"name": "greedy", "eps": 1}}}, "runtime.rule: unknown key 'eps'"),
        (
            {"evaluation": {"contenders": [{"label": "a", "runtime": {"shap": {}}}]}},
            "evaluation.contenders.0.runtime: unknown key 'shap' (did you mean 'shape'?)",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_its_place_and_the_nearest_known_one(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, SMALLEST | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drafter": {"name": "eagel3"}}, "drafter: name 'eagel3' is unknown (did you mean 'eagle3'?); known: small_lm, medusa, eagle3"),
        ({"runtime": {"rule": "gredy"}}, "(did you mean 'greedy'?)"),
        ({"runtime": {"rule": {"name": "recursiv"}}}, "(did you mean 'recursive'?)"),
        ({"runtime": {"shape": {"shape": "chian"}}}, "shape 'chian' is unknown (did you mean 'chain'?)"),
        ({"runtime": {"shape": {"length": 3}}}, "runtime.shape: the key 'shape' is missing"),
        ({"train": {"steps": 1, "schedule": "cosin"}}, "(did you mean 'cosine'?)"),
        ({"train": {"steps": "many"}}, "train.steps: Input should be a valid integer"),
        ({"train": {}}, "give exactly one of steps, epochs, minutes"),
        ({"export": {"formats": ["natve"]}}, "format 'natve' is unknown (did you mean 'native'?)"),
        ({"drafter": {}}, "drafter: the key 'name' is missing"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_place_and_what_can(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, SMALLEST | changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected sections"),
        ("- a", "expected sections"),
        ("a: [", "not YAML"),
        ("train: {steps: 1}\ntrain: {steps: 2}", "key 'train' stands twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path, SMALLEST)
    with pytest.raises(UserError, match=r"no such file \(did you mean 'recipe.yaml'\?\)"):
        load_recipe(tmp_path / "recip.yaml")


def test_overrides_set_values_sections_and_list_items(tmp_path: Path) -> None:
    data = SMALLEST | {"evaluation": {"contenders": [{"label": "a"}, {"label": "b"}]}}
    overrides = [
        "train.lr=5e-4", "train.steps=7", "drafter={name: medusa, heads: 2}", "data.temperatures=[0, 1]", "target.aux_layers=[1, 2]",
        "evaluation.contenders.1.label=c=d", "runtime.shape={shape: chain, length: 2}", "name=x",
    ]  # fmt: skip
    recipe = load_recipe(write(tmp_path, data), overrides)
    assert (recipe.train.lr, recipe.train.steps, recipe.data.temperatures, recipe.target.aux_layers) == (5e-4, 7, (0.0, 1.0), (1, 2))
    assert recipe.drafter == DRAFTERS["medusa"].Config(name="medusa", heads=2)
    assert [contender.label for contender in recipe.evaluation.contenders] == ["a", "c=d"]
    assert (recipe.runtime.shape.depth, recipe.folder) == (2, Path("runs/x"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("train.steps=[1", "the value is not YAML"),
        ("train.step=3", "unknown key 'step' (did you mean 'steps'?)"),
        ("train.steps.now=3", "'train.steps' is 1 and has no keys of its own"),
        ("data.sources.0.count=3", "set the whole list, data.sources=[...]"),
        ("evaluation.contenders.4.label=c", "the number of an item, 0 to 0"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, said: str) -> None:
    assert said in refusal(tmp_path, SMALLEST | {"evaluation": {"contenders": [{"label": "a"}]}}, override)


def test_a_rule_that_does_not_fit_is_refused_when_the_recipe_is_read(tmp_path: Path) -> None:
    tree = {"shape": {"shape": "static", "children": [2, 2]}}
    assert "use 'rejection' or 'recursive'" in refusal(tmp_path, SMALLEST, "runtime.rule=greedy", "evaluation.temperature=1")
    assert "or a chain" in refusal(tmp_path, SMALLEST | {"runtime": tree}, "runtime.rule=rejection", "evaluation.temperature=1")
    contender = {"label": "a", "runtime": tree | {"rule": "rejection"}}
    assert "rejection" in refusal(tmp_path, SMALLEST | {"evaluation": {"contenders": [contender]}})


def test_the_seed_reaches_the_sections_that_name_none(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALLEST | {"seed": 5, "evaluation": {"seed": 9}}))
    assert (recipe.data.seed, recipe.train.seed, recipe.evaluation.seed) == (5, 5, 9)


def test_a_resolved_recipe_reads_back_as_itself_wherever_its_run_was_moved(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALLEST), ["runtime.rule=greedy", "data.tokens=9"])
    write_resolved(recipe, tmp_path / "run")
    again = load_recipe(tmp_path / "run")
    assert again == recipe.model_copy(update={"output": str(tmp_path / "run")})
    assert set(json.loads((tmp_path / "run" / VERSIONS).read_text())) >= {"python", "torch", "transformers", "drafttrain"}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted([RESOLVED, VERSIONS])


def test_every_key_is_in_a_stage_or_free(tmp_path: Path) -> None:
    parts = {part for wanted in DEPENDS.values() for part in wanted}
    keys = keys_of(load_recipe(write(tmp_path, SMALLEST)))
    lost = [key for key in keys if key not in FREE and not any(key == part or key.startswith(f"{part}.") for part in parts)]
    assert lost == []
    assert keys.keys() >= {key for key in (*FREE, *parts) if "." in key}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("data.max_new_tokens=7", {"regenerate", "capture", "train", "eval", "export"}),
        ("drafter.name=medusa", {"capture", "train", "eval", "export"}),
        ("train.lr=0.5", {"train", "eval", "export"}),
        ("runtime.shape={shape: chain, length: 2}", {"eval"}),
        ("evaluation.limit=2", {"eval"}),
        ("export.folder=elsewhere", {"export"}),
        ("output=elsewhere", set()),
        ("train.keep=9", set()),
        ("seed=9", {"regenerate", "capture", "train", "eval", "export"}),
    ],
)
def test_a_change_reaches_the_stages_that_depend_on_it_and_no_others(tmp_path: Path, override: str, changed: set[str]) -> None:
    path = write(tmp_path, SMALLEST)
    before, after = load_recipe(path), load_recipe(path, [override])
    assert {stage for stage in DEPENDS if stage_fingerprint(before, stage) != stage_fingerprint(after, stage)} == changed


def test_a_fingerprint_reads_the_files_that_the_recipe_names(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    recipe = load_recipe(write(tmp_path, SMALLEST), [f"data.sources=[{{kind: jsonl, path: {prompts}}}]"])
    before = stage_fingerprint(recipe, "regenerate")
    prompts.write_text('{"prompt": "b"}\n')
    assert stage_fingerprint(recipe, "regenerate") != before


def test_the_schema_knows_every_family_and_rule() -> None:
    text = json.dumps(Recipe.model_json_schema())
    for name in (*DRAFTERS, *RULES):
        assert f'"const": "{name}"' in text
    assert "Drafted tokens a round (K)." in text  # descriptions come from the fields' docstrings


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_shipped_recipes_are_read_and_named_after_their_files(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_auto_precision_becomes_what_this_device_computes_and_files_and_fingerprints_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(native: str, *overrides: str) -> Recipe:
        for module in ("drafttrain.target.files", "drafttrain.train.loop"):
            monkeypatch.setattr(f"{module}.native_dtype", lambda device: native)
        return load_recipe(write(tmp_path, SMALLEST), overrides)

    emulated, native = read("float32"), read("bfloat16")
    assert (emulated.target.dtype, emulated.train.precision) == ("float32", "float32")
    assert (native.target.dtype, native.train.precision) == ("bfloat16", "bfloat16")
    assert stage_fingerprint(emulated, "regenerate") != stage_fingerprint(native, "regenerate")
    assert read("float32", "target.dtype=bfloat16").target.dtype == "bfloat16"
    write_resolved(emulated, tmp_path / "run")
    assert load_recipe(tmp_path / "run").target.dtype == "float32"
