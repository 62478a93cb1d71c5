"""Who writes the texts: the target in this process, or a server that serves the same model. Jobs in, finished texts out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field

from drafttrain.core.config import Config
from drafttrain.data.server import ServerConfig, ServerWriter
from drafttrain.target.adapter import Target
from drafttrain.target.sample import Finished, Job, Sampler


class Writer(Protocol):
    """Writes one text a job."""

    def run(self, jobs: Iterable[Job], features: Iterable[str] = ()) -> Iterator[Finished]:
        """Texts in the order they are finished; a job is taken from the iterable when there is room for it."""
        ...


class OwnWriter(Config):
    """The target writes in this process."""

    kind: Literal["target"] = "target"


WriterConfig = Annotated[OwnWriter | ServerConfig, Field(discriminator="kind")]


def open_writer(
    config: WriterConfig, target: Target, batch: int, capacity: int, seed: int, answers: Path, purpose: int = 0
) -> Writer:
    """The writer that a recipe names, checked before its first job.

    batch: texts that the target writes side by side in this process. capacity: tokens of the longest prompt with its answer. answers:
    folder in which a server's answers are kept until the store has them. purpose: sets random streams apart.
    """
    if isinstance(config, ServerConfig):
        return ServerWriter(config, target, capacity, seed, answers, purpose)
    return Sampler(target, batch, capacity, seed, purpose=purpose)
