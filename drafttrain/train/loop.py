"""The one training loop: anything with `needs` and `loss`, on one process or under `accelerate launch`.

A step sums the loss over all ranks and micro-batches and divides by the sum of the counts that the losses return, so that how rows are
spread over processes changes nothing. What it reports on the held-out part is the accepted length that decoding will measure.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from pydantic import Field, model_validator
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from drafttrain.core.config import Config, Seed, fingerprint
from drafttrain.core.console import SafeConsole
from drafttrain.core.disk import locked, writable, write_text
from drafttrain.core.errors import UserError
from drafttrain.core.layers import native_dtype
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.types import TrainingBatch
from drafttrain.data.collate import PackedRows, learnable
from drafttrain.data.store import Store
from drafttrain.drafters.base import Drafter, Loss
from drafttrain.drafters.files import save_drafter
from drafttrain.evaluation.memory import PeakMemory
from drafttrain.runtime.replay import Expected, expect, replay, stands
from drafttrain.runtime.stats import Statistics
from drafttrain.target.adapter import Target
from drafttrain.target.head import TargetHead
from drafttrain.train.checkpoint import Progress, resume, save
from drafttrain.train.optimizers import WeightAverage, new_optimizer

SHARDED = {"ACCELERATE_USE_FSDP": "FSDP (configs/fsdp2.yaml)", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (configs/zero2.yaml, zero3.yaml)"}
"""What `accelerate launch` says in the environment: on CPUs accelerate would drop it and train unsharded."""

ALONE = {"ACCELERATE_USE_CPU", "MASTER_ADDR"}
"""What `accelerate launch` leaves in the environment where it starts a single process although several were asked for."""

START_STATES = 16_384
"""States of the target that low-rank output heads are fitted to; the demo target's need some 10,000."""

LOSS_NUMBERS = 1
"""The purpose of the random numbers that losses draw (`SeededRng`)."""

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Config):
    """How a drafter is trained."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; give this, `epochs` or `minutes`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training part."""
    minutes: float | None = Field(default=None, gt=0)
    """Minutes of training steps, evaluations and checkpoints not counted: learning rate and curricula follow that clock. For machines of
    unknown speed; not reproducible step by step."""
    batch_rows: int = Field(default=8, ge=1)
    """Packed rows a process and micro-batch."""
    row_length: int = Field(default=2048, ge=8)
    """Tokens a packed row; longer conversations are cut."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches an optimizer step."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    """What the learning rate does after its warm-up."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the training in which the learning rate rises."""
    lr_floor: float = Field(default=0.05, ge=0, le=1)
    """Where the schedule ends, as a share of `lr`."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled, on matrices only."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's moments."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for matrices, AdamW for vectors and tables over a vocabulary, at one learning rate."""
    momentum: Beta = 0.95
    """Muon's."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Evaluate and keep an exponential moving average of the weights, of this decay a step; None: the weights themselves."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; `auto`: bfloat16 where the device has instructions for it, else float32. Weights and optimizer stay in
    float32."""
    start: Literal["target", "random"] = "target"
    """Initialise from the target's own head and layers where the family can."""
    held_out: float = Field(default=0.05, ge=0, lt=1)
    """Share of prompts kept out of training (by their hash)."""
    eval_every: int = Field(default=500, ge=1)
    """Steps between evaluations; one more comes at the end."""
    eval_tokens: int = Field(default=20_000, ge=1)
    """Held-out tokens an evaluation reads; greedy answers where there are any."""
    eval_length: int = Field(default=5, ge=1)
    """Chain length (K) of the accepted length that decides which drafter is best."""
    eval_temperature: float = Field(default=0.0, ge=0)
    """Temperature of the decoding whose accepted length decides. 0: greedy. Above: of held-out answers that the target sampled at just
    this temperature, by sum min(p, q) with unbiased weights (`runtime/replay.py`)."""
    save_every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    seed: Seed = 0
    """Of initialisation and order."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where curves go besides train.jsonl."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if sum(length is not None for length in (self.steps, self.epochs, self.minutes)) != 1:
            raise ValueError("give exactly one of steps, epochs, minutes")
        return self

    def multiplies_in(self, device: torch.device) -> Literal["float32", "bfloat16"]:
        """What `precision` means on this device."""
        return native_dtype(device) if self.precision == "auto" else self.precision

    def lr_at(self, done: float) -> float:
        """The learning rate when a share `done` of the training is over."""
        if done < self.warmup:
            return self.lr * max(done / self.warmup, 0.01)
        if self.schedule == "constant":
            return self.lr
        left = 1 - (done - self.warmup) / (1 - self.warmup)
        shape = left if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        return self.lr * (self.lr_floor + (1 - self.lr_floor) * shape)


@dataclass
class TrainResult:
    """What a training run came to."""

    steps: int
    tokens: int
    seconds: float
    best_tau: float | None
    """Held-out accepted length of the drafter that was kept; None where nothing was held out."""
    alpha: list[float | None] = field(default_factory=list)
    peak_memory: int = 0
    """Bytes, of this process (`evaluation.memory.PeakMemory`)."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Conversations, and answers' ends, that were not trained on or judged by, by reason."""


