"""The target writes its own training data: prompts in, conversations (and features of the same passes) out.

A conversation depends on its number alone, which sets prompt, temperature and random stream. So a killed run goes on
where it stopped and ends with the store of an uninterrupted one: token for token in fp32; in lower precision a resumed
answer may differ by the rounding of another batch shape, and is a sample of the same distribution.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from drafttrain.core.config import Config, Seed, fingerprint
from drafttrain.core.console import SafeConsole
from drafttrain.core.disk import locked, only_writer, writable
from drafttrain.core.errors import UserError
from drafttrain.core.sampling import Sampling
from drafttrain.core.types import FeatureName
from drafttrain.data.journal import FLUSH_SECONDS, StoreJournal
from drafttrain.data.origin import Origin, take_probe
from drafttrain.data.prompts import DataPrompt, SelfPrompts, Source, read_prompts
from drafttrain.data.server import AnswerJournal
from drafttrain.data.share import Share, completed, joined, part_of, refuse_others, sweep, take_up
from drafttrain.data.store import Conversation, Store, StoreWriter, feature_widths
from drafttrain.data.turns import Turn, all_openings, kept_prompts, openings, turn_jobs
from drafttrain.data.writer import OwnWriter, Writer, WriterConfig, open_writer
from drafttrain.target.adapter import Target, check_prompt_ids
from drafttrain.target.sample import Finished, Job
from drafttrain.target.template import check_answer_end

Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DataConfig(Config):
    """Training conversations and how they are made."""

    sources: tuple[Source, ...] = Field(default=(SelfPrompts(),), min_length=1)
    """Where prompts come from; several are taken one after another."""
    temperatures: tuple[Temperature, ...] = Field(default=(0.0, 0.7), min_length=1)
    """Answers are drawn at these temperatures in turn; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the answers that are not greedy."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer."""
    conversations: int | None = Field(default=None, ge=1)
    """How many to write; by default each prompt once. At most each prompt at each temperature: 30 prompts and 2 temperatures give 60."""
    tokens: int | None = Field(default=None, ge=1)
    """How many tokens to write, prompts included; the last conversation may exceed it. Each prompt at each temperature is all there is."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longer prompts are dropped; without it, one that does not fit the target's context is an error."""
    batch_size: int = Field(default=64, ge=1)
    """Answers written side by side."""
    capture: tuple[FeatureName, ...] = ()
    """Features to store, taken from the passes that write the answers: `last_hidden_state`, `aux_hidden_states`."""
    online: bool = False
    """Compute features that are not stored while training, with the target loaded, instead of capturing them to disk first."""
    writer: WriterConfig = OwnWriter()
    """Who writes the answers: the target in this process (`kind: target`), or a server of the same model (`kind: openai`)."""
    seed: Seed = 0
    """Of all draws."""
    existing: str | None = None
    """Folder of a finished store to use as it is."""

    @model_validator(mode="after")
    def _features_of_the_writer(self) -> DataConfig:
        if self.capture and self.writer.kind == "openai":
            raise ValueError(
                "data.capture takes features from the passes that write the answers, and a server gives none; leave it out: the stage "
                "`capture` computes them, or training with data.online"
            )
        return self

    def count(self, prompts: int) -> int:
        """How many conversations so many prompts give, unless `tokens` are reached before."""
        most = prompts * len(self.temperatures)
        return min(self.conversations or (prompts if self.tokens is None else most), most)

    def job(self, prompts: list[DataPrompt], id: int) -> Job:
        """Conversation `id`: every prompt at one temperature, then every prompt at the next."""
        lap, at = divmod(id, len(prompts))
        temperature = self.temperatures[(at + lap) % len(self.temperatures)]
        sampling = Sampling(temperature, 0, self.top_p if temperature else 1.0)
        return Job(id, prompts[at].tokens, self.max_new_tokens, sampling)


