"""What turns a drafter's states into logits without a matrix of its own: the target's, some rows of it, or one of low rank.

The low-rank matrix scores every token, and the target's own matrix scores the best few again, exactly (EAGLE-4, SlimSpec, 2026,
arXiv:2605.10453). How it starts decides everything: W is the target's matrix and S the square root of the states' covariance, so that
the best rank-r matrix for these states comes from the singular vectors of W S, not of W. D hidden, V vocabulary, Vd draft vocabulary,
r rank.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from drafttrain.core.config import Config
from drafttrain.core.errors import UserError
from drafttrain.core.losses import OutputLayer, ScoringLayer, guesses
from drafttrain.core.packed import linear
from drafttrain.core.vocab import draft_index, draft_vocab
from drafttrain.drafters.base import Drafter
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class FullHead(Config):
    """The target's own matrix, frozen."""

    kind: Literal["full"] = "full"


class SubsetHead(Config):
    """Rows of the target's own matrix, frozen."""

    kind: Literal["subset"] = "subset"
    size: int = Field(ge=2)
    """Tokens that can be proposed, the most frequent of the training answers and the ends."""


class LowRankHead(Config):
    """A product of two thin matrices over the whole vocabulary, whose best tokens the target's own matrix scores again."""

    kind: Literal["low_rank"] = "low_rank"
    rank: int = Field(default=128, ge=1)
    """Numbers that a state is cut to."""
    candidates: int = Field(default=128, ge=0, le=1024)
    """The best tokens by the thin matrices that are scored exactly; 0: none."""
    by_frequency: bool = True
    """Fit frequent tokens of the training answers better than rare ones."""
    trained: bool = False
    """Train the thin matrices on; otherwise they stay as they start."""


OutputConfig = Annotated[FullHead | SubsetHead | LowRankHead, Field(discriminator="kind")]


LOW_RANK = "a low-rank output holds the whole vocabulary; leave {other} out, or the output"


