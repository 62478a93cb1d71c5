"""The stages of a recipe, from data to export: each runs alone, or all in order, skipping what is done and resuming what is half done.

    OUTPUT/data/       conversations        OUTPUT/drafter/      the best drafter       OUTPUT/results.jsonl  what `eval` measured
    OUTPUT/features/   captured features    OUTPUT/checkpoints/  to resume training     OUTPUT/export/        for others to load
    OUTPUT/stages/     for each stage its recipe, the versions, and `state.json`: what its result depends on, and whether it is done
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.text import Text

from drafttrain import legality
from drafttrain.core.config import Config, fingerprint, parse
from drafttrain.core.console import SafeConsole
from drafttrain.core.disk import check_file_name, folder_fingerprint, locked, read_json, writable, write_text
from drafttrain.core.errors import UserError
from drafttrain.data import capture as capturing
from drafttrain.data import regenerate as regenerating
from drafttrain.data.licences import licences, of_folder
from drafttrain.data.origin import Origin
from drafttrain.data.outputs import past_outputs
from drafttrain.data.shards import INDEX, read_index
from drafttrain.data.share import ALL, Share
from drafttrain.data.store import Store
from drafttrain.data.tables import json_rows
from drafttrain.drafters import DRAFTERS, build
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.datastore import save_datastore
from drafttrain.drafters.files import load_drafter, save_drafter
from drafttrain.evaluation import bench
from drafttrain.evaluation.check import right
from drafttrain.evaluation.rows import Row
from drafttrain.evaluation.rule_rows import RuleRow
from drafttrain.evaluation.rules import replay_rules
from drafttrain.evaluation.runners import Runner
from drafttrain.evaluation.streams import StreamRow, load_stream, pooled_tau
from drafttrain.evaluation.suites import Suite, load_suite
from drafttrain.export import export as export_drafter
from drafttrain.recipe import RESOLVED, Recipe, stage_fingerprint, stage_values, versions, write_resolved
from drafttrain.report.card import Story, write_card
from drafttrain.runtime.classifier import PromptClassifier, fit_classifier, held_out_accuracy, prompt_states
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.runtime.rounds import LoggedProbs, log_rounds
from drafttrain.runtime.stats import alpha_text
from drafttrain.target.adapter import Target, check_same_tokens, load_tokenizer, read_shape
from drafttrain.target.files import TargetConfig, TargetShape, resolve, target_fingerprint
from drafttrain.target.head import TargetHead
from drafttrain.train import judge as judging
from drafttrain.train import loop as training
from drafttrain.train import online
from drafttrain.train.decision import DecisionTraining, Fitted, fit
from drafttrain.train.online import Position, StreamRun, check_online

STATE = "state.json"
LEAD = os.environ.get("RANK", "0") == "0"
"""Of the processes that `accelerate launch` started, the one that writes records and speaks."""

console = SafeConsole(stderr=True, quiet=not LEAD)


class Record(Config):
    """`stages/STAGE/state.json`."""

    fingerprint: str
    values: dict[str, Any]
    """What the fingerprint was made from."""
    done: bool = False
    seconds: float = 0.0
    """From the beginning of the last attempt to its end."""
    finished: str = ""
    """When, in UTC."""
    notes: dict[str, Any] = Field(default_factory=dict)
    """What the stage wants to remember."""


def perform(stage: str, recipe: Recipe, again: bool = False) -> Record:
    """Brings one stage to its end. again: also where it is done already.

    Raises `UserError` where what it needs is missing or does not fit, where it would write over a drafter trained with other options, and
    for every stage but `train` in one of several processes.
    """
    if stage != "train":
        alone(stage)
    with claimed(stage, recipe):
        return _perform(stage, recipe, again)


def perform_share(stage: str, recipe: Recipe, share: Share) -> Record:
    """One process's share of `regenerate` or `capture`; the stage is done once all shares are. Raises `UserError` as `perform` does."""
    if share.whole:
        return perform(stage, recipe)
    with claimed(stage, recipe) if share.waits else nullcontext():  # shares of a job array have a lock each
        return _perform(stage, recipe, False, share)


