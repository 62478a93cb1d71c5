"""`drafttrain verify`: the exported drafter in a real engine, its rounds beside ours, and why they differ where they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from drafttrain.core.errors import UserError, nearest
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.eagle3 import Eagle3
from drafttrain.drafters.files import load_drafter
from drafttrain.engines import ENGINES
from drafttrain.engines.base import Engine, Job
from drafttrain.engines.compare import Verdict, chain_decoder, compare, decode, likely_causes
from drafttrain.engines.tensors import TensorGap, gaps, likely_cause, peers_tensors, tensors_of
from drafttrain.evaluation.suites import load_suite
from drafttrain.export import FORMATS, write_format
from drafttrain.export.base import Source
from drafttrain.target.adapter import Target
from drafttrain.target.files import TargetConfig, resolve

MARGIN = 64
"""Positions that engines want beyond prompt and answer."""


@dataclass
class Order:
    """What is verified, and on what."""

    run: Path  # of the trained drafter
    target: TargetConfig
    engine: str
    form: str | None = None  # another format than the engine's first
    folder: Path | None = None  # a folder exported already
    suite: str = "builtin"
    prompts: int = 12
    max_new_tokens: int = 64
    length: int = 3
    threads: int = 1


@dataclass
class Served:
    """A target, its drafter, and the folder that the engine reads."""

    target: Target
    load: Callable[[], Drafter]
    export: Path
    job: Job
    prompts: list[list[int]]


def engine_of(name: str) -> Engine:
    if name not in ENGINES:
        raise UserError(f"engine '{name}' is unknown{nearest(name, ENGINES)}; known: {', '.join(ENGINES)}")
    return ENGINES[name]()


def served(order: Order, engine: Engine) -> Served:
    """Everything ready: exported in fp32 where no folder is given, prompts tokenized."""
    engine.python()  # before long work
    config = order.target.model_copy(update={"dtype": "float32", "device": "cpu"})
    folder, home = order.run / "drafter", resolve(config)
    target = Target.load(config)
    drafter = load_drafter(folder, target.fingerprint)
    target.aux_layers = drafter.target.aux_layers
    method = engine.method(drafter.config.name)
    export = order.folder or exported(order, engine, Source(drafter, folder, home, config))
    items = load_suite(order.suite).items
    chosen = items[:: max(1, len(items) // order.prompts)][: order.prompts]
    decoder = chain_decoder(target, load_drafter(folder), order.length)
    prompts = [decoder.tokenize(item.opening()) for item in chosen]
    context = max(map(len, prompts)) + order.max_new_tokens + MARGIN
    job = Job(
        engine.target(home, export, order.run / "verify"), engine.drafter(export), method, prompts, order.length, order.max_new_tokens,
        context, list(target.eos_ids), order.threads,
    )  # fmt: skip
    return Served(target, lambda: load_drafter(folder), export, job, prompts)


def exported(order: Order, engine: Engine, source: Source) -> Path:
    """The drafter as the engine reads it, in fp32, below the run."""
    form = engine.form(source.drafter.config.name, source.home)
    if order.form is not None:
        if order.form not in FORMATS:
            raise UserError(f"format '{order.form}' is unknown{nearest(order.form, FORMATS)}; known: {', '.join(FORMATS)}")
        form = FORMATS[order.form].model_validate({"name": order.form, "dtype": "float32"})
    form.check(source.drafter.config, source.drafter.target)
    return write_format(form, source, order.run / "verify" / f"{engine.name}-{form.name}")


def verify(order: Order) -> Verdict:
    """Both decode the same prompts greedily in fp32."""
    engine = engine_of(order.engine)
    ready = served(order, engine)
    version, theirs = engine.decode(ready.job)
    ours = decode(chain_decoder(ready.target, ready.load(), order.length), ready.prompts, order.max_new_tokens)
    compared = compare(ours, theirs, ready.prompts, ready.target, order.length, engine.by_position)
    verdict = Verdict(order.engine, version, order.length, compared, engine.by_position)
    if verdict.differing:
        first = verdict.differing[0]
        prompt, count = ready.prompts[first], theirs[first]
        verdict.causes = likely_causes(
            ready.load, ready.target, prompt, count, order.length, order.max_new_tokens, engine.by_position
        )
    return verdict


@dataclass
class TensorVerdict:
    """What the comparison with a peer's own class found."""

    version: str
    gaps: list[TensorGap]
    causes: list[str]

    @property
    def differs(self) -> bool:
        return self.first is not None

    @property
    def first(self) -> TensorGap | None:
        """The first tensor that differs."""
        return next((gap for gap in self.gaps if gap.differs), None)


def verify_tensors(order: Order) -> TensorVerdict:
    """The peer's own class over one answer of ours: every tensor, from the features to the drafted tokens."""
    engine = engine_of(order.engine)
    ready = served(order, engine)
    drafter = ready.load()
    assert isinstance(drafter, Eagle3)
    (answer,) = decode(chain_decoder(ready.target, ready.load(), order.length), ready.prompts[:1], order.max_new_tokens)
    tokens = ready.prompts[0] + answer.tokens
    version, theirs = peers_tensors(engine, ready.job, ready.target, tokens)
    verdict = TensorVerdict(version, gaps(tensors_of(drafter, ready.target, tokens, order.length), theirs), [])
    if verdict.first is not None:
        verdict.causes = likely_cause(ready.load, ready.target, tokens, theirs, order.length)
    return verdict
