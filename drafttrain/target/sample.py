"""Plain batched generation without drafts: a continuous batch, in which a finished row makes room at once.

Used by regeneration. A step waits for the host once. Each job draws from a random stream of its own, so that its text
does not depend on which jobs share the batch.
B rows, P tokens of a prompt, T tokens of a conversation, V vocabulary, F numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from drafttrain.core.errors import UserError
from drafttrain.core.processing import Processing, Texts
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling, likeliest
from drafttrain.core.tree import root_only
from drafttrain.core.types import Features
from drafttrain.target.adapter import Target
from drafttrain.target.cache import TreeCache

SHRINK = 0.75  # a batch that nothing refills is rebuilt when this share of its rows, or less, is left


@dataclass
class Job:
    """One answer to write."""

    id: int  # also the number of its random stream
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    ends: tuple[int, ...] = ()  # tokens that end it, besides the target's own


@dataclass
class Finished:
    """A job done."""

    id: int
    tokens: list[int]  # prompt and answer
    prompt_len: int
    ended: bool  # the target ended it; otherwise it ran into its limit
    features: Features  # name -> [T, F]; zero at the last token, which the target never read


class Sampler:
    """Writes answers, `batch` at a time."""

    def __init__(
        self, target: Target, batch: int, capacity: int, seed: int = 0, prefill_chunk: int = 512, purpose: int = 0
    ) -> None:
        """capacity: tokens of the longest prompt with its answer; batch and capacity set the cache's size."""
        self.target, self.batch, self.capacity, self.seed, self.purpose = target, batch, capacity, seed, purpose
        self.prefill_chunk = prefill_chunk
        asked = target.processing()
        self.processing: Processing | None = asked.check(target.vocab_size) if asked.active else None
        """What the target's own configuration changes of its logits."""
        self.steps, self.read = 0, 0  # forwards of one token a row, prompt tokens read: tests count them

    @torch.inference_mode()
    def run(self, jobs: Iterable[Job], features: Iterable[str] = ()) -> Iterator[Finished]:
        """Answers in the order they are finished; a job is taken from the iterable when there is room for it.

        features: captured from the same passes. Raises `UserError` for an empty prompt or one that does not fit.
        """
        waiting, rows = iter(jobs), _Rows(self, tuple(features))
        while True:
            rows.admit(list(islice(waiting, self.batch - rows.alive)))
            if not rows.alive:
                return
            self.steps += 1
            yield from rows.step()

    def check(self, job: Job) -> None:
        """A `UserError` where a job cannot be done."""
        check_job(job, min(self.capacity, self.target.max_context))


def check_job(job: Job, limit: int) -> None:
    """A `UserError` for an empty prompt, or one whose answer may not fit into `limit` tokens."""
    if not job.prompt:
        raise UserError(f"prompt {job.id} is empty; give at least one token, or drop it")
    if len(job.prompt) + job.max_new_tokens > limit:
        raise UserError(
            f"prompt {job.id}: {len(job.prompt)} tokens and {job.max_new_tokens} new ones exceed the {limit} "
            f"there is room for; shorten or drop the prompt, or lower max_new_tokens"
        )


@dataclass
class _Row:
    job: Job
    cached: int  # tokens the target has read
    written: list[int] = field(default_factory=list)  # empty until the step after the prefill tells the first token

    ended: bool = False

    def write(self, tokens: list[int], ends: tuple[int, ...]) -> bool:
        """Appends what the host just learnt; True where the answer is complete."""
        for token in tokens:
            self.written.append(token)
            self.ended = token in ends or token in self.job.ends
            if self.ended or len(self.written) == self.job.max_new_tokens:
                return True
        return False


@dataclass
class _Opening:
    """What the prompts of the first jobs begin with, all of them (a system prompt): read once."""

    tokens: list[int]
    cache: TreeCache  # one row
    features: Features  # name -> [tokens, F]

    def shared(self, prompts: Iterable[list[int]]) -> int:
        """How many of its tokens all of these prompts begin with, and go on after."""
        return common([self.tokens, *(prompt[:-1] for prompt in prompts)])