def _perform(stage: str, recipe: Recipe, again: bool, share: Share | None = None) -> Record:
    record = planned(stage, recipe)
    held = read_record(recipe, stage)
    if held is not None and held.done and held.fingerprint == record.fingerprint and MADE[stage](recipe, held) and not again:
        console.print(Text.assemble((stage, "bold"), f": done already ({recipe.folder})"))
        return held
    legality.check(recipe, read_shape(recipe.target))
    if stage == "train":
        refuse_other_options(held, record, recipe)
    console.print(Text.assemble((stage, "bold"), f": {recipe.folder}"))
    write_record(recipe, stage, record)
    begun = time.monotonic()
    notes = STAGES[stage](recipe) if share is None else SHARED[stage](recipe, share)
    if notes is None:
        console.print(f"{stage}: this share is done, others are missing still; the last one to end finishes the stage")
        return record
    finished = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    seconds = round(time.monotonic() - begun, 1)
    record = record.model_copy(update={"done": True, "seconds": seconds, "finished": finished, "notes": notes})
    write_record(recipe, stage, record)
    return record


def alone(what: str) -> None:
    """A `UserError` where several processes were launched: all of them would write the same files."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"{what} runs in one process, and several were launched; launch `drafttrain train`, `regenerate` and `capture` only, one by "
            f"one, `drafttrain {what}` alone"
        )


@contextmanager
def claimed(what: str, recipe: Recipe) -> Iterator[None]:
    """While this is entered no other process does the same work for the same output; a `UserError` where one does."""
    if not LEAD:
        yield
        return
    folder = recipe.folder / "stages" / what
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", recipe.folder):
        yield


def planned(stage: str, recipe: Recipe) -> Record:
    """The record of a stage that begins now: its recipe keys, the target's weights, and when the stages before it ended."""
    before = list(STAGES)[: list(STAGES).index(stage)]
    ended = [held.finished if (held := read_record(recipe, earlier)) else "" for earlier in before]
    inputs = (target_fingerprint(resolve(recipe.target)), *ended)
    return Record(fingerprint=stage_fingerprint(recipe, stage, *inputs), values=stage_values(recipe, stage))


def read_record(recipe: Recipe, stage: str) -> Record | None:
    """What is known of a stage's last attempt."""
    path = recipe.folder / "stages" / stage / STATE
    if not path.exists():
        return None
    data = read_json(path, f"'{path}'", "delete it, the stage will look at its files again")
    return parse(Record, data, str(path))


def write_record(recipe: Recipe, stage: str, record: Record) -> None:
    """Replaces a stage's record, with the recipe and the versions beside it."""
    if not LEAD:
        return
    folder = recipe.folder / "stages" / stage
    write_resolved(recipe, folder)
    if stage in ("regenerate", "capture", "train") or not (recipe.folder / RESOLVED).exists():
        write_resolved(recipe, recipe.folder)
    write_text(folder / STATE, record.model_dump_json(indent=1))


def refuse_other_options(held: Record | None, record: Record, recipe: Recipe) -> None:
    """A `UserError` that names the first option in which this training differs from the one whose drafter lies here."""
    left = [path for path in (recipe.folder / "drafter", recipe.folder / "checkpoints") if path.exists()]
    if held is None or not left:
        return
    for key in sorted(held.values.keys() | record.values.keys()):
        before, now = held.values.get(key), record.values.get(key)
        if before != now:
            where = " and ".join(f"'{path}'" for path in left)
            raise UserError(
                f"run '{recipe.folder}' was trained with {key} = {before}, now it is {now}; choose another output folder "
                f"(output=...), or delete {where} to train anew"
            )


