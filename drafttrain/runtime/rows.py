"""The rows of a running batch: which request each one decodes, what it may still write, and where a verdict is cut.

B rows, D depth. Tensors live on the device; what the host knows of the rows it learns once a round, in `fetch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drafttrain.core.rng import RowRng
from drafttrain.core.tree import Tree
from drafttrain.core.types import Verdict


@dataclass
class Request:
    """One row to decode."""

    prompt: list[int]
    stream: int  # number of its random stream: equal requests with equal streams get equal texts
    max_new_tokens: int
    group: int | None = None  # samples of one prompt share a number; None: the row is alone


@dataclass
class CutVerdict:
    """A verdict after end tokens, stop strings and the length limit cut it."""

    verdict: Verdict
    tokens: Tensor  # [B, D + 1] the row's new tokens, padded
    count: Tensor  # [B] how many are real; 0 for finished rows
    alive: Tensor  # [B] bool: the row goes on


@dataclass
class Emission:
    """What one row gained in a round."""

    row: int  # number of the request
    tokens: list[int]  # none where the row was finished before
    accepted: int  # the first so many are nodes of the tree, the rest is the target's
    done: bool
    from_target: int = 0  # the first so many are nodes that the target named itself (`Tree.from_target`)

    @property
    def origins(self) -> list[int]:
        """Of each token: 1 the drafter's, 0 the target's."""
        drafted = range(self.from_target, self.accepted)
        return [int(index in drafted) for index in range(len(self.tokens))]


Stopper = Callable[[int, list[int]], int]
"""(request, its tokens so far) -> how many of them to keep, for stop strings."""


@dataclass
class Rows:
    """Requests being decoded together. `select` and `join` make new ones; `advance` moves them on."""

    numbers: list[int]  # [B] the request each row decodes
    lengths: list[int]  # [B] committed tokens, as the host knows them
    going: list[bool]  # [B] not done, as the host knows it
    arms: list[int]  # [B] the drafter of the row's latest round; 0 where there is one
    ends: Tensor  # [E] end tokens
    roots: Tensor  # [B] last committed tokens, which the target reads next
    left: Tensor  # [B] tokens still to write
    alive: Tensor  # [B] bool
    rounds: Tensor  # [B] rounds that the row has played: its random numbers hang on them, not on the batch's
    rng: RowRng

    @classmethod
    def of(cls, requests: Sequence[Request], first_number: int, ends: Tensor, rng: RowRng) -> Rows:
        """Fresh rows; the first request has the number `first_number`."""
        device, B = ends.device, len(requests)
        zeros = torch.zeros(B, dtype=torch.long, device=device)
        left = torch.tensor([request.max_new_tokens for request in requests], device=device)
        return cls(
            numbers=list(range(first_number, first_number + B)),
            lengths=[len(request.prompt) for request in requests],
            going=[True] * B,
            arms=[0] * B,
            ends=ends,
            roots=zeros,
            left=left,
            alive=zeros == 0,
            rounds=zeros,
            rng=rng,
        )

    def __len__(self) -> int:
        return len(self.numbers)

    def select(self, kept: Sequence[int]) -> Rows:
        """Only the rows at these places."""
        index = torch.tensor(kept, dtype=torch.long, device=self.roots.device)
        return Rows(
            [self.numbers[row] for row in kept],
            [self.lengths[row] for row in kept],
            [self.going[row] for row in kept],
            [self.arms[row] for row in kept],
            self.ends,
            self.roots[index],
            self.left[index],
            self.alive[index],
            self.rounds[index],
            self.rng.select(index),
        )

    def join(self, other: Rows) -> Rows:
        """These rows followed by the other's."""
        return Rows(
            self.numbers + other.numbers,
            self.lengths + other.lengths,
            self.going + other.going,
            self.arms + other.arms,
            self.ends,
            torch.cat([self.roots, other.roots]),
            torch.cat([self.left, other.left]),
            torch.cat([self.alive, other.alive]),
            torch.cat([self.rounds, other.rounds]),
            self.rng.join(other.rng),
        )

    # -- cutting ----------------------------------------------------------------------------------------------------------------------

    def opened(self, tokens: Tensor) -> CutVerdict:
        """[B] the tokens that the prefill gave, cut like a round's."""
        nothing = torch.zeros_like(tokens)
        verdict = Verdict(nothing[:, None], nothing, tokens)
        return self._limited(verdict, torch.stack([tokens, nothing], 1))

    def cut(self, tree: Tree, verdict: Verdict) -> CutVerdict:
        """The round's new tokens up to the first end token and the row's limit."""
        drafted = tree.tokens.gather(1, verdict.path)  # [B, D]
        tokens = torch.cat([drafted, torch.zeros_like(self.roots)[:, None]], 1)
        if verdict.next is not None:
            tokens = tokens.scatter(1, verdict.length[:, None], verdict.next[:, None])
        return self._limited(verdict, tokens)

    def _limited(self, verdict: Verdict, tokens: Tensor) -> CutVerdict:
        written = verdict.length + int(verdict.next is not None)
        count = torch.where(self.alive, torch.minimum(written, self.left), 0)
        order = torch.arange(tokens.shape[1], device=tokens.device)
        ends = torch.isin(tokens, self.ends) & (order < count[:, None])  # [B, D + 1]
        ended = ends.any(1)
        count = torch.where(ended, ends.long().argmax(1) + 1, count)
        alive = self.alive & ~ended & (self.left > count)
        shortened = replace(verdict, length=torch.minimum(verdict.length, count))
        return CutVerdict(shortened, tokens, count, alive)

    # -- the host's side --------------------------------------------------------------------------------------------------------------

    def fetch(self, cut: CutVerdict, from_target: bool = False) -> list[Emission]:
        """What every row gained, finished ones too: the round's one wait for the device. from_target: see `Tree.from_target`."""
        marks = torch.stack([cut.count, cut.verdict.length, cut.alive.long()], 1)
        fetched = torch.cat([cut.tokens, marks], 1).tolist()
        gained = []
        for number, (*tokens, count, accepted, alive) in zip(self.numbers, fetched, strict=True):
            gained.append(Emission(number, tokens[:count], accepted, not alive, int(from_target and accepted > 0)))
        return gained

    def stop(self, cut: CutVerdict, gained: list[Emission], written: list[list[int]], stopper: Stopper) -> CutVerdict:
        """Cuts at stop strings, which only the host can read; `gained` is cut in place. written: of every request, before this round."""
        for emission in gained:
            before = written[emission.row]
            allowed = 0
            if emission.tokens:
                allowed = max(0, stopper(emission.row, before + emission.tokens) - len(before))
            emission.done = emission.done or allowed < len(emission.tokens)
            emission.tokens = emission.tokens[:allowed]
            emission.accepted = min(emission.accepted, allowed)
        marks = [[len(emission.tokens), emission.accepted, not emission.done] for emission in gained]
        count, length, alive = torch.tensor(marks, device=cut.count.device).unbind(1)
        return replace(cut, count=count, alive=alive.bool(), verdict=replace(cut.verdict, length=length))

    def advance(self, cut: CutVerdict, gained: Sequence[Emission], stored: int) -> None:
        """Moves the rows on past a round. stored: of the committed tokens, how many beside the accepted nodes now stand in the cache: the
        root, unless the rule left the next token open."""
        last = (cut.count - 1).clamp_min(0)[:, None]
        self.roots = torch.where(cut.count > 0, cut.tokens.gather(1, last)[:, 0], self.roots)
        self.left, self.alive = self.left - cut.count, cut.alive
        self.going = [not emission.done for emission in gained]
        for row, emission in enumerate(gained):
            if emission.tokens:
                self.lengths[row] += emission.accepted + stored
