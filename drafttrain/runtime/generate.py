"""The round: propose, score, verify, cut, commit, observe. Everything else in this project serves these lines.

B rows, N nodes, D depth, V vocabulary. A round waits for the host once, to hand out tokens and learn which rows are done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from drafttrain.core.plan import Plan
from drafttrain.core.rng import SeededRng, draw_one
from drafttrain.core.sampling import Sampling, likeliest
from drafttrain.core.tree import Draws, Tree, root_only
from drafttrain.core.types import Scored, Verdict
from drafttrain.drafters.base import Drafter, DrafterState
from drafttrain.runtime.policy import Policy
from drafttrain.runtime.prefetch import Prefetched, Prefetcher
from drafttrain.runtime.stats import Clock, History, PastRound, Statistics, Tally
from drafttrain.target.adapter import Target
from drafttrain.verify.base import Rule


@dataclass
class Request:
    """One row to decode."""

    prompt: list[int]
    stream: int  # number of its random stream: equal requests with equal streams get equal texts
    max_new_tokens: int


@dataclass
class CutVerdict:
    """A verdict after EOS and the length limit cut it."""

    verdict: Verdict
    tokens: Tensor  # [B, D + 1] the row's new tokens, padded
    count: Tensor  # [B] how many are real; 0 for finished rows
    alive: Tensor  # [B] bool: the row goes on


@dataclass
class Emission:
    """What one row gained in a round."""

    row: int  # index of the request
    tokens: list[int]  # none where the row was finished before
    accepted: int  # the first so many are nodes of the tree, the rest is the target's
    done: bool
    from_target: int = 0  # the first so many are nodes that the target named itself (`Tree.from_target`)

    @property
    def origins(self) -> list[int]:
        """Of each token: 1 the drafter's, 0 the target's."""
        drafted = range(self.from_target, self.accepted)
        return [int(place in drafted) for place in range(len(self.tokens))]


RoundHook = Callable[[Tree, Scored, Verdict], None]
"""Called after each round's verdict, before anything is cut."""

Stopper = Callable[[int, list[int]], int]
"""(request, its tokens so far) -> how many of them to keep, for stop strings."""