def regenerate(recipe: Recipe, share: Share | None = None) -> dict[str, Any] | None:
    """The target writes the conversations; a finished store that the recipe names is only checked. None: other shares are missing still."""
    if not DRAFTERS[recipe.drafter.name].trainable:
        console.print(f"a {recipe.drafter.name} drafter learns nothing: no conversations are needed")
        return {}
    new_drafter(recipe, read_shape(recipe.target))  # one that cannot be built stops here, before anything is written for it
    if recipe.data.existing is not None:
        store = Store.open(recipe.data.existing)
        store.check_target(Origin.of_config(recipe.target))
    else:
        known = licences(recipe.target, recipe.data.sources)
        target, folder = Target.load(placed(recipe.target, share)), recipe.folder / "data"
        if share is None:
            store = regenerating.regenerate(target, recipe.data, folder, licences=known)
        elif (shared := regenerating.regenerate_share(target, recipe.data, folder, share, licences=known)) is None:
            return None
        else:
            store = shared
    console.print(f"{len(store):,} conversations, {store.tokens:,} tokens in {store.folder}")
    return {"conversations": len(store), "tokens": store.tokens}


def placed(target: TargetConfig, share: Share | None) -> TargetConfig:
    """Each process of a launcher has a GPU of its own, where the recipe names no device."""
    if share is None or not share.waits or target.device != "auto" or not torch.cuda.is_available():
        return target
    return target.model_copy(update={"device": f"cuda:{os.environ.get('LOCAL_RANK', '0')}"})


def capture(recipe: Recipe, share: Share | None = None) -> dict[str, Any] | None:
    """Features that training needs and the conversations lack, unless training computes them itself. None: other shares are missing."""
    if not DRAFTERS[recipe.drafter.name].trainable:
        return {}
    source, needs = conversations(recipe), features_of(new_drafter(recipe, read_shape(recipe.target)))
    missing = needs - set(source.feature_names)
    if not missing or recipe.data.online:
        console.print("the conversations have every feature" if not missing else "features will be computed while training (data.online)")
        return {}
    store = capturing.capture(Target.load(placed(recipe.target, share)), source, recipe.folder / "features", needs, share=share or ALL)
    if store is None:
        return None
    console.print(f"{', '.join(store.feature_names)} of {store.tokens:,} tokens in {store.folder}")
    return {"tokens": store.tokens, "features": list(store.feature_names)}


def train(recipe: Recipe) -> dict[str, Any]:
    """Trains the drafter; runs under `accelerate launch` too. A family without weights is only written down."""
    if not DRAFTERS[recipe.drafter.name].trainable:
        if LEAD:
            save_drafter(new_drafter(recipe, read_shape(recipe.target)), recipe.folder / "drafter")
        return {}
    accelerator = training.new_accelerator(recipe.train, recipe.folder)
    drafter = new_drafter(recipe, read_shape(recipe.target))
    store = training_store(recipe, features_of(drafter))
    store.check_target(Origin.of_config(recipe.target))
    target = None
    if features_of(drafter) <= set(store.feature_names):
        options = recipe.target
        head = TargetHead.from_folder(resolve(options), dtype=options.torch_dtype(), trust_remote_code=options.trust_remote_code)
        store.check_head(head)
    else:
        target = Target.load(recipe.target.model_copy(update={"device": str(accelerator.device)}))
        head = target.head
    result = training.train(drafter, store, recipe.train, head, recipe.folder, target, accelerator)
    if LEAD and not (recipe.folder / "drafter" / "config.json").exists():
        raise UserError(f"run '{recipe.folder}': its checkpoints are at the end of training, but the drafter is gone; delete them")
    judged = "nothing was held out to judge it by (train.held_out)"
    if result.best_tau is not None:
        judged = f"held-out tau {result.best_tau:.2f} (alpha {alpha_text(result.alpha)})"
    console.print(f"{result.steps:,} steps, {result.tokens:,} tokens, at most {result.peak_memory / 2**30:.2f} GiB of memory; {judged}")
    return {
        "steps": result.steps, "tokens": result.tokens, "held_out_tau": result.best_tau, "held_out_alpha": result.alpha,
        "peak_memory": result.peak_memory, "left_out": result.left_out,
    }  # fmt: skip


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Plain and speculative decoding side by side on the suite."""
    target = Target.load(recipe.target)
    own: list[Runner] = [*bench.contenders(target, recipe.folder / "drafter", recipe.runtime, recipe.evaluation)]
    runs = [*own, *bench.peers(target, recipe.evaluation)]
    rows = bench.evaluate(target, runs, load_suite(recipe.evaluation.suite), recipe.evaluation, results(recipe))
    return {"run": rows[0].run}


def compare_rules(recipe: Recipe, chances: int) -> list[RuleRow]:
    """Every rule on the same logged rounds of the recipe's drafter and of its further contenders; the rows also go to rules.jsonl."""
    alone("eval")
    target = Target.load(recipe.target)
    with claimed("rules", recipe):
        runs = bench.contenders(target, recipe.folder / "drafter", recipe.runtime, recipe.evaluation)
        rows, left_out = replay_rules(target, runs, load_suite(recipe.evaluation.suite), recipe.evaluation, recipe.folder, chances)
    for note in left_out:
        console.print(f"left out: {note}")
    return rows


