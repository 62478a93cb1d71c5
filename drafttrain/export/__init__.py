"""Drafters as others read and write them. `FORMATS` and `IMPORTS` are the whole lists: a new format adds its line to each."""

from __future__ import annotations

from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from drafttrain.core.config import Config
from drafttrain.core.disk import whole_folder, writable
from drafttrain.core.errors import nearest
from drafttrain.drafters.base import DrafterConfig
from drafttrain.drafters.files import load_drafter
from drafttrain.export.base import FormatConfig, Source
from drafttrain.export.causal_lm import CausalLM
from drafttrain.export.gguf import GGUF
from drafttrain.export.medusa import MedusaFormat
from drafttrain.export.mlp_speculator import MLPSpeculatorFormat
from drafttrain.export.native import Native
from drafttrain.export.openvino import OpenVINO
from drafttrain.export.sglang import SGLang
from drafttrain.export.speculators import Speculators
from drafttrain.target.files import TargetConfig, TargetShape, resolve, target_fingerprint

FORMATS: dict[str, type[FormatConfig]] = {
    "native": Native, "causal_lm": CausalLM, "speculators": Speculators, "sglang": SGLang, "gguf": GGUF, "openvino": OpenVINO,
    "medusa": MedusaFormat, "mlp_speculator": MLPSpeculatorFormat,
}  # fmt: skip

if TYPE_CHECKING:
    AnyFormat = FormatConfig | str
else:
    AnyFormat = Literal[tuple(FORMATS)] | Annotated[reduce(or_, FORMATS.values()), Field(discriminator="name")]


class ExportConfig(Config):
    """What `drafttrain export` writes."""

    formats: tuple[AnyFormat, ...] = Field(default=("native",), min_length=1)
    """Each a name, or `name` with the format's options: native, causal_lm, speculators, sglang, gguf, openvino, medusa, mlp_speculator."""
    folder: str | None = None
    """Where each format gets a folder of its own name; by default OUTPUT/export."""

    @field_validator("formats", mode="before")
    @classmethod
    def _known(cls, formats: Any) -> Any:
        if not isinstance(formats, (list, tuple)):
            return formats
        for form in formats:
            if isinstance(form, str) and form not in FORMATS:
                raise ValueError(f"format '{form}' is unknown{nearest(form, FORMATS)}; known: {', '.join(FORMATS)}")
        return formats

    @property
    def configs(self) -> list[FormatConfig]:
        """The formats with their options."""
        return [FORMATS[form](name=form) if isinstance(form, str) else form for form in self.formats]

    def check(self, drafter: DrafterConfig, target: TargetShape) -> None:
        """A `UserError` where a format cannot say this drafter."""
        for form in self.configs:
            form.check(drafter, target)


def export(drafter: Path, target: TargetConfig, config: ExportConfig, folder: Path) -> list[Path]:
    """The trained drafter in every format of `config`, each below `folder`; an older export stays until the new one is complete.

    Raises `UserError` for a drafter that a format cannot say, and for one of another target.
    """
    home = resolve(target)
    source = Source(load_drafter(drafter, target_fingerprint(home)), drafter, home, target)
    config.check(source.drafter.config, source.drafter.target)
    return [write_format(form, source, Path(config.folder or folder) / form.name) for form in config.configs]


def write_format(form: FormatConfig, source: Source, folder: Path) -> Path:
    """One format's folder, whole or not at all."""
    with writable(folder), whole_folder(folder) as partial:
        form.write(source, partial)
    return folder
