"""Where the newest tokens occurred before: a suffix automaton for texts that grow, a suffix array for texts that do not.

The automaton (Blumer et al., 1985) has one state for each set of substrings that end at the same places. A state's link leads to the
longest of its suffixes that occurred at further places: the chain of links is the back-off from long contexts to short ones. Several texts
may grow in one automaton; each has its own end. Everything is plain Python on the host, and depends on the tokens alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

ROOT = 0
COUNTED = 64
"""Contexts of a new token that are counted, the longest first: a text that repeats one token has as many as it has tokens."""


@dataclass(frozen=True)
class Cursor:
    """A place in an automaton: a state, and how many of its tokens match."""

    state: int = ROOT
    length: int = 0


@dataclass
class SuffixAutomaton:
    """All substrings of the texts so far. State 0 is the empty one."""

    following: list[dict[int, int]] = field(default_factory=lambda: [{}])  # of each state: token -> state
    link: list[int] = field(default_factory=lambda: [-1])
    length: list[int] = field(default_factory=lambda: [0])  # tokens of the state's longest substring
    count: list[int] = field(default_factory=lambda: [0])  # how often it occurred
    newest: list[int] = field(default_factory=lambda: [-1])  # when it occurred last
    time: int = 0  # tokens taken in

    def extend(self, end: int, token: int) -> int:
        """Appends a token to the text whose end is the state `end` (`ROOT`: an empty text); its new end."""
        known = self.following[end].get(token)
        new = self._append(end, token) if known is None else self._of_length(end, token, known)
        state = new
        for _ in range(COUNTED):
            if state <= ROOT:
                break
            self.count[state] += 1
            self.newest[state] = self.time
            state = self.link[state]
        self.time += 1
        return new

    def _append(self, end: int, token: int) -> int:
        new = self._state(self.length[end] + 1, {}, ROOT, 0, self.time)
        state = end
        while state >= 0 and token not in self.following[state]:
            self.following[state][token] = new
            state = self.link[state]
        if state >= 0:
            self.link[new] = self._of_length(state, token, self.following[state][token])
        return new

    def _of_length(self, state: int, token: int, target: int) -> int:
        """The state of `state`'s longest substring and `token`. Where `target` stands for longer ones too, its shorter part becomes a
        state of its own: from now on the two stand at different places."""
        length = self.length[state] + 1
        if self.length[target] == length:
            return target
        part = self._state(length, dict(self.following[target]), self.link[target], self.count[target], self.newest[target])
        self.link[target] = part
        while state >= 0 and self.following[state].get(token) == target:
            self.following[state][token] = part
            state = self.link[state]
        return part

    def _state(self, length: int, following: dict[int, int], link: int, count: int, newest: int) -> int:
        self.following.append(following)
        self.link.append(link)
        self.length.append(length)
        self.count.append(count)
        self.newest.append(newest)
        return len(self.link) - 1

    def step(self, cursor: Cursor, token: int) -> Cursor:
        """The longest suffix of the cursor's tokens and `token` that occurred in a text."""
        state, length = cursor.state, cursor.length
        while token not in self.following[state]:
            if state == ROOT:
                return Cursor()
            state = self.link[state]
            length = self.length[state]
        return Cursor(self.following[state][token], length + 1)

    def contexts(self, cursor: Cursor) -> Iterator[Cursor]:
        """The cursor and its suffixes that something followed, the longest first, the empty one last."""
        state, length = cursor.state, cursor.length
        while state >= ROOT:
            if self.following[state]:
                yield Cursor(state, length)
            state = self.link[state]
            length = self.length[max(state, ROOT)]

    def copy(self) -> SuffixAutomaton:
        following = [dict(tokens) for tokens in self.following]
        return SuffixAutomaton(following, [*self.link], [*self.length], [*self.count], [*self.newest], self.time)


@dataclass(frozen=True)
class Span:
    """Entries of a suffix array whose suffixes begin with the same `length` tokens."""

    start: int
    stop: int
    length: int

    def __len__(self) -> int:
        return self.stop - self.start


DEPTH = 32
"""Tokens by which suffixes are ordered: longer contexts than this are not looked up."""
LOOKED_AT = 256
"""Entries of a span at most that are read to count what follows; of a longer one as many, evenly spread."""


def suffix_order(tokens: np.ndarray) -> np.ndarray:
    """[T] int32: the suffixes' starts, ordered by their first `DEPTH` tokens (prefix doubling)."""
    rank = tokens.astype(np.int64)
    order = np.argsort(rank, kind="stable")
    width = 1
    while width < DEPTH:
        later = np.zeros_like(rank)
        later[:-width] = rank[width:] + 1
        key = rank * (int(later.max(initial=0)) + 1) + later
        order = np.argsort(key, kind="stable")
        ranked = key[order]
        rank[order] = np.concatenate([[0], np.cumsum(ranked[1:] != ranked[:-1])])
        width *= 2
    return order.astype(np.int32)


REMEMBERED = 1 << 17
"""Answers that a suffix array keeps, as most questions come again."""


class SuffixArray:
    """Texts one after the other, a `separator` behind each that is larger than all tokens, and where every substring stands."""

    def __init__(self, tokens: np.ndarray, order: np.ndarray, separator: int) -> None:
        """tokens: [T] int32; order: [T] int32, their `suffix_order`."""
        self.tokens, self.order, self.separator = tokens, order, separator
        self.firsts = np.searchsorted(tokens[order], np.arange(separator + 2)).tolist()  # where the suffixes begin that begin so
        self._narrow = lru_cache(REMEMBERED)(self._searched)
        self._following = lru_cache(REMEMBERED)(self._counted)

    def narrow(self, span: Span | None, token: int) -> Span:
        """The suffixes in `span` (None: all) that go on with `token`."""
        if span is None:
            return Span(self.firsts[token], self.firsts[token + 1], 1)
        return self._narrow(span, token)

    def _searched(self, span: Span, token: int) -> Span:
        def at(place: int) -> int:
            index = int(self.order[place]) + span.length
            return int(self.tokens[index]) if index < len(self.tokens) else -1

        places = range(span.start, span.stop)
        start = bisect_left(places, token, key=at)
        stop = bisect_left(places, token + 1, lo=start, key=at)
        return Span(span.start + start, span.start + stop, span.length + 1)

    def narrowed(self, spans: Sequence[Span], token: int, most: int) -> tuple[Span, ...]:
        """Spans of a text's suffixes of at most `most` tokens (the longest first, the empty one not among them) with `token` behind."""
        grown = [self.narrow(span, token) for span in (*spans, None) if span is None or span.length < most]
        return tuple(span for span in grown if len(span))

    def following(self, span: Span) -> dict[int, float]:
        """How often each token comes next; the separator is not one."""
        return self._following(span)

    def _counted(self, span: Span) -> dict[int, float]:
        step = max(1, -(-len(span) // LOOKED_AT))
        index = self.order[span.start : span.stop : step].astype(np.int64) + span.length
        tokens, counts = np.unique(self.tokens[index[index < len(self.tokens)]], return_counts=True)
        return {
            token: float(count) for token, count in zip(tokens.tolist(), counts.tolist(), strict=True) if token != self.separator
        }