def make_datastore(recipe: Recipe, source: Path, output: Path) -> int:
    """Writes the target's past outputs in `source` as a lookup's datastore; how many tokens it holds."""
    alone("datastore")
    check_file_name(output)
    origin = Origin.of_config(recipe.target)
    tokenizer = load_tokenizer(resolve(recipe.target), recipe.target.trust_remote_code)
    texts = past_outputs(source, origin, tokenizer)
    return save_datastore(texts, output, origin.target, origin.tokenizer, origin.vocab_size)


def train_router(recipe: Recipe, prompts: Path, output: Path) -> tuple[PromptClassifier, float]:
    """A prompt classifier for the router `task`, and its accuracy on held-out prompts.

    prompts: JSONL of `prompt` or `messages`, and `drafter`: the number of the drafter that suits it, 0 for the recipe's own.
    """
    alone("router")
    check_file_name(output)
    records = list(json_rows(prompts))
    arms = 1 + len(recipe.runtime.drafters)
    for where, record in records:
        arm = record.get("drafter")
        if not isinstance(arm, int) or isinstance(arm, bool) or not 0 <= arm < arms:
            raise UserError(f"{where}: `drafter` is {arm!r}; expected a number from 0 to {arms - 1}, as runtime.drafters lists them")
    if not records:
        raise UserError(f"prompts '{prompts}': no prompt in this file; give some of each drafter")
    target = Target.load(recipe.target)
    reader = SpeculativeDecoder(target)
    states = prompt_states(target, [reader.tokenize(record.get("messages") or record.get("prompt", "")) for _, record in records])
    suited = torch.tensor([record["drafter"] for _, record in records])
    fitted = fit_classifier(states, suited, target.fingerprint)
    fitted.save(output)
    return fitted, held_out_accuracy(states, suited, target.fingerprint)


