"""The recipe: one YAML file for everything from the target to the exported drafter, and what each stage's result depends on.

Drafters and rules are unions built from their registries, and checked when the recipe is read, before any model loads.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import Field

from drafttrain import legality
from drafttrain.core.config import Config, Seed, fingerprint, parse
from drafttrain.core.disk import write_text
from drafttrain.core.errors import UserError, first_line, nearest, refuse_halves
from drafttrain.data.origin import dtype_name
from drafttrain.data.regenerate import DataConfig
from drafttrain.data.shards import INDEX
from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.base import DrafterConfig
from drafttrain.evaluation.bench import EvaluationConfig
from drafttrain.export import ExportConfig
from drafttrain.report.frontier import StudyConfig
from drafttrain.runtime.decoder import RESOLVED, RuntimeConfig
from drafttrain.target.files import TargetConfig
from drafttrain.train.loop import TrainConfig
from drafttrain.train.online import OnlineConfig

VERSIONS = "versions.json"
PACKAGES = (
    "drafttrain", "torch", "transformers", "tokenizers", "accelerate", "datasets", "peft", "safetensors", "huggingface_hub", "pydantic",
    "numpy",
)  # fmt: skip
SEEDED = ("data", "train", "evaluation", "online")
"""Sections that take the recipe's seed where they name none."""

if TYPE_CHECKING:
    AnyDrafter = DrafterConfig
else:
    AnyDrafter = Annotated[reduce(or_, (family.Config for family in DRAFTERS.values())), Field(discriminator="name")]

_DATA = (
    "target.model", "target.revision", "target.dtype", "target.trust_remote_code", "target.max_context", "target.extra_end_ids",
    "target.ignore_generation_options", "data",
)  # fmt: skip
_DRAFTER = (*_DATA, "target.aux_layers", "drafter", "train")
DEPENDS: dict[str, tuple[str, ...]] = {
    "regenerate": (*_DATA, "target.aux_layers"),
    "capture": (*_DATA, "target.aux_layers", "drafter"),
    "train": _DRAFTER,
    "eval": (*_DRAFTER, "target.kernels", "runtime", "evaluation"),
    "export": (*_DRAFTER, "export"),
}
"""The recipe keys, or whole sections, that each stage's fingerprint is made from, in the order of the stages."""

FREE = frozenset(
    {
        "name", "output", "seed", "target.device", "data.batch_size", "data.online", "data.writer", "train.keep", "train.save_every",
        "train.tracker", "study.grid", "study.confirm", "study.timed", *(f"online.{key}" for key in OnlineConfig.model_fields),
    }
)  # fmt: skip
"""Keys that no stage's fingerprint reads: they change no result beyond rounding (`seed` is counted in the sections that take it), or are
the study's or online learning's, which keep their own accounts."""


class Recipe(Config):
    """Everything about one drafter. Every command reads its own sections."""

    name: str = Field(default="drafter", min_length=1, pattern=r"^[\w-][\w.-]*$")
    """What this recipe is called; its output folder is `runs/NAME` unless `output` says otherwise."""
    output: str | None = Field(default=None, min_length=1)
    """Folder of everything that is made."""
    seed: Seed = 0
    """Of all randomness; `data`, `train` and `evaluation` may have their own."""
    target: TargetConfig = TargetConfig()
    data: DataConfig = DataConfig()
    drafter: AnyDrafter
    """The drafter family by `name`, with its options."""
    train: TrainConfig
    runtime: RuntimeConfig = RuntimeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    study: StudyConfig = StudyConfig()
    online: OnlineConfig = OnlineConfig()

    @property
    def folder(self) -> Path:
        """Where everything that is made goes."""
        return Path(self.output or f"runs/{self.name}")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, or of a run (a folder), with `section.key=value` overrides.

    What a run's own recipe says of `target.trust_remote_code` does not count: an override must say so.

    Raises `UserError` for a file that cannot be read, an unknown key or a value out of range (both named), and a rule that does not fit.
    """
    of_run = os.path.isdir(path)
    source = path / RESOLVED if of_run else path
    data = read_yaml(source)
    if of_run:
        data["output"] = str(path)  # it may have been moved
    if source.name == RESOLVED and isinstance(data.get("target"), dict):
        data["target"].pop("trust_remote_code", None)  # whoever sent the folder does not decide what code runs here
    for override in overrides:
        apply_override(data, override)
    for section in SEEDED:
        if isinstance(data.get(section, {}), dict):
            data[section] = {"seed": data.get("seed", 0), **data.get(section, {})}
    return check_recipe(data, str(source))


def check_recipe(data: dict[str, Any], where: str) -> Recipe:
    """`data` as a recipe whose parts fit together (`legality`), or a `UserError` that `where` opens."""
    recipe = _settled(parse(Recipe, data, where))
    legality.check(recipe)
    return recipe


def _settled(recipe: Recipe) -> Recipe:
    """With the precisions that `auto` stands for on this device: what is made depends on them, so files and fingerprints name them."""
    target, train = recipe.target, recipe.train
    if target.dtype == "auto":
        target = target.model_copy(update={"dtype": dtype_name(target.torch_dtype())})
    if train.precision == "auto":
        train = train.model_copy(update={"precision": train.multiplies_in(target.torch_device())})
    return recipe.model_copy(update={"target": target, "train": train})


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the first would be dropped silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"key '{key}' stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """A document's value; a `yaml.YAMLError` for whatever is none, values that Python cannot make and too deep nesting included."""
    try:
        value = yaml.load(text, UniqueKeys)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise yaml.YAMLError(f"a value cannot be read ({first_line(error)})") from error
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    if _nodes(value, MOST_VALUES) > MOST_VALUES:  # before anything walks them
        raise UserError(f"recipe: more than {MOST_VALUES:,} values once its aliases are written out; write them out, or fewer")
    refuse_halves(value, "recipe")  # YAML takes `\\ud83d` for a letter
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's mapping, or a `UserError`."""
    try:
        data = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        near = nearest(path.name, [other.name for other in path.parent.glob("*.yaml")])
        raise UserError(f"recipe '{path}': no such file{near}; give a recipe (YAML) or the folder of a run") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe '{path}': not YAML: {_yaml_reason(error)}") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        said = first_line(error)
        raise UserError(f"recipe '{path}': cannot be read ({said}); give a recipe (YAML in UTF-8) or the folder of a run") from error
    if not isinstance(data, dict):
        raise UserError(f"recipe '{path}': expected sections ({', '.join(Recipe.model_fields)}), got {type(data).__name__}")
    return data


