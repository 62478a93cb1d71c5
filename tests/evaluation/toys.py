"""A tiny target that reads text, a drafter that is spoilt on purpose, a rule that trusts it, and decodings with made-up figures."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from drafttrain.core.plan import Chain, Plan
from drafttrain.core.rng import Rng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.drafters.base import Drafter
from drafttrain.evaluation.bench import EvaluationConfig
from drafttrain.evaluation.rows import Sample
from drafttrain.evaluation.runners import Contender, Outcome
from drafttrain.evaluation.suites import Item, Suite
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.stats import PHASES, Statistics
from drafttrain.target.adapter import Target
from drafttrain.verify.base import Rule, RuleConfig
from tests.tiny import fitted, tiny_eagle3, tiny_target

SUITE = Suite(
    "toy",
    (
        Item("a", "letters", ("5:<N3",)),
        Item("b", "letters", ("ABCAB",)),
        Item("c", "signs", (":;<=>?@",)),
        Item("d", "signs", ("@?>",)),
    ),
)
CONFIG = EvaluationConfig(max_new_tokens=20, warmup=0, efficiency=False)


class Letters:
    """A tokenizer of one letter a token; a conversation is its messages, one after another."""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012
    all_special_tokens: tuple[str, ...] = ()
    all_special_ids: tuple[int, ...] = ()

    chat_template = "joined"
    eos_token_id = None

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("0") + token) for token in tokens)

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return "".join(message["content"] for message in messages)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("0") for letter in text]}


@lru_cache
def target() -> Target:
    made = tiny_target()
    made.tokenizer = Letters()
    return made


@lru_cache
def contender(label: str = "eagle3 chain-3", length: int = 3) -> Contender:
    prompts = [Letters()(item.turns[0])["input_ids"] for item in SUITE.items]
    drafter = fitted(tiny_eagle3(target(), ttt_steps=3), target(), prompts, new_tokens=20, steps=30)
    return Contender(label, SpeculativeDecoder(target(), drafter, RuntimeConfig(shape=Chain(length=length))))


class TrustingConfig(RuleConfig):
    name: Literal["trusting"] = "trusting"


class Trusting(Rule):
    """The worst of lossy rules: in a chain every drafted token stands."""

    Config = TrustingConfig
    lossless = False

    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        B, N = tree.tokens.shape
        every = torch.full((B,), N - 1)
        return Verdict(torch.arange(1, N).expand(B, -1), every, scored.top[:, N - 1])


class TrustingRuntime(RuntimeConfig):
    """Drafts as any runtime does, and verifies by `Trusting`."""

    def fitted(self, sampling: Sampling, drafter: type[Drafter] | None = None) -> tuple[Rule, Plan]:
        return Trusting(TrustingConfig()), super().fitted(sampling, drafter)[1]


def sample(
    item: str, label: str, seconds: float, tokens: int, rounds: int, task: str = "math", looping: bool = False,
    **changes: Any,
) -> Sample:
    """A decoding of `tokens` in `rounds` that took `seconds` after a prefill of one second."""
    spent = {**dict.fromkeys(PHASES, 0.0), "prefill": 1.0, "score": seconds}
    statistics = Statistics(rounds, tokens, [rounds], [tokens - rounds], spent)
    outcome = Outcome(list(range(tokens + 1)), "", statistics, seconds + 1.0, 4 * rounds, 1000)
    return Sample(item, 0, 0, task, label, outcome, looping, **changes)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())
