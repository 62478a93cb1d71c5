"""What trains small heads on examples that fit into memory: the judge's and the decision model's.

`train/loop.py` trains on packed texts whose features come from a store, with the head borrowed from the target, across processes. A head
here learns from single tokens, each with a label, in seconds: nothing of that loop would be left but its optimizer step. M examples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def apart(group: Tensor, share: float, generator: torch.Generator, at_least: int = 0) -> Tensor:
    """[M] bool: the examples to hold out, all those of a share of the groups ([M], such as prompts), at least so many groups."""
    known = group.unique()
    order = torch.randperm(len(known), generator=generator)
    return torch.isin(group, known[order[: max(at_least, round(share * len(known)))]])


def descend(
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor], Tensor],
    count: int,
    epochs: int,
    batch: int,
    generator: torch.Generator,
    held: Callable[[], float] | None = None,
) -> float | None:
    """Trains on `count` examples in shuffled batches.

    loss: indices of examples [b] -> their mean loss. held: the loss on examples held out; the epoch in which it was lowest leaves its
    weights in the head, and that loss is returned. Without it the last epoch's weights stay. The head is in training mode for steps alone.
    """
    best, kept = float("inf"), _copy(head)
    for _ in range(epochs):
        head.train()
        for chosen in torch.randperm(count, generator=generator).split(batch):
            optimizer.zero_grad()
            loss(chosen).backward()
            optimizer.step()
        head.eval()
        if held is not None:
            with torch.no_grad():
                here = held()
            if here < best:
                best, kept = here, _copy(head)
    if held is None:
        return None
    head.load_state_dict(kept)
    return best


def _copy(head: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


def auroc(score: np.ndarray, label: np.ndarray) -> float:
    """P(a positive scores above a negative), ties counting half; a label in (0, 1) is that much of a positive. [M] each; 0.5 where there
    are only positives, or only negatives."""
    order = np.argsort(score, kind="stable")
    _, start = np.unique(score[order], return_index=True)
    positive = np.add.reduceat(label[order].astype(np.float64), start)
    negative = np.add.reduceat(1.0 - label[order].astype(np.float64), start)
    below = np.cumsum(negative) - negative
    total = positive.sum() * negative.sum()
    return float((positive * (below + negative / 2)).sum() / total) if total > 0 else 0.5
