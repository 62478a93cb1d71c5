"""N-gram lookup: what followed when the newest tokens stood in the prompt or the output before (prompt lookup decoding, Saxena, 2023).

Nothing to train and nothing to run on the device: rows are lists on the host, found by a table of their n-grams. A draft that reaches
the end of what was written goes on with its own tokens, so that a loop is drafted to any length. B rows, N nodes, K draft length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from drafttrain.core.errors import UserError
from drafttrain.core.nodes import Branch, Nodes, from_nodes, of_branches
from drafttrain.core.plan import Plan
from drafttrain.core.rng import Rng, SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Features, TrainingBatch
from drafttrain.drafters.base import Drafter, DrafterConfig, DrafterState, Loss
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class NgramConfig(DrafterConfig):
    """Nothing here is learnt."""

    name: Literal["ngram"] = "ngram"
    longest: int = Field(default=3, ge=1)
    """Tokens that must match, at first; then one less, down to `shortest`."""
    shortest: int = Field(default=1, ge=1)
    """Below this many matching tokens nothing is drafted."""
    branches: int = Field(default=1, ge=1)
    """Different continuations drafted side by side, the newest first; a chain takes one."""

    @model_validator(mode="after")
    def _ordered(self) -> NgramConfig:
        if self.shortest > self.longest:
            raise ValueError(f"shortest {self.shortest} is more than longest {self.longest}: nothing would ever match; lower it")
        return self


@dataclass(frozen=True)
class Match:
    """A place where the newest tokens stood before."""

    tokens: tuple[int, ...]  # what followed
    length: int  # how many of the newest tokens matched, `FAR` at most


FAR = 32  # tokens compared backwards to tell how good a match is
PRIOR = 4.0  # what is known before anything was tried counts as much as this many trials


def expected(length: int) -> float:
    """Probability that the token after a match of `length` tokens comes again, before anything is known of the text.

    Fitted to 12,000 tokens of the demo target's own conversations: 0.23, 0.54, 0.66, 0.73, 0.84, 0.90, 0.94 for 1, 2, 3, 4, 8, 16, 32.
    """
    return 1 - 0.77 * max(length, 1) ** -0.75


@dataclass
class Reliability:
    """How often matches of each length (in powers of two) went on as before, in one row."""

    trials: list[float] = field(default_factory=lambda: [0.0] * (FAR.bit_length() + 1))
    hits: list[float] = field(default_factory=lambda: [0.0] * (FAR.bit_length() + 1))

    def count(self, length: int, hit: bool) -> None:
        """One token after a match of `length` tokens was looked at."""
        place = min(length, FAR).bit_length()
        self.trials[place] += 1
        self.hits[place] += hit

    def of(self, length: int) -> float:
        """The probability that the token after such a match comes again."""
        place = min(length, FAR).bit_length()
        return (self.hits[place] + PRIOR * expected(min(length, FAR))) / (self.trials[place] + PRIOR)

    def copy(self) -> Reliability:
        return Reliability([*self.trials], [*self.hits])


@dataclass
class Text:
    """One row: its tokens, for every n-gram the places behind it, and how good its matches were."""

    longest: int
    tokens: list[int] = field(default_factory=list)
    places: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    reliability: Reliability = field(default_factory=Reliability)
    guessed: Match | None = None  # of the last round, and
    guessed_at: int = 0  # where its first token would stand

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens; the n-grams before each of them can now be continued."""
        for token in tokens:
            here = len(self.tokens)
            for size in range(1, min(self.longest, here) + 1):
                self.places.setdefault(tuple(self.tokens[here - size :]), []).append(here)
            self.tokens.append(token)

    def copy(self) -> Text:
        places = {gram: [*places] for gram, places in self.places.items()}
        return Text(self.longest, [*self.tokens], places, self.reliability.copy(), self.guessed, self.guessed_at)

    def branches(self, root: int, shortest: int, most: int, length: int) -> list[Branch]:
        """What `matches` finds, with how likely each token is; learns from what became of the last guess."""
        self._learn(root)
        out: list[Branch] = []
        left = 1.0  # probability that no branch before this one is right
        for match in self.matches(root, shortest, most, length):
            path_prob = [left * self.reliability.of(match.length) * (0.5 if out else 1.0)]
            for further in range(1, len(match.tokens)):
                path_prob.append(path_prob[-1] * self.reliability.of(match.length + further))
            if not out:
                self.guessed, self.guessed_at = match, len(self.tokens) + 1
            left -= path_prob[0]
            out.append(Branch(match.tokens, path_prob))
        return out

    def _learn(self, root: int) -> None:
        if self.guessed is None:
            return
        truth = [*self.tokens[self.guessed_at :], root]
        for further, (token, guess) in enumerate(zip(truth, self.guessed.tokens, strict=False)):
            self.reliability.count(self.guessed.length + further, token == guess)
            if token != guess:
                break
        self.guessed = None

    def matches(self, root: int, shortest: int, most: int, length: int) -> list[Match]:
        """Continuations of the text and its root, at most `length` tokens each, beginning differently; the longest match first, then the
        newest."""
        newest = [*self.tokens[-FAR:], root]
        found: list[Match] = []
        begun: set[int] = set()
        for size in range(min(self.longest, len(newest)), shortest - 1, -1):
            for place in reversed(self.places.get(tuple(newest[-size:]), ())):
                if len(found) == most:
                    return found
                if self.tokens[place] not in begun:
                    begun.add(self.tokens[place])
                    found.append(Match(self._following(place, root, length), self._alike(place, newest)))
        return found

    def _following(self, place: int, root: int, length: int) -> tuple[int, ...]:
        """`length` tokens from `place` on; behind the last one stand the root and what is being drafted."""
        out = [*self.tokens[place : place + length]]
        if len(out) < length:
            out.append(root)
        period = len(self.tokens) + 1 - place
        while len(out) < length:
            out.append(out[len(out) - period])
        return tuple(out)

    def _alike(self, place: int, newest: list[int]) -> int:
        """How many tokens before `place` are the newest ones."""
        most = min(place, len(newest))
        return next((back for back in range(most) if self.tokens[place - 1 - back] != newest[-1 - back]), most)