class OutputHead(nn.Module):
    """States that live where the target's last ones do, [..., D] -> logits [..., Vd]."""

    vocab: Tensor  # [Vd] ascending target ids

    def __init__(self, config: FullHead | SubsetHead | LowRankHead, target: TargetShape) -> None:
        super().__init__()
        self.config, self.size, self.ends = config, target.vocab_size, list(target.eos_ids)
        self._rows: tuple[TargetHead, OutputLayer] | None = None  # the target's own layer, cut to the draft vocabulary once
        if isinstance(config, SubsetHead):
            self.register_buffer("vocab", torch.arange(min(config.size, target.vocab_size)))
        if isinstance(config, LowRankHead):
            if config.rank > target.hidden_size:
                raise UserError(f"drafter.output.rank {config.rank}: states have {target.hidden_size} numbers; give fewer, or kind: full")
            self.down = nn.Linear(target.hidden_size, config.rank, bias=False).requires_grad_(config.trained)
            self.up = nn.Linear(config.rank, target.vocab_size, bias=False).requires_grad_(config.trained)

    @property
    def draft_ids(self) -> Tensor | None:
        """[Vd] target ids of the draft vocabulary; None where it is the target's own."""
        return self.vocab if isinstance(self.config, SubsetHead) and len(self.vocab) < self.size else None

    @property
    def reads_start_states(self) -> bool:
        return isinstance(self.config, LowRankHead)

    def index(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[...] target ids -> draft ids, and which of them the draft vocabulary holds."""
        return draft_index(tokens, self.draft_ids)

    @torch.no_grad()
    def start_from(self, head: TargetHead, counts: Tensor, states: Tensor | None = None) -> None:
        """counts: [V] how often each token stands in the training answers; states: [R, D] last states of the target in such texts."""
        self._rows = None
        if isinstance(self.config, SubsetHead):
            self.vocab.copy_(draft_vocab(counts, len(self.vocab), self.ends))
        if isinstance(self.config, LowRankHead):
            down, up = low_rank(head.output.float(), self.config.rank, states, counts if self.config.by_frequency else None)
            self.down.weight.copy_(down)
            self.up.weight.copy_(up)

    def logits(self, states: Tensor, head: TargetHead) -> Tensor:
        """[..., D] -> [..., Vd]."""
        return self.layer(head).logits(states)

    def layer(self, head: TargetHead) -> ScoringLayer:
        """The same as a layer that the losses take."""
        if isinstance(self.config, LowRankHead):
            return LowRankLayer(self.down.weight, self.up.weight, head, self.config.candidates)
        if self._rows is None or self._rows[0] is not head:
            rows = slice(None) if self.draft_ids is None else self.draft_ids
            bias = None if head.bias is None else head.bias[rows]
            self._rows = head, OutputLayer(head.output[rows], bias, head.finish)
        return self._rows[1]


class OutputDrafter(Drafter):
    """A drafter whose states are read through an `OutputHead`, `self.output`."""

    output: OutputHead

    @property
    def draft_ids(self) -> Tensor | None:
        return self.output.draft_ids

    @property
    def reads_start_states(self) -> bool:
        return self.output.reads_start_states

    def start_output(self, head: TargetHead, counts: Tensor, states: Tensor) -> None:
        self.output.start_from(head, counts, states)


class LowRankLayer(NamedTuple):
    """Scores of all tokens by two thin matrices; the best few are replaced by what the target's own matrix says."""

    down: Tensor  # [r, D]
    up: Tensor  # [V, r]
    head: TargetHead
    candidates: int

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.down, self.up

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        head = self.head
        scores = linear(linear(hidden.to(self.down.dtype), self.down), self.up, head.bias)
        if self.candidates:
            best = scores.detach().topk(min(self.candidates, scores.shape[-1]), -1).indices  # [..., c]
            rows = head.output[best]  # [..., c, D]
            exact = (rows @ hidden.to(rows.dtype)[..., None])[..., 0]
            exact = exact if head.bias is None else exact + head.bias[best]
            scores = scores.scatter(-1, best, exact.to(scores.dtype))
        return head.finish(scores)

    def guesses(self, hidden: Tensor, vocab: Tensor | None, chunk: int) -> Tensor:
        """See `OutputLayer.guesses`."""
        return guesses(self, hidden, vocab, chunk)


SMOOTHING = 10.0
"""In mean frequencies, what every token is given: without it, rare tokens would not be fitted at all (EAGLE-4's figure)."""


def low_rank(weight: Tensor, rank: int, states: Tensor | None = None, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Thin matrices [r, D] and [V, r] whose product stands in for `weight` [V, D].

    states: [R, D] the product errs least on states like these, None: on any; counts: [V] tokens count by their frequency's square root.
    """
    root = torch.eye(weight.shape[1], dtype=torch.float64) if states is None else _root(states.double().cpu())
    wanted = weight.double().cpu() @ root  # [V, D]
    weighted = wanted if counts is None else wanted * _row_weights(counts.double().cpu())[:, None]
    directions = torch.linalg.eigh(weighted.T @ weighted).eigenvectors[:, -rank:]  # [D, r], what a state is to be cut to
    up = wanted @ directions  # least squares of each row by itself: its scale does not matter here
    down = directions.T @ torch.linalg.inv(root)
    return down.to(weight), up.to(weight)


def _row_weights(counts: Tensor) -> Tensor:
    """[V] counts -> [V] square roots of smoothed relative frequencies."""
    return (counts / counts.mean().clamp_min(1e-9) + SMOOTHING).sqrt()


def _root(states: Tensor) -> Tensor:
    """[R, D] -> [D, D] square root of their second moment, with a little of the identity so that it can be inverted."""
    moment = states.T @ states / max(len(states), 1)
    values, vectors = torch.linalg.eigh(moment)
    floor = 1e-6 * values.mean().clamp_min(1e-12)
    return (vectors * values.clamp_min(floor).sqrt()) @ vectors.T
