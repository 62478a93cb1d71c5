"""llama.cpp, through xllamacpp: reads GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from drafttrain.engines.base import Engine
from drafttrain.export.base import FormatConfig
from drafttrain.export.gguf import DRAFTER_FILE, GGUF, TARGET_FILE


class LlamaCpp(Engine):
    name = "llamacpp"
    methods: ClassVar[dict[str, str]] = {"eagle3": "eagle3", "small_lm": "draft_model"}
    by_position = False

    def form(self, family: str, home: Path) -> FormatConfig:
        self.method(family)
        return GGUF(quantization="f32", target=True)

    def target(self, home: Path, export: Path, cache: Path) -> Path:
        return export / TARGET_FILE

    def drafter(self, export: Path) -> Path:
        return export / DRAFTER_FILE
