"""The model card beside an exported drafter: card.md, filled in from the drafter's own files and the run's results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from drafttrain.core.disk import folder_fingerprint, write_text
from drafttrain.core.errors import UserError
from drafttrain.data.licences import UNSTATED, of_folder
from drafttrain.drafters.files import load_drafter
from drafttrain.evaluation.bench import read_rows
from drafttrain.export.base import FormatConfig
from drafttrain.report.tables import results_table
from drafttrain.runtime.stats import alpha_text
from drafttrain.target.files import DEMO, TargetConfig, resolve

CARD, TEMPLATE = "README.md", Path(__file__).with_name("card.md")
TOLD = ("batch_rows", "row_length", "accumulate", "lr", "schedule", "weight_decay", "precision", "seed")
"""Options of training that stand in a card; all of them are in the recipe beside it."""


@dataclass(frozen=True)
class Story:
    """What a card tells that the drafter's own files don't."""

    name: str
    target: TargetConfig
    data: str  # the conversations, in words
    results: Path  # what `eval` measured; may not exist
    version: str  # of this package
    licence: str | None = None  # of the target; None: what its card says, if it lies here


def write_card(folder: Path, form: FormatConfig, drafter: Path, story: Story) -> Path:
    """Puts the card of the trained drafter in `drafter` into `folder`, which holds it in the format `form`."""
    text = card(form, drafter, story)
    write_text(folder / CARD, text)
    return folder / CARD


def card(form: FormatConfig, drafter: Path, story: Story) -> str:
    """The card's text. Raises `UserError` where the drafter or the results are damaged."""
    made = load_drafter(drafter)
    notes: dict[str, Any] = json.loads((drafter / "config.json").read_text(encoding="utf-8"))["notes"]
    model = story.target.model
    return TEMPLATE.read_text(encoding="utf-8").format(
        name=story.name, family=made.config.name, target=model, fingerprint=made.target.fingerprint, dtype=story.target.dtype,
        metadata=metadata(made.config.name, form, story),
        parameters=f"{sum(weight.numel() for weight in made.parameters()):,}", version=story.version,
        use=form.use(model), results=_results(drafter, story.results), training=_training(notes), data=story.data,
        options=_listed(made.config.model_dump(mode="json")),
    )  # fmt: skip


def metadata(family: str, form: FormatConfig, story: Story) -> str:
    """The card's front matter. A drafter of a target on the Hub names it; a licence stands there where the target's card states one."""
    model = story.target.model
    on_hub = model != DEMO and not Path(model).is_dir()
    licence = story.licence or (UNSTATED if on_hub else of_folder(resolve(story.target)))
    data = ModelCardData(
        library_name="transformers" if form.name == "causal_lm" else "drafttrain", pipeline_tag="text-generation",
        tags=["speculative-decoding", "draft-model", family, form.name], license=None if licence == UNSTATED else licence,
        base_model=model if on_hub else None, base_model_relation="adapter" if on_hub else None, ignore_metadata_errors=False,
    )  # fmt: skip
    return data.to_yaml().strip()


def _results(drafter: Path, results: Path) -> str:
    """Its rows and plain decoding's; rows of other drafters in the same file are left out."""
    mark = folder_fingerprint(drafter)
    rows = read_rows(results) if results.exists() else []
    own = {row.run for row in rows if row.measured.drafter_fingerprint == mark}
    kept = [row for row in rows if row.run in own and row.measured.drafter_fingerprint in (mark, None)]
    if not kept:
        return "Not measured yet: `drafttrain eval` on the run, then `drafttrain export` again."
    try:
        return results_table(kept).rstrip()
    except UserError as error:
        return f"Not shown: {error}."


def _training(notes: Mapping[str, Any]) -> str:
    if "step" not in notes:
        return "Nothing was trained."
    told = ", ".join(f"{key} {notes['train'][key]}" for key in TOLD)
    text = f"{notes['step']:,} steps over {notes['tokens']:,} tokens ({told})."
    if "held_out_tau" in notes:
        alpha = alpha_text(notes["held_out_alpha"])
        text += f" On held-out conversations a chain of {notes['length']} has accepted length {notes['held_out_tau']:.2f} (alpha {alpha})."
    return text


def _listed(options: Mapping[str, Any]) -> str:
    return "\n".join(f"- `{key}`: {json.dumps(value)}" for key, value in options.items())
