"""The round: propose, score, verify, commit, observe. Everything else in this project serves these lines.

Rows and cutting are in `rows.py`, drafting in `proposer.py`, counting in `accounting.py`. B rows, V vocabulary. A round waits for the host
once, to hand out tokens and learn which rows are done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from drafttrain.core.errors import UserError
from drafttrain.core.processing import Processing, Texts, forbidden
from drafttrain.core.rng import RowRng, SeededRng, draw_one
from drafttrain.core.sampling import Sampling, likeliest
from drafttrain.core.tree import Tree, root_only
from drafttrain.core.types import Features, Groups, Scored, Verdict
from drafttrain.drafters.base import Drafter
from drafttrain.runtime.accounting import Accounting
from drafttrain.runtime.policy import Policy
from drafttrain.runtime.proposer import Prompts, Proposer, proposer_of
from drafttrain.runtime.rows import CutVerdict, Emission, Request, Rows, Stopper
from drafttrain.runtime.stats import Statistics
from drafttrain.target.adapter import Target
from drafttrain.target.cache import TreeCache
from drafttrain.verify.base import Rule


@dataclass(frozen=True)
class RoundRecord:
    """One round as `on_round` sees it, before its tokens are committed."""

    tree: Tree
    scored: Scored
    verdict: Verdict  # as the rule gave it
    kept: Tensor  # [B] tokens that each row keeps, once end tokens, stop strings and the limit have cut the verdict
    rows: tuple[int, ...]  # [B] number of the request that each row decodes
    alive: Tensor  # [B] bool: rows that were not finished when the round began
    arms: tuple[int, ...]  # [B] which drafter proposed; 0 where there is one
    weight_versions: tuple[int, ...]  # of each drafter (`Drafter.weight_version`)

    @property
    def features(self) -> Features:
        """The target's features at the tree's nodes: those that drafters and rule read, and those the hook asked for."""
        return self.scored.features


RoundHook = Callable[[RoundRecord], None]
"""Called in each round, once it is known what is kept and before it is committed."""


class DecodingLoop:
    """Rows being decoded together; `admit` lets further ones in while they run."""

    def __init__(
        self, target: Target, drafter: Drafter | Proposer | None, rule: Rule, policy: Policy, sampling: Sampling, seed: int,
        stopper: Stopper | None = None, on_round: RoundHook | None = None, prefill_chunk: int = 512, features: frozenset[str] = frozenset(),
        processing: Processing | None = None,
    ) -> None:
        """drafter: None decodes plainly, by the same loop. stopper: see `Stopper`; it moves the round's wait before the commit. features:
        of the target, that `on_round` reads. processing: what changes the target's logits; None: what the target itself asks for."""
        self.target, self.rule, self.policy, self.sampling, self.seed = target, rule, policy, sampling, seed
        processing = target.processing() if processing is None else processing
        self.processing = processing.check(target.vocab_size) if processing.active else None
        self.proposer = proposer_of(drafter, rule.leaves_next_open)
        self.stopper, self.on_round, self.prefill_chunk = stopper, on_round, prefill_chunk
        self.needs = rule.needs | self.proposer.needs | features
        self.accounts = Accounting(target, self.proposer)
        self.clock, self.history = self.accounts.clock, self.accounts.history
        self.ends = torch.tensor(target.eos_ids, dtype=torch.long, device=target.device)
        self.prompts: list[list[int]] = []  # of every request
        self.written: list[list[int]] = []  # new tokens of every request so far
        self.rows: Rows | None = None  # None where none runs
        self.texts: dict[int, dict[int, list[int]]] = {}  # see `Groups`
        self.slots: int | None = None  # positions that a round takes behind a row's text, at most
        self.cache: TreeCache
        rule.prepare(target)

    @property
    def done(self) -> bool:
        return self.rows is None

    @property
    def vacant(self) -> int:
        """Rows of the batch that are finished."""
        return 0 if self.rows is None else self.rows.going.count(False)

    @property
    def running(self) -> int:
        """Rows that go on."""
        return 0 if self.rows is None else self.rows.going.count(True)

    @torch.inference_mode()
    def step(self) -> list[Emission]:
        """One round for every row that is not done."""
        rows = self.rows
        assert rows is not None, "every row is done"
        with self.accounts.counting():
            begun = self.accounts.now()
            self.clock.start()
            plan = self.policy.plan(self.history)

            rows.rng.substream(2 * rows.rounds + 1)
            tree = self.proposer.propose(rows, plan, self.sampling)
            self.clock.lap("draft")
            scored = self.target.score(self.cache, self.rule.layout(tree), self.sampling, self.needs)  # the round's ONE forward
            blocked = self._process(tree, scored)
            self.clock.lap("score")
            rows.rng.substream(2 * rows.rounds + 2)
            verdict = self.rule(self._allowed(tree, scored), scored, rows.rng)
            cut = rows.cut(tree, verdict)
            refuse_blocked(blocked, cut)
            self.clock.lap("verify")
            cut, gained = self._looked_at(tree, scored, verdict, cut)
            committed = self.target.commit(self.cache, tree, scored, cut.verdict, cut.count > 0)
            self.proposer.observe(committed, cut, scored, tree)
            self.accounts.count(rows, tree, cut)
            self.clock.lap("commit")

            gained = gained or self._fetch(cut, tree.from_target)
            rows.rounds = rows.rounds + 1
            out = self._hand_out(cut, gained, stored=int(verdict.next is not None))
            self.accounts.remember(rows, plan, gained, begun)
            self._drop_finished()
            self.clock.lap("other")
            return out

    def _process(self, tree: Tree, scored: Scored) -> Tensor | None:
        """Changes the scored logits in place by the texts before them; where nothing may follow, if any options forbid tokens."""
        if self.processing is None:
            return None
        assert self.rows is not None
        texts, nodes, parts = self._texts(self.rows.numbers), tree.tokens.shape[1], []
        logits = scored.logits.float()
        for part in self.rule.readings(nodes):
            processed = self.processing(logits[:, part], tree, texts, self.target.eos_ids)
            logits[:, part] = processed.logits
            parts.append(processed)
        scored.logits = logits
        return parts[0].blocked

    def _texts(self, numbers: Sequence[int]) -> Texts:
        """What the requests of these numbers have said so far."""
        texts = [self.prompts[number] + self.written[number] for number in numbers]
        return Texts(texts, [len(self.prompts[number]) for number in numbers])

    def _allowed(self, tree: Tree, scored: Scored) -> Tree:
        """What the rule sees: a lossless one rejects forbidden tokens by itself, a lossy one might let them through."""
        if self.processing is None or self.rule.lossless:
            return tree
        return replace(tree, live=tree.live & ~forbidden(tree, scored.logits))

    def _looked_at(self, tree: Tree, scored: Scored, verdict: Verdict, cut: CutVerdict) -> tuple[CutVerdict, list[Emission] | None]:
        """What must see a round before it is committed: stop strings, which cut it further and need the host, and the hook."""
        rows, gained = self.rows, None
        assert rows is not None
        if self.stopper:
            gained = self._fetch(cut, tree.from_target)
            cut = rows.stop(cut, gained, self.written, self.stopper)
            self.clock.lap("verify")
        if self.on_round:
            versions = tuple(drafter.weight_version for drafter in self.proposer.drafters)
            self.on_round(RoundRecord(tree, scored, verdict, cut.count, tuple(rows.numbers), rows.alive, tuple(rows.arms), versions))
            self.clock.pause()  # whoever looks on pays for it
        return cut, gained

    # -- rows that enter --------------------------------------------------------------------------------------------------------------

    def start(self, requests: Sequence[Request]) -> list[Emission]:
        """The first rows."""
        assert self.done, "rows are running: let further ones in with `admit`"
        return self.admit(requests)

    @torch.inference_mode()
    def admit(self, requests: Sequence[Request]) -> list[Emission]:
        """Reads the prompts (equal ones once) and draws each row's first token; the rows join those that run."""
        with self.accounts.counting():
            self.clock.start()
            self._drop_finished(always=True)
            running, held, proposer = self.rows, None if self.done else self.cache, self.proposer
            assert running is None or proposer.joins, "this proposer takes in no rows while others run"
            self.rows, prompts, logits = self._read(requests)
            self.proposer = proposer if running is None else proposer.fresh()
            self.proposer.begin(prompts)
            cut = self.rows.opened(self._first(logits))
            gained = self._fetch(cut)
            if self.stopper:
                cut = self.rows.stop(cut, gained, self.written, self.stopper)
            out = self._hand_out(cut, gained, stored=0)
            if running is not None and held is not None:
                newcomers, self.proposer = self.proposer, proposer
                self.rows, self.cache = running.join(self.rows), held.join(self.cache)
                self.proposer.join(newcomers)
                self._set_lengths()
            self._drop_finished()
            self.clock.lap("prefill")
            return out

    def _read(self, requests: Sequence[Request]) -> tuple[Rows, Prompts, Tensor]:
        """Prefills a cache: the fresh rows, what a drafter begins with, and logits [B, V] after the prompts."""
        device, number = self.target.device, len(self.written)
        distinct, copies = _distinct([request.prompt for request in requests])
        prompts = pad_sequence([torch.tensor(prompt, device=device) for prompt in distinct], batch_first=True)
        lengths = torch.tensor([len(prompt) for prompt in distinct], device=device)
        capacity = max(len(request.prompt) + request.max_new_tokens for request in requests) + self._slots()
        self.cache = self.target.new_cache(len(distinct), capacity)
        read = self.target.prefill(self.cache, prompts, lengths, self.needs, self.prefill_chunk)
        copied = torch.tensor(copies, device=device)
        self.cache = self.cache.select(copied) if len(distinct) < len(requests) else self.cache
        self.prompts += [request.prompt for request in requests]
        self.written += [[] for _ in requests]
        self.accounts.tally.grow(len(requests))
        streams = [request.stream for request in requests]
        rng: RowRng = SeededRng(self.seed, torch.tensor(streams, device=device))
        rows = Rows.of(requests, number, self.ends, rng)
        features = {name: value[copied] for name, value in read.features.items()}
        groups = self._groups(requests, number)
        begun = Prompts(prompts[copied], lengths[copied], features, self.target.head, capacity, groups, streams)
        return rows, begun, read.logits[copied]

    def _slots(self) -> int:
        """Positions behind a row's text that a round may take. Asked once: policies count how often they are asked."""
        if self.slots is None:
            shape = self.policy.plan(self.history).shape
            self.slots = shape.slots + self.rule.slots(shape) + 1 + self.proposer.slots(shape)
        return self.slots

    def _groups(self, requests: Sequence[Request], number: int) -> Groups:
        groups = []
        for offset, request in enumerate(requests, number):
            group = -1 - offset if request.group is None else request.group  # alone: a number that no group has
            self.texts.setdefault(group, {})[offset] = self.written[offset]
            groups.append(group)
        return Groups(groups, self.texts)

    def _first(self, logits: Tensor) -> Tensor:
        """[B, V] after the prompts -> [B] the token the prefill gives."""
        assert self.rows is not None
        if self.processing is not None:
            texts = self._texts(self.rows.numbers)
            lone = root_only(torch.tensor([text[-1] for text in texts.tokens], device=logits.device))
            processed = self.processing(logits[:, None], lone, texts, ())  # a prompt may end with an end token
            logits = processed.logits[:, 0]
            if processed.blocked is not None and bool(processed.blocked.any()):
                raise UserError(BLOCKED)
        if self.sampling.greedy:
            return likeliest(logits)
        return draw_one(self.rows.rng, self.sampling.probs(logits))

    # -- rows that go on, and those that leave ----------------------------------------------------------------------------------------

    def _fetch(self, cut: CutVerdict, from_target: bool = False) -> list[Emission]:
        assert self.rows is not None
        self.history.syncs += 1
        return self.rows.fetch(cut, from_target)

    def _hand_out(self, cut: CutVerdict, gained: Sequence[Emission], stored: int) -> list[Emission]:
        """Moves the rows on; what they gained, and that finished ones are done."""
        assert self.rows is not None
        self.rows.advance(cut, gained, stored)
        self._set_lengths()
        for emission in gained:
            self.written[emission.row] += emission.tokens
        return [emission for emission in gained if emission.tokens or emission.done]

    def _set_lengths(self) -> None:
        assert self.rows is not None
        self.cache.set_lengths(self.rows.lengths)
        self.proposer.set_lengths(self.rows.lengths)

    def _drop_finished(self, always: bool = False) -> None:
        """Leaves finished rows behind once they are half of the batch: what goes on gets smaller at most log2(B) times."""
        if self.rows is None:
            return
        kept = [row for row, goes_on in enumerate(self.rows.going) if goes_on]
        if not kept:
            self.rows = None
        elif len(kept) * 2 <= len(self.rows) or (always and len(kept) < len(self.rows)):
            index = torch.tensor(kept, device=self.rows.roots.device)
            self.rows, self.cache = self.rows.select(kept), self.cache.select(index)
            self.proposer.select(index)
            self._set_lengths()

    def statistics(self) -> list[Statistics]:
        """Each request's counts; times and calls, which rows share, stand with the first (waits for the device)."""
        return self.accounts.statistics()


