"""A drafter on disk: config.json (family, options, which target, weights' hash) and model.safetensors. Written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafttrain.core.config import parse
from drafttrain.core.errors import UserError, first_line, nearest
from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.base import Drafter
from drafttrain.target.files import TargetShape, blocks, sha256

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_drafter(
    drafter: Drafter, folder: Path, notes: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None
) -> Path:
    """Writes the drafter; an older one in the same folder stays until the new one is complete.

    notes: anything JSON can hold that readers should know (training figures, versions). weights: its state dict where the module
    itself holds only a shard of it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        save_file(plain(drafter.state_dict() if weights is None else weights), partial / WEIGHTS, metadata={"format": "pt"})
        config = {
            "format": FORMAT,
            "drafter": drafter.config.model_dump(mode="json"),
            "target": drafter.target.to_json(),
            "weights_sha256": sha256(partial / WEIGHTS),
            "notes": notes or {},
        }
        (partial / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n")
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as safetensors takes them: contiguous, detached, on the CPU, and none sharing memory (a tied head is written twice)."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        here = value.detach().cpu().contiguous()
        shared = any(here.data_ptr() == other.data_ptr() for other in out.values())
        out[name] = here.clone() if shared else here
    return out


def replace_folder(new: Path, old: Path) -> None:
    """`new` takes the place of `old`: at any moment one of them stands whole."""
    if old.exists():
        aside = Path(tempfile.mkdtemp(dir=old.parent, prefix=f".old-{old.name}-"))
        os.replace(old, aside / "folder")
        os.replace(new, old)
        shutil.rmtree(aside)
    else:
        os.replace(new, old)


def load_drafter(folder: Path, fingerprint: str | None = None) -> Drafter:
    """The drafter in `folder`, in eval mode.

    fingerprint: the target it is to draft for. Raises `UserError` where the drafter was trained on another target, or the files are
    missing, damaged, or of an unknown family.
    """
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"drafter '{folder}': no config.json; give the folder of a trained drafter (RUN/drafter) or its run")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        family, shape = str(config["drafter"]["name"]), TargetShape.from_json(config["target"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"drafter '{folder}': config.json is not a drafttrain drafter's ({reason}); export or train it again") from error
    if family not in DRAFTERS:
        raise UserError(f"drafter '{folder}': unknown family '{family}'{nearest(family, DRAFTERS)}; known: {', '.join(DRAFTERS)}")
    if fingerprint is not None and shape.fingerprint != fingerprint:
        raise UserError(
            f"drafter '{folder}' was trained for target {shape.fingerprint}, but this target is {fingerprint}; "
            f"decode with its own target, or train a drafter for this one"
        )
    drafter = DRAFTERS[family](parse(DRAFTERS[family].Config, config["drafter"], str(path)), shape)
    try:
        weights = load_file(folder / WEIGHTS)
        _check_hash(folder / WEIGHTS, config.get("weights_sha256"))
        drafter.load_state_dict(weights)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"drafter '{folder}': model.safetensors is missing, truncated or of another shape ({reason})") from error
    drafter.files = folder
    return drafter.eval()


def _check_hash(weights: Path, expected: str | None) -> None:
    """A `UserError` where the weights are not those that were saved. expected: None in drafters of earlier versions."""
    if expected is not None and sha256(weights) != expected:
        raise UserError(
            f"drafter '{weights.parent}': {weights.name} is damaged or not its own: the content differs from the hash in {CONFIG}; "
            f"restore the folder from a copy, or train the drafter again"
        )


def folder_fingerprint(folder: Path) -> str:
    """16 hex digits over the names and bytes of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + str(path.stat().st_size).encode() + b"\0")
        for block in blocks(path):
            digest.update(block)
    return digest.hexdigest()[:16]
