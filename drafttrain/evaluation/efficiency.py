"""How much of a round is model arithmetic: the forwards of its target and drafter, replayed alone at the same shapes.

Rounds of one decoding are left alone and looked into by turns. A round left alone gives what a round takes; in the next one
every call of the target's backbone and head and every `bare_forward` of the drafter is done again `TIMES` times, on the very
tensors it was given (slots of caches are written again with the same values), and timed. Medians over rounds that stand a few
milliseconds apart keep a busy machine out of the ratio. What is left of a round is masks, growing, verification, commit and Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from statistics import median
from types import TracebackType
from typing import Any

import torch
from torch import nn

from drafttrain.core.sampling import Sampling
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.runtime.generate import Request

TIMES = 3
NEW_TOKENS = 32


@dataclass(frozen=True)
class Efficiency:
    """Seconds of a typical round: as measured, and of its bare forwards."""

    round: float  # from the end of the round before to its own end
    draft: float  # its `draft` phase
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


def measure(
    decoder: SpeculativeDecoder, prompts: Iterable[list[int]], sampling: Sampling, seed: int, new_tokens: int = NEW_TOKENS
) -> Efficiency | None:
    """Over the first `new_tokens` tokens of each prompt (token ids); None where no prompt gives two rounds."""
    alone: list[tuple[float, float]] = []  # seconds of a round and of its drafting
    bare: list[tuple[float, float]] = []  # seconds of a round's target and drafter forwards
    replay = Replay(decoder)
    for prompt in prompts:
        batch = decoder.batch(sampling, seed)
        batch.start([Request(prompt, 0, new_tokens)])
        batch.clock.seconds()  # waits for the device and forgets the prefill
        watched = False
        while not batch.done:
            start = time.perf_counter()
            if watched:
                with replay:
                    batch.step()
                bare.append((replay.target_seconds, replay.drafter_seconds))
                batch.clock.seconds()
            else:
                batch.step()
                drafting = batch.clock.seconds()["draft"]
                alone.append((time.perf_counter() - start, drafting))
            watched = not watched
    if not alone or not bare:
        return None
    (rounds, drafts), (targets, drafters) = zip(*alone, strict=True), zip(*bare, strict=True)
    return Efficiency(median(rounds), median(drafts), median(targets), median(drafters))


class Replay:
    """Adds up the seconds of bare forwards while it is entered, doing each of them again."""

    def __init__(self, decoder: SpeculativeDecoder) -> None:
        self.target, self.drafter = decoder.target, decoder.drafter
        self.target_seconds, self.drafter_seconds = 0.0, 0.0

    def __enter__(self) -> Replay:
        self.target_seconds, self.drafter_seconds = 0.0, 0.0
        self._hook = self.target.backbone.register_forward_hook(self._after_backbone, with_kwargs=True)
        if self.drafter is not None:
            self.drafter.watcher = self._after_drafter
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        if self.drafter is not None:
            self.drafter.watcher = None

    def _after_backbone(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        def again() -> object:
            return self.target.head.logits(module.forward(*args, **kwargs).last_hidden_state)

        self.target_seconds += self._timed(again)

    def _after_drafter(self, again: Callable[[], object]) -> None:
        self.drafter_seconds += self._timed(again)

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
