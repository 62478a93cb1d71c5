"""A drafter on disk: config.json (family, options, which target, weights' hash) and model.safetensors. Written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from drafttrain.core.config import parse
from drafttrain.core.disk import CONFIG, WEIGHTS, check_format, load_weights, reachable, read_json, save_configured, standing
from drafttrain.core.errors import UserError, first_line, nearest
from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.base import Drafter
from drafttrain.target.files import TargetShape

FORMAT = 1
MEND = "export or train it again"
RESTORE = "restore the folder from a copy, or train the drafter again"


def save_drafter(
    drafter: Drafter, folder: Path, notes: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None
) -> Path:
    """Writes the drafter; an older one in the same folder stays until the new one is complete.

    notes: anything JSON can hold that readers should know (training figures, versions). weights: its state dict where the module
    itself holds only a shard of it.
    """

    def config(digest: str) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "drafter": drafter.config.model_dump(mode="json"),
            "target": drafter.target.to_json(),
            "weights_sha256": digest,
            "notes": notes or {},
        }

    return save_configured(folder, config, plain(drafter.state_dict() if weights is None else weights))


def plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as safetensors takes them: contiguous, detached, on the CPU, and none sharing memory (a tied head is written twice)."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        here = value.detach().cpu().contiguous()
        shared = any(here.data_ptr() == other.data_ptr() for other in out.values())
        out[name] = here.clone() if shared else here
    return out


def load_drafter(folder: Path, fingerprint: str | None = None) -> Drafter:
    """The drafter in `folder`, in eval mode.

    fingerprint: the target it is to draft for. Raises `UserError` where the drafter was trained on another target, or the files are
    missing, damaged, or of an unknown family.
    """
    what, source = f"drafter '{folder}'", standing(folder)
    path = source / CONFIG
    if not reachable(path, what):
        raise UserError(f"{what}: no config.json; give the folder of a trained drafter (RUN/drafter) or its run")
    config = read_json(path, what, MEND)
    try:
        family, shape = str(config["drafter"]["name"]), TargetShape.from_json(config["target"])
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{what}: config.json is not a drafttrain drafter's ({reason}); {MEND}") from error
    check_format(config, FORMAT, what, MEND)
    if family not in DRAFTERS:
        raise UserError(f"drafter '{folder}': unknown family '{family}'{nearest(family, DRAFTERS)}; known: {', '.join(DRAFTERS)}")
    if fingerprint is not None and shape.fingerprint != fingerprint:
        raise UserError(
            f"drafter '{folder}' was trained for target {shape.fingerprint}, but this target is {fingerprint}; "
            f"decode with its own target, or train a drafter for this one"
        )
    drafter = DRAFTERS[family](parse(DRAFTERS[family].Config, config["drafter"], str(path)), shape)
    weights = load_weights(source, config.get("weights_sha256"), what, RESTORE)
    try:
        drafter.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{what}: {WEIGHTS} is of another shape ({first_line(error)}); {RESTORE}") from error
    drafter.files = folder
    return drafter.eval()
