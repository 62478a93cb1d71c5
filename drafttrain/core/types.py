"""What passes between target, drafter, rule and trainer. B rows, N nodes, V vocabulary, D depth, T time.

Feature names: `last_hidden_state`, the target's hidden state after its final norm (what its output head reads), and `aux_hidden_states`,
raw residual-stream states of several layers concatenated (`AUX_LAYERS`). A feature at position t was computed after reading token t.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from drafttrain.core.sampling import Sampling, likeliest

FeatureName = Literal["last_hidden_state", "aux_hidden_states"]
Features = dict[str, Tensor]


@dataclass
class Scored:
    """The target's answer to one layout. Distributions are computed when first read: greedy rules never need them."""

    logits: Tensor  # [B, N, V]
    sampling: Sampling
    features: Features = field(default_factory=dict)  # name -> [B, N, ...]

    @cached_property
    def top(self) -> Tensor:
        """[B, N] the target's argmax at each node."""
        return likeliest(self.logits)

    @cached_property
    def target_probs(self) -> Tensor:
        """[B, N, V] fp32: the target's distribution at each node, after sampling options."""
        return self.sampling.probs(self.logits)

    def probs_at(self, nodes: Tensor | slice) -> Tensor:
        """[B, M, V] fp32: the same at some nodes alone, for rules that need few of them; nodes: [B, M], or a slice or [M] for all rows."""
        row = torch.arange(len(self.logits), device=self.logits.device)[:, None]
        index = (slice(None), nodes) if isinstance(nodes, slice) or nodes.dim() == 1 else (row, nodes)
        return self.target_probs[index] if "target_probs" in self.__dict__ else self.sampling.probs(self.logits[index])

    def at(self, nodes: Tensor) -> Scored:
        """The answer at `nodes` ([B, M]) alone; distributions that were read already are not computed again."""
        row = torch.arange(len(nodes), device=nodes.device)[:, None]
        part = Scored(self.logits[row, nodes], self.sampling, {name: value[row, nodes] for name, value in self.features.items()})
        for name in ("top", "target_probs"):
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][row, nodes]
        return part


@dataclass
class Verdict:
    """Which drafted nodes stand."""

    path: Tensor  # [B, D] accepted nodes from the root's child down, padded with 0; the root itself always stands
    length: Tensor  # [B] how many of them
    next: Tensor | None  # [B] the token after them, drawn by the rule; None where the rule leaves it open
    target_candidates: Tensor | None = None  # [B, w] where it is left open: the target's own tokens for the next tree's first level


@dataclass
class Committed:
    """Tokens that just entered the target's cache: the root, then the accepted nodes. The next root is not among them."""

    tokens: Tensor  # [B, T], padded at the end
    count: Tensor  # [B] how many are real
    features: Features = field(default_factory=dict)  # name -> [B, T, ...], the target's, at these tokens
    nodes: Tensor | None = None  # [B, T] where they stood in the tree the drafter proposed; None if it proposed none

    def only(self, names: Iterable[str]) -> Committed:
        """The same with these features alone: what one drafter reads, where rules or others read more."""
        return Committed(self.tokens, self.count, {name: self.features[name] for name in names}, self.nodes)

    def then(self, later: Committed) -> Committed:
        """These tokens followed by the later ones, row by row; where they stood in trees is forgotten."""
        features = {name: appended(value, self.count, later.features[name]) for name, value in self.features.items()}
        return Committed(appended(self.tokens, self.count, later.tokens), self.count + later.count, features)


@dataclass
class Groups:
    """Which rows are samples of the same prompt, and what all of these have written: finished ones too, whose rows have left the batch.

    A drafter that reads siblings keeps it in its state (`DrafterState.set_groups`).
    """

    group: list[int]  # [B] number of each row's group
    texts: dict[int, dict[int, list[int]]]  # group -> request -> its new tokens so far; the loop appends to them

    def select(self, rows: Tensor) -> Groups:
        """Of these rows; all texts stay readable."""
        return Groups([self.group[row] for row in rows.tolist()], self.texts)

    def join(self, other: Groups) -> Groups:
        """Of these rows and the other's; both must be of one loop."""
        assert self.texts is other.texts
        return Groups(self.group + other.group, self.texts)