def train_decision(recipe: Recipe, config: DecisionTraining, prompts: int) -> tuple[Fitted, Path]:
    """A decision model for the recipe's drafter, shape and sampling, from rounds on the first `prompts` training prompts; and its folder.

    Rounds are logged once; `evaluation` says at which temperature and how long answers are.
    """
    alone("decision")
    store, asked = conversations(recipe), recipe.evaluation
    chosen = [store[index] for index in range(min(prompts, len(store)))]
    opening = [one.tokens[: int(one.mask.argmax())].tolist() for one in chosen]
    target, folder = Target.load(recipe.target), recipe.folder / "drafter"
    drafter, mark = load_drafter(folder, target.fingerprint), folder_fingerprint(folder)
    decoder = SpeculativeDecoder(target, drafter, recipe.runtime.model_copy(update={"policy": "fixed"}))
    made_from = {"prompts": [one.prompt_hash for one in chosen], "runtime": decoder.runtime.model_dump(mode="json")}
    name = fingerprint(target.fingerprint, mark, asked.sampling, asked.seed, asked.max_new_tokens, made_from, "states")
    with claimed("rules", recipe):
        log = log_rounds(
            decoder, opening, asked.sampling, asked.max_new_tokens, recipe.folder / "rounds" / name, mark, asked.seed,
            made_from=made_from, states=True,
        )  # fmt: skip
    fitted = fit(log, LoggedProbs(log.info, drafter, target.head), config)
    place = decision_folder(recipe, config)
    if place.exists():
        console.print(f"the decision model in '{place}' is replaced")
    fitted.model.save(place)
    return fitted, place


def decision_folder(recipe: Recipe, config: DecisionTraining) -> Path:
    """One for each kind of labels and each sampling, as a model serves no other: `decision-soft-t0.7-k50`."""
    temperature, top_k, top_p = recipe.evaluation.sampling[:3]
    cuts = [f"k{top_k}"] * (top_k > 0) + [f"p{top_p:g}"] * (top_p < 1)
    return recipe.folder / "-".join(["decision", config.labels, f"t{temperature:g}", *cuts])


def train_judge(recipe: Recipe, questions: str, config: judging.JudgeTrainConfig) -> tuple[judging.Labelled, judging.JudgeResult, Path]:
    """A judge for the recipe's target, from the mismatches of its drafter on checkable questions; and its folder.

    questions: a suite, by name or path, none of whose prompts stands in the recipe's own suite. Labels are kept, part by part. `evaluation`
    says how long answers are. Raises `UserError` where a question cannot be checked, or is asked in the evaluation too.
    """
    alone("judge")
    asked = load_suite(questions)
    refuse_unfit_questions(recipe, questions, asked)
    target, folder, length = Target.load(recipe.target), recipe.folder / "drafter", recipe.evaluation.max_new_tokens
    reader = SpeculativeDecoder(target)
    prompts = [reader.tokenize(item.opening()) for item in asked.items]
    checks = [item.check for item in asked.items]

    def is_right(number: int, answer: list[int]) -> bool:
        check = checks[number]
        assert check is not None and target.tokenizer is not None
        return right(check, target.tokenizer.decode(answer, skip_special_tokens=True))

    drafter, mark = load_drafter(folder, target.fingerprint), folder_fingerprint(folder)
    name = fingerprint(target.fingerprint, str(target.dtype), mark, prompts, [repr(check) for check in checks], length)
    with claimed("judge", recipe):
        labels = judging.labelled(target, drafter, prompts, is_right, length, recipe.folder / "judge-labels" / name)
    result = judging.fit(labels.examples, target.fingerprint, config)
    notes = {
        "questions": asked.name, "asked": labels.asked, "solved": labels.solved, "mismatches": int((~labels.examples.random).sum()),
        "good": int(labels.examples.good.sum()), "held_out": result.held_out, "auc": result.auc, "let_through": result.let_through,
        "training": config.model_dump(mode="json") | {"penalty": result.penalty},
    }  # fmt: skip
    return labels, result, result.head.save(recipe.folder / "judge", notes)


