"""transformers' own assisted generation: a small LM as `assistant_model`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from drafttrain.engines.base import Engine
from drafttrain.export.base import FormatConfig
from drafttrain.export.causal_lm import CausalLM


class TransformersEngine(Engine):
    name = "transformers"
    methods: ClassVar[dict[str, str]] = {"small_lm": "draft_model"}
    by_position = False

    def form(self, family: str, home: Path) -> FormatConfig:
        self.method(family)
        return CausalLM(dtype="float32")

    def python(self) -> Path:
        return Path(sys.executable)
