"""What families that look up share: where the newest tokens occurred before, what followed there, and a tree of it.

Contexts back off: what followed the longest match counts first, then what followed the next shorter one, and so on (as in prediction by
partial matching, Cleary and Witten, 1984). How far a context is trusted is learnt in each row from every committed token, by the length of
its match and by how many different tokens followed there. Everything happens on the host and hangs on the row's own tokens, and on those of
the rows that share its index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush, nlargest
from itertools import pairwise
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from drafttrain.core.errors import UserError
from drafttrain.core.nodes import Nodes, from_nodes
from drafttrain.core.plan import Plan
from drafttrain.core.rng import Rng, SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.suffix import Cursor, Span, SuffixArray, SuffixAutomaton
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Features, TrainingBatch
from drafttrain.drafters.base import Drafter, DrafterConfig, DrafterState, Loss
from drafttrain.drafters.datastore import load_datastore
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead

FAR = 32
"""Tokens of a match that count; longer ones are as good."""
PRIOR = 4.0
"""What is known before anything was tried counts as much as this many trials."""
CONTEXTS = 6
"""Contexts at most that a guess is made from."""
NEWEST = 0.3
"""What the newest continuation of a context weighs more, as a share of all of them."""
CANDIDATES = 32
"""Continuations of one context at most."""
ANYWHERE = 0.3
"""Probability that a token occurred before at all, where no context matches."""
STORED = 4
"""Tokens of a match in the datastore that count."""

Kind = tuple[bool, int, int]  # of a context: from the datastore, match length in powers of two, different continuations (3 is more)


def expected(length: int) -> float:
    """Probability that the token after a match of `length` tokens comes again, before anything is known of the text.

    Fitted to 12,000 tokens of the demo target's own conversations: 0.23, 0.54, 0.66, 0.73, 0.84, 0.90, 0.94 for 1, 2, 3, 4, 8, 16, 32.
    """
    return 1 - 0.77 * length**-0.75 if length else ANYWHERE


@dataclass
class Reliability:
    """How often the token that came was among a context's continuations, by kind, in one row."""

    trials: dict[Kind, float] = field(default_factory=dict)
    hits: dict[Kind, float] = field(default_factory=dict)

    def count(self, kind: Kind, hit: bool) -> None:
        self.trials[kind] = self.trials.get(kind, 0.0) + 1
        self.hits[kind] = self.hits.get(kind, 0.0) + hit

    def of(self, kind: Kind, length: int) -> float:
        prior = PRIOR * expected(min(length, FAR))
        return (self.hits.get(kind, 0.0) + prior) / (self.trials.get(kind, 0.0) + PRIOR)

    def copy(self) -> Reliability:
        return Reliability(dict(self.trials), dict(self.hits))


@dataclass(frozen=True)
class Context:
    """A suffix of the text that occurred before."""

    length: int  # tokens that match
    weights: dict[int, float]  # of what followed
    stored: bool  # in the datastore

    @property
    def kind(self) -> Kind:
        return self.stored, min(self.length, FAR).bit_length(), min(len(self.weights), 3)


@dataclass(frozen=True)
class Position:
    """Where a text, or a draft below it, stands in the index and in the datastore."""

    cursor: Cursor
    spans: tuple[Span, ...] = ()  # of its suffixes, the longest first


