"""OpenVINO GenAI: reads IRs, the target's too."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from drafttrain.engines.base import Engine
from drafttrain.export.base import FormatConfig
from drafttrain.export.openvino import MODEL, OpenVINO, copy_tokenizer, export_ir


class OpenVINOEngine(Engine):
    name = "openvino"
    methods: ClassVar[dict[str, str]] = {"eagle3": "eagle3"}
    by_position = False

    def form(self, family: str, home: Path) -> FormatConfig:
        self.method(family)
        return OpenVINO(weights="fp32")

    def target(self, home: Path, export: Path, cache: Path) -> Path:
        folder = cache / "openvino-target"
        if not (folder / MODEL).exists():
            export_ir(home, folder, "fp32")
        copy_tokenizer(folder, export)
        return folder
