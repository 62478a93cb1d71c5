"""Under which licences data stands: what the cards of the target and of the prompts' data sets say. Nothing is guessed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import DatasetCard
from huggingface_hub.repocard import metadata_load

from drafttrain.data.prompts import DatasetPrompts, Source, dataset_rows
from drafttrain.target.files import TargetConfig, resolve

UNSTATED = "not stated"
CARD = "README.md"


def licences(target: TargetConfig, sources: Sequence[Source]) -> dict[str, str]:
    """What each part of the conversations stands under: the target, which wrote the answers, and prompts that it did not write."""
    out = {f"target {target.model}": of_folder(resolve(target))}
    for source in sources:
        if source.kind == "dataset":
            out[f"data set {source.name}"] = of_data_set(source)
        elif source.kind == "jsonl":
            out[f"prompts {source.path}"] = UNSTATED
    return out


def of_folder(folder: Path) -> str:
    """What the front matter of a model's or data set's card says (`license: apache-2.0`)."""
    try:
        return _told((metadata_load(folder / CARD) or {}).get("license"))
    except (OSError, ValueError):
        return UNSTATED


def of_data_set(source: DatasetPrompts) -> str:
    """What came with the rows, else what the card says, in the folder or on the Hub."""
    said = _told(dataset_rows(source).info.license)
    if said != UNSTATED:
        return said
    if Path(source.name).exists():
        return of_folder(Path(source.name))
    try:
        return _told(DatasetCard.load(source.name).data.to_dict().get("license"))
    except Exception:  # no connection, no card, a broken one: it is not stated here
        return UNSTATED


def _told(value: object) -> str:
    names = value if isinstance(value, list) else [value]
    return ", ".join(str(name) for name in names if name) or UNSTATED
