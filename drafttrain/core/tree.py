"""The proposal of one round: a tree of tokens below each row's last committed token.

B rows, N nodes with the root, C children at most, V vocabulary. Node 0 is the root (its own parent); a parent stands before its child,
and siblings stand in the order they were drawn. Everything is a tensor of static shape: nothing here waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Draws = Literal["point", "iid", "without_replacement"]
"""How siblings were drawn, hence how they must be verified. `point`: chosen with certainty (top-k, argmax, lookup)."""


@dataclass
class Layout:
    """What the target scores in one forward: the tree's nodes, and any tokens a rule appends."""

    tokens: Tensor  # [B, N]
    depth: Tensor  # [B, N] position relative to the root's
    mask: Tensor  # [B, N, N] bool: query row sees key column (the committed context is always seen)


@dataclass
class Tree:
    """See the module. `live` marks real nodes: padding is never attended to, never accepted."""

    tokens: Tensor  # [B, N] int64
    parents: Tensor  # [B, N] int64, parents[:, 0] = 0
    live: Tensor  # [B, N] bool
    draws: Draws
    max_depth: int  # static bound on a node's depth
    max_children: int  # static bound on a node's children
    origin: Tensor | None = None  # [B, N] int8: which proposer (hybrids); None where there is one
    law_rows: Tensor | None = None  # [B, R, V] fp32: the laws tokens were drawn from
    law_of: Tensor | None = None  # [B, N] int64: the row of `law_rows` a node was DRAWN from; the root's is unused
    law_states: Tensor | None = None  # [B, R, D] what the drafter read those laws from, where `Plan.keep_states` asks for it

    @property
    def topology(self) -> Literal["chain", "tree"]:
        return "chain" if self.max_children <= 1 else "tree"

    @cached_property
    def depth(self) -> Tensor:
        """[B, N]; the root's is 0."""
        return self.ancestors.sum(-1) - 1

    @cached_property
    def ancestors(self) -> Tensor:
        """[B, N, N] bool: [b, i, j] where j is i itself or stands above it."""
        N = self.tokens.shape[1]
        seen = torch.eye(N, dtype=torch.bool, device=self.tokens.device).repeat(len(self.tokens), 1, 1)
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
        rank = torch.where(real, elder.sum(-1), self.max_children)  # dead nodes go to a column that is cut off
        table = torch.full((B, N, self.max_children + 1), -1, device=self.tokens.device)
        row = torch.arange(B, device=self.tokens.device)[:, None]
        table[row, torch.where(real, self.parents, 0), rank] = nodes.expand(B, N)
        return table[..., : self.max_children]

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

    def law(self, node: Tensor) -> Tensor:
        """[B] node -> [B, V] the law it was drawn from."""
        assert self.law_rows is not None and self.law_of is not None, f"a {self.draws} tree recorded no laws"
        row = self.law_of.gather(1, node[:, None])
        return self.law_rows[torch.arange(len(node), device=node.device), row[:, 0]]


FIELDS = frozenset(field.name for field in fields(Tree))
"""What a tree is given, apart from what it works out of it once."""


def root_only(roots: Tensor) -> Tree:
    """The tree of plain decoding: [B] -> a tree of one node, max_depth 0."""
    zeros = torch.zeros_like(roots)[:, None]
    return Tree(roots[:, None], zeros, zeros == 0, "point", max_depth=0, max_children=0)