BLOCKED = "the logits processors forbid every token at a place where a text must go on; let them allow one, an end token for instance"


def refuse_blocked(blocked: Tensor | None, cut: CutVerdict) -> None:
    """A `UserError` where a row's next token was drawn though every token is forbidden. blocked: [B, N], or None where that cannot be."""
    if blocked is None:
        return
    verdict = cut.verdict
    last = torch.where(verdict.length > 0, verdict.path.gather(1, (verdict.length - 1).clamp_min(0)[:, None])[:, 0], 0)
    if bool((blocked.gather(1, last[:, None])[:, 0] & (cut.count > verdict.length)).any()):
        raise UserError(BLOCKED)


def served(loop: DecodingLoop, requests: Sequence[Request], batch_size: int) -> Iterator[list[Emission]]:
    """Decodes all requests, in their order, about `batch_size` rows at a time: finished rows make room for the next requests.

    Samples of one prompt enter together, even where they are more than `batch_size`. Prompts are read once a quarter of the rows is vacant,
    so that one pass reads several.
    """
    waiting = deque(_families(requests))
    while waiting or not loop.done:
        room = batch_size - loop.running
        entering: list[Request] = []
        if loop.done or (loop.proposer.joins and 4 * room >= batch_size):
            while waiting and (len(entering) + len(waiting[0]) <= room or not (entering or loop.running)):
                entering += waiting.popleft()
        if entering:
            yield loop.admit(entering)
        else:
            yield loop.step()


def _families(requests: Sequence[Request]) -> list[list[Request]]:
    """Requests that enter together: neighbours of one group."""
    out: list[list[Request]] = []
    for request in requests:
        if out and request.group is not None and request.group == out[-1][-1].group:
            out[-1].append(request)
        else:
            out.append([request])
    return out


def _distinct(prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The different prompts in order, and for each prompt which of them it is."""
    number: dict[tuple[int, ...], int] = {}
    copies = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
    return [list(prompt) for prompt in number], copies
