"""`evaluate`: plain decoding and every contender on the same prompts, one after the other for each prompt, in one
process.

Batch 1, warmed up, the order of the runners turning from prompt to prompt. Every item is journaled once it is done, so
that a run that was stopped goes on where it was; its rows enter results.jsonl together at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from drafttrain.core.config import Config, Seed, fingerprint
from drafttrain.core.console import SafeConsole
from drafttrain.core.errors import UserError
from drafttrain.core.sampling import Sampling
from drafttrain.drafters import build
from drafttrain.drafters.base import DrafterConfig
from drafttrain.drafters.hybrid import AnyFree
from drafttrain.evaluation.efficiency import Efficiency, measure
from drafttrain.evaluation.execute import OPEN, can_execute, guarded
from drafttrain.evaluation.journal import ResultJournal, append_whole, read_lines
from drafttrain.evaluation.loops import loops
from drafttrain.evaluation.machine import commit, device_name, versions
from drafttrain.evaluation.peers import Peer, PeerConfig, make_peer
from drafttrain.evaluation.quality import judge
from drafttrain.evaluation.rows import Difference, Row, Sample, Setting, make_rows
from drafttrain.evaluation.runners import GENERATE, PLAIN, Contender, Facts, Runner, shape_name
from drafttrain.evaluation.suites import Item, Suite
from drafttrain.export.load import load_drafter
from drafttrain.runtime.costs import in_turn
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder, find_drafter
from drafttrain.target.adapter import Target

EFFICIENCY_PROMPTS = 4
WARM_UP_TOKENS = 32


class ContenderConfig(Config):
    """A further way of decoding, compared with the recipe's own in the same run."""

    label: str = Field(min_length=1)
    """Its name in tables."""
    drafter: str | AnyFree | None = None
    """Folder of another drafter of the same target, or of the run that trained it; or a family that needs no training by `name`, with its
    options; by default the recipe's own drafter."""
    runtime: RuntimeConfig | None = None
    """How it drafts and verifies; by default as the recipe's `runtime` section says."""


class EvaluationConfig(Config):
    """What `drafttrain eval` measures."""

    suite: str = "builtin"
    """`builtin`, `checkable`, a public benchmark (`spec_bench`, `mt_bench`, `humaneval`, `gsm8k`, `alpaca`; `gsm8k:PATH` reads it from a
    file or folder), or the path of a JSONL file with `id`, `task` and one of `prompt`, `turns`, `messages`."""
    tasks: tuple[str, ...] = ()
    """Tasks of the suite to run; none named: all."""
    limit: int | None = Field(default=None, ge=1)
    """Items of each task to run; by default all."""
    turns: int | None = Field(default=None, ge=1)
    """Turns of each item to run at most, with plain decoding's answers in between; by default all. An answer that can be checked is the
    one to the last turn."""
    max_new_tokens: int = Field(default=128, ge=2)
    """Tokens written for each prompt at most."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the smallest set of likeliest tokens with this mass."""
    seed: Seed = 0
    """Of all sampling."""
    repeats: int = Field(default=1, ge=1)
    """Times the whole suite is run; sampled texts differ between them. From 2 on, rows say where the same run's speed-ups would fall again:
    3 or more passes give an interval of use."""
    warmup: int = Field(default=2, ge=0)
    """Prompts decoded untimed by every contender before the first one counts."""
    contenders: tuple[ContenderConfig, ...] = ()
    """More drafters and settings to compare."""
    peers: tuple[PeerConfig, ...] = (PeerConfig(kind="generate"),)
    """Modes of transformers' own `generate` to compare with. Plain `generate` is the second baseline: where it is left out, rows have
    the speed-up over our own plain decoding alone."""
    efficiency: bool = True
    """Measure the loop efficiency too: a few prompts are decoded again while bare forwards are replayed."""
    quality: bool = False
    """Quality columns for every contender. Those with a lossy rule have them in any case, and plain decoding beside them."""
    execute_code: bool = False
    """Run the programs that the target writes (HumanEval) in namespaces of their own, without files, network or other processes. Implies
    `quality`."""
    execute_unguarded: bool = False
    """Run them with limits alone where the system lets nobody make namespaces: inside a container, or with a model that you trust."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    def chosen(self, suite: Suite) -> Suite:
        """The part of the suite that this configuration asks for."""
        return suite.select(self.tasks, self.limit, self.turns)


def contenders(target: Target, drafter: Path, runtime: RuntimeConfig, config: EvaluationConfig) -> list[Contender]:
    """The recipe's own drafter under its `runtime`, then those of `config.contenders`.

    drafter: its folder, or that of the run that trained it. Raises `UserError` where a drafter is missing or another
    target's.
    """
    out = [_contender(target, None, drafter, runtime)]
    for one in config.contenders:
        which = Path(one.drafter) if isinstance(one.drafter, str) else one.drafter or drafter
        out.append(_contender(target, one.label, which, one.runtime or runtime))
    return out


def _contender(target: Target, label: str | None, which: Path | DrafterConfig, how: RuntimeConfig) -> Contender:
    drafter = build(which, target.shape) if isinstance(which, DrafterConfig) else load_drafter(find_drafter(which), target=target)
    decoder = SpeculativeDecoder(target, drafter, how)
    assert decoder.drafter is not None
    return Contender(label or f"{decoder.drafter.config.name} {shape_name(how.shape)}", decoder)


def peers(target: Target, config: EvaluationConfig) -> list[Peer]:
    """Transformers' modes that `config.peers` asks for, ready to run."""
    return [make_peer(target, peer) for peer in config.peers]


