"""The native directory: what `load_drafter` reads, with the notes that say how it was made, and the entry for transformers' `generate`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from drafttrain.drafters.base import DrafterConfig
from drafttrain.export.base import FormatConfig, Source
from drafttrain.target.files import TargetShape

CODE = '''"""`model.generate(**inputs, custom_generate="THIS REPOSITORY", trust_remote_code=True)`: this drafter, through drafttrain."""

DRAFTER = {drafter!r}
"""Where it lies: a Hub repository, or a folder; None: say it as `drafter=`."""

MADE = {{}}


def generate(model, inputs=None, drafter=DRAFTER, runtime=None, streamer=None, **options):
    """runtime: what a recipe's `runtime` section holds; by default a chain."""
    from drafttrain import speculative

    if drafter is None:
        raise ValueError("generate(..., drafter=...): say where the drafter lies, a folder or a Hub repository")
    key = str(drafter), repr(runtime)
    if key not in MADE:
        MADE[key] = speculative(drafter, runtime)
    return model.generate(inputs, custom_generate=MADE[key].heard_by(streamer), **options)
'''

REQUIREMENTS = "drafttrain\n"


def write_custom_generate(folder: Path, drafter: str | None) -> None:
    """The folder that transformers looks for. drafter: the repository or folder that it will be loaded from, where that is known."""
    inner = folder / "custom_generate"
    inner.mkdir(exist_ok=True)
    (inner / "generate.py").write_text(CODE.format(drafter=drafter), encoding="utf-8")
    (inner / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")


class Native(FormatConfig):
    """Every family, and nothing lost."""

    name: Literal["native"] = "native"

    def check(self, drafter: DrafterConfig, target: TargetShape) -> None:
        """It holds whatever there is."""

    def write(self, source: Source, folder: Path) -> None:
        shutil.copytree(source.folder, folder, dirs_exist_ok=True)
        write_custom_generate(folder, None)

    def use(self, target: str) -> str:
        return f"""```python
from drafttrain import SpeculativeDecoder

decoder = SpeculativeDecoder.from_pretrained("{target}", "PATH/OF/THIS/FOLDER")
print(decoder.generate("Why is the sky blue?", max_new_tokens=128)[0].text)
```

By transformers' own `generate`, with its streamers, stopping criteria and logits processors:

```python
from drafttrain import speculative

model.generate(**inputs, max_new_tokens=128, custom_generate=speculative("PATH/OF/THIS/FOLDER"))
```"""
