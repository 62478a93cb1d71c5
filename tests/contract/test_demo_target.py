"""On the real target, in fp32: a minute of training raises held-out acceptance, replay counts what is served, and whatever drafts, greedy
text is the target's own.

The target writes the training conversations here; each family is trained once, saved, and used as it is loaded again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.plan import Chain, Dynamic, Plan, Static
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed
from drafttrain.data.collate import batches
from drafttrain.data.prompts import SelfPrompts
from drafttrain.data.regenerate import DataConfig, regenerate
from drafttrain.data.store import Store
from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.base import Drafter, DrafterConfig, DrafterState
from drafttrain.drafters.files import load_drafter
from drafttrain.drafters.grow import Frontier, grow
from drafttrain.drafters.hybrid import HybridConfig
from drafttrain.evaluation.suites import load_suite
from drafttrain.runtime.decoder import Generation, RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.replay import replay
from drafttrain.runtime.stats import Statistics
from drafttrain.target.adapter import Target
from drafttrain.target.files import TargetConfig
from drafttrain.train.loop import TrainConfig, train
from tests.families import FAMILIES, TRAINABLE, demo_drafter
from tests.tiny import packed

pytestmark = [pytest.mark.slow, pytest.mark.demo]
PROMPTS, NEW_TOKENS, MARGIN = 20, 128, 1e-4
SHAPES = [Chain(length=4), Dynamic(depth=3, beam=3, top_k=3, nodes=8)]
DATA = DataConfig(
    sources=(SelfPrompts(count=160, max_tokens=48),), temperatures=(0.0,), max_new_tokens=64, conversations=96, batch_size=48,
    capture=("aux_hidden_states", "last_hidden_state"),
)  # fmt: skip
TRAIN = TrainConfig(steps=40, batch_rows=2, row_length=512, held_out=0.2, eval_every=20, eval_length=4)


@cache
def demo() -> Target:
    return Target.load(TargetConfig(dtype="float32"))


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """20 of the built-in suite's, over all of its tasks."""
    reader, items = SpeculativeDecoder(demo()), load_suite("builtin").items
    return tuple(tuple(reader.tokenize(item.opening())) for item in items[:: len(items) // PROMPTS][:PROMPTS])  # type: ignore[arg-type]


@cache
def own_texts() -> tuple[tuple[int, ...], ...]:
    """What transformers itself decodes greedily."""
    out = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        text = demo().model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        out.append(tuple(text[0, len(prompt) :].tolist()))
    return tuple(out)


def margin(prompt: tuple[int, ...], text: tuple[int, ...]) -> float:
    """Between the target's two likeliest tokens after `text`."""
    with torch.inference_mode():
        best = demo().model(torch.tensor([[*prompt, *text]])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


class OracleState(DrafterState):
    def __init__(self, written: list[int]) -> None:
        self.written = written  # tokens of each row so far, prompt included

    def select(self, rows: Tensor) -> OracleState:
        return OracleState([self.written[row] for row in rows.tolist()])

    def join(self, other: DrafterState) -> OracleState:
        raise AssertionError("not needed here")


class Oracle(Drafter):
    """Proposes the target's own continuation, each token corrupted with probability 0.3."""

    def __init__(self, texts: list[tuple[int, ...]]) -> None:
        super().__init__(DrafterConfig(name="oracle"), demo().shape)
        self.texts = texts
        self.generator = torch.Generator().manual_seed(sum(texts[0]))  # another pattern of corruption for each text

    def loss(self, batch: Any, head: Any) -> Any:
        raise AssertionError("it knows everything")

    def teacher_forced_drafts(self, batch: Any, head: Any, length: int) -> Tensor:
        raise AssertionError("not needed here")

    def begin(self, prompts: Tensor, lengths: Tensor, features: Any, head: Any, capacity: int) -> OracleState:
        return OracleState(lengths.tolist())

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Any) -> Tree:
        assert isinstance(state, OracleState)

        def step(frontier: Frontier) -> Tensor:
            logits = torch.rand(len(roots), frontier.tokens.shape[1], demo().vocab_size, generator=self.generator)
            for row, text in enumerate(self.texts):
                place = state.written[row] + 1 + frontier.level
                if place < len(text) and torch.rand(1, generator=self.generator) > 0.3:
                    logits[row, :, text[place]] = 9.0
            return logits

        return grow(step, roots, plan, sampling, rng).tree

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, OracleState)
        state.written = [before + count for before, count in zip(state.written, committed.count.tolist(), strict=True)]


def check(generations: Sequence[Generation]) -> tuple[int, float]:
    """(texts that differ, accepted length); a difference is allowed only where the target itself is undecided."""
    differing, total = 0, Statistics()
    for got, prompt, own in zip(generations, prompts(), own_texts(), strict=True):
        total = total + got.statistics
        if tuple(got.tokens) != own:
            differing += 1
            at = next(i for i, (a, b) in enumerate(zip(got.tokens, own, strict=False)) if a != b)
            assert margin(prompt, own[:at]) < MARGIN, (prompt[-8:], at)
    return differing, total.tau


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Conversations that the target wrote greedily, with features."""
    return regenerate(demo(), DATA, tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def trained(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Drafter]:
    """A family's drafter as it is loaded after a short training."""
    folders: dict[str, Path] = {}

    def loaded(family: str) -> Drafter:
        if not DRAFTERS[family].trainable:
            return demo_drafter(family, demo())
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            train(demo_drafter(family, demo()), store, TRAIN, demo().head, folders[family], demo())
        return load_drafter(folders[family] / "drafter", demo().fingerprint)

    return loaded


def shown(part: Any) -> str:
    if isinstance(part, (Chain, Dynamic)):
        return part.shape
    return part if isinstance(part, str) else "hybrid" if part else "alone"


@pytest.mark.parametrize("family", TRAINABLE)
def test_a_short_training_raises_held_out_acceptance_and_replay_counts_what_is_served(
    store: Store, trained: Callable[[str], Drafter], family: str
) -> None:
    held = store.split("held_out", TRAIN.held_out, TRAIN.seed)
    rows = list(batches(store, held, TRAIN.batch_rows, TRAIN.row_length, ("aux_hidden_states", "last_hidden_state")))
    before, drafter = demo_drafter(family, demo()), trained(family)
    before.start_from(demo().head, store.answer_counts(demo().vocab_size))
    at_first, after = (
        replay(lambda batch, K, one=one: one.teacher_forced_drafts(batch, demo().head, K), rows, 4) for one in (before, drafter)
    )
    assert after.tau > at_first.tau

    few = [store[index] for index in held[:8]]
    asked = [one.tokens[~one.mask].tolist() for one in few]
    served = SpeculativeDecoder(demo(), drafter, RuntimeConfig(shape=Chain(length=4))).generate(asked, max_new_tokens=DATA.max_new_tokens)
    total, found = Statistics(), Statistics()
    for prompt, one in zip(asked, served, strict=True):
        total = total + one.statistics
        batch = packed(demo(), [prompt + one.tokens], [len(prompt)])
        found = found + replay(lambda rows, K: drafter.teacher_forced_drafts(rows, demo().head, K), [batch], 4)
    assert (found.rounds, found.tokens) == (total.rounds, total.tokens)
    assert (found.attempts, found.accepts) == (total.attempts, total.accepts)
    print(f"{family}: held-out tau {at_first.tau:.3f} before, {after.tau:.3f} after; {total.tau:.3f} served on {len(few)} of them")


CASES = [
    *((family, shape, None) for family in FAMILIES for shape in SHAPES),
    *((family, SHAPES[1], HybridConfig()) for family in TRAINABLE),
]


@pytest.mark.parametrize(("family", "shape", "beside"), CASES, ids=shown)
def test_greedy_text_in_fp32_is_the_targets_own(
    trained: Callable[[str], Drafter], family: str, shape: Any, beside: HybridConfig | None
) -> None:
    decoder = SpeculativeDecoder(demo(), trained(family), RuntimeConfig(shape=shape, hybrid=beside))
    differing, tau = check(decoder.generate([list(prompt) for prompt in prompts()], max_new_tokens=NEW_TOKENS, batch_size=PROMPTS))
    print(f"{family} {'hybrid ' if beside else ''}{shape.shape}: {differing} of {PROMPTS} differ, tau {tau:.2f}")


@pytest.mark.parametrize("shape", [Chain(length=8), Static(children=(2, 1, 1, 1, 1, 1, 1, 1))], ids=lambda shape: shape.shape)
def test_greedy_text_is_the_targets_own_when_much_is_accepted(shape: Any) -> None:
    def generate(prompt: tuple[int, ...], own: tuple[int, ...]) -> Generation:
        oracle = Oracle([(*prompt, *own)])
        return SpeculativeDecoder(demo(), oracle, RuntimeConfig(shape=shape)).generate(list(prompt), max_new_tokens=NEW_TOKENS)[0]

    differing, tau = check([generate(prompt, own) for prompt, own in zip(prompts(), own_texts(), strict=True)])
    print(f"oracle {shape.shape}: {differing} of {PROMPTS} differ, tau {tau:.2f}")
    assert tau - 1 >= 2  # mean accepted
