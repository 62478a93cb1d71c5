"""The proposal of one round: a tree of tokens below each row's last committed token.

B rows, N nodes with the root, C children at most, V vocabulary. Node 0 is the root (its own parent); a parent stands before its child,
and siblings stand in the order they were drawn. Everything is a tensor of static shape: nothing here waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

Draws = Literal["deterministic", "iid", "without_replacement"]
"""How siblings were drawn, hence how they must be verified. `deterministic`: chosen with certainty (top-k, argmax, lookup)."""

Topology = Literal["chain", "tree"]


@dataclass
class Layout:
    """What the target scores in one forward: the tree's nodes, and any tokens a rule appends."""

    tokens: Tensor  # [B, N]
    depth: Tensor  # [B, N] position relative to the root's
    mask: Tensor  # [B, N, N] bool: query row sees key column (the committed context is always seen)


@dataclass(frozen=True)
class Skeleton:
    """Where the nodes of every row hang, known on the host: of trees of a static shape."""

    parents: tuple[int, ...]
    probs_row: tuple[int, ...]
    """The row of `draft_probs` each node was drawn from; siblings share one."""

    def __post_init__(self) -> None:
        probs_rows = set(zip(self.parents[1:], self.probs_row[1:], strict=True))
        assert len(probs_rows) == len(set(self.parents[1:])), (
            "siblings drawn from several distributions: such a tree is of `deterministic` draws"
        )

    def first(self, nodes: int) -> Skeleton:
        """Of the first nodes alone, among them every parent of one."""
        return self if nodes == len(self.parents) else Skeleton(self.parents[:nodes], self.probs_row[:nodes])


@dataclass(frozen=True)
class SiblingGroup:
    """Nodes of one depth that have children, those with the most first. Indices are slices where they follow each other: `x[:, parents]`
    is a view then."""

    parents: Tensor | slice  # [W]
    probs_rows: Tensor | slice  # [W] the rows of `draft_probs` their children were drawn from
    children: tuple[Tensor | slice, ...]  # rank by rank: [n] the children of that rank of the first n parents
    table: Tensor  # [W, ranks] the same, 0 where a parent has fewer