MOST_VALUES = 100_000
"""Values of a recipe at most: aliases of aliases can stand for more than fits into any memory."""


def _nodes(value: Any, most: int) -> int:
    """How many values there are within one, counted up to a little more than `most`."""
    waiting, count = [value], 0
    while waiting and count <= most:
        inner = waiting.pop()
        count += 1
        if isinstance(inner, dict):
            waiting += inner.values()
        elif isinstance(inner, list):
            waiting += inner
    return count


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one `section.key=value` in place; the value is YAML, list items go by their number (`evaluation.contenders.0.label=x`)."""
    keys, found, text = override.partition("=")
    path = keys.strip().split(".")
    if not found or not all(path):
        raise UserError(f"override '{override}': expected section.key=value, such as train.lr=0.0005")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': the value is not YAML: {_yaml_reason(error)}") from error
    place: Any = data
    for at, key in enumerate(path[:-1]):
        place = _inside(place, key, ".".join(path[: at + 1]), override)
    if isinstance(place, list):
        place[_number(place, path[-1], override)] = value
    else:
        place[path[-1]] = value


def _inside(place: Any, key: str, name: str, override: str) -> Any:
    """What stands under `key`; an empty section where nothing does."""
    if isinstance(place, list):
        return place[_number(place, key, override)]
    if place.get(key) is None:
        if key.isdigit():
            raise UserError(f"override '{override}': the recipe lists no such item; set the whole list, {name.rpartition('.')[0]}=[...]")
        place[key] = {}
    if not isinstance(place[key], (dict, list)):
        raise UserError(f"override '{override}': '{name}' is {place[key]!r} and has no keys of its own; set {name} itself")
    return place[key]


def _number(place: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise UserError(f"override '{override}': '{key}' should be the number of an item, 0 to {len(place) - 1}")
    return int(key)


def _yaml_reason(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return first_line(error)
    mark = error.problem_mark or error.context_mark
    return f"{error.problem or error.context}{f', line {mark.line + 1}' if mark else ''}"


def write_resolved(recipe: Recipe, folder: Path) -> None:
    """Puts the recipe as it was understood, and the versions it ran with, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, folder / RESOLVED)
    write_text(folder / VERSIONS, json.dumps(versions(), indent=2) + "\n")


def write_recipe(recipe: Recipe, path: Path) -> None:
    """The recipe as it was understood, every key of it."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    write_text(path, text)


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "source"


def stage_values(recipe: Recipe, stage: str) -> dict[str, Any]:
    """`section.key` -> value for every key that the stage depends on; a file or store that a value names adds its content's hash."""
    wanted = DEPENDS[stage]
    values = {
        key: value for key, value in keys_of(recipe).items()
        if key not in FREE and any(key == part or key.startswith(f"{part}.") for part in wanted)
    }  # fmt: skip
    contents = {f"{key} ({text})": mark for key, value in values.items() for text in _texts(value) if (mark := _content(text))}
    return values | contents


def stage_fingerprint(recipe: Recipe, stage: str, *inputs: str) -> str:
    """16 hex digits over what the stage depends on. inputs: anything else that it reads, such as the target's fingerprint."""
    return fingerprint(stage, stage_values(recipe, stage), inputs)


def keys_of(recipe: Recipe) -> dict[str, Any]:
    """`section.key` -> value for all keys of all sections, and the keys outside of sections."""
    flat: dict[str, Any] = {}
    for section, value in recipe.model_dump(mode="json").items():
        flat |= {f"{section}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {section: value}
    return flat


def _texts(value: Any) -> Iterator[str]:
    """All strings within a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _content(text: str) -> str | None:
    """A hash of the file (also behind a prefix, as in `gsm8k:FILE`), the store's index, or the config.json of a folder of weights (of a
    run: its drafter's) that `text` names; None where it names none."""
    inside = [os.path.join(text, *place) for place in ((INDEX,), ("config.json",), ("drafter", "config.json"))]
    for path in (text, text.partition(":")[2], *inside):
        if os.path.isfile(path):
            return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    return None
