"""Our greedy rounds beside an engine's, and what the difference most likely comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch

from drafttrain.core.plan import Chain
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.eagle3 import Eagle3
from drafttrain.engines.base import Counted
from drafttrain.engines.faults import FAULTS, Fault
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.target.adapter import Target

TIE = 1e-3
"""Margin between the two likeliest tokens below which two correct programs may choose differently in fp32."""


@dataclass
class Comparison:
    """One prompt in both."""

    ours: Counted
    theirs: Counted
    same_text: bool
    same_rounds: bool
    tie: float | None = None  # where texts part: the margin there

    @property
    def differs(self) -> bool:
        """Whether it is a real difference, not a near tie of the target's."""
        if self.same_text:
            return not self.same_rounds
        return self.tie is None or self.tie > TIE


@dataclass
class Verdict:
    """What `verify` found."""

    engine: str
    version: str
    length: int
    comparisons: list[Comparison]
    by_position: bool
    causes: list[str] = field(default_factory=list)  # likely ones of the first difference

    @property
    def differing(self) -> list[int]:
        return [index for index, one in enumerate(self.comparisons) if one.differs]

    @property
    def differs(self) -> bool:
        return bool(self.differing)

    def totals(self, side: str) -> tuple[int, list[int]]:
        """Rounds and accepted tokens of all prompts, `ours` or `theirs`."""
        counts: list[Counted] = [getattr(one, side) for one in self.comparisons]
        return sum(count.rounds for count in counts), added([count.accepted for count in counts])


def added(lists: Sequence[Sequence[int]]) -> list[int]:
    width = max((len(one) for one in lists), default=0)
    return [sum(one[place] for one in lists if place < len(one)) for place in range(width)]


def decode(decoder: SpeculativeDecoder, prompts: Sequence[list[int]], max_new_tokens: int) -> list[Counted]:
    """Our own rounds, prompt by prompt."""
    answers = []
    for prompt in prompts:
        (done,) = decoder.generate([prompt], max_new_tokens=max_new_tokens)
        answers.append(Counted(list(done.tokens), done.statistics.rounds, list(done.statistics.accepts)))
    return answers


def chain_decoder(target: Target, drafter: Drafter, length: int) -> SpeculativeDecoder:
    return SpeculativeDecoder(target, drafter, RuntimeConfig(shape=Chain(length=length)))


def same_rounds(ours: Counted, theirs: Counted, length: int, by_position: bool) -> bool:
    """Equal up to the end of the text: an engine counts what it accepted beyond the cut, we don't."""
    if by_position:
        beyond = [more - own for own, more in zip_longest(ours.accepted, theirs.accepted, fillvalue=0)]
        return ours.rounds == theirs.rounds and all(0 <= more <= 1 for more in beyond)
    beyond_all = sum(theirs.accepted) - sum(ours.accepted)
    return abs(ours.rounds - theirs.rounds) <= 1 and abs(beyond_all) <= length


def compare(
    ours: Sequence[Counted], theirs: Sequence[Counted], prompts: Sequence[list[int]], target: Target, length: int, by_position: bool
) -> list[Comparison]:
    """Prompt by prompt."""
    compared = []
    for prompt, mine, other in zip(prompts, ours, theirs, strict=True):
        own_text, other_text = without_end(mine.tokens, target), without_end(other.tokens, target)
        same = own_text == other_text
        tie = None if same else margin(target, prompt, own_text, other_text)
        compared.append(Comparison(mine, other, same, same_rounds(mine, other, length, by_position), tie))
    return compared


def without_end(tokens: Sequence[int], target: Target) -> list[int]:
    """Engines differ in whether the end-of-turn token is part of an answer."""
    return list(tokens[:-1] if tokens and tokens[-1] in target.eos_ids else tokens)


@torch.inference_mode()
def margin(target: Target, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """By how much the target prefers its likeliest token to the next one, where two texts part."""
    parting = next((at for at, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), min(len(ours), len(theirs)))
    tokens = torch.tensor([prompt + ours[:parting]], device=target.device)
    first, second = target.model(tokens).logits[0, -1].float().topk(2).values.tolist()
    return float(first - second)


def likely_causes(
    load: Callable[[], Drafter], target: Target, prompt: list[int], theirs: Counted, length: int, max_new_tokens: int, by_position: bool
) -> list[str]:
    """The faults under which our own rounds on this prompt are the engine's.

    load: a fresh copy of the drafter, which a fault may change.
    """
    causes = []
    for fault in FAULTS.values():
        drafter = load()
        if not isinstance(drafter, Eagle3):
            return []
        (count,) = decode_faulty(fault, drafter, target, [prompt], length, max_new_tokens)
        if same_rounds(count, theirs, 0 if not by_position else length, by_position) and count.rounds == theirs.rounds:
            causes.append(f"{fault.tensor}: {fault.cause}")
    return causes


def decode_faulty(
    fault: Fault, drafter: Eagle3, target: Target, prompts: Sequence[list[int]], length: int, max_new_tokens: int
) -> list[Counted]:
    """Our rounds under a fault; the target is left as it was."""
    layers = target.aux_layers
    try:
        target.aux_layers = drafter.target.aux_layers
        fault.apply(drafter, target)
        return decode(chain_decoder(target, drafter, length), prompts, max_new_tokens)
    finally:
        target.aux_layers = layers