@dataclass
class Text:
    """One row. Rows that share an index read what the others have written."""

    index: SuffixAutomaton
    shortest: int = 0
    datastore: SuffixArray | None = None
    end: int = 0  # state of the whole text
    spans: tuple[Span, ...] = ()
    reliability: Reliability = field(default_factory=Reliability)
    known: dict[Cursor, Context] = field(default_factory=dict)  # contexts of this draft
    known_at: int = -1  # the index's time when they were counted

    @property
    def position(self) -> Position:
        return Position(Cursor(self.end, self.index.length[self.end]), self.spans)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens, and learns from each what contexts are worth."""
        for token in tokens:
            self._learn(token)
            self.end = self.index.extend(self.end, token)
            self.spans = self._narrowed(self.spans, token)

    def copy(self, index: SuffixAutomaton) -> Text:
        """index: a copy of its own."""
        return Text(index, self.shortest, self.datastore, self.end, self.spans, self.reliability.copy())

    def after(self, position: Position, token: int) -> Position:
        return Position(self.index.step(position.cursor, token), self._narrowed(position.spans, token))

    def likely(self, position: Position, least: float = 0.0) -> dict[int, float]:
        """The next tokens and how likely they are thought to be, those below `least` left out."""
        left = 1.0
        out: dict[int, float] = {}
        for context in self.contexts(position):
            fresh = {token: weight for token, weight in context.weights.items() if token not in out} if out else context.weights
            if not fresh:
                continue
            trust = left * self.reliability.of(context.kind, context.length)
            share = trust / sum(fresh.values())
            for token, weight in fresh.items():
                if share * weight < least:  # the heaviest come first
                    break
                out[token] = share * weight
            left -= trust
            if left < least:
                break
        return out

    def contexts(self, position: Position) -> list[Context]:
        """Where the position's suffixes occurred before, the longest first, the row's own text before the datastore."""
        found = [*self._own(position.cursor), *self._stored(position.spans)]
        return sorted(found, key=lambda context: -context.length)[:CONTEXTS]

    def _own(self, cursor: Cursor) -> Iterator[Context]:
        for place, suffix in enumerate(self.index.contexts(cursor)):
            if place == CONTEXTS or suffix.length < self.shortest:
                return
            yield self._remembered(suffix)

    def _remembered(self, suffix: Cursor) -> Context:
        """A context, counted once for all nodes of a draft: the shortest ones come again at each."""
        if self.known_at != self.index.time:
            self.known, self.known_at = {}, self.index.time
        if suffix not in self.known:
            self.known[suffix] = self._counted(suffix)
        return self.known[suffix]

    def _counted(self, suffix: Cursor) -> Context:
        index, following = self.index, self.index.following[suffix.state]
        weights = {token: float(index.count[state]) for token, state in following.items()}
        if suffix.length:
            newest = max(following, key=lambda token: index.newest[following[token]])
            weights[newest] += NEWEST * sum(weights.values())
        return Context(suffix.length, likeliest(weights), False)

    def _stored(self, spans: Sequence[Span]) -> Iterator[Context]:
        if self.datastore is None:
            return
        size = 0
        for span in spans:
            if len(span) == size or span.length < self.shortest:  # the same places as the longer one's
                continue
            size = len(span)
            weights = self.datastore.following(span)
            if weights:
                yield Context(span.length, likeliest(weights), True)

    def _narrowed(self, spans: Sequence[Span], token: int) -> tuple[Span, ...]:
        return () if self.datastore is None else self.datastore.narrowed(spans, token, STORED)

    def _learn(self, token: int) -> None:
        seen: set[int] = set()
        for context in self.contexts(self.position):
            if not context.weights.keys() <= seen:
                self.reliability.count(context.kind, token in context.weights)
            if token in context.weights:
                return
            seen |= context.weights.keys()


def likeliest(weights: dict[int, float]) -> dict[int, float]:
    """The `CANDIDATES` tokens of most weight; of equal ones those that came first."""
    return dict(nlargest(CANDIDATES, weights.items(), key=lambda item: item[1]))


def lookup_tree(text: Text, root: int, nodes: int, width: int, depth: int, ends: frozenset[int], confidence: float = 1e-3) -> Nodes:
    """The likeliest continuations of a text and its root as one tree, grown best-first.

    width: children of a node at most; depth: levels at most; confidence: the least probability of a node. Nothing is drafted below an end
    token.
    """
    out = Nodes([], [], [], [])
    places = {0: (text.after(text.position, root), 0)}  # of each node: where it stands, and its depth
    heap: list[tuple[float, int, int, int]] = []  # (-path probability, order, parent, token)
    order = 0

    def consider(node: int, path_prob: float) -> None:
        nonlocal order
        position, level = places[node]
        if level >= depth:
            return
        likely = text.likely(position, confidence / path_prob)
        for token in nlargest(width, likely, key=likely.__getitem__):
            order += 1
            heappush(heap, (-path_prob * likely[token], order, node, token))

    consider(0, 1.0)
    while heap and len(out.tokens) < nodes:
        lost, _, parent, token = heappop(heap)
        node = out.add(token, parent, -lost)
        if token not in ends and len(out.tokens) < nodes:
            position, level = places[parent]
            places[node] = text.after(position, token), level + 1
            consider(node, -lost)
    return out


class LookupConfig(DrafterConfig):
    """Nothing here is learnt."""

    shortest: int = Field(default=0, ge=0)
    """Below this many matching tokens nothing is drafted. 0 drafts the text's commonest tokens where nothing matches."""
    branches: int = Field(default=32, ge=1)
    """Children of a node at most; a chain takes one."""
    confidence: float = Field(default=1e-3, gt=0, lt=1)
    """Nodes that are thought to be reached less often than this are not drafted."""
    datastore: str | None = Field(default=None, min_length=1)
    """File of past outputs of this target (`drafttrain datastore`), looked up beside the row's own text."""


