"""Python in the pages is what the package has: names import, options exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import drafttrain

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(ast.parse(block), id=f"{page.name}-{place}")
    for page in PAGES
    for place, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_name_that_a_page_imports_is_there(block: ast.Module) -> None:
    for node in ast.walk(block):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("drafttrain"):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_configuration_that_a_page_makes_is_valid(block: ast.Module) -> None:
    known = {name: getattr(drafttrain, name) for name in ("RuntimeConfig", "Chain", "Static", "Dynamic")}
    for node in ast.walk(block):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            eval(compile(ast.Expression(node), "page", "eval"), {**known})


def test_public_names_are_those_that_are_listed() -> None:
    assert set(drafttrain.__all__) - {"__version__"} == set(drafttrain.PUBLIC)
    for name in drafttrain.__all__:
        assert getattr(drafttrain, name) is not None
