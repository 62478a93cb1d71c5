"""Trees described on the host, row by row, for who finds or merges them there (lookups, hybrids). B rows, N nodes with the root."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.tree import Tree


@dataclass(frozen=True)
class Branch:
    """Tokens one below the other, and how likely the path down to each is thought to be."""

    tokens: Sequence[int]
    path_prob: Sequence[float]


@dataclass
class Nodes:
    """One row's nodes below the root on the host: node i + 1 has tokens[i] and hangs from parents[i]."""

    tokens: list[int]
    parents: list[int]
    path_prob: list[float]
    proposer: list[int]

    def add(self, token: int, parent: int, path_prob: float, proposer: int = 0) -> int:
        """One more node; its number."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.path_prob.append(path_prob)
        self.proposer.append(proposer)
        return len(self.tokens)

    @property
    def depth(self) -> int:
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return max(depths)

    @property
    def children(self) -> int:
        """The most that one node has."""
        return max(Counter(self.parents).values(), default=0)

    def likeliest(self) -> list[int]:
        """Indices of the nodes by their chance, the best first; a parent, whose chance is never less, before its child."""
        return sorted(range(len(self.tokens)), key=lambda place: -self.path_prob[place])

    def only(self, places: Sequence[int]) -> Nodes:
        """The nodes of these indices, among them every parent of one."""
        kept = sorted(places)
        number = {-1: 0} | {place: node for node, place in enumerate(kept, 1)}
        parents = [number[self.parents[place] - 1] for place in kept]
        return Nodes([self.tokens[p] for p in kept], parents, [self.path_prob[p] for p in kept], [self.proposer[p] for p in kept])


def from_nodes(roots: Tensor, rows: Sequence[Nodes], static: tuple[int, int] | None = None) -> Tree:
    """Point tree of rows described on the host, under `roots` [B].

    static: the most nodes (hence levels) and the most children that a row may have, for trees of one size where a row's later draws
    must not depend on what other rows have; by default the most that a row has.
    """
    N = 1 + (static[0] if static else max(len(row.tokens) for row in rows))

    def padded(part: str, root: float, dtype: torch.dtype) -> Tensor:
        lists: list[list[float]] = [[root, *vars(row)[part], *[0] * (N - 1 - len(row.tokens))] for row in rows]
        return torch.tensor(lists, dtype=dtype, device=roots.device)

    tokens, live = padded("tokens", 0, torch.int64), [[node <= len(row.tokens) for node in range(N)] for row in rows]
    tokens[:, 0] = roots
    depth, children = static or (max(row.depth for row in rows), max(row.children for row in rows))
    return Tree(
        tokens, padded("parents", 0, torch.int64), torch.tensor(live, device=roots.device), "deterministic", depth, children,
        proposer=padded("proposer", 0, torch.int8), path_prob=padded("path_prob", 1.0, torch.float32),
    )  # fmt: skip


def to_nodes(tree: Tree) -> list[Nodes]:
    """A tree on the host (which waits for the device), dead nodes left out: they stand last, or have dead descendants only."""
    path_prob = torch.ones_like(tree.tokens, dtype=torch.float32) if tree.path_prob is None else tree.path_prob
    out = []
    for tokens, parents, live, chances in zip(
        tree.tokens.tolist(), tree.parents.tolist(), tree.live.tolist(), path_prob.tolist(), strict=True
    ):
        nodes, number = Nodes([], [], [], []), {0: 0}
        for node in range(1, len(tokens)):
            if live[node] and parents[node] in number:
                number[node] = nodes.add(tokens[node], number[parents[node]], chances[node])
        out.append(nodes)
    return out


def of_branches(branches: Sequence[Branch], most: int) -> Nodes:
    """Branches found on the host as nodes, at most `most` of them, the likeliest; where two share a node, the likelier guess counts."""
    out = Nodes([], [], [], [])
    known: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    for branch in branches:
        node = 0
        for token, path_prob in zip(branch.tokens, branch.path_prob, strict=True):
            if (node, token) not in known:
                known[node, token] = out.add(token, node, path_prob)
            node = known[node, token]
            out.path_prob[node - 1] = max(out.path_prob[node - 1], path_prob)
    return out.only(out.likeliest()[:most])
