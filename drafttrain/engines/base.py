"""What `drafttrain verify` asks of an engine: which export it reads, and to decode a job in its own process.

A worker is a script that knows nothing of this package, since the engine's environment does not hold it: it reads a job (JSON) and writes
its answers (JSON).
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.core.errors import UserError
from drafttrain.export.base import FormatConfig
from drafttrain.export.environments import engine_python

WORKERS = Path(__file__).with_name("workers")


@dataclass
class Counted:
    """One prompt's greedy answer, and what its rounds accepted."""

    tokens: list[int]
    rounds: int
    accepted: list[int]  # by position, or their sum alone


@dataclass
class Job:
    """What an engine is to decode."""

    target: Path  # as the engine reads it
    drafter: Path
    method: str
    prompts: Sequence[Sequence[int]]
    length: int
    max_new_tokens: int
    context: int
    eos_ids: Sequence[int]
    threads: int


class Engine(ABC):
    """One engine."""

    name: ClassVar[str]
    methods: ClassVar[dict[str, str]]  # family -> what the engine calls it
    by_position: ClassVar[bool] = True  # whether it counts by position, or all positions together

    @abstractmethod
    def form(self, family: str, home: Path) -> FormatConfig:
        """The export that it reads, in fp32. home: the target's folder."""

    def target(self, home: Path, export: Path, cache: Path) -> Path:
        """The target as it reads it. export: the drafter's folder; cache: where a converted target may be kept."""
        return home

    def drafter(self, export: Path) -> Path:
        return export

    def method(self, family: str) -> str:
        if family not in self.methods:
            known = ", ".join(self.methods)
            raise UserError(f"engine '{self.name}' reads no {family} drafters; it reads: {known}")
        return self.methods[family]

    def python(self) -> Path:
        return engine_python(self.name)

    def decode(self, job: Job) -> tuple[str, list[Counted]]:
        """Its version, and the answers."""
        found = self.run(job, {})
        return found["version"], [Counted(answer["tokens"], answer["rounds"], answer["accepted"]) for answer in found["answers"]]

    def run(self, job: Job, more: dict[str, Any]) -> dict[str, Any]:
        """What the worker wrote; a `UserError` with the engine's last words where it failed."""
        with tempfile.TemporaryDirectory() as name:
            order, answers = Path(name) / "job.json", Path(name) / "answers.json"
            text = json.dumps({**vars(job), "answers": str(answers), **more}, default=str)
            order.write_text(text, encoding="utf-8")
            command = [str(self.python()), str(WORKERS / f"run_{self.name}.py"), str(order)]
            environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            environment |= {"OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=name)
            if done.returncode or not answers.exists():
                words = [line.strip() for line in done.stderr.splitlines() if "rror" in line] or done.stderr.splitlines()[-1:]
                raise UserError(f"engine '{self.name}' failed: {words[-1] if words else f'exit code {done.returncode}'}")
            return dict(json.loads(answers.read_text(encoding="utf-8")))