@dataclass
class Tree:
    """What a drafter proposes for each row of a batch. `live` marks real nodes: padding is never attended to, never accepted."""

    tokens: Tensor  # [B, N] int64
    parents: Tensor  # [B, N] int64, parents[:, 0] = 0
    live: Tensor  # [B, N] bool
    draws: Draws
    max_depth: int  # static bound on a node's depth
    max_children: int  # static bound on a node's children
    proposer: Tensor | None = None  # [B, N] int8: which proposer (hybrids); None where there is one
    draft_probs: Tensor | None = None  # [B, R, V] fp32: what tokens were drawn from; in a `deterministic` tree (if recorded) chosen by
    probs_row: Tensor | None = None  # [B, N] int64: the row of `draft_probs` a node was DRAWN from; the root's is unused
    path_prob: Tensor | None = None  # [B, N] fp32: the proposer's guess of how likely the path down to a node is; None where it has none
    draft_states: Tensor | None = None  # [B, R, D] what the drafter read those distributions from, where `Plan.keep_states` asks for it
    skeleton: Skeleton | None = None  # of a whole static shape, even where the tree ended early; without it `sibling_groups` waits
    from_target: bool = False  # the first level is not the drafter's: the target named these tokens itself (`Plan.target_candidates`)

    @property
    def topology(self) -> Topology:
        return "chain" if self.max_children <= 1 else "tree"

    @cached_property
    def depth(self) -> Tensor:
        """[B, N]; the root's is 0."""
        return self.ancestors.sum(-1) - 1

    @cached_property
    def ancestors(self) -> Tensor:
        """[B, N, N] bool: [b, i, j] where j is i itself or stands above it."""
        B, N = self.tokens.shape
        if self.skeleton is not None:  # built once for the whole shape, and sliced
            return skeleton_mask(self.skeleton, self.tokens.device)[:N, :N].expand(B, -1, -1)
        seen = torch.eye(N, dtype=torch.bool, device=self.tokens.device).repeat(B, 1, 1)
        for _ in range(self.max_depth):
            seen = seen | seen.gather(1, self.parents[:, :, None].expand_as(seen))
        return seen

    @cached_property
    def children(self) -> Tensor:
        """[B, N, C] node ids in drawn order, -1 where there are fewer."""
        B, N = self.tokens.shape
        nodes = torch.arange(N, device=self.tokens.device)
        real = self.live & (nodes > 0)
        elder = (self.parents[:, :, None] == self.parents[:, None, :]) & real[:, None, :] & (nodes[:, None] > nodes)
        rank = torch.where(real, elder.sum(-1), -1)  # dead nodes go to a column that is cut off
        table = torch.full((B, N, max(self.max_children, 1) + 1), -1, device=self.tokens.device)  # a lone root's children: one column of -1
        row = torch.arange(B, device=self.tokens.device)[:, None]
        table[row, torch.where(real, self.parents, 0), rank] = nodes.expand(B, N)
        return table[..., :-1]

    @cached_property
    def sibling_groups(self) -> tuple[SiblingGroup, ...]:
        """The inner nodes of a tree of drawn tokens, depth by depth. Raises `ValueError` where rows differ in shape."""
        skeleton = _read_skeleton(self) if self.skeleton is None else self.skeleton.first(self.tokens.shape[1])
        return _sibling_groups(skeleton, self.tokens.device)

    def layout(self) -> Layout:
        """The tree as the target reads it."""
        return Layout(self.tokens, self.depth, self.ancestors)

    def path_to(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """[B] node -> ([B, max_depth] the nodes below the root down to it, padded with 0; [B] how many)."""
        steps = [node]
        for _ in range(self.max_depth - 1):
            steps.append(self.parents.gather(1, steps[-1][:, None])[:, 0])
        upward = torch.stack(steps, 1)  # [B, D] from the node up; stays at the root once there
        length = self.depth.gather(1, node[:, None])[:, 0]
        order = length[:, None] - 1 - torch.arange(len(steps), device=node.device)
        path = upward.gather(1, order.clamp_min(0))
        return torch.where(order >= 0, path, 0), length

    def first_born(self) -> tuple[Tensor, Tensor]:
        """The chain of first children below the root: its nodes [B, K + 1], staying where it ends, and which of them are real."""
        row = torch.arange(len(self.tokens), device=self.tokens.device)
        node, live = torch.zeros_like(row), torch.ones_like(row, dtype=torch.bool)
        path, real = [node], [live]
        for _ in range(self.max_depth):
            child = self.children[row, node, 0]
            live = live & (child >= 0)
            node = torch.where(live, child, node)
            path.append(node)
            real.append(live)
        return torch.stack(path, 1), torch.stack(real, 1)

    def select(self, rows: Tensor) -> Tree:
        """Only these rows, in this order ([R] int64)."""
        parts: dict[str, Any] = {name: part[rows] for name, part in vars(self).items() if isinstance(part, Tensor) and name in FIELDS}
        return replace(self, **parts)

    def draft_probs_at(self, node: Tensor) -> Tensor:
        """[B] node -> [B, V] the distribution it was drawn from."""
        assert self.draft_probs is not None and self.probs_row is not None, f"a {self.draws} tree recorded no distributions"
        row = self.probs_row.gather(1, node[:, None])
        return self.draft_probs[torch.arange(len(node), device=node.device), row[:, 0]]


FIELDS = frozenset(field.name for field in fields(Tree))
"""What a tree is given, apart from what it works out of it once."""


@lru_cache(maxsize=64)
def skeleton_mask(skeleton: Skeleton, device: torch.device) -> Tensor:
    """[N, N] bool: [i, j] where j is i itself or stands above it. Parents stand before children: the mask of the first n nodes is
    `[:n, :n]`."""
    rows: list[list[bool]] = []
    for node, parent in enumerate(skeleton.parents):
        above = rows[parent] if node else [False] * len(skeleton.parents)
        rows.append([*above[:node], True, *above[node + 1 :]])
    return torch.tensor(rows, device=device)


@lru_cache(maxsize=64)
def _sibling_groups(skeleton: Skeleton, device: torch.device) -> tuple[SiblingGroup, ...]:
    children: dict[int, list[int]] = {}
    depth = [0]
    for node, parent in enumerate(skeleton.parents[1:], 1):
        children.setdefault(parent, []).append(node)
        depth.append(depth[parent] + 1)

    def index(nodes: list[int]) -> Tensor | slice:
        if nodes == list(range(nodes[0], nodes[0] + len(nodes))):
            return slice(nodes[0], nodes[0] + len(nodes))
        return torch.tensor(nodes, device=device)

    sibling_groups = []
    for level in range(max(depth)):
        inner = sorted((node for node in children if depth[node] == level), key=lambda node: -len(children[node]))
        ranks = [[children[node][rank] for node in inner if rank < len(children[node])] for rank in range(len(children[inner[0]]))]
        probs_rows = [skeleton.probs_row[children[node][0]] for node in inner]
        table = [[children[node][rank] if rank < len(children[node]) else 0 for rank in range(len(ranks))] for node in inner]
        sibling_groups.append(SiblingGroup(index(inner), index(probs_rows), tuple(map(index, ranks)), torch.tensor(table, device=device)))
    return tuple(sibling_groups)


def _read_skeleton(tree: Tree) -> Skeleton:
    """From the live nodes of all rows; where a node lives nowhere, it hangs from the root."""
    assert tree.probs_row is not None, f"a {tree.draws} tree recorded no distributions"
    first = tree.live.long().argmax(0)  # [N] a row in which each node lives, if any does
    node = torch.arange(tree.tokens.shape[1], device=tree.tokens.device)
    parents, probs_row = (torch.where(tree.live.any(0), part[first, node], 0) for part in (tree.parents, tree.probs_row))
    if bool((tree.live & ((tree.parents != parents) | (tree.probs_row != probs_row)))[:, 1:].any()):
        raise ValueError("rows of one batch hang their drawn nodes in different ways; verify them one by one")
    return Skeleton(tuple(parents.tolist()), tuple(probs_row.tolist()))


def root_only(roots: Tensor, target_candidates: Tensor | None = None) -> Tree:
    """The tree of plain decoding: [B] -> a tree of one node, max_depth 0. candidates: [B, w], where the token after the root was left open:
    then the first of them stands below it."""
    tokens = roots[:, None] if target_candidates is None else torch.stack([roots, target_candidates[:, 0]], 1)
    below = tokens.shape[1] - 1
    zeros = torch.zeros_like(tokens)
    return Tree(tokens, zeros, zeros == 0, "deterministic", max_depth=below, max_children=below, from_target=target_candidates is not None)
