"""Environments of engines whose pins clash with ours: made by `scripts/engines.sh NAME`, used through a process of their own."""

from __future__ import annotations

import os
from pathlib import Path

from drafttrain.core.errors import UserError

VARIABLE = "DRAFTTRAIN_ENGINES"


def engines_root() -> Path:
    """Where the environments are: $DRAFTTRAIN_ENGINES, or ~/.cache/drafttrain/engines."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "drafttrain" / "engines")


def engine_python(name: str) -> Path:
    """The engine's own Python, or a `UserError` that says how to make its environment."""
    python = engines_root() / name / "bin" / "python"
    if not python.exists():
        raise UserError(f"engine '{name}' has no environment at '{python.parent.parent}'; make it with: bash scripts/engines.sh {name}")
    return python