def evaluate(
    target: Target, runs: Sequence[Runner], suite: Suite, config: EvaluationConfig, out_path: Path
) -> list[Row]:
    """Plain decoding and `runs` over the suite; the new rows, which then also stand at the end of `out_path`.

    suite: whole; `config` chooses the part. out_path: results.jsonl; single decodings are kept in `measurements/`
    beside it, and a run that was stopped there goes on. Raises `UserError` before any decoding where a prompt or a
    setting cannot be honoured.
    """
    suite = config.chosen(suite)
    runners: list[Runner] = [Contender(PLAIN, SpeculativeDecoder(target)), *runs]
    facts = {runner.label: runner.facts(config.sampling.check()) for runner in runners}
    if len(facts) < len(runners):
        given = ", ".join(run.label for run in runs)
        raise UserError(f"labels of contenders must differ, and none is '{PLAIN}': got {given}")
    if any(runner.label == GENERATE and not isinstance(runner, Peer) for runner in runs):
        raise UserError(f"the label '{GENERATE}' means transformers' own decoding (evaluation.peers); give the contender another")
    if config.execute_code and not can_execute():
        raise UserError("evaluation.execute_code: this system lacks the limits that programs are run under (POSIX); leave it off")
    if config.execute_code and not config.execute_unguarded and not guarded():
        raise UserError(
            f"evaluation.execute_code: this system makes no namespaces (unshare), so nothing holds what a program does: {OPEN}; run in a "
            f"container of its own with evaluation.execute_unguarded=true, or leave it off"
        )
    bench = Bench(target, runners, config, judged_labels(facts, config))
    bench.check(suite)
    setting = bench.setting(suite, out_path, facts)
    journal = ResultJournal(out_path.parent / "measurements" / f"{setting.run}.jsonl")
    with journal.alone():
        if out_path.exists() and setting.run in {row.run for row in read_rows(out_path)}:
            raise UserError(f"'{out_path}': another process has just finished this measurement; run again for one more")
        entries = bench.measure(suite, journal, setting.commit)
        setting = replace(setting, commit=_commits(entries))
        rows = make_rows(_samples(entries), facts, _efficiencies(entries), setting, _hybrid_costs(entries))
        append_whole(out_path, [row.to_json() for row in rows])
    return rows


def judged_labels(facts: dict[str, Facts], config: EvaluationConfig) -> frozenset[str]:
    """The runners whose texts the target reads again: all where that is asked for, else those with a lossy rule and, to compare them
    with, plain decoding."""
    if config.quality or config.execute_code:
        return frozenset(facts)
    lossy = frozenset(label for label, known in facts.items() if not known.lossless)
    return lossy | {PLAIN} if lossy else lossy