class _Rows:
    """The rows of the running batch; a place without a job is None."""

    def __init__(self, sampler: Sampler, features: tuple[str, ...]) -> None:
        self.sampler, self.target, self.names = sampler, sampler.target, features
        self.rows: list[_Row | None] = []
        self.cache: TreeCache
        self.roots: Tensor  # [B] tokens the target reads next
        self.rng: SeededRng
        self.opening: _Opening | None = None
        self.kept: Features = {}  # name -> [B, capacity, F] features so far

    @property
    def alive(self) -> int:
        return sum(row is not None for row in self.rows)

    def admit(self, jobs: list[Job]) -> None:
        """Reads the prompts of new jobs into vacant places, and draws their first tokens."""
        for job in jobs:
            self.sampler.check(job)
        if not jobs:
            return self._shrink()
        device, target = self.target.device, self.target
        if not self.rows:
            self._open(len(jobs))
        texts = [job.prompt for job in jobs]
        prompts = pad_sequence([torch.tensor(text, device=device) for text in texts], batch_first=True)
        lengths = torch.tensor([len(text) for text in texts], device=device)
        cache = target.new_cache(len(jobs), prompts.shape[1])
        self.opening = opening = self.opening or self._read_opening(texts)
        known = opening.shared(texts)
        cache.open_with(opening.cache, known)
        read = target.prefill(cache, prompts, lengths, self.names, self.sampler.prefill_chunk, known)
        self.sampler.read += sum(len(text) - known for text in texts)

        vacant = [place for place, row in enumerate(self.rows) if row is None][: len(jobs)]
        places = torch.tensor(vacant, device=device)
        self.cache.put(places, cache)
        for place, job in zip(vacant, jobs, strict=True):
            self.rows[place] = _Row(job, len(job.prompt))
        self._set_lengths()
        for name, value in read.features.items():
            kept = self._keep(name, value.shape[-1])
            if known:
                kept[places, :known] = opening.features[name][:known]
            kept[places, known : known + value.shape[1]] = value
        streams = SeededRng(self.sampler.seed, torch.tensor([job.id for job in jobs], device=device), self.sampler.purpose)
        logits = self._processed(read.logits, prompts.gather(1, lengths[:, None] - 1)[:, 0], [self.rows[place] for place in vacant], True)
        self.roots[places] = draw(logits, streams, alike([target.sampling(job.sampling) for job in jobs], device))
        self.rng.key[places], self.rng.count[places] = streams.key, streams.count
        self._sort()

    def _read_opening(self, prompts: list[list[int]]) -> _Opening:
        """What these, the first prompts, have in common; nothing where there is only one."""
        tokens = prompts[0][: common([prompt[:-1] for prompt in prompts])] if len(prompts) > 1 else []
        cache, features = self.target.new_cache(1, max(1, len(tokens))), {}
        if tokens:
            device = self.target.device
            whole, length = torch.tensor([tokens], device=device), torch.tensor([len(tokens)], device=device)
            read = self.target.prefill(cache, whole, length, self.names, self.sampler.prefill_chunk)
            features = {name: value[0] for name, value in read.features.items()}
        self.sampler.read += len(tokens)
        return _Opening(tokens, cache, features)

    def step(self) -> list[Finished]:
        """One token for every row, and the answers that it finished."""
        scored = self.target.score(self.cache, root_only(self.roots).layout(), Sampling(), self.names)
        place = torch.arange(len(self.rows), device=self.target.device)
        for name, value in scored.features.items():
            self._keep(name, value.shape[-1])[place, self.cache.lengths] = value[:, 0]
        logits = self._processed(scored.logits[:, 0], self.roots, self.rows)
        read, self.roots = self.roots, draw(logits, self.rng, self.drawn)
        self.cache.commit(torch.zeros_like(place)[:, None], self.live.long(), moved=False)
        return self._hand_out(torch.stack([read, self.roots], 1).tolist())  # the step's one wait

    def _processed(self, logits: Tensor, roots: Tensor, rows: Sequence[_Row | None], entering: bool = False) -> Tensor:
        """[B, V] after each row's root, as the target's own options change them. entering: the root is the prompt's last token."""
        if self.sampler.processing is None:
            return logits
        texts = Texts([], [])
        for row, root in zip(rows, roots.tolist(), strict=True):
            prompt = [] if row is None else row.job.prompt
            written = [root] if row is None or not row.written else row.written  # the first is not fetched yet
            texts.tokens.append(prompt if entering else prompt + written)
            texts.prompts.append(len(prompt))
        return self.sampler.processing(logits[:, None], root_only(roots), texts).logits[:, 0]

    def _hand_out(self, fetched: list[list[int]]) -> list[Finished]:
        done = []
        for place, row in enumerate(self.rows):
            if row is None:
                continue
            row.cached += 1
            if row.write(fetched[place][1:] if row.written else fetched[place], self.target.eos_ids):
                done.append(self._finish(place, row))
        self._set_lengths()
        if done:
            self._sort()
        return done

    def _set_lengths(self) -> None:
        self.cache.set_lengths([row.cached if row else 0 for row in self.rows])

    def _finish(self, place: int, row: _Row) -> Finished:
        tokens = row.job.prompt + row.written
        features = {name: value[place, : len(tokens)].clone() for name, value in self.kept.items()}
        for value in features.values():
            value[-1] = 0  # an answer of one token was fed before the host saw that it was the last
        self.rows[place] = None
        return Finished(row.job.id, tokens, len(row.job.prompt), row.ended, features)

    def _open(self, batch: int) -> None:
        device = self.target.device
        self.rows = [None] * batch
        self.cache = self.target.new_cache(batch, self.sampler.capacity)
        self.roots = torch.zeros(batch, dtype=torch.long, device=device)
        self.rng = SeededRng(self.sampler.seed, self.roots, self.sampler.purpose)

    def _shrink(self) -> None:
        """Fewer rows, once nothing is left to fill them with."""
        left = [place for place, row in enumerate(self.rows) if row]
        if not left or len(left) > SHRINK * len(self.rows):
            return
        places = torch.tensor(left, device=self.target.device)
        self.rows = [self.rows[place] for place in left]
        self.cache, self.roots, self.rng = self.cache.select(places), self.roots[places], self.rng.select(places)
        self.kept = {name: value[places] for name, value in self.kept.items()}
        self._sort()

    def _sort(self) -> None:
        """Groups rows by how they are drawn, whenever the rows have changed."""
        device = self.target.device
        self.drawn = alike([self.target.sampling(row.job.sampling) if row else Sampling() for row in self.rows], device)
        self.live = torch.tensor([row is not None for row in self.rows], device=device)
        self.cache.lengths *= self.live  # a vacant place must not reach beyond what the others need

    def _keep(self, name: str, width: int) -> Tensor:
        """[B, capacity, F] where a feature of the running rows is collected."""
        if name not in self.kept:
            shape = (len(self.rows), self.cache.capacity, width)
            self.kept[name] = torch.zeros(shape, dtype=self.target.dtype, device=self.target.device)
        return self.kept[name]


def common(texts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all of these begin with."""
    return next((place for place, tokens in enumerate(zip(*texts, strict=False)) if len(set(tokens)) > 1), min(map(len, texts)))


Alike = list[tuple[Sampling, Tensor]]
"""Sampled (not greedy) rows with the same options: the options, and the rows' places [R]."""


def alike(options: Sequence[Sampling], device: torch.device) -> Alike:
    """Rows grouped by how they are drawn; greedy ones are left out."""
    groups: dict[Sampling, list[int]] = {}
    for place, sampling in enumerate(options):
        if not sampling.greedy:
            groups.setdefault(sampling, []).append(place)
    return [(sampling, torch.tensor(places, device=device)) for sampling, places in groups.items()]


def draw(logits: Tensor, rng: SeededRng, sampled: Alike) -> Tensor:
    """[B, V] -> [B] next tokens, each row in its own way. Only the streams of sampled rows move."""
    tokens = likeliest(logits)
    for sampling, places in sampled:
        part = rng.select(places)
        tokens[places] = part.draw(sampling.probs(logits[places])[:, None], 1, replace=True)[:, 0, 0]
        rng.count[places] = part.count
    return tokens