@dataclass
class LookupState(DrafterState):
    """The rows' texts."""

    rows: list[Text]

    def select(self, rows: Tensor) -> LookupState:
        indices: dict[int, SuffixAutomaton] = {}  # rows that share one go on sharing its copy
        out = []
        for text in (self.rows[row] for row in rows.tolist()):
            if id(text.index) not in indices:
                indices[id(text.index)] = text.index.copy()
            out.append(text.copy(indices[id(text.index)]))
        return replace(self, rows=out)

    def join(self, other: DrafterState) -> LookupState:
        assert isinstance(other, LookupState)
        return replace(self, rows=[*self.rows, *other.rows])


class Lookup(Drafter):
    """Drafts what followed the newest tokens where they occurred before; nothing is trained."""

    config: LookupConfig
    trainable = False
    gives_draft_probs = False
    draws = frozenset({"deterministic"})

    def __init__(self, config: DrafterConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        path = self.config.datastore
        self.datastore = None if path is None else load_datastore(Path(path), target)
        self.ends = frozenset(target.eos_ids)

    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        name = self.config.name
        raise UserError(f"drafter '{name}' has no weights: there is nothing to train; use it in `drafttrain eval` or `generate`")

    def text(self) -> Text:
        """An empty one."""
        return Text(SuffixAutomaton(), self.config.shortest, self.datastore)

    @torch.no_grad()
    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> Tensor:
        guesses = torch.full((*batch.tokens.shape, length), -1)
        for row, start, stop in _documents(batch.document.tolist()):
            tokens, text = batch.tokens[row, start:stop].tolist(), self.text()
            for place, (token, root) in enumerate(pairwise(tokens), start):
                text.extend([token])
                found = self.grown(text, root, length, 1, length).tokens
                guesses[row, place, : len(found)] = torch.tensor(found, dtype=torch.long)
        return guesses.to(batch.tokens.device)

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> LookupState:
        rows = [self.text() for _ in prompts]
        for text, tokens, length in zip(rows, prompts.tolist(), lengths.tolist(), strict=True):
            text.extend(tokens[:length])
        return LookupState(rows)

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        found = self.nodes(state, roots, plan, sampling, rng)
        return from_nodes(roots, found, None if sampling.greedy else (plan.shape.nodes, self._width(plan)))

    def nodes(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> list[Nodes]:
        """A lookup has no levels to pay for: it may be as deep as the plan has nodes, and `plan.stop` has nothing to save."""
        assert isinstance(state, LookupState)
        self.calls += 1
        nodes, width = plan.shape.nodes, self._width(plan)
        # The last token that a row may write is the target's own: a node for it would save nothing.
        depths = [nodes] * len(state.rows) if plan.left is None else [min(nodes, left - 1) for left in plan.left.tolist()]
        return [
            self.grown(text, root, nodes, width, depth)
            for text, root, depth in zip(state.rows, roots.tolist(), depths, strict=True)
        ]

    def grown(self, text: Text, root: int, nodes: int, width: int, depth: int) -> Nodes:
        return lookup_tree(text, root, nodes, width, depth, self.ends, self.config.confidence)

    def _width(self, plan: Plan) -> int:
        return 1 if plan.shape.shape == "chain" else min(self.config.branches, plan.shape.nodes)

    def teacher_forced_logits(self, state: DrafterState, committed: Committed) -> Tensor:
        """What each place's own index finds; certain tokens."""
        assert isinstance(state, LookupState)
        B, T = committed.tokens.shape
        logits = torch.full((B, T, self.target.vocab_size), float("-inf"))
        for row, (text, tokens, count) in enumerate(zip(state.rows, committed.tokens.tolist(), committed.count.tolist(), strict=True)):
            for step, root in enumerate(tokens[:count]):
                for token in self.grown(text, root, 1, 1, 1).tokens:
                    logits[row, step, token] = 0.0
                text.extend([root])
        self.calls += 1
        return logits.to(committed.tokens.device)

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, LookupState)
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
