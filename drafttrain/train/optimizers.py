"""Optimizers of drafters: AdamW, or Muon for matrices beside it; and a moving average of the weights.

Muon (Jordan et al., 2024) moves a matrix by its orthogonalised momentum. Tables over a vocabulary and vectors stay with AdamW. Updates are
scaled to AdamW's size (Liu et al., 2025, arXiv:2502.16982), so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.drafters.base import Drafter


def new_optimizer(
    drafter: Drafter, name: str, lr: float, betas: tuple[float, float], weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """`adamw`, or `muon` for the drafter's matrices with AdamW for the rest; weight decay is of matrices only."""
    trained = [weight for weight in drafter.parameters() if weight.requires_grad]
    hidden = [weight for weight in trained if name == "muon" and is_hidden_matrix(weight, drafter)]
    chosen = {id(weight) for weight in hidden}
    rest = [weight for weight in trained if id(weight) not in chosen]
    groups = [
        {"params": [weight for weight in rest if weight.dim() > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in rest if weight.dim() <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, fused=True)
    if not hidden:
        return adamw
    muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
    return Together([muon, adamw])


def is_hidden_matrix(weight: Tensor, drafter: Drafter) -> bool:
    """Whether a parameter turns states into states: no vector, and no table over a vocabulary."""
    vocabularies = {drafter.target.vocab_size, *(() if drafter.draft_ids is None else (len(drafter.draft_ids),))}
    return weight.dim() == 2 and min(weight.shape) > 1 and not vocabularies & set(weight.shape)


class Together(torch.optim.Optimizer):
    """Several optimizers that step as one; their groups are their own."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.optimizers = optimizers
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "no optimizer here evaluates the loss again"
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._share()


class WeightAverage:
    """An exponential moving average of weights, which is what is evaluated and kept."""

    def __init__(self, weights: Iterable[nn.Parameter], decay: float) -> None:
        self.weights, self.decay, self.steps = list(weights), decay, 0
        self.average = [weight.detach().clone() for weight in self.weights]

    def update(self) -> None:
        """After a step. Early steps count more, so that the start is soon forgotten."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [weight.detach() for weight in self.weights], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The weights are their average inside."""
        trained = [weight.detach().clone() for weight in self.weights]
        self._set(self.average)
        try:
            yield
        finally:
            self._set(trained)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for kept, loaded in zip(self.average, state["average"], strict=True):
            kept.copy_(loaded)
