"""Files import only from layers below their own, and folders of one layer do not import each other (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "drafttrain"
LAYER = {
    "core": 0, "target": 1, "drafters": 2, "verify": 2, "data": 2, "export": 3, "runtime": 4, "evaluation": 5, "report": 6, "train": 6,
    "engines": 6,
    "legality": 7, "recipe": 8, "stages": 9, "design": 10, "cli": 11, "__init__": 12, "__main__": 12,
}  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    """The folder a file lies in, or its own name where it lies in the package itself."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Modules of this package that the file imports, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("drafttrain"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("drafttrain"):
            yield from ([f"drafttrain.{alias.name}" for alias in node.names] if node.module == "drafttrain" else [node.module or ""])


def test_every_room_has_a_layer() -> None:
    assert {room(path) for path in FILES} == set(LAYER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_imports_only_from_layers_below_its_own(path: Path) -> None:
    own = room(path)
    for module in imports(path):
        other = module.split(".")[1] if "." in module else "__init__"
        # `__version__` is all that the package itself hands downwards
        if other not in (own, "__init__", "__version__"):
            assert LAYER[other] < LAYER[own], f"{path.relative_to(ROOT)} (layer {LAYER[own]}) imports {module} (layer {LAYER[other]})"


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=lambda path: path.name)
def test_core_knows_no_model_zoo_and_no_network(path: Path) -> None:
    if path.name == "disk.py":  # the one file of core/ that touches files
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"transformers", "huggingface_hub", "datasets", "pathlib", "os", "safetensors"}


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda folder: folder.name)
def test_files_of_one_room_import_each_other_in_no_circle(folder: Path) -> None:
    """A package's own file, which names what the room holds, is read last."""
    modules = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in folder.glob("[!_]*.py")}
    graph = {name: [module for module in imports(path) if module in modules and module != name] for name, path in modules.items()}
    list(TopologicalSorter(graph).static_order())  # a circle raises CycleError, which names it
