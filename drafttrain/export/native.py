"""The native directory: what `load_drafter` reads, with the notes that say how it was made, in a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from drafttrain.drafters.files import load_drafter
from drafttrain.target.files import TargetConfig


def export_native(source: Path, folder: Path, target: TargetConfig) -> None:
    """Copies a trained drafter after reading it whole: a damaged one is not passed on."""
    load_drafter(source)
    shutil.copytree(source, folder, dirs_exist_ok=True)