def learn_online(recipe: Recipe, source: str, batch_size: int) -> tuple[dict[str, list[StreamRow]], Path]:
    """Each of `online.methods` decodes the stream, learning on the way as it does; their rows, and the folder of it all.

    source: a JSONL file of prompts or a store. `evaluation` says at which temperature and how long answers are. What cannot be learnt is
    told before the target loads; a method that was cut off goes on, and one that is done is read.
    """
    alone("online")
    asked, config, folder = recipe.evaluation, recipe.online, recipe.folder / "online"
    drafter, mark = _served_drafter(recipe)
    check_online(config, recipe.runtime, asked.sampling, type(drafter))
    items = load_stream(source, Origin.of_config(recipe.target), config.pattern, config.tasks, config.count, config.seed)
    target, results = Target.load(recipe.target), dict[str, list[StreamRow]]()
    for method in config.methods:
        decoder = SpeculativeDecoder(target, _served_drafter(recipe)[0], recipe.runtime)
        run = StreamRun(
            decoder, items, method, config, asked.sampling, asked.max_new_tokens, folder / method, asked.seed, batch_size, mark
        )
        results[method] = run.run(lambda position, method=method: _tell_position(method, position, len(items)))  # type: ignore[misc]
    return results, folder


def learn_from_log(recipe: Recipe, log: str) -> dict[str, int]:
    """Each of `online.methods` learns from a log of decoding (`online.keep_log`); how many updates each made."""
    alone("online")
    config, sampling = recipe.online, recipe.evaluation.sampling
    check_online(config, recipe.runtime, sampling, DRAFTERS[recipe.drafter.name])
    store = Store.open(log)
    store.check_target(Origin.of_config(recipe.target))
    options = recipe.target
    head = TargetHead.from_folder(resolve(options), dtype=options.torch_dtype(), trust_remote_code=options.trust_remote_code)
    updates = dict[str, int]()
    for method in config.methods:
        drafter, folder = _served_drafter(recipe)[0], recipe.folder / "online-replay" / method
        updates[method] = online.learn_from_log(drafter, head, store, method, config, sampling, recipe.runtime.shape.depth, folder).updates
        console.print(f"{method}: {updates[method]} updates from {len(store):,} requests; the drafter is in {folder / 'drafter'}")
    return updates


def _served_drafter(recipe: Recipe) -> tuple[Drafter, str]:
    """The recipe's trained drafter, and its fingerprint."""
    folder = recipe.folder / "drafter"
    return load_drafter(folder, target_fingerprint(resolve(recipe.target))), folder_fingerprint(folder)


def _tell_position(method: str, position: Position, requests: int) -> None:
    recent = pooled_tau(position.rows[-8:])
    console.print(f"{method}: {position.place} of {requests} requests, tau of the last {min(8, len(position.rows))}: {recent:.2f}")


def refuse_unfit_questions(recipe: Recipe, questions: str, asked: Suite) -> None:
    """A `UserError` where a judge's questions cannot be checked without running programs, or stand in the recipe's suite."""
    measured = {item.turns[0] for item in load_suite(recipe.evaluation.suite).items}
    for item in asked.items:
        where = f"questions '{questions}', item '{item.id}'"
        if item.check is None or item.check.kind == "code" or len(item.turns) > 1:
            raise UserError(f"{where}: one prompt with an answer that can be checked (number, choice, option, word) is needed")
        if item.turns[0] in measured:
            suite = recipe.evaluation.suite
            raise UserError(f"{where} stands in evaluation.suite '{suite}' too, where the judge is to be measured; give other questions")


def export(recipe: Recipe) -> dict[str, Any]:
    """The drafter as others read it, each format with its card."""
    source = recipe.folder / "drafter"
    folders = export_drafter(source, recipe.target, recipe.export, recipe.folder / "export")
    licence = of_folder(resolve(recipe.target))
    story = Story(recipe.name, recipe.target, _told(recipe), results(recipe), versions()["drafttrain"], licence)
    for form, folder in zip(recipe.export.configs, folders, strict=True):
        write_resolved(recipe, folder)
        write_card(folder, form, source, story)
        console.print(f"exported to {folder}")
    return {"folders": [str(folder) for folder in folders]}


