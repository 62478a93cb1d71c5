"""Learning while serving: a stream is decoded in order, and the drafter learns from what it got wrong.

Online Speculative Decoding (Liu et al., 2023, arXiv:2310.07177): `osd`. OnlineSPEC (Qian et al., 2026, arXiv:2603.12617): `plain`,
`ensemble` (several learning rates, merged in parameter space), `optimistic` (momentum that lasts from chunk to chunk). Draft-OPD (2026,
arXiv:2605.29343): `replay`, drafting anew from the positions where verification failed.

Each chunk of requests is decoded first and learnt from afterwards: its rows are by weights that never saw it. Texts do not change, whatever
was learnt: the rule verifies with the q that drew a tree.
"""

from __future__ import annotations

import copy
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from drafttrain.core.config import Config, Seed, fingerprint
from drafttrain.core.disk import only_writer, read_bytes, writable, write_text, write_whole
from drafttrain.core.errors import UserError
from drafttrain.core.losses import OnlineMix
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.data.collate import shuffled
from drafttrain.data.origin import Origin
from drafttrain.data.store import Store, StoreWriter, feature_widths
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.files import save_drafter
from drafttrain.evaluation.streams import Pattern, StreamItem, StreamRow, stream_hash
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.generate import DecodingLoop, served
from drafttrain.runtime.rows import Request
from drafttrain.target.head import TargetHead
from drafttrain.train.transcripts import Recording, Transcript, training_batch

