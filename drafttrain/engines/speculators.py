"""The speculators package: no engine, but its own class of the drafter, whose tensors are compared with ours one by one."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from drafttrain.engines.base import Engine
from drafttrain.export.base import FormatConfig
from drafttrain.export.speculators import Speculators


class SpeculatorsEngine(Engine):
    name = "speculators"
    methods: ClassVar[dict[str, str]] = {"eagle3": "eagle3"}

    def form(self, family: str, home: Path) -> FormatConfig:
        self.method(family)
        return Speculators(dtype="float32", verifier=str(home))