def gathered(values: Tensor, places: Tensor) -> Tensor:
    """[B, N, X] at [B, M] -> [B, M, X]."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def appended(values: Tensor, count: Tensor, more: Tensor) -> Tensor:
    """[B, T, ...] of which `count` [B] are real, and [B, U, ...] -> [B, T + U, ...] with the second behind each row's real values."""
    B, U = more.shape[:2]
    out = torch.cat([values, torch.zeros_like(more)], 1)
    row = torch.arange(B, device=values.device)[:, None]
    out[row, count[:, None] + torch.arange(U, device=values.device)] = more
    return out


@dataclass
class TrainingBatch:
    """Training rows: documents packed one after another, never attending to each other."""

    tokens: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] bool: the token is part of an answer (a label, if the drafter could have guessed it: see `labels`)
    document: Tensor  # [B, T] int64: number of the document within its row, -1 for padding
    position: Tensor  # [B, T] int64: position within the document
    features: Features = field(default_factory=dict)  # name -> [B, T, ...]
    progress: float = 1.0
    """How much of the training is done, 0 to 1: losses with a curriculum read it."""
    learns: Tensor | None = None
    """[B, T] bool: the labels that are learnt, where these are not all of them (online learning: what was rejected)."""

    def to(self, device: torch.device) -> TrainingBatch:
        move = {name: value.to(device, non_blocking=True) for name, value in self.features.items()}
        tokens, mask, document, position = (
            value.to(device, non_blocking=True) for value in (self.tokens, self.mask, self.document, self.position)
        )
        learns = None if self.learns is None else self.learns.to(device, non_blocking=True)
        return TrainingBatch(tokens, mask, document, position, move, self.progress, learns)

    def ahead(self, offset: int) -> tuple[Tensor, Tensor]:
        """The tokens `offset` positions later, [B, T], and where they are labels, [B, T] bool.

        A label is an answer token of the same document whose predecessor is an answer token too: the first token of an answer comes
        from the target's prefill and is never drafted (pitfall P3).
        """
        T = self.tokens.shape[1]
        index = torch.arange(T, device=self.tokens.device) + offset
        inside = index < T
        index = index.clamp_max(T - 1)
        same = (self.document[:, index] == self.document) & (self.document >= 0)
        return self.tokens[:, index], self._drafted()[:, index] & same & inside

    def labels(self) -> Labels:
        """All labels of the batch, whichever draft step guesses them."""
        row, place = self._drafted().nonzero(as_tuple=True)
        return Labels(row, place, self.tokens[row, place], self.position[row, place])

    def _drafted(self) -> Tensor:
        """[B, T] bool: labels, by their own place."""
        drafted = torch.zeros_like(self.mask)
        drafted[:, 1:] = self.mask[:, 1:] & self.mask[:, :-1] & (self.document[:, 1:] == self.document[:, :-1])
        return drafted if self.learns is None else drafted & self.learns


@dataclass
class Labels:
    """The R tokens of a batch that drafters learn to guess (see `Batch.ahead`), row by row in the order of the text."""

    row: Tensor  # [R] of the batch
    place: Tensor  # [R] in that row
    tokens: Tensor  # [R]
    position: Tensor  # [R] within the document

    def before(self, values: Tensor, offset: int) -> Tensor:
        """[B, T, ...] -> [R, ...]: the value `offset` tokens before each label; some other one where `reaches` says there is none."""
        return values[self.row, (self.place - offset).clamp_min(0)]

    def reaches(self, offset: int) -> Tensor:
        """[R] bool: the label's document has a token `offset` places before it."""
        return self.position >= offset
