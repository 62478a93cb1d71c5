"""All trees that a tabular drafter can draw, side by side as the rows of one batch, with the probability of each."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import permutations, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.sampling import Sampling, normalise
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored

Paths = tuple[tuple[int, ...], ...]
TOPOLOGIES: dict[str, Paths] = {
    "1-1": ((0,), (0, 0)),
    "1-1-1": ((0,), (0, 0), (0, 0, 0)),
    "2": ((0,), (1,)),
    "3": ((0,), (1,), (2,)),
    "2-1": ((0,), (1,), (0, 0), (1, 0)),
    "2-2": ((0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)),
    "3-1": ((0,), (1,), (2,), (0, 0), (1, 0), (2, 0)),
    "1-2": ((0,), (0, 0), (0, 1)),
    "2-2-1": ((0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)),
    "ragged": ((0,), (1,), (0, 0), (0, 1), (0, 0, 0)),
    "ragged wide": ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)),
    "younger deeper": ((0,), (1,), (2,), (1, 0), (1, 1), (1, 1, 0)),
}
DEEP = ("1-1", "2-1", "2-2", "3-1", "1-2", "2-2-1", "ragged", "ragged wide")


@lru_cache(1 << 16)
def probs(seed: int, context: tuple[int, ...], vocab: int) -> np.ndarray:
    return np.random.default_rng([seed, *(token + 1 for token in context)]).dirichlet(np.full(vocab, 0.7))


def all_trees(paths: Paths, draws: str, vocab: int, p_seed: int, q_seed: int) -> tuple[Tree, Scored, Tensor]:
    """The batch of every tree, what the target says at its nodes, and each row's probability [B]."""
    parents = [0] + [0 if len(path) == 1 else 1 + paths.index(path[:-1]) for path in paths]
    inner = sorted(set(parents))
    groups = [[node for node in range(1, len(parents)) if parents[node] == parent] for parent in inner]
    rows: list[tuple[list[int], float]] = [([0] * len(parents), 1.0)]
    for parent, group in zip(inner, groups, strict=True):
        grown = []
        for tokens, weight in rows:
            q = probs(q_seed, context(tokens, parents, parent), vocab)
            ids, size = range(vocab), len(group)
            for drawn in permutations(ids, size) if draws == "without_replacement" else product(ids, repeat=size):
                filled = list(tokens)
                for node, token in zip(group, drawn, strict=True):
                    filled[node] = token
                grown.append((filled, weight * chance_of(q, drawn, draws)))
        rows = grown
    tokens = torch.tensor([row for row, _ in rows])
    distributions = [[probs(q_seed, context(row, parents, parent), vocab) for parent in inner] for row, _ in rows]
    depth = max(len(path) for path in paths)
    above, probs_row = (torch.tensor(ids).expand(len(rows), -1) for ids in (parents, [inner.index(parent) for parent in parents]))
    tree = Tree(
        tokens, above, torch.ones_like(tokens, dtype=torch.bool), draws, depth, max(map(len, groups)),  # type: ignore[arg-type]
        draft_probs=torch.tensor(np.array(distributions)).float(), probs_row=probs_row,
    )  # fmt: skip
    target = [[probs(p_seed, context(row, parents, node), vocab) for node in range(len(parents))] for row, _ in rows]
    return tree, Scored(torch.tensor(np.array(target)).log().float(), Sampling(1.0)), torch.tensor([weight for _, weight in rows])


def many_trees(name: str, draws: str, seeds: range, sampling: Sampling | None = None) -> tuple[Tree, Scored, Tensor, Tensor]:
    """`all_trees` of many random pairs of target and drafter in one batch, and the seed of each row [B].

    The vocabulary is of 2 or 3 tokens, that they stay few, and of 4 where siblings would else be all of it.
    """
    few = name == "2-2-1" or (draws == "iid" and name in ("2-2", "ragged", "ragged wide"))
    vocab = 2 if few else 4 if name == "3" else 3
    made = [all_trees(TOPOLOGIES[name], draws, vocab, 2 * seed, 2 * seed + 1) for seed in seeds]
    first = made[0][0]
    parts = ("tokens", "parents", "live", "draft_probs", "probs_row")
    joined: dict[str, Any] = {part: torch.cat([getattr(tree, part) for tree, *_ in made]) for part in parts}
    scored = Scored(torch.cat([one.logits for _, one, _ in made]), sampling or Sampling(1.0))
    seed = torch.cat([torch.full((len(weight),), seed) for seed, (*_, weight) in enumerate(made)])
    return replace(first, **joined), scored, torch.cat([weight for *_, weight in made]), seed


def context(tokens: list[int], parents: list[int], node: int) -> tuple[int, ...]:
    """The drafted tokens down to a node."""
    out: tuple[int, ...] = ()
    while node:
        out, node = (tokens[node], *out), parents[node]
    return out


def chance_of(q: np.ndarray, drawn: tuple[int, ...], draws: str) -> float:
    weight, left = 1.0, 1.0
    for token in drawn:
        weight *= q[token] / left
        left -= q[token] if draws == "without_replacement" else 0.0
    return weight


def recursive_reach(tree: Tree, p: Tensor) -> Tensor:
    """[B, N] the probability that recursive verification accepts each node, child by child as its paper says."""
    B, N = tree.tokens.shape
    reach = torch.zeros(B, N, dtype=torch.float64)
    reach[:, 0] = 1.0
    row = torch.arange(B)
    for parent in range(N):
        P, left = p[:, parent].double(), reach[:, parent].clone()
        Q = None
        for child in tree.children[0, parent].tolist():
            if child < 0:
                continue
            token = tree.tokens[:, child]
            Q = tree.draft_probs_at(torch.full((B,), child)).double() if Q is None or tree.draws == "iid" else Q
            stands = (P[row, token] / Q[row, token]).clamp_max(1)
            reach[:, child] = left * stands
            left = left * (1 - stands)
            P = normalise((P - Q).clamp_min(0))
            if tree.draws == "without_replacement":
                Q = normalise(Q.scatter(1, token[:, None], 0.0))
    return reach
