"""How much of a round is model arithmetic: the forwards of its target and drafter, replayed alone at the same shapes.

At the end of a round's target forward, every `bare_forward` of the drafter and the call of the target's backbone and head are done again
`TIMES` times in the order in which they came, on the very tensors they were given (slots of caches are written again with the same
values), and timed. The order matters: each model finds the processor's caches full of the other's weights, as it does in a real round.
The time of doing it again is taken out of the round. What is left of a round is masks, growing, verification, commit and Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from types import TracebackType
from typing import Any

from torch import nn

from drafttrain.core.sampling import Sampling
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.runtime.rows import Request
from drafttrain.runtime.stats import now

TIMES = 3
NEW_TOKENS = 32


@dataclass(frozen=True)
class Efficiency:
    """Medians over rounds."""

    round: float  # seconds, replays taken out
    loop: float  # share of a round that is bare forwards; what is missing to 1 is this runtime's own cost
    drafting: float | None  # drafting time over its bare forwards; None where a drafter has none (plain decoding, lookup)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RecordedRound:
    """Seconds of one round."""

    whole: float
    draft: float
    bare_target: float
    bare_drafter: float


def measure(
    decoder: SpeculativeDecoder, prompts: Iterable[list[int]], sampling: Sampling, seed: int, new_tokens: int = NEW_TOKENS
) -> Efficiency | None:
    """Over the first `new_tokens` tokens of each prompt (token ids); None where no prompt gives a round."""
    rounds = [found for prompt in prompts for found in _rounds(decoder, prompt, sampling, seed, new_tokens)]
    if not rounds:
        return None
    drafted = [one for one in rounds if one.bare_drafter]
    return Efficiency(
        median(one.whole for one in rounds),
        median((one.bare_target + one.bare_drafter) / one.whole for one in rounds),
        median(one.draft / one.bare_drafter for one in drafted) if drafted else None,
    )


def _rounds(decoder: SpeculativeDecoder, prompt: list[int], sampling: Sampling, seed: int, new_tokens: int) -> Iterator[RecordedRound]:
    batch, replay = decoder.batch(sampling, seed), RoundReplay(decoder)
    batch.start([Request(prompt, 0, new_tokens)])
    batch.clock.take()  # waits for the device and forgets the prefill
    while not batch.done:
        start = time.perf_counter()
        with replay:
            batch.step()
        drafting = batch.clock.take()["draft"]
        yield RecordedRound(time.perf_counter() - start - replay.seconds, drafting, replay.target_seconds, replay.drafter_seconds)


class RoundReplay:
    """Does the bare forwards of a round again while it is entered."""

    def __init__(self, decoder: SpeculativeDecoder) -> None:
        self.target, self.drafter = decoder.target, decoder.drafter
        self.calls: list[Callable[[], object]] = []  # the drafter's, in this round so far
        self.seconds, self.target_seconds, self.drafter_seconds = 0.0, 0.0, 0.0

    def __enter__(self) -> RoundReplay:
        self.calls, self.seconds, self.target_seconds, self.drafter_seconds = [], 0.0, 0.0, 0.0
        self._hook = self.target.backbone.register_forward_hook(self._after_backbone, with_kwargs=True)
        if self.drafter is not None:
            self.drafter.watcher = self.calls.append
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        if self.drafter is not None:
            self.drafter.watcher = None

    def _after_backbone(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        start = now(self.target.device)
        for _ in range(TIMES):
            self.drafter_seconds += self._timed(self.calls) / TIMES
            self.target_seconds += self._timed([lambda: self.target.head.logits(module.forward(*args, **kwargs).last_hidden_state)]) / TIMES
        self.seconds += now(self.target.device) - start

    def _timed(self, calls: Sequence[Callable[[], object]]) -> float:
        """Seconds of doing them again."""
        if not calls:
            return 0.0
        start = now(self.target.device)
        for again in calls:
            again()
        return now(self.target.device) - start