def _told(recipe: Recipe) -> str:
    """The training conversations in words."""
    if not DRAFTERS[recipe.drafter.name].trainable:
        return "none"
    kinds = {"self": "prompts that the target wrote itself", "jsonl": "given prompts", "dataset": "the prompts of a data set"}
    sources = ", ".join(dict.fromkeys(kinds[source.kind] for source in recipe.data.sources))
    origin = "given conversations" if recipe.data.existing is not None else f"the target's own answers to {sources}"
    if not (conversations_folder(recipe) / INDEX).exists():
        return origin
    store = Store.open(conversations_folder(recipe))
    stated = "".join(f"; licence of {part}: {name}" for part, name in store.index.licences.items())
    return f"{len(store):,} conversations of {store.tokens:,} tokens, {origin}{stated}"


SHARED: dict[str, Callable[[Recipe, Share], dict[str, Any] | None]] = {"regenerate": regenerate, "capture": capture}
"""Stages whose work several processes may share."""

STAGES: dict[str, Callable[[Recipe], dict[str, Any] | None]] = {
    "regenerate": regenerate, "capture": capture, "train": train, "eval": evaluate, "export": export,
}  # fmt: skip


def conversations_folder(recipe: Recipe) -> Path:
    """Where the conversations are."""
    return Path(recipe.data.existing) if recipe.data.existing is not None else recipe.folder / "data"


def conversations(recipe: Recipe) -> Store:
    """The finished conversations, or a `UserError`."""
    folder = conversations_folder(recipe)
    if not (folder / INDEX).exists():
        raise UserError(f"no conversations in '{folder}'; run `drafttrain regenerate` first, or `drafttrain run` for all stages")
    if not read_index(folder).complete:
        raise UserError(f"the conversations in '{folder}' are half done; run `drafttrain regenerate` again, it goes on where it stopped")
    return Store.open(folder)


def training_store(recipe: Recipe, needs: set[str]) -> Store:
    """Conversations with the features that training needs; without them where training computes them itself."""
    source = conversations(recipe)
    if needs <= set(source.feature_names) or recipe.data.online:
        return source
    folder = recipe.folder / "features"
    if not (folder / INDEX).exists() or not read_index(folder).complete:
        source.require(needs)
    store = Store.open(folder)
    if len(store) != len(source) or store.tokens != source.tokens:
        raise UserError(f"the features in '{folder}' are of other conversations than '{source.folder}'; delete them and capture again")
    return store


def features_of(drafter: Drafter) -> set[str]:
    """What training reads of the target."""
    return set(drafter.needs | drafter.teacher_needs)


def new_drafter(recipe: Recipe, shape: TargetShape) -> Drafter:
    """Untrained, its random weights set by the seed. Raises `UserError` where it cannot be built, or reads other tokens than the target."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.train.seed)
        drafter = build(recipe.drafter, shape)
    if drafter.origin is not None:
        check_same_tokens(load_tokenizer(resolve(recipe.target), recipe.target.trust_remote_code), drafter.origin, drafter.origin_rows)
    return drafter


def results(recipe: Recipe) -> Path:
    """What `eval` measured."""
    return recipe.folder / "results.jsonl"


def rows_of(recipe: Recipe, record: Record) -> list[Row]:
    """The rows that one evaluation wrote."""
    return [row for row in bench.read_rows(results(recipe)) if row.run == record.notes["run"]]


MADE: dict[str, Callable[[Recipe, Record], bool]] = {
    "regenerate": lambda recipe, held: not held.notes or (conversations_folder(recipe) / INDEX).exists(),
    "capture": lambda recipe, held: not held.notes.get("features") or (recipe.folder / "features" / INDEX).exists(),
    "train": lambda recipe, held: (recipe.folder / "drafter" / "config.json").exists(),
    "eval": lambda recipe, held: results(recipe).exists(),
    "export": lambda recipe, held: all(Path(folder).exists() for folder in held.notes["folders"]),
}
"""Whether a finished stage's output still lies where it was written."""
