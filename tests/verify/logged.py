"""Real rounds of a tiny target, logged once, on which rules are replayed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.plan import Chain, Dynamic, Plan, Static
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.drafters.base import Drafter
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.generate import DecodingLoop, RoundRecord
from drafttrain.runtime.policy import Fixed
from drafttrain.runtime.rows import Request
from drafttrain.target.adapter import Target
from drafttrain.verify.base import Rule
from drafttrain.verify.typical import Typical, TypicalConfig
from tests.tiny import fitted, tiny_eagle3, tiny_target

SHAPES: dict[str, Any] = {
    "chain": Chain(length=4), "static": Static(children=(3, 2, 1)), "dynamic": Dynamic(depth=3, beam=3, top_k=3, nodes=8),
}  # fmt: skip
PROMPTS = [[5, 9, 11, 30, 2, 7], [1, 2, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
COLD, WARM = Sampling(), Sampling(temperature=0.8)


@lru_cache
def target() -> Target:
    return tiny_target()


@lru_cache
def drafter() -> Drafter:
    """Right now and then."""
    return fitted(tiny_eagle3(target(), ttt_steps=4), target(), PROMPTS)


def decoded(sampling: Sampling, runtime: RuntimeConfig, new_tokens: int = 24) -> list[list[int]]:
    """What comes out for all prompts."""
    made = SpeculativeDecoder(target(), drafter(), runtime).generate(PROMPTS, new_tokens, *sampling[:3], seed=3)
    assert sum(one.statistics.tokens for one in made) > sum(one.statistics.rounds for one in made)  # something was accepted
    return [one.tokens for one in made]


@dataclass
class Round:
    """What a rule is given."""

    tree: Tree
    scored: Scored

    @torch.inference_mode()
    def judged(self, rule: Rule) -> Verdict:
        """The rule's verdict, every rule with the same chance."""
        return rule(self.tree, self.scored, SeededRng(7, torch.arange(len(self.tree.tokens))))


class Reading(Typical):
    """A rule under which everything that any rule reads is there to be logged."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"last_hidden_state"})


@lru_cache
def rounds(shape: str, sampling: Sampling, draws: Any = "deterministic") -> list[Round]:
    """Rounds of lossless decoding with trees of this shape."""
    seen: list[Round] = []

    def log(record: RoundRecord) -> None:
        seen.append(Round(record.tree, record.scored))

    rule, plan = Reading(TypicalConfig(epsilon=None)), Plan(SHAPES[shape], draws, record_probs=True)
    batch = DecodingLoop(target(), drafter(), rule, Fixed(plan), sampling, seed=1, on_round=log)
    batch.start([Request(prompt, index, 20) for index, prompt in enumerate(PROMPTS)])
    while not batch.done:
        batch.step()
    return seen


def lengths(rule: Rule, logged: list[Round]) -> Tensor:
    """[rounds x rows] accepted drafted tokens."""
    return torch.cat([one.judged(rule).length for one in logged])
