"""The recipes that come with the package: their list, and a copy to change."""

from __future__ import annotations

import sys
from pathlib import Path

from drafttrain.core.disk import write_whole
from drafttrain.core.errors import UserError, nearest

CHECKOUT = Path(__file__).parents[2] / "recipes"
INSTALLED = Path(sys.prefix) / "share" / "drafttrain" / "recipes"


def shipped() -> dict[str, Path]:
    """The recipes' files by name."""
    folder = CHECKOUT if CHECKOUT.is_dir() else INSTALLED
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def purpose(path: Path) -> str:
    """What a recipe is for: its first line."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def copy_recipe(name: str, folder: Path) -> Path:
    """A shipped recipe in `folder`. Raises `UserError` for an unknown name, and where a file of that name lies there."""
    known = shipped()
    if name not in known:
        raise UserError(f"recipe '{name}'{nearest(name, known)} does not come with the package; `drafttrain recipes` lists those that do")
    place = folder / known[name].name
    if place.exists():
        raise UserError(f"'{place}' is there already; remove it, or copy to another folder with --to")
    folder.mkdir(parents=True, exist_ok=True)
    content = known[name].read_bytes()
    write_whole(place, lambda partial: partial.write_bytes(content))
    return place