def read_rows(path: Path) -> list[Row]:
    """All rows of a results file, in the order in which they were measured."""
    if not path.is_file():
        raise UserError(f"results '{path}': no such file; `drafttrain eval` writes it")
    return [Row.from_json(entry, f"'{path}', line {number}") for number, entry in enumerate(read_lines(path), 1)]


@dataclass
class Bench:
    """Runners side by side on one target."""

    target: Target
    runners: list[Runner]
    config: EvaluationConfig
    judged: frozenset[str] = frozenset()  # labels of the runners whose quality is measured

    def __post_init__(self) -> None:
        self.reader = SpeculativeDecoder(self.target)

    def check(self, suite: Suite) -> None:
        """Every first prompt fits into the context."""
        room = self.target.max_context - self.config.max_new_tokens
        for item in suite.items:
            length = len(self.reader.tokenize(item.opening()))
            if length > room:
                raise UserError(
                    f"suite '{suite.name}', item '{item.id}': {length} prompt tokens and {self.config.max_new_tokens} new "
                    f"ones exceed the target's context of {self.target.max_context}; lower evaluation.max_new_tokens or "
                    f"leave its task out"
                )

    def setting(self, suite: Suite, out_path: Path, facts: dict[str, Any]) -> Setting:
        """The run's name is made from everything that shapes its numbers; a finished one of the same name makes it the
        next."""
        target, config = self.target, self.config
        where = (device_name(target.device), torch.get_num_threads(), versions())
        dtype = str(target.dtype).removeprefix("torch.")
        known = {label: asdict(fact) for label, fact in facts.items()}
        name = fingerprint(target.fingerprint, dtype, where, suite.hash, config, known)
        finished = {row.run for row in read_rows(out_path)} if out_path.exists() else set()
        number = next(n for n in range(1, len(finished) + 2) if f"{name}-{n}" not in finished)
        return Setting(
            f"{name}-{number}", target.name, target.fingerprint, dtype, suite.name, suite.hash, *config.sampling[:3],
            config.max_new_tokens, config.repeats, config.seed, *where, commit(),
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )  # fmt: skip

    def warm_up(self, suite: Suite) -> None:
        """The longest prompts first: whatever is allocated or compiled once is done then."""
        prompts = sorted((self.reader.tokenize(item.opening()) for item in suite.items), key=len, reverse=True)
        tokens = min(WARM_UP_TOKENS, self.config.max_new_tokens)
        for prompt in prompts[: self.config.warmup]:
            for runner in self.runners:
                runner.run(prompt, tokens, self.config.sampling, self.config.seed)

    def measure(self, suite: Suite, journal: ResultJournal, commit: str | None) -> list[dict[str, Any]]:
        """Decodes what the journal lacks; everything that then stands in it. commit: of the code that decodes."""
        entries, config = [*journal.entries], self.config
        done = {(entry["repeat"], entry["item"]) for entry in entries if "item" in entry}
        units = [(repeat, place, item) for repeat in range(config.repeats) for place, item in enumerate(suite.items)]
        waiting = [unit for unit in units if (unit[0], unit[2].id) not in done]
        if waiting:
            self.warm_up(suite)
            if hybrid_costs := {
                one.label: one.decoder.hybrid_costs for one in self.runners if isinstance(one, Contender) and one.decoder.hybrid_costs
            }:
                entries.append({"hybrid_costs": hybrid_costs})
                journal.append(entries[-1])
        with progress_bar() as progress:
            what = f"{suite.name}: {len(self.runners)} runners"
            bar = progress.add_task(what, total=len(units), completed=len(units) - len(waiting))
            for repeat, place, item in waiting:
                samples = [sample.to_json() for sample in self.hold(item, repeat, place)]
                entries.append({"repeat": repeat, "item": item.id, "commit": commit, "samples": samples})
                journal.append(entries[-1])
                progress.advance(bar)
        if config.efficiency and not any("efficiency" in entry for entry in entries):
            entries.append({"efficiency": self.efficiencies(suite)})
            journal.append(entries[-1])
        return entries

    def hold(self, item: Item, repeat: int, place: int) -> list[Sample]:
        """One item, turn by turn, by every runner."""
        samples: list[Sample] = []
        answers: list[str] = []
        for turn in range(len(item.turns)):
            prompt = self.reader.tokenize(item.opening() if turn == 0 else item.asked(turn, answers))
            if len(prompt) + self.config.max_new_tokens > self.target.max_context:
                break  # the conversation has outgrown the context
            asked = (prompt, self.config.max_new_tokens, self.config.sampling, self._seed(item.id, turn, repeat))
            outcomes = {runner.label: runner.run(*asked) for runner in in_turn(self.runners, place + repeat)}
            answers.append(outcomes[PLAIN].text)
            check = item.check if turn == len(item.turns) - 1 else None
            for label, outcome in outcomes.items():
                difference = self._difference(prompt, outcomes[PLAIN].tokens, outcome.tokens)
                looping = loops(outcome.tokens)
                sample = Sample(item.id, turn, repeat, item.task, label, outcome, looping, difference)
                if label in self.judged:
                    texts = (outcome.tokens, outcome.text, answers[-1])
                    sample.quality = judge(self.target, prompt, *texts, check, self.config.sampling, self.config.execute_code)
                samples.append(sample)
        return samples

    def efficiencies(self, suite: Suite) -> dict[str, dict[str, Any]]:
        """Of every runner that decodes through our runtime, on the first item of each task."""
        first = {item.task: item for item in reversed(suite.items)}
        prompts = [self.reader.tokenize(first[task].opening()) for task in suite.tasks[:EFFICIENCY_PROMPTS]]
        found: dict[str, dict[str, Any]] = {}
        for runner in self.runners:
            if isinstance(runner, Contender):
                efficiency = measure(runner.decoder, prompts, self.config.sampling, self.config.seed)
                found |= {runner.label: efficiency.to_json()} if efficiency else {}
        return found

    def _difference(self, prompt: list[int], plain: list[int], other: list[int]) -> Difference | None:
        """Where a greedy output leaves plain decoding's, and by how little; None where it does not, or where tokens are
        sampled."""
        if self.config.temperature > 0 or plain == other:
            return None
        at = next((place for place, pair in enumerate(zip(plain, other, strict=False)) if pair[0] != pair[1]), None)
        if at is None:
            return Difference(min(len(plain), len(other)), None)
        return Difference(at, margin(self.target, prompt + plain[:at], plain[at], other[at]))

    def _seed(self, *which: str | int) -> int:
        return int(fingerprint(self.config.seed, *which)[:15], 16)