CHECKPOINT, ROWS, LOG = "checkpoint.pt", "rows.jsonl", "log"
MEND = "delete the folder to begin the stream anew"
LOSS_NUMBERS = 2
"""The purpose of the random numbers that losses draw here (`SeededRng`)."""

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "mix", "tv", "ce"]
MIXES: dict[str, dict[str, float]] = {
    "forward_kl": {"forward_kl": 1}, "reverse_kl": {"reverse_kl": 1}, "jsd": {"jsd": 1}, "mix": {"forward_kl": 0.9, "reverse_kl": 0.1},
    "tv": {"tv": 1}, "ce": {"ce": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One way of learning from a stream."""

    learns: Literal["nothing", "all", "rejected"]
    momentum: bool = False  # SGD with momentum instead of AdamW
    keeps: bool = False  # the optimizer's state from update to update
    ensemble: bool = False
    window: bool = False  # of each rejected position as many tokens as a draft has


METHODS: dict[str, Method] = {
    "frozen": Method("nothing"),
    "plain": Method("all"),
    "osd": Method("rejected", keeps=True),
    "replay": Method("rejected", keeps=True, window=True),
    "ensemble": Method("all", ensemble=True),
    "optimistic": Method("all", momentum=True, keeps=True),
}
MethodName = Literal["frozen", "plain", "osd", "replay", "ensemble", "optimistic"]


class OnlineConfig(Config):
    """How a drafter learns from the stream that it serves."""

    methods: tuple[MethodName, ...] = ("osd",)
    """Each decodes the whole stream: `frozen` learns nothing; `plain` all tokens; `osd` those where a draft was rejected; `replay` a
    draft's length from each of these on; `ensemble` all tokens at several learning rates, merged by their losses; `optimistic` all tokens,
    by SGD with momentum that lasts."""
    pattern: Pattern = "given"
    """How requests are arranged: as they stand, in `blocks` of one task after another, `alternating`, or a slow `mixture` from each task
    to the next."""
    tasks: tuple[str, ...] = ()
    """Tasks (a store's domains) that are asked, in this order; none named: all of them."""
    count: int | None = Field(default=None, ge=1)
    """Requests of the stream; all by default."""
    every: int = Field(default=8, ge=1)
    """Requests decoded before the drafter learns from them."""
    rounds: int | None = Field(default=None, ge=1)
    """Learn also after so many rounds of a batch, within requests, as long answers want; None: between requests alone."""
    caches: Literal["rebuild", "age"] = "rebuild"
    """What becomes of the drafter's caches of running requests when its weights change: computed anew, or left until they end."""
    divergence: Divergence = "forward_kl"
    """Between the target's distribution p and the drafter's q: KL(p || q), KL(q || p), Jensen-Shannon, `mix` (0.9 and 0.1 of the two KLs,
    as the paper's code), total variation, or the cross entropy of the target's own token."""
    temperature: float | None = Field(default=None, ge=0)
    """Of both distributions; by default that of the decoding, 1 where it is greedy."""
    lr: float | None = Field(default=None, ge=0)
    """Learning rate; by default 1e-4 (AdamW), or 0.02 for the momentum of `optimistic`."""
    rates: tuple[float, ...] = (0.25, 1.0, 4.0)
    """Learning rates of `ensemble`, as multiples of `lr`."""
    meta_temperature: float = Field(default=1.0, gt=0)
    """Weights of the ensemble's learners are a softmax of minus their losses over this."""
    epochs: int = Field(default=1, ge=1)
    """Passes over what an update learns from."""
    rows: int = Field(default=4, ge=1)
    """Requests an optimizer step."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of `optimistic`."""
    least: int = Field(default=16, ge=1)
    """Labels that must wait before an update; fewer stay in the buffer."""
    replay_share: float = Field(default=0.25, ge=0, lt=1)
    """Share of the requests of an update that are earlier ones, against forgetting."""
    memory: int = Field(default=64, ge=0)
    """Earlier requests kept for that, a fair sample of all so far."""
    keep_log: bool = False
    """Keep tokens and states of all requests on disk, for learning from them again later (`--replay`). Prompts and answers can be read from
    it."""
    seed: Seed = 0
    """Of order and replay."""

    def mix(self, sampling: Sampling) -> OnlineMix:
        """What is minimised. Raises `UserError` at temperature 0."""
        temperature = self.temperature
        if temperature is None:
            temperature = sampling.temperature or 1.0
        if temperature == 0:
            raise UserError(
                f"online.temperature 0: there both distributions are single tokens, and {self.divergence} has no gradient; give a "
                f"temperature above 0, or online.divergence=ce, which learns the target's own token at temperature 1"
            )
        return OnlineMix(**{"forward_kl": 0.0, **MIXES[self.divergence]}, temperature=temperature)

    def rates_of(self, method: Method) -> list[float]:
        """Learning rate of each learner."""
        lr = (0.02 if method.momentum else 1e-4) if self.lr is None else self.lr
        return [lr * rate for rate in self.rates] if method.ensemble else [lr]


def check_online(config: OnlineConfig, runtime: RuntimeConfig, sampling: Sampling, family: type[Drafter]) -> None:
    """A `UserError` where this cannot be learnt online, or a run could not be resumed to the same figures."""
    config.mix(sampling)
    if not config.methods or len(set(config.methods)) < len(config.methods):
        raise UserError(f"online.methods {list(config.methods)}: name each method once; known: {', '.join(METHODS)}")
    if "ensemble" in config.methods and (len(config.rates) < 2 or min(config.rates) < 0):
        raise UserError(f"online.rates {list(config.rates)}: an ensemble has two learning rates or more, none below 0")
    reasons = {
        "this family has no weights to learn; use a trained drafter": not family.trainable,
        "this family has a loss of its own, which takes no divergence": family.trainable and "loss" not in family.Config.model_fields,
        "online learning serves one drafter; leave runtime.drafters and runtime.router out": runtime.pooled,
        "online learning serves one drafter; leave runtime.hybrid out": runtime.hybrid is not None,
        "swapped tokens are the drafter's no more; set runtime.corrupt to 0": bool(runtime.corrupt),
        "what was drafted ahead is of older weights; set runtime.prefetch to 0": bool(runtime.prefetch),
        f"policy '{runtime.policy_name}' goes by times, or was trained for other weights; use fixed or confidence":
            runtime.policy_name not in ("fixed", "confidence"),
    }  # fmt: skip
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"drafttrain online: {reason}")
    if runtime.fitted(sampling, family)[0].leaves_next_open:
        raise UserError("drafttrain online: this rule leaves tokens open, so that no draft is told right or wrong; use runtime.rule=auto")


class Learner:
    """The weights that are trained, in fp32, one copy a learning rate; and what they learn from."""

    def __init__(self, drafter: Drafter, head: TargetHead, method: Method, config: OnlineConfig, sampling: Sampling, window: int) -> None:
        """drafter: decodes; its weights are replaced at each `swap`. window: tokens of a draft."""
        self.serving, self.head, self.method, self.config = drafter, head, method, config
        self.window = None if method.learns == "all" else window if method.window else 1
        self.names = sorted(drafter.needs | drafter.teacher_needs)
        self.rates = config.rates_of(method)
        self.pupils = [self._pupil(drafter, config.mix(sampling)) for _ in self.rates]
        self.optimizers = [self._optimizer(pupil, rate) for pupil, rate in zip(self.pupils, self.rates, strict=True)]
        self.weights = [1 / len(self.pupils)] * len(self.pupils)  # of the ensemble
        self.buffer: list[Transcript] = []  # not learnt from yet
        self.memory: list[Transcript] = []  # learnt from, and learnt again now and then
        self.remembered = 0  # requests that `memory` is a sample of
        self.updates = 0

    @staticmethod
    def _pupil(drafter: Drafter, mix: OnlineMix) -> Drafter:
        pupil = copy.deepcopy(drafter).float().train()
        pupil.config = pupil.config.model_copy(update={"loss": mix})
        return pupil

    def _optimizer(self, pupil: Drafter, rate: float) -> torch.optim.Optimizer:
        trained = [weight for weight in pupil.parameters() if weight.requires_grad]
        if self.method.momentum:
            return torch.optim.SGD(trained, lr=rate, momentum=self.config.momentum)
        return torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)

    def add(self, text: Transcript) -> None:
        """One request, or what there is of it."""
        if self.method.learns != "nothing" and text not in self.buffer:
            self.buffer.append(text)

    @property
    def waiting(self) -> int:
        """Labels that were not learnt from."""
        return sum(len(text.labels(self.window)) for text in self.buffer)

    def update(self) -> bool:
        """Learns from the buffer, with a share of earlier requests, where enough waits; then `swap`. Whether it did."""
        if self.waiting < self.config.least:
            return False
        chosen = [text for text in self.buffer if text.labels(self.window)] + self._replayed(len(self.buffer))
        losses = [self._learn(number, chosen) for number in range(len(self.pupils))]
        self._merge(losses)
        for text in self.buffer:
            text.learnt = len(text.tokens)
        self.updates += 1
        self.swap()
        return True

    def retire(self) -> None:
        """Where all requests have ended: those that were learnt from leave the buffer, and a fair sample of them stays in memory."""
        learnt = [text for text in self.buffer if not text.labels(self.window)]
        self.buffer = [text for text in self.buffer if text.labels(self.window)]
        for text in learnt:
            self._remember(text)

    def _remember(self, text: Transcript) -> None:
        """Reservoir sampling: every request so far is as likely to be here."""
        again = copy.copy(text)
        again.learnt = 0
        if not again.labels(self.window):
            return  # nothing was rejected
        self.remembered += 1
        if len(self.memory) < self.config.memory:
            self.memory.append(again)
        elif self.config.memory and (slot := shuffled(self.remembered, self.config.seed, 2, self.remembered)[0]) < self.config.memory:
            self.memory[slot] = again

    def _replayed(self, fresh: int) -> list[Transcript]:
        share = self.config.replay_share
        wanted = round(fresh * share / (1 - share))
        order = shuffled(len(self.memory), self.config.seed, 3, self.updates)
        return [self.memory[place] for place in order[:wanted]]

    def _learn(self, number: int, texts: Sequence[Transcript]) -> float:
        """One learner's passes; its mean loss on the way."""
        pupil, config = self.pupils[number], self.config
        if not self.method.keeps:
            self.optimizers[number] = self._optimizer(pupil, self.rates[number])
        optimizer, total, count = self.optimizers[number], 0.0, 0.0
        for epoch in range(config.epochs):
            order = shuffled(len(texts), config.seed, 4, self.updates, epoch)
            for start in range(0, len(order), config.rows):
                part = [texts[place] for place in order[start : start + config.rows]]
                batch = training_batch(part, self.names, self.window, self.head.device)
                streams = torch.tensor([text.place for text in part], device=self.head.device) + ((self.updates + 1) << 32)
                loss = pupil.loss(batch, self.head, SeededRng(config.seed, streams, LOSS_NUMBERS + epoch))
                if not loss.count:
                    continue  # all of its labels are out of the drafter's reach
                (loss.sum / loss.count).backward()
                torch.nn.utils.clip_grad_norm_(pupil.parameters(), config.clip)
                optimizer.step()
                optimizer.zero_grad()
                total, count = total + float(loss.sum.detach()), count + float(loss.count)
        mean = total / count if count else 0.0
        if not math.isfinite(mean):
            rate = self.rates[number]
            raise UserError(f"online learning diverged, update {self.updates + 1}: loss {mean}; lower online.lr (now {rate:g})")
        return mean

    @torch.no_grad()
    def _merge(self, losses: Sequence[float]) -> None:
        """All learners go on from their weighted mean."""
        if len(self.pupils) == 1:
            return
        self.weights = torch.softmax(-torch.tensor(losses, dtype=torch.float64) / self.config.meta_temperature, 0).tolist()
        for same in zip(*(pupil.parameters() for pupil in self.pupils), strict=True):
            mean = merged([weight.detach() for weight in same], self.weights)
            for weight in same:
                weight.copy_(mean)

    @torch.no_grad()
    def swap(self) -> None:
        """The decoding drafter gets the learnt weights, and another version. Call it between rounds."""
        for served_weight, learnt in zip(self.serving.parameters(), self.pupils[0].parameters(), strict=True):
            served_weight.copy_(learnt)
        self.serving.weight_version = self.updates

    # -- saved and loaded -------------------------------------------------------------------------------------------------------------

    def state(self, texts: bool) -> dict[str, Any]:
        """Everything that the next update depends on. texts: with the buffer and the memory."""
        buffer, memory = (self.buffer, self.memory) if texts else ([], [])
        return {
            "weights": {name: weight.detach() for name, weight in self.pupils[0].named_parameters()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ensemble": self.weights, "updates": self.updates, "remembered": self.remembered,
            "buffer": [text.state() for text in buffer], "memory": [text.state() for text in memory],
        }  # fmt: skip

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        for pupil in self.pupils:  # after an update all are alike
            for name, weight in pupil.named_parameters():
                weight.copy_(state["weights"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.weights, self.updates, self.remembered = state["ensemble"], state["updates"], state["remembered"]
        self.buffer = [Transcript.of_state(text) for text in state["buffer"]]
        self.memory = [Transcript.of_state(text) for text in state["memory"]]
        self.swap()


def merged(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Their weighted mean, in fp64; of equal tensors the tensor itself."""
    total = sum((weight * tensor.double() for tensor, weight in zip(tensors, weights, strict=True)), torch.zeros_like(tensors[0]).double())
    return total.to(tensors[0].dtype)


@dataclass
class Position:
    """Where a stream stands: what the next chunk depends on, beside the learner."""

    place: int = 0  # requests that are done
    rows: list[StreamRow] = field(default_factory=list)
    done: bool = False


class StreamRun:
    """One method over one stream. Killed at any moment, it goes on from the end of the last whole chunk, to the same figures."""

    def __init__(
        self, decoder: SpeculativeDecoder, items: Sequence[StreamItem], method: str, config: OnlineConfig, sampling: Sampling,
        max_new_tokens: int, folder: Path, seed: int = 0, batch_size: int = 8, started_from: str = "",
    ) -> None:
        """decoder: with a drafter of its own, which learns. folder: of this method alone. started_from: the drafter's fingerprint."""
        assert decoder.drafter is not None
        self.decoder, self.items, self.name, self.config, self.sampling = decoder, items, method, config, sampling
        self.max_new_tokens, self.folder, self.seed, self.batch_size = max_new_tokens, folder, seed, batch_size
        prompts = decoder.requests([item.prompt for item in items], max_new_tokens, 1)  # too long ones are told before any decoding
        self.requests = [replace(request, group=None) for request in prompts]
        length = decoder.runtime.shape.depth
        self.learner = Learner(decoder.drafter, decoder.target.head, METHODS[method], config, sampling, length)
        self.position = Position()
        self.answers: dict[int, list[int]] = {}
        """What was written (token ids) by this process, by place."""
        own = config.model_dump(mode="json", exclude={"methods", "pattern", "tasks", "count"})
        self.mark = fingerprint(
            method, own, stream_hash(items), sampling, seed, max_new_tokens, batch_size, decoder.runtime, decoder.target.fingerprint,
            str(decoder.target.dtype), started_from,
        )  # fmt: skip

    def run(self, on_chunk: Callable[[Position], None] = lambda position: None) -> list[StreamRow]:
        """Decodes and learns to the end of the stream. on_chunk: called after each chunk is safe on disk."""
        with only_writer(self.folder):
            self._resume()
            while self.position.place < len(self.items):
                self._chunk()
                self._save()
                on_chunk(self.position)
            if not self.position.done:
                self._finish()
        return self.position.rows

    def _chunk(self) -> None:
        """Decodes the next requests by the weights as they are, then learns from them."""
        first = self.position.place
        requests = self.requests[first : first + self.config.every]
        begun = time.perf_counter()
        loop, proposer, inside = self._decode(requests)
        decoding = time.perf_counter() - begun - inside
        texts = [self._whole(proposer.texts[request.stream], loop.written[number]) for number, request in enumerate(requests)]
        rows = self._rows(loop, texts, decoding)
        begun = time.perf_counter()
        for text in texts:
            self.learner.add(text)
        self.learner.update()
        self.learner.retire()
        learning = inside + time.perf_counter() - begun
        self.position.rows += [row.model_copy(update={"learn_seconds": learning / len(rows)}) for row in rows]
        self.position.place += len(requests)
        if self.config.keep_log:
            self._log(texts)

    def _decode(self, requests: Sequence[Request]) -> tuple[DecodingLoop, Recording, float]:
        """The loop at its end, who drafted in it, and seconds that were spent learning within."""
        decoder, learner = self.decoder, self.learner
        rule, plan = decoder.runtime.fitted(self.sampling, decoder.drafter)
        proposer = Recording(learner.serving, decoder.runtime.treat_as)
        policy, chunk = decoder.runtime.planner(plan), decoder.runtime.prefill_chunk
        loop = DecodingLoop(decoder.target, proposer, rule, policy, self.sampling, self.seed, None, None, chunk)
        inside = 0.0
        for number, _ in enumerate(served(loop, requests, self.batch_size), 1):
            if self.config.rounds is not None and number % self.config.rounds == 0 and not loop.done:
                begun = time.perf_counter()
                self._learn_within(proposer)
                inside += time.perf_counter() - begun
        return loop, proposer, inside

    def _learn_within(self, proposer: Recording) -> None:
        """Between two rounds of running requests."""
        for text in proposer.texts.values():
            self.learner.add(text)
        if self.learner.update() and self.config.caches == "rebuild":
            proposer.rebuild(self.decoder.target.head)

    def _whole(self, text: Transcript, written: list[int]) -> Transcript:
        """With the last token, which no round committed."""
        self.answers[text.place] = written
        text.tokens = text.tokens[: text.prompt] + written
        return text

    def _rows(self, loop: DecodingLoop, texts: Sequence[Transcript], seconds: float) -> list[StreamRow]:
        rows = []
        counts = loop.statistics()
        total = sum(len(written) for written in loop.written)
        for text, count, written in zip(texts, counts, loop.written, strict=True):
            item, versions = self.items[text.place], text.versions or [self.learner.updates]
            row = StreamRow(
                method=self.name, place=text.place, id=item.id, task=item.task, version=versions[0], last_version=versions[-1],
                rounds=count.rounds, tokens=count.tokens, attempts=tuple(count.attempts), accepts=tuple(count.accepts),
                decode_seconds=seconds * len(written) / total, learn_seconds=0.0,
            )  # fmt: skip
            rows.append(row)
        return rows

    # -- on disk ----------------------------------------------------------------------------------------------------------------------

    def _log(self, texts: Sequence[Transcript]) -> None:
        """Adds requests to the store of `keep_log`; those of a chunk that was cut off are there already."""
        target, names = self.decoder.target, self.learner.names
        widths = feature_widths(names, target.shape.hidden_size, len(target.aux_layers))
        writer = StoreWriter(self.folder / LOG, Origin.of_target(target), widths, stage=self.mark)
        for text in texts:
            if text.place not in writer.lengths:
                writer.append(text.conversation(self.items[text.place].task), {name: text.features(name) for name in names})
        writer.finish()

    def _save(self) -> None:
        """The checkpoint, whole or not at all; the rows beside it are written from it."""
        rows = [row.model_dump(mode="json") for row in self.position.rows]
        state = {
            "mark": self.mark, "place": self.position.place, "done": self.position.done, "rows": rows,
            "learner": self.learner.state(texts=not self.position.done),
        }  # fmt: skip
        with writable(self.folder):
            write_whole(self.folder / CHECKPOINT, lambda path: torch.save(state, path))
            write_text(self.folder / ROWS, "".join(row.model_dump_json() + "\n" for row in self.position.rows))

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        state = read_checkpoint(path)
        if state["mark"] != self.mark:
            raise UserError(
                f"'{self.folder}' holds another stream, or one with other options; choose another output (output=...), or {MEND}"
            )
        rows = [StreamRow(**row) for row in state["rows"]]
        self.position = Position(state["place"], rows, state["done"])
        self.learner.load_state(state["learner"])

    def _finish(self) -> None:
        """Saves the learnt drafter, and leaves no tokens behind unless `keep_log` asks for them."""
        self.position.done = True
        pupil = self.learner.pupils[0]
        weights = {**self.learner.serving.state_dict(), **dict(pupil.named_parameters())}
        notes = {"online": self.name, "updates": self.learner.updates, "requests": self.position.place}
        save_drafter(self.learner.serving, self.folder / "drafter", notes, weights)
        self._save()


def learn_from_log(
    drafter: Drafter, head: TargetHead, store: Store, method: str, config: OnlineConfig, sampling: Sampling, window: int, folder: Path
) -> Learner:
    """Learns from a log of decoding (`keep_log`) without decoding: `every` requests at a time, in their order, `epochs` passes over each.

    The learnt drafter goes to folder/drafter. Raises `UserError` where the store is no log.
    """
    store.require(drafter.needs | drafter.teacher_needs)
    learner = Learner(drafter, head, METHODS[method], config, sampling, window)
    for start in range(0, len(store), config.every):
        for index in range(start, min(start + config.every, len(store))):
            learner.add(Transcript.of_store(store, index, learner.names))
        learner.update()
        learner.retire()
    save_drafter(drafter, folder / "drafter", {"online": method, "updates": learner.updates, "requests": len(store)})
    return learner


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `StreamRun` saved, or a `UserError`."""
    data = read_bytes(path, f"'{path}'", MEND)
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # zip, pickle and torch raise errors of their own
        raise UserError(f"'{path}': truncated or corrupt; {MEND}") from error
    return state
