"""A target and a drafter that are tables of distributions, behind the interfaces of the real ones: every branch of the real round can be
walked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.plan import Plan
from drafttrain.core.processing import Processing
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Layout, Tree
from drafttrain.core.types import Committed, Scored, Verdict
from drafttrain.drafters.base import DrafterState
from drafttrain.drafters.grow import Frontier, grow
from drafttrain.target.adapter import Prefill, Target


def probs(seed: int, context: Sequence[int], vocab: int) -> np.ndarray:
    """A fixed random distribution for this context: [V]."""
    return np.random.default_rng([seed, *(token + 1 for token in context)]).dirichlet(np.full(vocab, 0.7))


class TableCache:
    """Each row's committed text."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts, self.fed = texts, torch.zeros(0)

    def commit(self, nodes: Tensor, kept: Tensor, moved: bool) -> None:
        for row, text in enumerate(self.texts):
            text.extend(self.fed[row, nodes[row, : kept[row]]].tolist())

    def set_lengths(self, lengths: list[int]) -> None:
        assert lengths == [len(text) for text in self.texts]

    def select(self, rows: Tensor) -> TableCache:
        return TableCache([list(self.texts[row]) for row in rows.tolist()])


class TableTarget:
    """p(context) from a table; the first token after any prompt is 0."""

    device, dtype, eos_ids, head, forwards = torch.device("cpu"), torch.float32, (), None, 0

    def __init__(self, vocab: int, seed: int = 1) -> None:
        self.vocab, self.vocab_size, self.seed = vocab, vocab, seed

    def p(self, context: Sequence[int]) -> np.ndarray:
        return probs(self.seed, context, self.vocab)

    def processing(self) -> Processing:
        return Processing()  # its logits are as they are

    def new_cache(self, batch: int, capacity: int) -> TableCache:
        return TableCache([[] for _ in range(batch)])

    def prefill(self, cache: TableCache, prompts: Tensor, lengths: Tensor, features: Any, chunk: int) -> Prefill:
        cache.texts = [prompt[:length] for prompt, length in zip(prompts.tolist(), lengths.tolist(), strict=True)]
        logits = torch.full((len(prompts), self.vocab), float("-inf"))
        logits[:, 0] = 0.0
        return Prefill(logits, {})

    def score(self, cache: TableCache, layout: Layout, sampling: Sampling, features: Any) -> Scored:
        self.forwards += 1
        cache.fed = layout.tokens
        rows = [[self._at(text, layout, row, node) for node in range(layout.tokens.shape[1])] for row, text in enumerate(cache.texts)]
        return Scored(torch.tensor(np.array(rows)).log().float(), sampling)

    def _at(self, text: list[int], layout: Layout, row: int, node: int) -> np.ndarray:
        above = layout.mask[row, node].nonzero()[:, 0]
        order = layout.depth[row, above].argsort()
        return self.p([*text, *layout.tokens[row, above[order]].tolist()])

    def commit(self, cache: Any, tree: Tree, scored: Scored, verdict: Verdict, alive: Tensor) -> Committed:
        return Target.commit(self, cache, tree, scored, verdict, alive)  # type: ignore[arg-type]


class TableState(DrafterState):
    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts

    def select(self, rows: Tensor) -> TableState:
        return TableState([self.texts[row] for row in rows.tolist()])

    def join(self, other: DrafterState) -> TableState:
        raise AssertionError("not needed here")


class TableDrafter:
    """q(context) from another table, through the real growing code."""

    needs: frozenset[str] = frozenset()
    calls, max_depth, weight_version = 0, None, 0

    def __init__(self, vocab: int, seed: int = 2) -> None:
        self.vocab, self.seed = vocab, seed

    def begin(self, prompts: Tensor, lengths: Tensor, features: Any, head: Any, capacity: int) -> TableState:
        return TableState([prompt[:length] for prompt, length in zip(prompts.tolist(), lengths.tolist(), strict=True)])

    def propose(self, state: TableState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Any) -> Tree:
        paths = [[[*text, root]] for text, root in zip(state.texts, roots.tolist(), strict=True)]

        def step(frontier: Frontier) -> Tensor:
            nonlocal paths
            if frontier.level:
                grown = zip(paths, frontier.parent.tolist(), frontier.tokens.tolist(), strict=True)
                paths = [[[*row[above], token] for above, token in zip(parents, tokens, strict=True)] for row, parents, tokens in grown]
            distributions = [[probs(self.seed, path, self.vocab) for path in row] for row in paths]
            return torch.tensor(np.array(distributions)).log().float()

        return grow(step, roots, plan, sampling, rng).tree

    def observe(self, state: TableState, committed: Committed) -> None:
        for row, count in enumerate(committed.count.tolist()):
            state.texts[row] = state.texts[row] + committed.tokens[row, :count].tolist()
