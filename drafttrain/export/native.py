"""The native directory: what `load_drafter` reads, with the notes that say how it was made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from drafttrain.drafters.base import DrafterConfig
from drafttrain.export.base import FormatConfig, Source
from drafttrain.target.files import TargetShape


class Native(FormatConfig):
    """Every family, and nothing lost."""

    name: Literal["native"] = "native"

    def check(self, drafter: DrafterConfig, target: TargetShape) -> None:
        """It holds whatever there is."""

    def write(self, source: Source, folder: Path) -> None:
        shutil.copytree(source.folder, folder, dirs_exist_ok=True)

    def use(self, target: str) -> str:
        return f"""```python
from drafttrain import SpeculativeDecoder

decoder = SpeculativeDecoder.from_pretrained("{target}", "PATH/OF/THIS/FOLDER")
print(decoder.generate("Why is the sky blue?", max_new_tokens=128)[0].text)
```"""