def regenerate(
    target: Target, config: DataConfig, folder: Path, flush_seconds: float = FLUSH_SECONDS, licences: Mapping[str, str] | None = None
) -> Store:
    """Conversations of `config` in `folder`, which may hold a part of them or all. licences: to be kept with them, by part.

    Raises `UserError` for bad prompts, a target without an end token, another run's folder, a full disk. On Ctrl-C
    what is finished is saved.
    """
    if config.existing is not None:
        store = Store.open(config.existing)
        store.check_target(Origin.of_target(target))
        return store
    check_ends(target)
    with only_writer(folder):
        left_out: Counter[str] = Counter()
        prompts = collect(target, config, folder / "prompts", left_out, flush_seconds)
        run = Regeneration(target, config, prompts, folder, flush_seconds, licences, left_out)
        refuse_others(folder, Share())
        take_up(folder, run.writer)
        store = run.run()
        sweep(folder)
        return store


def regenerate_share(
    target: Target, config: DataConfig, folder: Path, share: Share, flush_seconds: float = FLUSH_SECONDS,
    licences: Mapping[str, str] | None = None,
) -> Store | None:
    """One process's share of `regenerate`; None where other shares are missing still and it does not wait for them.

    Prompts that the target writes are written by the first process that comes. Raises `UserError` as `regenerate` does, for a budget of
    tokens, and while processes of another number of shares are at work.
    """
    if config.tokens is not None:
        raise UserError(
            f"data.tokens={config.tokens:,} cannot be shared among processes, as each would have to know what the others wrote; give "
            f"data.conversations"
        )
    check_ends(target)
    left_out: Counter[str] = Counter()
    with writable(folder):
        (folder / "prompts").mkdir(parents=True, exist_ok=True)
    with locked(folder / "prompts" / ".lock", folder, wait=True):
        prompts = collect(target, config, folder / "prompts", left_out, flush_seconds)

    def opened(place: Path) -> Regeneration:
        return Regeneration(target, config, prompts, place, flush_seconds, licences, left_out)

    with ExitStack() as held:
        with joined(folder, share, lambda: opened(folder).writer) as store:
            done = store.lengths
            part = held.enter_context(part_of(folder, share))
        opened(part).write_share(share, done)
    with joined(folder, share, lambda: opened(folder).writer) as store:
        limit = Budget(config.count(len(prompts)), None).limit(store.lengths)
        if limit is not None:
            store.finish(limit)
            sweep(folder)
    return completed(folder, share)


def check_ends(target: Target) -> None:
    """A `UserError` where the target's answers could not end, or would run on behind their end."""
    if not target.eos_ids:
        raise UserError(
            f"target '{target.name}': no end token, so no answer could end; set eos_token_id in generation_config.json"
        )
    if target.tokenizer is not None:
        check_answer_end(target.tokenizer, target.eos_ids, target.name)


def collect(
    target: Target, config: DataConfig, folder: Path, left_out: Counter[str], flush_seconds: float = FLUSH_SECONDS
) -> list[DataPrompt]:
    """The prompts of all sources, each once; those that the target has to write are kept in `folder`. left_out: what is not among them is
    counted there, by reason."""
    if target.tokenizer is None:
        raise UserError(f"target '{target.name}' has no tokenizer, which prompts need")
    found: dict[tuple[int, ...], DataPrompt] = {}
    for number, source in enumerate(config.sources):
        if isinstance(source, SelfPrompts):
            made, dropped = write_turns(target, source, config, folder / str(number), flush_seconds)
            left_out.update({f"turns of the target: {reason}": count for reason, count in dropped.items() if count})
        else:
            made = read_prompts(source, target.tokenizer, left_out)
        before = len(found)
        for prompt in made:
            check_prompt_ids(prompt.tokens, target.vocab_size, f"a prompt of source {number + 1}")
            found.setdefault(tuple(prompt.tokens), prompt)
        _say_left_out(left_out, "equal prompts", before + len(made) - len(found))
    limit = config.max_prompt_tokens
    prompts = [prompt for prompt in found.values() if limit is None or len(prompt.tokens) <= limit]
    _say_left_out(left_out, f"prompts longer than {limit} tokens (data.max_prompt_tokens)", len(found) - len(prompts))
    if not prompts:
        raise UserError(f"no prompt is left of {len(found)}; raise data.max_prompt_tokens or the number of prompts")
    longest = max(len(prompt.tokens) for prompt in prompts)
    room = target.max_context - config.max_new_tokens
    if longest > room:
        raise UserError(
            f"a prompt of {longest} tokens and {config.max_new_tokens} new ones exceed the target's context of "
            f"{target.max_context}; set data.max_prompt_tokens to {room} to drop such prompts, or lower max_new_tokens"
        )
    return prompts