def margin(target: Target, context: list[int], ours: int, theirs: int) -> float:
    """By how much the target's logit of `ours` exceeds that of `theirs` after `context`, in its own precision, read in
    one pass."""
    tokens = torch.tensor([context], device=target.device)
    read = target.prefill(target.new_cache(1, len(context)), tokens, torch.tensor([len(context)], device=target.device))
    return float(read.logits[0, ours].float() - read.logits[0, theirs].float())


def _samples(entries: Sequence[dict[str, Any]]) -> list[Sample]:
    return [Sample.from_json(sample) for entry in entries for sample in entry.get("samples", [])]


def _commits(entries: Sequence[dict[str, Any]]) -> str | None:
    """Those that decoded; a run that went on after the code had changed names both."""
    return ", ".join(dict.fromkeys(entry["commit"] for entry in entries if entry.get("commit"))) or None


def _efficiencies(entries: Sequence[dict[str, Any]]) -> dict[str, Efficiency]:
    return {label: Efficiency(**data) for entry in entries for label, data in entry.get("efficiency", {}).items()}


def _hybrid_costs(entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By label; of a run that went on, the last ones."""
    return {label: found for entry in entries for label, found in entry.get("hybrid_costs", {}).items()}


def progress_bar() -> Progress:
    """On stderr: what is done, how many units of it, and for how long."""
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*shown, console=SafeConsole(stderr=True))
