"""Training checkpoints: whole or not there at all, checked before they are used, the newest few kept."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from drafttrain.core.disk import replace_folder, sha256, sync_tree
from drafttrain.core.errors import UserError

STATE = "state.json"


@dataclass
class Progress:
    """Where a training run stands."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None  # held-out accepted length of the best drafter so far; None before the first
    alpha: list[float | None] = field(default_factory=list)  # of the same drafter
    fingerprint: str = ""  # of what must not change between a run and its continuation
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256 of everything else in the checkpoint


def save(accelerator: Accelerator, folder: Path, progress: Progress, keep: int) -> None:
    """Writes `folder`/step-N beside the older ones, then removes all but the newest `keep`; later ones too, which training passed over
    as damaged. All ranks call it."""
    partial, final = folder / f".step-{progress.step}", folder / f"step-{progress.step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial), safe_serialization=True)
    except OSError as error:
        raise UserError(f"checkpoint '{final}' cannot be written ({error}); free some disk space and run again, it resumes") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        progress.files = {str(path.relative_to(partial)): sha256(path) for path in _files(partial)}
        (partial / STATE).write_text(json.dumps(asdict(progress)))
        sync_tree(partial)
        replace_folder(partial, final)
        there = checkpoints(folder)
        place = there.index(final) + 1
        for gone in there[: max(0, place - keep)] + there[place:]:
            shutil.rmtree(gone)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, folder: Path, fingerprint: str) -> Progress:
    """Loads the newest whole checkpoint; a damaged one is passed over with a warning. A fresh `Progress` where there is none.

    Raises `UserError` where the checkpoint belongs to other options, or where all are damaged.
    """
    if accelerator.is_main_process:
        for leftover in folder.glob(".step-*"):  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
    there = checkpoints(folder)
    for candidate in reversed(there):
        progress = _whole(candidate)
        if progress is None:
            warnings.warn(f"checkpoint '{candidate}' is damaged and passed over", stacklevel=2)
            continue
        if progress.fingerprint != fingerprint:
            raise UserError(
                f"checkpoint '{candidate}' was written with other options or data; choose another output folder, or delete "
                f"'{folder}' to train from the start"
            )
        accelerator.load_state(str(candidate))
        return progress
    if there:
        raise UserError(f"no checkpoint in '{folder}' is whole; delete that folder to train from the start, or bring one back")
    return Progress(fingerprint=fingerprint)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def _whole(folder: Path) -> Progress | None:
    """What a checkpoint says of itself, or None where a file is missing or was changed."""
    try:
        known: dict[str, Any] = json.loads((folder / STATE).read_text())
        progress = Progress(**known)
        if all(sha256(folder / name) == digest for name, digest in progress.files.items()):
            return progress
    except (OSError, ValueError, TypeError):  # ValueError: not UTF-8, not JSON
        pass
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
