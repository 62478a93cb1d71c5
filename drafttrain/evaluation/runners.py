"""What can decode a suite: a runner takes a prompt's token ids and says what came out and what it took.

Speculative and plain decoding through our runtime is `Contender`. Peers (other libraries' decoding) are further classes
with the same three members.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from drafttrain.core.config import fingerprint
from drafttrain.core.disk import folder_fingerprint
from drafttrain.core.plan import Shape
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.pool import DrafterPool
from drafttrain.evaluation.memory import PeakMemory
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.runtime.generate import RoundRecord
from drafttrain.runtime.stats import Statistics

PLAIN = "plain"
"""The label of plain decoding through our own runtime, which every speed-up is measured against."""
GENERATE = "generate"
"""The label of the target library's own plain decoding; where it is in a run, every speed-up is given against it too."""


@dataclass
class Outcome:
    """One decoding of one prompt."""

    tokens: list[int]  # the prefill's token first
    text: str
    statistics: Statistics  # `seconds` adds up to `wall`: what no phase owns stands under `other`
    wall: float  # seconds, from the call until its answer stood ready
    drafted: int  # live drafted nodes that the target scored, over all rounds
    peak_memory: int  # bytes; see `PeakMemory`
    kept: list[int] = field(default_factory=list)  # tokens of each round, in order; empty where a runner has no rounds

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        return cls(**{**data, "statistics": Statistics(**data["statistics"])})


@dataclass(frozen=True)
class Facts:
    """What a result row says about a runner."""

    drafter: str | None = None  # family
    drafter_fingerprint: str | None = None
    rule: str | None = None
    lossless: bool = True
    draws: str | None = None
    shape: dict[str, Any] | None = None
    draft_length: int = 0  # K: depth of a round's tree
    slots: int = 0  # N: drafted nodes a round, padding included
    options: dict[str, Any] | None = None  # everything else that was set
    policy: str | None = None  # what made the rounds' plans


class Runner(Protocol):
    """Decodes prompts in its own way."""

    @property
    def label(self) -> str: ...

    def run(self, prompt: list[int], max_new_tokens: int, sampling: Sampling, seed: int) -> Outcome: ...

    def facts(self, sampling: Sampling) -> Facts: ...


@dataclass
class Contender:
    """Decoding through our runtime: with a drafter, or plainly without one."""

    label: str
    decoder: SpeculativeDecoder

    def run(self, prompt: list[int], max_new_tokens: int, sampling: Sampling, seed: int) -> Outcome:
        live: list[Tensor] = []
        kept: list[Tensor] = []

        def watch(record: RoundRecord) -> None:
            live.append(record.tree.live)  # kept, and counted when the clock has stopped
            kept.append(record.kept)

        memory = PeakMemory(self.decoder.target.device)
        start = time.perf_counter()
        (generation,) = self.decoder.generate([prompt], max_new_tokens, *sampling[:3], seed=seed, on_round=watch)
        wall = time.perf_counter() - start
        statistics = generation.statistics
        statistics.seconds["other"] += wall - sum(statistics.seconds.values())
        drafted = sum(int(nodes.sum()) - 1 for nodes in live)
        return Outcome(generation.tokens, generation.text, statistics, wall, drafted, memory.read(), [int(count) for count in kept])

    def facts(self, sampling: Sampling) -> Facts:
        drafter, runtime = self.decoder.drafter, self.decoder.runtime
        if drafter is None:
            return Facts()
        rule, plan = runtime.fitted(sampling, drafter)
        shape = runtime.shape
        options = runtime.model_dump(mode="json", exclude={"shape", "rule", "draws"}, exclude_defaults=True)
        if runtime.pooled:  # a default name is left out above, and says which router it was
            options["router"] = runtime.router_config.model_dump(mode="json", exclude_none=True)
        knobs = {} if rule.lossless else rule.config.model_dump(mode="json", exclude={"name"})  # what a lossy row's quality hangs on
        return Facts(
            drafter.config.name, self._fingerprint, rule.config.name, rule.lossless, runtime.treat_as or plan.draws,
            shape.model_dump(mode="json"), shape.depth, shape.nodes,
            options | ({"rule": knobs} if knobs else {}),
            runtime.policy_name,
        )

    @cached_property
    def _fingerprint(self) -> str:
        """Of all drafters of a pool together."""
        drafter = self.decoder.drafter
        assert drafter is not None
        if isinstance(drafter, DrafterPool):
            return fingerprint(*(_drafter_fingerprint(member) for member in drafter.members))
        return _drafter_fingerprint(drafter)


def _drafter_fingerprint(drafter: Drafter) -> str:
    """Of the files the drafter was loaded from; a trained one made in memory has none, and a lookup's options are all it is."""
    if drafter.files is not None:
        return folder_fingerprint(drafter.files)
    return "in-memory" if drafter.trainable else fingerprint(drafter.config)


def shape_name(shape: Shape) -> str:
    """`chain-4`, `static-12` or `tree-60`; numbers are drafted nodes."""
    kind = "tree" if shape.shape == "dynamic" else shape.shape
    return f"{kind}-{shape.nodes}"
