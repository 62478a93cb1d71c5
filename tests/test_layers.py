"""Files import only from layers below their own, and folders of one layer do not import each other (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "drafttrain"
LAYER = {
    "core": 0, "target": 1, "drafters": 2, "verify": 2, "data": 2, "runtime": 3, "evaluation": 4, "train": 5, "export": 5,
}  # fmt: skip
TOP = 6
FILES = sorted(ROOT.rglob("*.py"))


def room(module: str) -> str:
    """`drafttrain.core.tree` -> `core`; a file of the package itself -> its own name."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> Iterator[str]:
    """Modules of this package that the file imports, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("drafttrain"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("drafttrain"):
            yield from ([f"drafttrain.{alias.name}" for alias in node.names] if node.module == "drafttrain" else [node.module or ""])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_imports_only_from_layers_below_its_own(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    level = LAYER.get(own, TOP)
    for module in imports(path):
        other = room(module)
        if level < TOP and other != own:
            assert LAYER.get(other, TOP) < level, f"{path.name} of {own} (layer {level}) imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_knows_no_model_zoo_and_no_network(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] != "core":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"transformers", "huggingface_hub", "datasets", "safetensors", "pathlib", "os"}