class DecodingLoop:
    """Rows being decoded together."""

    def __init__(
        self, target: Target, drafter: Drafter | None, rule: Rule, policy: Policy, sampling: Sampling, seed: int,
        treat_as: Draws | None = None, stopper: Stopper | None = None, on_round: RoundHook | None = None, prefill_chunk: int = 512,
        prefetch: int = 0,
    ) -> None:
        """drafter: None decodes plainly, by the same loop. stopper: see `Stopper`; it moves the round's wait before the commit.
        prefetch: prefetched drafts a row on what a round commits (see `runtime/prefetch.py`); they add a wait a round."""
        self.target, self.drafter, self.rule, self.policy, self.sampling = target, drafter, rule, policy, sampling
        self.seed, self.treat_as, self.stopper, self.on_round, self.prefill_chunk = seed, treat_as, stopper, on_round, prefill_chunk
        self.needs = rule.needs | (drafter.needs if drafter else frozenset())
        self.ends = torch.tensor(target.eos_ids, dtype=torch.long, device=target.device)
        self.prefetcher = Prefetcher(drafter, target.head, prefetch) if prefetch and drafter else None
        self.ready: Tree | None = None  # the next round's tree, where it was prefetched
        self.target_candidates: Tensor | None = None  # [B, w] the target's, for its first level, where the rule left the last round open
        self.history, self.clock = History(), Clock(target.device)
        self.now: Callable[[], float] = time.perf_counter  # what policies are told of time
        self.calls = [0, 0]  # of target and drafter, by this batch alone
        rule.prepare(target)

    @torch.inference_mode()
    def start(self, requests: Sequence[Request]) -> list[Emission]:
        """Reads the prompts (equal ones once) and draws each row's first token."""
        with self._counting():
            return self._start(requests)

    @torch.inference_mode()
    def step(self) -> list[Emission]:
        """One round for every row that is not done."""
        with self._counting():
            return self._step()

    @contextmanager
    def _counting(self) -> Iterator[None]:
        before = self._calls_of_all()
        try:
            yield
        finally:
            self.calls = [mine + now - then for mine, now, then in zip(self.calls, self._calls_of_all(), before, strict=True)]

    def _calls_of_all(self) -> tuple[int, int]:
        return self.target.forwards, self.drafter.calls if self.drafter else 0

    def _start(self, requests: Sequence[Request]) -> list[Emission]:
        self.clock.start()
        device = self.target.device
        distinct, copies = _distinct([request.prompt for request in requests])
        prompts = pad_sequence([torch.tensor(prompt, device=device) for prompt in distinct], batch_first=True)
        lengths = torch.tensor([len(prompt) for prompt in distinct], device=device)
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        shape = self.policy.plan(self.history).shape
        capacity = longest + shape.slots + self.rule.slots(shape) + 1
        capacity += shape.depth + 1 if self.prefetcher else 0  # prefetched drafts may run past a row's end
        self.cache = self.target.new_cache(len(distinct), capacity)
        read = self.target.prefill(self.cache, prompts, lengths, self.needs, self.prefill_chunk)

        rows = torch.tensor(copies, device=device)
        self.cache = self.cache.select(rows) if len(distinct) < len(requests) else self.cache
        self.row_ids = list(range(len(requests)))  # [B] the request each row decodes
        self.written: list[list[int]] = [[] for _ in requests]
        self.lengths = [len(request.prompt) for request in requests]  # [B] committed tokens, as the host knows them
        self.cache.set_lengths(self.lengths)
        self.left = torch.tensor([request.max_new_tokens for request in requests], device=device)
        self.alive = torch.ones(len(requests), dtype=torch.bool, device=device)
        self.tally, self.request_of = Tally(len(requests), device), torch.arange(len(requests), device=device)
        self.rng = SeededRng(self.seed, torch.tensor([request.stream for request in requests], device=device))
        self.rounds = 0
        self.roots = self._first(read.logits[rows])
        self.state: DrafterState | None = None
        if self.drafter:
            features = {name: value[rows] for name, value in read.features.items()}
            self.state = self.drafter.begin(prompts[rows], lengths[rows], features, self.target.head, capacity)
        nothing = torch.zeros_like(self.roots)
        kept = self._limit(Verdict(nothing[:, None], nothing, self.roots), torch.stack([self.roots, nothing], 1))
        gained = self._fetch(kept)
        if self.stopper:
            kept = self._stop(kept, gained)
        out = self._hand_out(kept, gained)
        self._drop_finished()
        self.clock.lap("prefill")
        return out

    def _step(self) -> list[Emission]:
        begun = self.now()
        self.clock.start()
        plan = self.policy.plan(self.history)
        self.rng.substream(2 * self.rounds + 1)
        tree = self._propose(plan)
        prefetched = self._prefetch(tree, plan)
        self.clock.lap("draft")
        scored = self.target.score(self.cache, self.rule.layout(tree), self.sampling, self.needs)
        self.clock.lap("score")
        self.rng.substream(2 * self.rounds + 2)
        verdict = self.rule(tree, scored, self.rng)
        if self.on_round:
            self.clock.lap("verify")
            self.on_round(tree, scored, verdict)
            self.clock.pause()  # whoever looks on pays for it
        kept = self._cut(tree, verdict)
        self.clock.lap("verify")
        gained = self._fetch(kept, tree.from_target) if self.stopper else None  # stop strings need the host before the commit
        if gained:
            kept = self._stop(kept, gained)
        committed = self.target.commit(self.cache, tree, scored, kept.verdict, kept.count > 0)
        if self.drafter and self.state and not (prefetched and self._take_prefetched(prefetched, kept)):
            self.drafter.observe(self.state, committed)
        self._count(tree, kept)
        self.target_candidates = verdict.target_candidates
        self.clock.lap("commit")
        gained = gained or self._fetch(kept, tree.from_target)
        root = int(kept.verdict.next is not None)  # it stays in the cache, even if a draft behind it ended the row
        self.lengths = [length + (one.accepted + root if one.tokens else 0) for length, one in zip(self.lengths, gained, strict=True)]
        self._set_lengths()
        out = self._hand_out(kept, gained)
        self._remember(plan, gained, begun)
        self._drop_finished()
        self.rounds += 1
        self.clock.lap("other")
        return out

    @property
    def done(self) -> bool:
        return not self.row_ids

    def statistics(self) -> list[Statistics]:
        """Each request's counts; times and calls, which rows share, stand with the first."""
        rows = [self.tally.row(index) for index in range(len(self.written))]
        rows[0].seconds = self.clock.seconds()
        rows[0].target_forwards, rows[0].drafter_calls = self.calls
        rows[0].syncs = self.history.syncs
        rows[0].prefetched, rows[0].prefetch_hits = self.history.prefetched, self.history.prefetch_hits
        rows[0].prefetch_calls, rows[0].calls_saved = self.history.prefetch_calls, self.history.calls_saved
        return rows

    def _first(self, logits: Tensor) -> Tensor:
        """[B, V] after the prompts -> [B] the token the prefill gives."""
        if self.sampling.greedy:
            return likeliest(logits)
        return draw_one(self.rng, self.sampling.probs(logits))

    def _propose(self, plan: Plan) -> Tree:
        if self.drafter is None or self.state is None or not plan.draft:
            return root_only(self.roots, self.target_candidates)
        tree, self.ready = self.ready, None
        if tree is None:
            plan = replace(plan, keep_states=plan.keep_states or self.prefetcher is not None, target_candidates=self.target_candidates)
            tree = self.drafter.propose(self.state, self.roots, plan, self.sampling, self.rng)
        return tree if self.treat_as is None else replace(tree, draws=self.treat_as)

    def _prefetch(self, tree: Tree, plan: Plan) -> Prefetched | None:
        """Drafts for the next round, made before this one is scored."""
        if self.prefetcher is None or self.state is None or self.drafter is None:
            return None
        before = self.drafter.calls
        rows = torch.arange(len(self.roots), device=self.roots.device).repeat_interleave(self.prefetcher.width)
        rng = self.rng.select(rows)
        rng.substream(2 * self.rounds + 3)
        prefetched = self.prefetcher.draft(self.state, tree, replace(plan, keep_states=True), self.sampling, rng)
        self.history.prefetch_calls += self.drafter.calls - before
        return prefetched

    def _take_prefetched(self, prefetched: Prefetched, kept: CutVerdict) -> bool:
        """Takes the drafts of the prefetched drafts that came true, where every row that goes on has one."""
        hits = prefetched.hits(kept.verdict)
        self.history.syncs += 1
        going = [hit for hit, alive in zip(hits.tolist(), kept.alive.tolist(), strict=True) if alive]
        self.history.prefetched += len(going)
        self.history.prefetch_hits += sum(hit >= 0 for hit in going)
        if not going or min(going) < 0:
            return False
        width = prefetched.token.shape[1]
        rows = torch.arange(len(hits), device=hits.device) * width + hits.clamp_min(0)
        self.state, self.ready = prefetched.state.select(rows), prefetched.tree.select(rows)
        self.history.calls_saved += prefetched.saved
        return True

    def _cut(self, tree: Tree, verdict: Verdict) -> CutVerdict:
        """The round's new tokens up to the first EOS and the row's limit."""
        drafted = tree.tokens.gather(1, verdict.path)  # [B, D]
        tokens = torch.cat([drafted, torch.zeros_like(self.roots)[:, None]], 1)
        if verdict.next is not None:
            tokens = tokens.scatter(1, verdict.length[:, None], verdict.next[:, None])
        return self._limit(verdict, tokens)

    def _limit(self, verdict: Verdict, tokens: Tensor) -> CutVerdict:
        written = verdict.length + int(verdict.next is not None)
        count = torch.where(self.alive, torch.minimum(written, self.left), 0)
        order = torch.arange(tokens.shape[1], device=tokens.device)
        ends = torch.isin(tokens, self.ends) & (order < count[:, None])  # [B, D + 1]
        ended = ends.any(1)
        count = torch.where(ended, ends.long().argmax(1) + 1, count)
        alive = self.alive & ~ended & (self.left > count)
        return CutVerdict(replace(verdict, length=torch.minimum(verdict.length, count)), tokens, count, alive)

    def _fetch(self, kept: CutVerdict, from_target: bool = False) -> list[Emission]:
        """The round's one wait for the device: what every row gained, finished ones too. named: see `Tree.from_target`."""
        self.history.syncs += 1
        marks = torch.stack([kept.count, kept.verdict.length, kept.alive.long()], 1)
        rows = torch.cat([kept.tokens, marks], 1).tolist()
        return [
            Emission(request, tokens[:count], accepted, not alive, int(from_target and accepted > 0))
            for request, (*tokens, count, accepted, alive) in zip(self.row_ids, rows, strict=True)
        ]

    def _stop(self, kept: CutVerdict, gained: list[Emission]) -> CutVerdict:
        """Cuts at stop strings, which only the host can read; `gained` is cut in place."""
        assert self.stopper is not None
        for one in gained:
            before = self.written[one.row]
            allowed = max(0, self.stopper(one.row, before + one.tokens) - len(before)) if one.tokens else 0
            one.done = one.done or allowed < len(one.tokens)
            one.tokens, one.accepted = one.tokens[:allowed], min(one.accepted, allowed)
        cut = torch.tensor([[len(one.tokens), one.accepted, not one.done] for one in gained], device=kept.count.device)
        count, length, alive = cut.unbind(1)
        return replace(kept, count=count, alive=alive.bool(), verdict=replace(kept.verdict, length=length))

    def _count(self, tree: Tree, kept: CutVerdict) -> None:
        """alpha's attempts: every depth reached, and one more where the last node had a child that could have stood."""
        accepted = kept.verdict.length
        tip = kept.verdict.path.gather(1, (accepted - 1).clamp_min(0)[:, None])
        tip = torch.where(accepted[:, None] > 0, tip, 0)
        below = (tree.parents == tip) & tree.live
        below[:, 0] = False
        uncut = kept.count > accepted if kept.verdict.next is not None else kept.alive
        tried = accepted + (below.any(1) & uncut)
        self.tally.add(self.request_of, self.alive, kept.count, accepted, tried, tree.max_depth, tree.from_target)

    def _hand_out(self, kept: CutVerdict, gained: list[Emission]) -> list[Emission]:
        """Moves the rows on; what they gained, and that finished ones are done."""
        last = (kept.count - 1).clamp_min(0)[:, None]
        self.roots = torch.where(kept.count > 0, kept.tokens.gather(1, last)[:, 0], self.roots)
        self.left, self.alive = self.left - kept.count, kept.alive
        for one in gained:
            self.written[one.row] += one.tokens
        self.running = [not one.done for one in gained]
        return [one for one in gained if one.tokens or one.done]

    def _remember(self, plan: Plan, gained: list[Emission], begun: float) -> None:
        """What the next plan may be made from."""
        going = sum(bool(one.tokens) or not one.done for one in gained)
        tokens, drafted = sum(len(one.tokens) for one in gained), plan.draft and self.drafter is not None
        self.history.add(PastRound(len(gained), going, tokens, drafted, self.now() - begun))

    def _set_lengths(self) -> None:
        self.cache.set_lengths(self.lengths)
        if self.state:
            self.state.set_lengths(self.lengths)

    def _drop_finished(self) -> None:
        """Leaves finished rows behind once they are half of the batch: what goes on gets smaller at most log2(B) times."""
        going = [place for place, runs in enumerate(self.running) if runs]
        if len(going) * 2 > len(self.row_ids):
            return
        self.row_ids = [self.row_ids[place] for place in going]
        if not going:
            return
        rows = torch.tensor(going, device=self.roots.device)
        self.lengths = [self.lengths[place] for place in going]
        self.cache = self.cache.select(rows)
        self.state = self.state.select(rows) if self.state else None
        self.ready = self.ready.select(rows) if self.ready else None
        self.target_candidates = None if self.target_candidates is None else self.target_candidates[rows]
        self._set_lengths()
        self.rng, self.request_of = self.rng.select(rows), self.request_of[rows]
        self.roots, self.left, self.alive = self.roots[rows], self.left[rows], self.alive[rows]


def _distinct(prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The different prompts in order, and for each prompt which of them it is."""
    place: dict[tuple[int, ...], int] = {}
    copies = [place.setdefault(tuple(prompt), len(place)) for prompt in prompts]
    return [list(prompt) for prompt in place], copies
