"""What every export format is: its options, what it cannot say, how it is written, and how its folder is used."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from drafttrain.core.config import Config
from drafttrain.core.errors import UserError
from drafttrain.drafters.base import Drafter, DrafterConfig
from drafttrain.target.files import DTYPES, TargetConfig, TargetShape
from drafttrain.target.head import TargetHead

Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class Source:
    """What is exported: a trained drafter, and the target that it was trained for."""

    drafter: Drafter
    folder: Path  # of the trained drafter
    home: Path  # the target's folder
    target: TargetConfig

    @cached_property
    def head(self) -> TargetHead:
        """The target's embedding and output matrix, which drafters borrow."""
        return TargetHead.from_folder(self.home, trust_remote_code=self.target.trust_remote_code)

    def dtype(self, wanted: Precision) -> torch.dtype:
        return self.target.torch_dtype() if wanted == "auto" else DTYPES[wanted]


class FormatConfig(Config):
    """Base of the formats' configurations; `name` is the key in `FORMATS`."""

    name: str
    draft_length: int = Field(default=3, ge=1)
    """Tokens drafted a round, as the serve command and the format's own configuration say it."""

    @abstractmethod
    def check(self, drafter: DrafterConfig, target: TargetShape) -> None:
        """A `UserError` where the format has no words for this drafter, or where an engine that reads it would draft something else."""

    @abstractmethod
    def write(self, source: Source, folder: Path) -> None:
        """Fills the empty `folder`."""

    @abstractmethod
    def use(self, target: str) -> str:
        """How the folder is used, in Markdown. target: the target's name."""

    def refuse(self, reason: str, remedy: str) -> UserError:
        """What `check` raises."""
        return UserError(f"export format '{self.name}': {reason}; {remedy}")

    def only(self, drafter: DrafterConfig, families: Sequence[str], why: str) -> None:
        """A `UserError` for a drafter of another family."""
        if drafter.name not in families:
            raise self.refuse(f"it holds {' and '.join(families)} drafters, not {drafter.name} ones ({why})", "use 'native'")


def shell(*commands: str) -> str:
    """Commands as a Markdown block."""
    return "```bash\n" + "\n".join(commands) + "\n```"
