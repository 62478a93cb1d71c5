"""Every lossless sampling rule on 100,000 seeded rows, with temperature, top-k and top-p on: chi-square of the two tokens that come out.

Enumeration walks `ScriptedRng` branches; this goes through `SeededRng`, as decoding does. Distributions that hold fewer tokens than
siblings are among the
cases: nothing is left to draw there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from drafttrain.core.plan import Chain, Plan, Shape, Static
from drafttrain.core.processing import Processing
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Layout, Tree
from drafttrain.core.types import Committed, Scored, Verdict
from drafttrain.drafters.grow import Frontier, grow
from drafttrain.runtime import generate
from drafttrain.runtime.generate import DecodingLoop
from drafttrain.runtime.policy import Fixed
from drafttrain.runtime.rows import Request
from drafttrain.target.adapter import Prefill
from drafttrain.verify import RULES
from tests.contract.test_rules import VARIANTS, made

ROWS, PART = 100_000, 20_000
LEAST_P = 1e-4
WIDE = Sampling(0.8, 20, 0.9)
CASES = [
    (name, draws, shape)
    for name, (rule, _) in VARIANTS.items()
    for draws in ("deterministic", "iid", "without_replacement")
    for shape in (Chain(length=2), Static(children=(3, 2)))
    if RULES[rule].temperatures != "zero" and (draws, "chain" if shape.shape == "chain" else "tree") in RULES[rule].accepts
    and name not in ("multidraft truncated", "multidraft optimal")  # a program a row on the host
]  # fmt: skip


def tables(vocab: int, seed: int) -> Tensor:
    """[V, V] logits of the token after each token."""
    return 2 * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))


def alike() -> tuple[Tensor, Tensor]:
    """Logits of a target and of a drafter that is right now and then."""
    return tables(50, 1), tables(50, 1) + 0.5 * tables(50, 2)


def p_value(
    rule: str, draws: Any, shape: Shape, sampling: Sampling, p: Tensor, q: Tensor, change: Callable[[Tree], Tree] | None = None
) -> float:
    """Of the pair of tokens after token 0. p, q: [V, V] logits. Rows that stop after one token draw the second from the target."""
    vocab, counts = len(p), np.zeros(len(p) ** 2)
    for part in range(ROWS // PART):
        rng = SeededRng(part, torch.arange(PART))
        tree = grow(lambda frontier: following(q, frontier), torch.zeros(PART).long(), Plan(shape, draws), sampling, rng).tree
        tree = tree if change is None else change(tree)
        verdict = made(rule)(tree, Scored(p[tree.tokens], sampling), rng)
        drafted = torch.cat([tree.tokens.gather(1, verdict.path), torch.zeros(PART, 1).long()], 1)
        tokens = drafted.scatter(1, verdict.length[:, None], verdict.next[:, None])  # type: ignore[index]
        later = rng.draw(sampling.probs(p[tokens[:, 0]])[:, None], 1, replace=True)[:, 0, 0]
        second = torch.where(verdict.length > 0, tokens[:, 1], later)
        counts += np.bincount((tokens[:, 0] * vocab + second).numpy(), minlength=vocab**2)
    distributions = sampling.probs(p).double()
    expected = ROWS * (distributions[0][:, None] * distributions).flatten().numpy()
    assert counts[expected == 0].sum() == 0  # outside of top-k and top-p
    often = expected >= 5  # the rest counts as one cell
    seen, due = (np.append(part[often], part[~often].sum()) for part in (counts, expected))
    kept = due > 0
    return float(chisquare(seen[kept], due[kept] * seen.sum() / due.sum()).pvalue)


def following(q: Tensor, frontier: Frontier) -> Tensor:
    return q[frontier.tokens]


@pytest.mark.parametrize(("rule", "draws", "shape"), CASES, ids=lambda part: getattr(part, "shape", part))
def test_the_distribution_comes_out_at_a_vocabulary_of_50(rule: str, draws: str, shape: Shape) -> None:
    assert p_value(rule, draws, shape, WIDE, *alike()) > LEAST_P


@pytest.mark.parametrize("rule", ["recursive", "recursive naive", "traversal"])
def test_the_distribution_comes_out_where_the_drafter_has_fewer_tokens_than_siblings(rule: str) -> None:
    q = torch.full((5, 5), -9.0)
    q[:, 4], q[:, 1] = 1.0, 0.5  # two tokens, the last id among them, for three siblings
    shape = Static(children=(3, 2))
    assert p_value(rule, "without_replacement", shape, Sampling(1.0, 0, 0.95), tables(5, 3), q) > LEAST_P


def test_a_wrong_rule_is_seen() -> None:
    def mistaken(tree: Tree) -> Tree:
        return replace(tree, draws="iid")

    wrong = p_value("recursive", "without_replacement", Static(children=(3, 2)), WIDE, *alike(), mistaken)
    assert wrong < LEAST_P


class Stateless:
    """The same for every row."""

    def select(self, rows: Tensor) -> Stateless:
        return self

    def set_lengths(self, lengths: list[int]) -> None:
        pass

    def set_groups(self, groups: Any) -> None:
        pass


class Markov(Stateless):
    """A target whose distribution hangs on the last token alone, and its own cache: thousands of rows at once."""

    device, dtype, eos_ids, head, forwards = torch.device("cpu"), torch.float32, (), None, 0

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits  # [V, V]

    def processing(self) -> Processing:
        return Processing()  # its logits are as they are

    def new_cache(self, batch: int, capacity: int) -> Markov:
        return self

    def prefill(self, cache: Markov, prompts: Tensor, lengths: Tensor, features: Any, chunk: int) -> Prefill:
        return Prefill(torch.eye(len(self.logits))[:1].log().expand(len(prompts), -1), {})  # the first token is 0

    def score(self, cache: Markov, layout: Layout, sampling: Sampling, features: Any) -> Scored:
        return Scored(self.logits[layout.tokens], sampling)

    def commit(self, cache: Markov, tree: Tree, scored: Scored, verdict: Verdict, alive: Tensor) -> Committed:
        return Committed(tree.tokens[:, :1], torch.ones_like(verdict.length))


class MarkovDrafter(Stateless):
    """Drafts with another table through the real growing code; it remembers nothing."""

    needs: frozenset[str] = frozenset()
    calls, weight_version = 0, 0

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def begin(self, *given: Any) -> MarkovDrafter:
        return self

    def propose(self, state: Any, roots: Tensor, plan: Plan, sampling: Sampling, rng: Any) -> Tree:
        return grow(lambda frontier: following(self.logits, frontier), roots, plan, sampling, rng).tree

    def observe(self, state: Any, committed: Committed) -> None:
        pass


class Reusing(SeededRng):
    """Judges a round with the numbers that drafted it."""

    def substream(self, number: int | Tensor) -> None:
        super().substream(number - 1 + number % 2)


@pytest.mark.parametrize(("kind", "exact"), [(SeededRng, True), (Reusing, False)], ids=["as decoding does", "numbers used twice"])
def test_the_distribution_comes_out_of_whole_rounds_and_not_where_drafting_and_judging_share_their_numbers(
    monkeypatch: pytest.MonkeyPatch, kind: type[SeededRng], exact: bool
) -> None:
    monkeypatch.setattr(generate, "SeededRng", kind)
    p, q = tables(3, 1), tables(3, 1) + tables(3, 2)
    batch = DecodingLoop(Markov(p), MarkovDrafter(q), made("rejection"), Fixed(Plan(Chain(length=1), "iid")), Sampling(1.0), seed=0)  # type: ignore[arg-type]
    batch.start([Request([1, 1], row, 4) for row in range(ROWS)])
    batch.step()
    seen = np.bincount([written[1] for written in batch.written], minlength=3)
    found = float(chisquare(seen, ROWS * p[0].double().softmax(-1).numpy()).pvalue)
    assert (found > LEAST_P) == exact