@dataclass
class NgramState(DrafterState):
    """The rows' texts."""

    rows: list[Text]

    def select(self, rows: Tensor) -> NgramState:
        return NgramState([self.rows[row].copy() for row in rows.tolist()])

    def join(self, other: DrafterState) -> NgramState:
        assert isinstance(other, NgramState)
        return NgramState([*self.rows, *other.rows])


class Ngram(Drafter):
    """Drafts what followed the newest tokens where they stood before in the prompt or the output; nothing is trained."""

    Config = NgramConfig
    config: NgramConfig
    trainable = False
    gives_draft_probs = False
    draws = frozenset({"deterministic"})

    def __init__(self, config: NgramConfig, target: TargetShape) -> None:
        super().__init__(config, target)

    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        raise UserError("drafter 'ngram' has no weights: there is nothing to train; use it in `drafttrain eval` or `generate`")

    @torch.no_grad()
    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> Tensor:
        guesses = torch.full((*batch.tokens.shape, length), -1)
        for row, start, stop in _documents(batch.document.tolist()):
            tokens, text = batch.tokens[row, start:stop].tolist(), Text(self.config.longest)
            for place, (token, root) in enumerate(pairwise(tokens), start):
                text.extend([token])
                for match in text.matches(root, self.config.shortest, 1, length):
                    guesses[row, place] = torch.tensor(match.tokens)
        return guesses.to(batch.tokens.device)

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> NgramState:
        rows = []
        for tokens, length in zip(prompts.tolist(), lengths.tolist(), strict=True):
            rows.append(Text(self.config.longest))
            rows[-1].extend(tokens[:length])
        return NgramState(rows)

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        found = self.nodes(state, roots, plan, sampling, rng)
        return from_nodes(roots, found, None if sampling.greedy else (plan.shape.nodes, self._width(plan)))

    def nodes(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> list[Nodes]:
        """A lookup has no levels to pay for: it may be as deep as the plan has nodes, and `plan.stop` has nothing to save."""
        assert isinstance(state, NgramState)
        self.calls += 1
        width, length = self._width(plan), plan.shape.nodes
        return [
            of_branches(text.branches(root, self.config.shortest, width, length), length)
            for text, root in zip(state.rows, roots.tolist(), strict=True)
        ]

    def _width(self, plan: Plan) -> int:
        return 1 if plan.shape.shape == "chain" else self.config.branches

    def teacher_forced_logits(self, state: DrafterState, committed: Committed) -> Tensor:
        """What each place's own table finds; certain tokens."""
        assert isinstance(state, NgramState)
        B, T = committed.tokens.shape
        logits = torch.full((B, T, self.target.vocab_size), float("-inf"))
        for row, (text, tokens, count) in enumerate(zip(state.rows, committed.tokens.tolist(), committed.count.tolist(), strict=True)):
            for step, root in enumerate(tokens[:count]):
                for match in text.matches(root, self.config.shortest, 1, 1):
                    logits[row, step, match.tokens[0]] = 0.0
                text.extend([root])
        self.calls += 1
        return logits.to(committed.tokens.device)

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, NgramState)
        for text, tokens, count in zip(state.rows, committed.tokens.tolist(), committed.count.tolist(), strict=True):
            text.extend(tokens[:count])


def _documents(document: list[list[int]]) -> Iterator[tuple[int, int, int]]:
    """(row, start, stop) of every document of packed rows; padding is -1."""
    for row, numbers in enumerate(document):
        start = 0
        for stop in range(1, len(numbers) + 1):
            if stop == len(numbers) or numbers[stop] != numbers[start]:
                if numbers[start] >= 0:
                    yield row, start, stop
                start = stop
