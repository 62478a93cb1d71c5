"""Drafters as others read them. `FORMATS` is the whole list: a new format adds its line here."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from pydantic import Field, field_validator

from drafttrain.core.config import Config
from drafttrain.core.errors import nearest
from drafttrain.drafters.files import replace_folder
from drafttrain.export.native import export_native
from drafttrain.export.plain import export_plain
from drafttrain.target.files import TargetConfig

FORMATS: dict[str, Callable[[Path, Path, TargetConfig], None]] = {"native": export_native, "plain": export_plain}
"""(trained drafter's folder, empty folder to fill, target) by name."""


class ExportConfig(Config):
    """What `drafttrain export` writes."""

    formats: tuple[str, ...] = Field(default=("native",), min_length=1)
    """`native`: what this package loads. `plain`: an ordinary causal LM with its tokenizer (small_lm only)."""
    folder: str | None = None
    """Where each format gets a folder of its own name; by default OUTPUT/export."""

    @field_validator("formats")
    @classmethod
    def _known(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        for name in formats:
            if name not in FORMATS:
                raise ValueError(f"format '{name}' is unknown{nearest(name, FORMATS)}; known: {', '.join(FORMATS)}")
        return formats


def export(drafter: Path, target: TargetConfig, config: ExportConfig, folder: Path) -> list[Path]:
    """The trained drafter in every format of `config`, each below `folder`; an older export stays until the new one is complete."""
    return [_export_one(name, drafter, target, Path(config.folder or folder) / name) for name in config.formats]


def _export_one(name: str, drafter: Path, target: TargetConfig, folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        FORMATS[name](drafter, partial, target)
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
