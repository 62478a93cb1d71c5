"""What a round may draft: the tree's shape, how siblings are drawn, when to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from drafttrain.core.config import Config
from drafttrain.core.tree import Draws

Path = tuple[int, ...]

MOST_NODES = 1024
"""Nodes of a tree at most: a forward of more tokens costs any device many plain ones."""


class Chain(Config):
    """One token after the other."""

    shape: Literal["chain"] = "chain"
    length: int = Field(default=4, ge=1, le=MOST_NODES)
    """Drafted tokens a round (K)."""

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple((0,) * depth for depth in range(1, self.length + 1))

    @property
    def nodes(self) -> int:
        return self.length

    @property
    def depth(self) -> int:
        return self.length

    @property
    def slots(self) -> int:
        """Cache slots a round may fill at most, in the target's cache or a drafter's."""
        return self.length + 1


class Static(Config):
    """The same tree every round, as a list of paths or as children per level."""

    shape: Literal["static"] = "static"
    children: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Children of every node, level by level: [4, 2, 2] drafts 4 + 8 + 16 nodes."""
    choices: tuple[Path, ...] = ()
    """Explicit nodes: [1, 0] is the likeliest child of the second likeliest first token. Every prefix must be listed too."""

    @model_validator(mode="after")
    def _given_once(self) -> Static:
        if bool(self.children) == bool(self.choices):
            raise ValueError("give children (a number a level, as [4, 2, 2]) or choices (a list of paths), one of them")
        width, nodes = 1, len(self.choices)
        for children in self.children:
            width *= children
            nodes += width
            if nodes > MOST_NODES:
                break
        if nodes > MOST_NODES:
            raise ValueError(f"a tree of more than {MOST_NODES:,} nodes; choose a smaller one")
        return self

    @field_validator("choices")
    @classmethod
    def _closed(cls, choices: tuple[Path, ...]) -> tuple[Path, ...]:
        for path in choices:
            if any(rank < 0 for rank in path):
                raise ValueError(f"path {list(path)}: ranks count from 0")
            if len(path) == 0 or (len(path) > 1 and path[:-1] not in choices):
                raise ValueError(f"path {list(path)} has no parent in the list; add {list(path[:-1])}")
            if path[-1] > 0 and (*path[:-1], path[-1] - 1) not in choices:
                raise ValueError(f"path {list(path)} skips a sibling; add {[*path[:-1], path[-1] - 1]}")
        return tuple(sorted(set(choices), key=lambda path: (len(path), path)))

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        if self.choices:
            return self.choices
        level: list[Path] = [()]
        out: list[Path] = []
        for width in self.children:
            level = [(*path, rank) for path in level for rank in range(width)]
            out += level
        return tuple(out)

    @property
    def nodes(self) -> int:
        return len(self.paths)

    @property
    def depth(self) -> int:
        return max((len(path) for path in self.paths), default=0)

    @property
    def slots(self) -> int:
        """See `Chain.slots`."""
        return self.nodes + 1


class Dynamic(Config):
    """Best-first with rerank (EAGLE-2, Li et al., 2024, arXiv:2406.16858): each level expands the `beam` likeliest nodes into `top_k`
    children, and the `nodes` likeliest of all that was seen are kept. Deterministic draws only: tokens are dropped after being seen."""

    shape: Literal["dynamic"] = "dynamic"
    depth: int = Field(default=6, ge=1, le=MOST_NODES)
    """Levels, and drafter calls, a round."""
    beam: int = Field(default=8, ge=1, le=MOST_NODES)
    """Nodes expanded at each level after the first."""
    top_k: int = Field(default=8, ge=1, le=MOST_NODES)
    """Children considered for each expanded node."""
    nodes: int = Field(default=32, ge=1, le=MOST_NODES)
    """Drafted nodes kept for the target."""

    @property
    def slots(self) -> int:
        """See `Chain.slots`."""
        return max(self.nodes, self.depth, self.beam * (self.depth - 1)) + 1


Shape = Annotated[Chain | Static | Dynamic, Field(discriminator="shape")]


@dataclass(frozen=True)
class Plan:
    """One round's licence to draft. `stop` sees only what is known before a level is drawn."""

    shape: Chain | Static | Dynamic
    draws: Draws = "deterministic"
    """How siblings are drawn."""
    temperature: float | None = None
    """The drafter's own temperature; None takes the target's."""
    stop: Callable[[int, Tensor], Tensor] | None = None
    """(level, the drafter's logits [B, W, Vd] at the nodes that the level would hang from) -> [B] bool: rows that draw nothing from this
    level on (their nodes are dead). Asked once a level, in order, before its tokens are drawn: looking at a token and dropping it would
    change the distribution."""
    record_probs: bool = False
    """Record the drafter's distributions of `deterministic` trees too: the softmax of its logits, as nothing was drawn from them."""
    draft: bool = True
    """False: this round decodes plainly, and the drafter is not asked."""
    enough: Callable[[int, Tensor, Tensor | None], Tensor] | None = None
    """(level, the drafter's logits [B, W, Vd] at the nodes the level hangs from, and its states [B, W, D] there if the family hands them
    over) -> [B] bool: rows that draw nothing BELOW this level. Asked once a level, in order. Where no row goes on, the next level is not
    even fed and the tree ends there: this waits for the host once a level."""
    path_prob: bool = False
    """`deterministic` trees of fixed shapes say how likely the drafter finds the path down to each node (`Tree.path_prob`), as best-first
    ones always do."""
    target_candidates: Tensor | None = None
    """[B, w] tokens that the target named for the first level of a fixed shape; the drafter goes on below them (`Tree.from_target`). Where
    the shape is wider the rest is dead, where it is narrower the first ones count."""
    left: Tensor | None = None
    """[B] tokens that each row may still write. Lookups draft no node past them."""
    keep_states: bool = False
    """Trees keep the drafter's states that their distributions were read from (`Tree.draft_states`)."""
