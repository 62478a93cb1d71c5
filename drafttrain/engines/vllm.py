"""vLLM: reads the speculators folder, the SGLang folder, Medusa (up to 0.32) and causal LMs."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from drafttrain.engines.base import Engine
from drafttrain.export.base import FormatConfig
from drafttrain.export.causal_lm import CausalLM
from drafttrain.export.medusa import MedusaFormat
from drafttrain.export.speculators import Speculators


class VLLM(Engine):
    name = "vllm"
    methods: ClassVar[dict[str, str]] = {"eagle3": "eagle3", "medusa": "medusa", "small_lm": "draft_model"}

    def form(self, family: str, home: Path) -> FormatConfig:
        self.method(family)
        forms: dict[str, FormatConfig] = {
            "eagle3": Speculators(dtype="float32", verifier=str(home)), "medusa": MedusaFormat(dtype="float32"),
            "small_lm": CausalLM(dtype="float32"),
        }  # fmt: skip
        return forms[family]