def _say_left_out(left_out: Counter[str], reason: str, count: int) -> None:
    if count:
        left_out[reason] += count
        SafeConsole(stderr=True).print(f"left out: {count:,} {reason}", soft_wrap=True)


def written_by(config: DataConfig) -> tuple[str, ...]:
    """What sets a store apart that the target did not write in this process: a server draws other samples, whichever endpoint it is."""
    return () if config.writer.kind == "target" else (config.writer.kind,)


TURNS = 1
"""The purpose of the random streams that prompts are written with; their answers are drawn from others."""


def write_turns(
    target: Target, source: SelfPrompts, config: DataConfig, folder: Path, flush_seconds: float = FLUSH_SECONDS
) -> tuple[list[DataPrompt], dict[str, int]]:
    """Prompts that the target writes, and how many turns were dropped for which reason; the turns as they came are kept in `folder`."""
    assert target.tokenizer is not None
    jobs, themes = turn_jobs(source, target), openings(source)
    stage = fingerprint("turns", source.model_copy(update={"count": 1}), all_openings(source), config.seed, *written_by(config))
    writer = StoreWriter(folder, Origin.of_target(target), stage=stage)
    if len(writer.lengths) < len(jobs):
        longest = max(len(job.prompt) for job in jobs) + source.max_tokens
        sampler = open_writer(config.writer, target, config.batch_size, longest, config.seed, folder, TURNS)
        missing = (job for job in jobs if job.id not in writer.lengths)
        with StoreJournal(writer, "user turns", len(jobs), len(writer.lengths), "turns", flush_seconds) as journal:
            for one in sampler.run(missing):
                turn = _conversation(one, {"ended": one.ended})
                journal.add(turn, None, len(one.tokens) - one.prompt_len)
                journal.show(len(writer.lengths))
    store = writer.finish(len(jobs))
    AnswerJournal.forget(folder)
    turns = []
    for turn in (store[i] for i in range(len(store))):
        ended, (domain, opening) = bool(turn.meta["ended"]), themes[turn.id]
        head, words = turn.tokens[~turn.mask].tolist(), turn.tokens[turn.mask].tolist()
        turns.append(Turn(head, words[:-1] if ended else words, ended, opening, domain))
    prompts, dropped = kept_prompts(target.tokenizer, turns)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    SafeConsole(stderr=True).print(f"self-written prompts: {len(prompts)} kept of {len(turns)} ({reasons})")
    return prompts, dropped


@dataclass
class Budget:
    """When enough is written."""

    conversations: int  # at most
    tokens: int | None

    def limit(self, lengths: dict[int, int]) -> int | None:
        """The first id beyond the store, once everything before it is there: the fewest ids that fill the budget."""
        total = 0
        for id in range(self.conversations):
            if id not in lengths:
                return None
            total += lengths[id]
            if self.tokens is not None and total >= self.tokens:
                return id + 1
        return self.conversations