class Stopped(Exception):  # noqa: N818 (it is no mistake)
    """The run was asked to stop and has saved; `signal` says by what."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; progress is saved, run the same command to go on")
        self.signum = signum


class Learner(nn.Module):
    """The drafter as DDP, FSDP and DeepSpeed want it: every use of its weights goes through `forward`."""

    def __init__(self, drafter: Drafter) -> None:
        super().__init__()
        self.drafter = drafter

    def forward(
        self, batch: TrainingBatch, head: TargetHead, draft_length: int = 0, sampling: Sampling | None = None,
        rng: SeededRng | None = None,
    ) -> Loss | Tensor | tuple[Tensor, Tensor]:
        """The loss; or with `draft_length` the greedy guesses of that many steps, with `sampling` too how likely their draws stand
        (`stands`)."""
        if sampling is not None:
            return stands(self.drafter, batch, head, sampling, draft_length)
        if draft_length:
            return self.drafter.teacher_forced_drafts(batch, head, draft_length)
        return self.drafter.loss(batch, head, rng)


def train(
    drafter: Drafter, store: Store, config: TrainConfig, head: TargetHead, output: Path, target: Target | None = None,
    accelerator: Accelerator | None = None,
) -> TrainResult:
    """Trains `drafter` on `store` and leaves the best one in output/drafter; goes on where an earlier call was cut off.

    head: the frozen target's. target: computes the features that the store lacks. Raises `UserError` for data that cannot be learnt from,
    `Stopped` after SIGINT, SIGTERM or SIGHUP.
    """
    accelerator = accelerator or new_accelerator(config, output)
    with writable(output):
        output.mkdir(parents=True, exist_ok=True)
    alone = locked(output / ".train.lock", output) if accelerator.is_main_process else nullcontext()
    with alone:
        return TrainingRun(drafter, store, config, head, output, target, accelerator).run()


def new_accelerator(config: TrainConfig, output: Path) -> Accelerator:
    """What `accelerate launch` set up, or a single process.

    Raises `UserError` where the tracker is not installed, the launch asked for a way of sharding that needs accelerators, or for several
    processes and only one came.
    """
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise UserError(
            f"train.tracker '{config.tracker}': the package is not installed; pip install {config.tracker} (all of them: "
            f"'drafttrain[trackers]'), or set train.tracker=none: the curves are in train.jsonl anyway"
        )
    if config.accumulate > 1 and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(  # its engine steps inside `backward`: gradients cannot be divided once the last count is known
            f"train.accumulate {config.accumulate}: DeepSpeed steps before the labels of all micro-batches are counted; set "
            f"train.accumulate=1 with more train.batch_rows, or launch with configs/fsdp2.yaml"
        )
    cpu = not torch.accelerator.is_available()
    for switch, name in SHARDED.items():
        if cpu and os.environ.get(switch, "false").lower() == "true":
            raise UserError(f"{name} shards over accelerators and this machine has none; launch with configs/cpu.yaml instead")
    mixed = "bf16" if config.multiplies_in(torch.accelerator.current_accelerator() or torch.device("cpu")) == "bfloat16" else "no"
    if AcceleratorState._shared_state.get("_mixed_precision", mixed) != mixed:
        AcceleratorState._reset_state()  # an earlier training of this process had another precision; the process group stays
    accelerator = Accelerator(
        cpu=cpu,  # else accelerate would not join the processes of a launch on CPUs
        mixed_precision=mixed,
        gradient_accumulation_steps=config.accumulate,
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(project_dir=str(output)),
    )
    if accelerator.num_processes == 1 and os.environ.keys() >= ALONE:
        raise UserError(
            "`accelerate launch` was asked for several processes and started one, as it does without several GPUs; launch with "
            "--config_file configs/cpu.yaml, or `torchrun --nproc_per_node 2 -m drafttrain train RECIPE`, or ask for --num_processes 1"
        )
    if accelerator.num_processes > 1 and cpu:  # gloo's threads, where Python's end finds them in a group, abort some exits
        atexit.register(accelerator.state.destroy_process_group)
    return accelerator


class TrainingRun:
    """One training run's moving parts."""

    def __init__(
        self, drafter: Drafter, store: Store, config: TrainConfig, head: TargetHead, output: Path, target: Target | None,
        accelerator: Accelerator,
    ) -> None:
        self.store, self.config, self.output, self.target, self.accelerator = store, config, output, target, accelerator
        self.judged_at = Sampling(config.eval_temperature)
        self.wanted = tuple(
            sorted(drafter.needs | drafter.teacher_needs | (frozenset() if self.judged_at.greedy else {"last_hidden_state"}))
        )
        self.stored = tuple(name for name in self.wanted if name in store.feature_names)
        if set(self.stored) != set(self.wanted) and target is None:
            store.require(self.wanted)
        self.head = head.to(accelerator.device)
        self.data = self._packed(self._split("train"), accelerator.process_index, accelerator.num_processes)
        self.left_out: dict[str, int] = {}
        self._say_left_out("training", self.data.left_out)
        self.held_out = self._held_out_batches()
        self.family = drafter
        self._start(drafter)
        self.learner, self.optimizer = accelerator.prepare(Learner(drafter), self._optimizer(drafter))
        self.average = None if config.ema is None else WeightAverage(self.learner.parameters(), config.ema)
        if self.average is not None:
            accelerator.register_for_checkpointing(self.average)
        self.progress = resume(accelerator, output / "checkpoints", self._fingerprint())
        self.signal: int | None = None

    @property
    def lead(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def run(self) -> TrainResult:
        """Trains to the end."""
        output, memory = self.output, PeakMemory(self.accelerator.device)
        output.mkdir(parents=True, exist_ok=True)
        self._forget_after(self.progress.step)
        if self.config.tracker != "none":
            said = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in self.config}
            self.accelerator.init_trackers("drafttrain", config=said)  # trackers take no lists
        before = {number: signal.signal(number, self._on_signal) for number in _heeded()} if _main_thread() else {}
        try:
            with self._bar() as bar:
                self._loop(bar)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.config.tracker != "none":
                self.accelerator.end_training()
        progress = self.progress
        return TrainResult(
            progress.step, progress.tokens, progress.seconds, progress.best, progress.alpha, memory.read(), self.left_out
        )

    def _loop(self, bar: Bar) -> None:
        task = bar.add_task("training", total=1.0, note="")
        bar.update(task, completed=self._done())
        micro = self._micro_batches(self.progress.step * self.config.accumulate)
        while self._done() < 1.0:
            started = time.perf_counter()
            line = self._step([next(micro) for _ in range(self.config.accumulate)])
            self.progress.seconds += time.perf_counter() - started
            last = self._done() >= 1.0
            if last or self.progress.step % self.config.eval_every == 0:
                self._check_weights()
                with self.average.in_place() if self.average is not None else nullcontext():
                    line |= self._evaluate()
            self._log(line)
            bar.update(task, completed=min(1.0, self._done()), note=_note(line, self.progress))
            stopping = self._asked_to_stop()
            if last or stopping or self.progress.step % self.config.save_every == 0:
                self._check_weights()
                save(self.accelerator, self.output / "checkpoints", self.progress, self.config.keep)
            if stopping and not last:
                raise Stopped(stopping)

    def _step(self, batches: list[tuple[TrainingBatch, SeededRng]]) -> dict[str, float]:
        """One optimizer step; returns what to log."""
        accelerator, config, done = self.accelerator, self.config, self._done()
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(done)
        count = torch.zeros((), device=accelerator.device)
        divisor = float(config.batch_rows * config.row_length)  # stands in for the total until the last micro-batch has said its count
        logged: dict[str, Tensor] = {"loss": torch.zeros((), device=accelerator.device)}
        for batch, rng in batches:
            batch.progress = done
            with accelerator.accumulate(self.learner), accelerator.autocast():
                loss = self.learner(batch, self.head, rng=rng)
                count += loss.count.detach()
                if accelerator.sync_gradients:
                    total = float(accelerator.reduce(count, "sum").clamp_min(1))
                if config.accumulate == 1:
                    divisor = total
                # processes average their gradients and accelerate divides by the micro-batches: undo both
                accelerator.backward(loss.sum * (accelerator.num_processes * config.accumulate / divisor))
                if accelerator.sync_gradients:
                    if config.accumulate > 1:
                        self._scale_gradients(divisor / total)
                    accelerator.clip_grad_norm_(self.learner.parameters(), config.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            logged["loss"] += loss.sum.detach()
            for name, value in loss.metrics.items():
                logged[name] = logged.get(name, 0) + value.detach()
        if self.average is not None:
            self.average.update()
        summed = accelerator.reduce(logged, "sum")
        own_tokens = sum(int((batch.document >= 0).sum()) for batch, _ in batches)
        tokens = accelerator.reduce(torch.tensor(own_tokens, device=accelerator.device), "sum")
        self.progress.step += 1
        self.progress.tokens += int(tokens)
        line = {"step": self.progress.step, "loss": float(summed["loss"] / total), "lr": config.lr_at(done)}
        if not math.isfinite(line["loss"]):
            raise self._diverged(f"the loss is {line['loss']}")
        names = [name for name in summed if f"{name}_count" in summed]
        return line | {name: float(summed[name] / summed[f"{name}_count"].clamp_min(1)) for name in names}

    def _scale_gradients(self, factor: float) -> None:
        for weight in self.learner.parameters():
            if weight.grad is not None:
                weight.grad.mul_(factor)

    def _check_weights(self) -> None:
        """A finite loss says nothing of the step after it: looked at before weights are kept."""
        own = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in self.learner.parameters()]
        broken = torch.stack([~weight.detach().isfinite().all() for weight in own]).any().float()
        if self.accelerator.reduce(broken, "sum"):
            raise self._diverged("weights are no longer finite numbers")

    def _diverged(self, found: str) -> UserError:
        return UserError(
            f"training diverged, step {self.progress.step}: {found}; try a lower train.lr (now {self.config.lr:g}), a longer train.warmup "
            f"or train.precision=float32 in another output folder. What was saved before stays in '{self.output}'"
        )

    def _evaluate(self) -> dict[str, float]:
        """Held-out accepted length; the best drafter so far goes to output/drafter, or the newest where nothing is held out."""
        if not self.held_out:
            self._keep(None)
            return {}
        self.learner.eval()
        with torch.no_grad(), self.accelerator.autocast():
            found = self._replayed(self._ready(self.held_out))
        self.learner.train()
        if self.progress.best is None or found.tau > self.progress.best:
            self.progress.best, self.progress.alpha = found.tau, found.alpha
            self._keep(found)
        known = {f"held_out_alpha_{depth}": value for depth, value in enumerate(found.alpha) if value is not None}
        return {"tau": found.tau} | known

    def _replayed(self, batches: Iterator[TrainingBatch]) -> Statistics | Expected:
        """What decoding at `eval_temperature` would count."""
        if self.judged_at.greedy:
            return replay(lambda batch, steps: self.learner(batch, self.head, steps), batches, self.config.eval_length)
        return expect(lambda batch, steps: self.learner(batch, self.head, steps, self.judged_at), batches, self.config.eval_length)

    def _keep(self, found: Statistics | Expected | None) -> None:
        weights = self.accelerator.get_state_dict(self.learner)
        if self.lead:
            own = {name.removeprefix("drafter."): value for name, value in weights.items()}
            notes = {"step": self.progress.step, "tokens": self.progress.tokens, "train": self.config.model_dump(mode="json")}
            if found:
                notes |= {"held_out_tau": found.tau, "held_out_alpha": found.alpha, "length": self.config.eval_length}
            save_drafter(self.family, self.output / "drafter", notes, own)

    # -- data -------------------------------------------------------------------------------------------------------------------------

    def _split(self, part: Literal["train", "held_out"]) -> list[int]:
        return self.store.split(part, self.config.held_out, self.config.seed)

    def _packed(self, indices: list[int], rank: int, world: int) -> PackedRows:
        if not indices:
            raise UserError(f"store '{self.store.folder}': no conversation is left to train on; it holds {len(self.store)} in all")
        config = self.config
        return PackedRows(self.store, indices, config.batch_rows, config.row_length, self.stored, config.seed, rank, world)

    def _say_left_out(self, part: str, left_out: dict[str, int]) -> None:
        self.left_out |= {f"{part} {reason}": count for reason, count in left_out.items()}
        for reason, count in left_out.items():
            if self.lead:
                SafeConsole(stderr=True).print(f"left out: {count:,} {part} {reason}", soft_wrap=True)

    def _held_out_batches(self) -> list[TrainingBatch]:
        """The same on every rank, so that sharded drafters evaluate together."""
        chosen, tokens = [], 0
        held, left_out = learnable(self.store, self._split("held_out"), self.config.row_length)
        self._say_left_out("held-out", left_out)
        for index in self._judged(held):
            if tokens >= self.config.eval_tokens:
                break
            chosen.append(index)
            tokens += int(self.store.lengths[index])
        return list(self._packed(chosen, 0, 1).batches(0)) if chosen else []

    def _judged(self, held: list[int]) -> list[int]:
        """Those whose answers were drawn as `eval_temperature` says, and alike; sets their distribution."""
        temperature = self.config.eval_temperature
        drawn = {index: self.store[index].meta for index in held}
        alike = [index for index in held if drawn[index].get("temperature") == temperature]
        if temperature == 0 or not held:
            return alike or held
        if not alike:
            known = sorted({str(meta.get("temperature")) for meta in drawn.values()})
            raise UserError(
                f"train.eval_temperature {temperature}: no held-out answer was drawn at it (theirs: {', '.join(known)}); take one of "
                f"these, add it to data.temperatures, or raise train.held_out"
            )
        top_p = drawn[alike[0]].get("top_p", 1.0)
        self.judged_at = Sampling(temperature, 0, top_p)
        return [index for index in alike if drawn[index].get("top_p", 1.0) == top_p]

    def _micro_batches(self, skip: int) -> Iterator[tuple[TrainingBatch, SeededRng]]:
        """This rank's batches from number `skip` on, epoch after epoch, with the random numbers of their rows."""
        epoch, first = divmod(skip, len(self.data))
        while True:
            for number, batch in enumerate(self._ready(self.data.batches(epoch, first)), start=first):
                yield batch, self._loss_rng(epoch, number, len(batch.tokens))
            epoch, first = epoch + 1, 0

    def _loss_rng(self, epoch: int, number: int, rows: int) -> SeededRng:
        """Of this rank's batch `number` of an epoch: streams by the rows' places in the epoch, which no number of processes changes."""
        accelerator = self.accelerator
        before = (number * accelerator.num_processes + accelerator.process_index) * rows
        places = torch.arange(before, before + rows, device=accelerator.device)
        return SeededRng(self.config.seed, places + (epoch << 32), LOSS_NUMBERS)

    def _ready(self, batches: Any) -> Iterator[TrainingBatch]:
        """Batches on the device, with the features that were not stored."""
        missing = set(self.wanted) - set(self.stored)
        for loaded in batches:
            batch = loaded.to(self.accelerator.device)
            if missing and self.target is not None:
                batch.features |= self.target.encode(batch.tokens, batch.position, batch.document, missing)
            yield batch

    # -- start, end, bookkeeping ------------------------------------------------------------------------------------------------------

    def _start(self, drafter: Drafter) -> None:
        drafter.to(self.accelerator.device)
        if self.config.start == "target":
            counts = self.store.answer_counts(drafter.target.vocab_size, self._split("train"))
            drafter.start_from(self.head, counts)
            if drafter.reads_start_states:
                drafter.start_output(self.head, counts, self._start_states())

    def _start_states(self) -> Tensor:
        """[R, D] last states of the target at answer tokens, the same on every rank."""
        states: list[Tensor] = []
        for batch in self._ready(self._packed(self._split("train"), 0, 1).batches(0)):
            states.append(batch.features["last_hidden_state"][batch.mask].float())
            if sum(len(part) for part in states) >= START_STATES:
                break
        return torch.cat(states)[:START_STATES]

    def _optimizer(self, drafter: Drafter) -> torch.optim.Optimizer:
        config = self.config
        return new_optimizer(drafter, config.optimizer, config.lr, config.betas, config.weight_decay, config.momentum)

    def _done(self) -> float:
        """Share of the training that is over."""
        config, progress = self.config, self.progress
        if config.minutes is not None:
            spent = torch.tensor(progress.seconds / (60 * config.minutes), device=self.accelerator.device)
            return float(self.accelerator.reduce(spent, "mean"))  # ranks must agree
        steps = config.steps or max(1, round((config.epochs or 1) * len(self.data) / config.accumulate))
        return progress.step / steps

    def _fingerprint(self) -> str:
        free = {"keep", "save_every", "tracker"}  # may change between a run and its continuation
        return fingerprint(self.config.model_dump(mode="json", exclude=free), self.family.config, self.store.index.stage, len(self.store))

    def _log(self, line: dict[str, float]) -> None:
        line = line | {"tokens": self.progress.tokens, "seconds": round(self.progress.seconds, 3)}
        if self.lead:
            with (self.output / "train.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.config.tracker != "none":
            self.accelerator.log(line, step=self.progress.step)

    def _forget_after(self, step: int) -> None:
        """Drops log lines of steps that will be done again, and damaged ones."""
        path = self.output / "train.jsonl"
        if not self.lead or not path.exists():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if (done := _step_of(line)) is not None and done <= step]
        write_text(path, "".join(line + "\n" for line in kept))

    def _bar(self) -> Bar:
        note = TextColumn("{task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(), note, TimeElapsedColumn(), TimeRemainingColumn())
        return Bar(*columns, console=SafeConsole(stderr=True), disable=not self.lead)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def _asked_to_stop(self) -> int:
        """The signal some rank got, or 0; ranks agree."""
        asked = torch.tensor(float(self.signal or 0), device=self.accelerator.device)
        return int(self.accelerator.gather(asked[None]).max()) if self.accelerator.num_processes > 1 else int(asked)


def _note(line: dict[str, float], progress: Progress) -> str:
    alphas = " ".join(f"{value:.2f}" for name, value in line.items() if name.startswith("alpha"))
    tau = f" best tau {progress.best:.2f}" if progress.best else ""
    return f"step {progress.step} loss {line['loss']:.3f} alpha {alphas}{tau} {progress.tokens / max(progress.seconds, 1e-9):,.0f} tok/s"


def _heeded() -> list[signal.Signals]:
    """Signals after which training saves; not those that whoever started the process has it ignore, as `nohup` does."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [signal.Signals[name] for name in names if name in signal.Signals.__members__]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def _main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def _step_of(line: str) -> int | None:
    """Of a line of the log; None where it is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
