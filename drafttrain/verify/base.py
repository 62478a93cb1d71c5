"""What every verification rule is: how a tree is laid out for the target, and which of its draft tokens are accepted.

A rule is one file beside this one and one line in `RULES` (`verify/__init__.py`). It reads `target_probs` (p) and, where siblings were
drawn, `draft_probs` (q).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from drafttrain.core.config import Config
from drafttrain.core.errors import UserError
from drafttrain.core.plan import Shape
from drafttrain.core.rng import Rng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Layout, Topology, Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.target.adapter import Target

ANY = frozenset((draws, shape) for draws in ("deterministic", "iid", "without_replacement") for shape in ("chain", "tree"))
"""`Rule.accepts` of a rule that takes every tree."""


class RuleConfig(Config):
    """Base of the rules' configurations; `name` is the key in `RULES`."""

    name: str


class Rule(ABC):
    """Decides which draft tokens are accepted."""

    Config: ClassVar[type[RuleConfig]]
    lossless: ClassVar[bool] = True
    accepts: ClassVar[frozenset[tuple[str, str]]]
    """Pairs of (draws, topology) for which the rule keeps the target's distribution; of a lossy rule: that it can read."""
    temperatures: ClassVar[str] = "any"
    """`zero` where the rule decodes greedily only."""
    def __init__(self, config: RuleConfig) -> None:
        self.config = config

    @property
    def needs(self) -> frozenset[str]:
        """Target features the rule reads."""
        return frozenset()

    @property
    def needs_draft_probs(self) -> bool:
        """Whether it reads the drafter's distributions of `deterministic` trees too; the plan then has them recorded."""
        return False

    @property
    def leaves_next_open(self) -> bool:
        """Whether its verdicts leave `next` open and name candidates instead, under which the drafter goes on in the next round."""
        return False

    def prepare(self, target: Target) -> None:  # noqa: B027
        """Called before a batch is decoded with `target`: what the rule loads or tokenizes is checked against it."""

    def slots(self, shape: Shape) -> int:
        """Tokens that `layout` appends to a tree of this shape at most."""
        return 0

    def layout(self, tree: Tree) -> Layout:
        """What the target scores; a rule may append tokens of its own after the tree's nodes."""
        return tree.layout()

    def readings(self, nodes: int) -> tuple[slice, ...]:
        """The parts of what was scored that are the tree's nodes, each in the tree's order: of all of them logits are processed."""
        return (slice(0, nodes),)

    @abstractmethod
    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        """The nodes that are accepted, batch-first, without waiting for the host."""

    def check(self, topology: Topology, draws: Draws, sampling: Sampling) -> None:
        """A `UserError` where this rule would not keep the target's distribution on such trees."""
        name = self.config.name
        if self.temperatures == "zero" and not sampling.greedy:
            raise UserError(f"rule '{name}' decodes greedily, but temperature is {sampling.temperature}; use 'rejection' or 'recursive'")
        if (draws, topology) not in self.accepts:
            fits = ", ".join(f"{drawn} {form}" for drawn, form in sorted(self.accepts))
            raise UserError(
                f"rule '{name}' {'is not exact for' if self.lossless else 'cannot read'} {draws} draws in a {topology}; it takes {fits}. "
                f"Choose another rule, or {self._remedy(topology)}"
            )

    def _remedy(self, topology: Topology) -> str:
        """What makes such trees fit this rule."""
        drawn = sorted(draws for draws, form in self.accepts if form == topology)
        if not drawn:
            return "a chain (runtime.shape) without a lookup beside it (runtime.hybrid)"
        if "deterministic" in drawn:
            return "set runtime.treat_as to 'deterministic', which is exact for every tree"
        return f"set runtime.draws to '{drawn[0]}' (fixed shapes, no lookup beside them), with runtime.treat_as left out"