class Regeneration:
    """One run over fixed prompts."""

    def __init__(
        self, target: Target, config: DataConfig, prompts: list[DataPrompt], folder: Path, flush_seconds: float,
        licences: Mapping[str, str] | None = None, left_out: Mapping[str, int] | None = None,
    ) -> None:
        self.target, self.config, self.prompts, self.flush_seconds = target, config, prompts, flush_seconds
        self.budget = Budget(config.count(len(prompts)), config.tokens)
        shape = target.shape
        widths = feature_widths(config.capture, shape.hidden_size, len(shape.aux_layers))
        self.writer = StoreWriter(
            folder, Origin.of_target(target), widths, self.stage(), take_probe(target), licences=licences, left_out=left_out
        )
        self.running = 0  # conversations begun and not finished

    def stage(self) -> str:
        """Fingerprint of what a conversation depends on: not the budgets, so that a store can grow."""
        config, prompts = self.config, [prompt.tokens for prompt in self.prompts]
        return fingerprint(
            "regenerate", prompts, config.temperatures, config.top_p, config.max_new_tokens, config.seed, config.capture,
            *written_by(config),
        )  # fmt: skip

    def run(self) -> Store:
        """Writes what is missing and returns the finished store."""
        limit = self.budget.limit(self.writer.lengths)
        if limit is None:
            limit = self._write()
        store = self.writer.finish(limit)
        AnswerJournal.forget(store.folder)
        if short := self.shortage(store.tokens):
            SafeConsole(stderr=True).print(short, soft_wrap=True)
        return store

    def shortage(self, written: int) -> str | None:
        """What to say where the prompts gave less than was asked for. written: tokens in all."""
        config, prompts, temperatures = self.config, len(self.prompts), len(self.config.temperatures)
        most = prompts * temperatures
        if config.tokens is not None and written >= config.tokens:
            return None
        if config.conversations is not None and config.conversations > most:
            asked = f"data.conversations={config.conversations:,}"
        elif config.conversations is None and config.tokens is not None:
            asked = f"data.tokens={config.tokens:,}"
        else:
            return None
        source = f"{prompts:,} prompt{'s'[: prompts > 1]} at {temperatures} temperature{'s'[: temperatures > 1]}"
        return f"{asked} not reached: {source} give {most:,} conversations ({written:,} tokens), no more; add prompts or data.temperatures"

    def write_share(self, share: Share, done: Container[int]) -> None:
        """Writes a share of what is not done, into the part that this was opened on."""
        missing = [id for id in range(self.budget.conversations) if share.mine(id) and id not in done]
        jobs = (self.config.job(self.prompts, id) for id in missing)
        with StoreJournal(self.writer, "answers", len(missing), 0, "conversations", self.flush_seconds) as journal:
            for one in self._open_writer().run(jobs, self.config.capture):
                journal.add(_conversation(one, self._meta(one)), one.features, len(one.tokens) - one.prompt_len)
                journal.show(len(self.writer.lengths))

    def _open_writer(self) -> Writer:
        config, longest = self.config, max(len(prompt.tokens) for prompt in self.prompts) + self.config.max_new_tokens
        return open_writer(config.writer, self.target, config.batch_size, longest, config.seed, self.writer.folder)

    def _write(self) -> int:
        sampler = self._open_writer()
        goal = self.config.tokens or self.budget.conversations
        unit = "tokens" if self.config.tokens else "conversations"
        with StoreJournal(self.writer, "answers", goal, self._progress(), unit, self.flush_seconds) as journal:
            while (limit := self.budget.limit(self.writer.lengths)) is None:
                for one in sampler.run(self._jobs(), self.config.capture):
                    journal.add(_conversation(one, self._meta(one)), one.features, len(one.tokens) - one.prompt_len)
                    self.running -= 1
                    journal.show(self._progress())
        return limit

    def _jobs(self) -> Iterator[Job]:
        """What is missing, in order, as long as what is running does not seem to fill the budget."""
        for id in range(self.budget.conversations):
            if id in self.writer.lengths:
                continue
            if self._filled():
                return
            self.running += 1
            yield self.config.job(self.prompts, id)

    def _filled(self) -> bool:
        if self.config.tokens is None:
            return False
        written, guess = len(self.writer.lengths), self.config.max_new_tokens / 2 + len(self.prompts[0].tokens)
        mean = self.writer.tokens / written if written > 8 else guess
        return self.writer.tokens + self.running * mean >= self.config.tokens and self.running + written > 0

    def _progress(self) -> int:
        return self.writer.tokens if self.config.tokens else len(self.writer.lengths)

    def _meta(self, one: Finished) -> dict[str, Any]:
        job = self.config.job(self.prompts, one.id)
        domain = self.prompts[one.id % len(self.prompts)].domain
        nucleus = {"top_p": job.sampling.top_p} if job.sampling.top_p < 1 else {}
        return {"domain": domain, "temperature": job.sampling.temperature, **nucleus, "ended": one.ended}


def _conversation(one: Finished, meta: dict[str, Any]) -> Conversation:
    return Conversation.answered(one.tokens, one.prompt_len, meta, one.id)
