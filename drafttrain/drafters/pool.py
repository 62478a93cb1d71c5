"""Several drafters of one target, among which a router chooses (`runtime/router.py`).

What stands here is what they can do together. Their states, one a drafter and row, are held by `runtime/pool.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Plan
from drafttrain.core.rng import Rng, SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Features, TrainingBatch
from drafttrain.drafters.base import Drafter, DrafterConfig, DrafterState, Loss
from drafttrain.target.head import TargetHead


class PoolConfig(DrafterConfig):
    """What result rows call it: the families' names, joined by `|`."""


class DrafterPool(Drafter):
    """Drafters that draft for the same rows. It can do what all of them can: draws, depth, draft distributions."""

    drafters: nn.ModuleList

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        """Raises `UserError` for drafters of different targets."""
        super().__init__(PoolConfig(name="|".join(drafter.config.name for drafter in drafters)), drafters[0].target)
        for drafter in drafters:
            if drafter.target.fingerprint != self.target.fingerprint:
                raise UserError(
                    f"runtime.drafters: '{drafter.files or drafter.config.name}' was made for target {drafter.target.fingerprint}, the "
                    f"first drafter for {self.target.fingerprint}; all drafters of a pool draft for one target and its tokenizer"
                )
        self.drafters = nn.ModuleList(drafters)
        self.needs = frozenset().union(*(drafter.needs for drafter in drafters))
        self.gives_draft_probs = all(drafter.gives_draft_probs for drafter in drafters)
        self.draws = frozenset.intersection(*(drafter.draws for drafter in drafters))  # type: ignore[misc]  # here by its members, not its class

    @property
    def members(self) -> list[Drafter]:
        """The drafters, in the router's order."""
        return [drafter for drafter in self.drafters if isinstance(drafter, Drafter)]

    @property
    def labels(self) -> tuple[str, ...]:
        """What statistics call them: the family, numbered where one stands twice."""
        names = [drafter.config.name for drafter in self.members]
        return tuple(name if names.count(name) == 1 else f"{name}-{place + 1}" for place, name in enumerate(names))

    @property
    def calls(self) -> int:
        """Of all of them."""
        return sum(drafter.calls for drafter in self.members)

    @calls.setter
    def calls(self, value: int) -> None:
        """They count for themselves."""

    @property
    def watcher(self) -> Callable[[Callable[[], object]], None] | None:
        return self.members[0].watcher

    @watcher.setter
    def watcher(self, watcher: Callable[[Callable[[], object]], None] | None) -> None:
        for drafter in self.members:
            drafter.watcher = watcher

    @property
    def max_depth(self) -> int | None:
        depths = [drafter.max_depth for drafter in self.members if drafter.max_depth is not None]
        return min(depths, default=None)

    def check_layers(self, aux_layers: Sequence[int]) -> None:
        for drafter in self.members:
            drafter.check_layers(aux_layers)

    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        raise self._alone()

    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> Tensor:
        raise self._alone()

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> DrafterState:
        raise self._alone()

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        raise self._alone()

    def observe(self, state: DrafterState, committed: Committed) -> None:
        raise self._alone()

    def _alone(self) -> UserError:
        return UserError(f"the drafters '{self.config.name}' are a pool, of which a router chooses while decoding; give one of them here")
