"""How much of a round is model arithmetic: the forwards of its target and drafter, replayed alone at the same shapes.

While one decoding runs, every call of the target's backbone and every `bare_forward` of the drafter is done again `TIMES` times on the very
tensors it was given (slots of the caches are written again with the same values) and timed. What a round takes comes from another, undisturbed
decoding of the same prompt just before. Masks, growing, verification, commit and Python are what is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.evaluation.runners import Contender
from drafttrain.runtime.decoder import SpeculativeDecoder

TIMES = 3
NEW_TOKENS = 48


@dataclass(frozen=True)
class Efficiency:
    """Seconds a round: as measured, and of its bare forwards."""

    round: float  # all phases but the prefill
    draft: float  # the `draft` phase
    bare_target: float
    bare_drafter: float

    @property
    def loop(self) -> float:
        """Share of a round that is bare forwards; what is missing to 1 is this runtime's own cost."""
        return (self.bare_target + self.bare_drafter) / self.round

    @property
    def drafting(self) -> float | None:
        """Drafting time over its bare forwards; None where a drafter has none (plain decoding, lookup)."""
        return self.draft / self.bare_drafter if self.bare_drafter else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(contender: Contender, prompts: Iterable[list[int]], sampling: Sampling, seed: int) -> Efficiency | None:
    """Over the first `NEW_TOKENS` tokens of each prompt; None where no prompt gave two rounds."""
    rounds, round_time, draft_time = 0, 0.0, 0.0
    replay = Replay(contender.decoder)
    for prompt in prompts:
        outcome = contender.run(prompt, NEW_TOKENS, sampling, seed)
        rounds += outcome.statistics.rounds
        round_time += outcome.wall - outcome.statistics.seconds["prefill"]
        draft_time += outcome.statistics.seconds["draft"]
        with replay:
            contender.decoder.generate([prompt], NEW_TOKENS, *sampling, seed=seed, on_round=replay.on_round)
    if not replay.rounds or not rounds:
        return None
    return Efficiency(
        round_time / rounds, draft_time / rounds, replay.target_seconds / replay.rounds, replay.drafter_seconds / replay.rounds
    )


class Replay:
    """Adds up the time of bare forwards over the rounds of the decodings that run inside it, each decoding's first round left out."""

    def __init__(self, decoder: SpeculativeDecoder) -> None:
        self.target, self.drafter = decoder.target, decoder.drafter
        self.rounds, self.target_seconds, self.drafter_seconds = 0, 0.0, 0.0
        self._pending = [0.0, 0.0]  # target's and drafter's seconds since the last round ended

    def __enter__(self) -> Replay:
        self._started = False
        self._hook = self.target.backbone.register_forward_hook(self._after_backbone, with_kwargs=True)
        if self.drafter is not None:
            self.drafter.watcher = self._after_drafter
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hook.remove()
        if self.drafter is not None:
            self.drafter.watcher = None

    def on_round(self, tree: Tree, scored: Scored, verdict: Verdict) -> None:
        """Closes a round. Before the first one lie the prefill and `begin`, so it is not counted."""
        if self._started:
            self.rounds += 1
            self.target_seconds += self._pending[0]
            self.drafter_seconds += self._pending[1]
        self._pending, self._started = [0.0, 0.0], True

    def _after_backbone(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._pending[0] += self._timed(lambda: self.target.head.logits(module.forward(*args, **kwargs).last_hidden_state))

    def _after_drafter(self, again: Callable[[], object]) -> None:
        self._pending[1] += self._timed(again)

    def _timed(self, again: Callable[[], object]) -> float:
        """Mean seconds of doing it again."""
        self._wait()
        start = time.perf_counter()
        for _ in range(TIMES):
            again()
        self._wait()
        return (time.perf_counter() - start) / TIMES

    def _wait(self) -> None:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
