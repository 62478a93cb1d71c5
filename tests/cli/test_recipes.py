"""Shipped recipes are listed and copied; help names what can be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from drafttrain.cli.commands import app
from drafttrain.cli.recipes import copy_recipe, purpose, shipped
from drafttrain.core.errors import UserError
from drafttrain.export import FORMATS
from drafttrain.recipe import load_recipe


def test_every_shipped_recipe_is_listed_with_its_purpose() -> None:
    shown = CliRunner().invoke(app, ["recipes"]).output
    names = shipped()
    assert "quickstart" in names
    for name, path in names.items():
        assert name in shown
        assert purpose(path)


def test_a_recipe_is_copied_as_it_is_and_never_over_another(tmp_path: Path) -> None:
    place = copy_recipe("quickstart", tmp_path / "mine")
    assert place.read_bytes() == shipped()["quickstart"].read_bytes()
    assert load_recipe(place).name == "quickstart"
    with pytest.raises(UserError, match="is there already"):
        copy_recipe("quickstart", tmp_path / "mine")
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        copy_recipe("quikstart", tmp_path)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_export_names_every_format_and_shows_its_brackets(flag: str) -> None:
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["export", flag]).output
    assert "[native, causal_lm]" in shown
    for name in FORMATS:
        assert name in shown


def test_shell_completion_can_be_installed() -> None:
    assert "--install-completion" in CliRunner(env={"COLUMNS": "200"}).invoke(app, ["-h"]).output
