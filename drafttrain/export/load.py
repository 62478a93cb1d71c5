"""Drafters from anywhere: a folder of ours, or a published head in a format of `IMPORTS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.core.errors import UserError, first_line
from drafttrain.drafters import files
from drafttrain.drafters.base import Drafter
from drafttrain.export import causal_lm, gguf, medusa, mlp_speculator, openvino, sglang, speculators
from drafttrain.export.reading import ImportTarget
from drafttrain.export.tensors import CONFIG, read_config
from drafttrain.target.adapter import Target
from drafttrain.target.files import TargetConfig, resolve, target_fingerprint


@dataclass(frozen=True)
class Importer:
    """How a format's folder is recognised by its path and config.json, and read."""

    recognises: Callable[[Path, dict[str, Any]], bool]
    read: Callable[[Path, dict[str, Any], ImportTarget], Drafter]


IMPORTS: dict[str, Importer] = {
    "gguf": Importer(gguf.recognises, gguf.read),
    "openvino": Importer(openvino.recognises, openvino.read),
    "speculators": Importer(speculators.recognises, speculators.read),
    "medusa": Importer(medusa.recognises, medusa.read),
    "mlp_speculator": Importer(mlp_speculator.recognises, mlp_speculator.read),
    "sglang": Importer(sglang.recognises, sglang.read),
    "causal_lm": Importer(causal_lm.recognises, causal_lm.read),
}
"""In the order in which they are asked: the first that recognises a folder reads it."""

PATTERNS = ["*.json", "*.safetensors", "*.gguf", "*.xml", "openvino_model.bin", "*.jinja", "*.model", "*.txt"]
"""What is fetched of a Hub repository; pickles and code are not."""


def load_drafter(
    path: str | Path, revision: str | None = None, *, target: str | TargetConfig | Target | None = None, fingerprint: str | None = None
) -> Drafter:
    """The drafter in a folder, a GGUF file or a Hub repository, in eval mode.

    target: what it drafts for. Drafters of ours know it, and `speculators` folders name it; other published heads need it, as the shape of
    the target decides how they are read. fingerprint: the target it must have been trained for. Raises `UserError` for a folder that no
    format recognises, for damaged files (by file and key), and for a head that computes what no family here does.
    """
    folder = fetched(path, revision)
    config = {} if folder.suffix == ".gguf" or not (folder / CONFIG).exists() else read_config(folder)
    if is_native(config):
        return files.load_drafter(folder, fingerprint or _fingerprint(target))
    importer = next((importer for importer in IMPORTS.values() if importer.recognises(folder, config)), None)
    if importer is None:
        if not config:
            return files.load_drafter(folder, fingerprint)  # says what is missing
        raise UserError(f"drafter '{folder}': {CONFIG} is of no format known here; known: native, {', '.join(IMPORTS)}")
    drafter = importer.read(folder, config, ImportTarget.of(_named(folder, config, target)))
    drafter.files = folder
    return drafter


def is_native(config: dict[str, Any]) -> bool:
    """Whether a config.json is one of ours, of whatever version."""
    return isinstance(config.get("drafter"), dict) and "target" in config


def fetched(path: str | Path, revision: str | None) -> Path:
    """The local folder (or GGUF file), downloaded where `path` is a Hub id."""
    local = Path(path)
    if local.exists():
        return local
    if isinstance(path, Path) or str(path).count("/") != 1:
        return local  # the reader says what is missing
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=PATTERNS))
    except Exception as error:  # the network, the Hub and its client fail in many ways
        raise UserError(
            f"drafter '{path}': neither a folder nor a Hub repository that can be loaded ({first_line(error)}); check the name and the "
            f"revision, `hf auth login` for a private one"
        ) from error


def _named(folder: Path, config: dict[str, Any], target: str | TargetConfig | Target | None) -> str | TargetConfig | Target:
    """The target that was given, or that the folder itself names."""
    named = target or speculators.verifier_of(config)
    if named is None:
        raise UserError(f"drafter '{folder}': this format does not name its target; say which it is (target=...)")
    return named


def _fingerprint(target: str | TargetConfig | Target | None) -> str | None:
    if target is None:
        return None
    if isinstance(target, Target):
        return target.fingerprint
    return target_fingerprint(resolve(TargetConfig(model=target) if isinstance(target, str) else target))
