"""What is in a store or a run: counts, lengths, loops, splits, features and bytes, samples, and where it all came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from drafttrain import stages
from drafttrain.cli.doctor import marked
from drafttrain.core.errors import UserError
from drafttrain.data.collate import learnable
from drafttrain.data.origin import tokenizer_hash
from drafttrain.data.prompts import counted
from drafttrain.data.shards import INDEX
from drafttrain.data.store import Store
from drafttrain.drafters.files import load_drafter
from drafttrain.evaluation.bench import read_rows
from drafttrain.evaluation.loops import loops
from drafttrain.evaluation.rows import ALL
from drafttrain.evaluation.runners import PLAIN
from drafttrain.recipe import RESOLVED, Recipe, load_recipe
from drafttrain.report.page import RESULTS
from drafttrain.report.tables import interval
from drafttrain.target.adapter import load_tokenizer
from drafttrain.target.files import TargetConfig, resolve
from drafttrain.train.loop import TrainConfig

LOOKED_AT = 2000
"""Conversations of a larger store that are read, evenly spread over it."""
KINDS = 12
"""Different values of a note at most for its counts to be shown."""
PERCENTILES = (0, 10, 50, 90, 100)
KNOWN = {"format", "origin", "features", "shards", "stage", "limit", "complete", "probe", "licences", "left_out"}
"""Of the index; whatever else it holds is shown as it is."""


@dataclass(frozen=True)
class StoreSummary:
    """What the conversations of a store are."""

    conversations: int
    tokens: int
    bytes: int
    read: int
    """Conversations that the figures below are made from."""
    prompts: int
    """Different ones among them."""
    prompt_lengths: list[int]
    answer_lengths: list[int]
    """Tokens, in ascending order."""
    looping: int
    """Answers that go round in circles."""
    held_out: int
    """Of all conversations, at `train`'s split."""
    left_out: dict[str, int]
    """What training leaves out of those read at its row length, by reason."""
    notes: dict[str, Counter[str]]
    """For every note on conversations (domain, temperature, ...) how often it has each value."""


def summarise(store: Store, held_out: float, seed: int, row_length: int) -> StoreSummary:
    """held_out, seed: of the split, and row_length, as `train` has them."""
    chosen = sorted({int(place) for place in np.linspace(0, len(store) - 1, min(len(store), LOOKED_AT))}) if len(store) else []
    read = [store[place] for place in chosen]
    notes: dict[str, Counter[str]] = {}
    for one in read:
        for key, value in one.meta.items():
            notes.setdefault(key, Counter())[str(value)] += 1
    return StoreSummary(
        len(store), store.tokens, sum(entry.bytes for entry in store.index.shards), len(read), len({one.prompt_hash for one in read}),
        sorted(int((~one.mask).sum()) for one in read), sorted(int(one.mask.sum()) for one in read),
        sum(loops(one.tokens[one.mask].tolist()) for one in read), len(store.split("held_out", held_out, seed)),
        learnable(store, chosen, row_length)[1], notes,
    )  # fmt: skip


def inspect(path: Path, samples: int) -> Iterator[RenderableType]:
    """What there is to say about a store's or a run's folder, or a results file. samples: conversations to show.

    Raises `UserError` where it is none of these.
    """
    if (path / INDEX).exists():
        split = {name: TrainConfig.model_fields[name].default for name in ("held_out", "seed", "row_length")}
        yield from of_store(path, samples, split["held_out"], split["seed"], split["row_length"])
    elif (path / RESOLVED).exists():
        yield from of_run(load_recipe(path), samples)
    elif path.is_file() or (path / RESULTS).exists():
        yield from of_results(path if path.is_file() else path / RESULTS)
    else:
        reason = "holds neither a store nor a run" if path.exists() else "does not exist"
        raise UserError(f"'{path}' {reason}; give the folder of a run, of conversations or features ({INDEX}), or a results file")


def of_run(recipe: Recipe, samples: int) -> Iterator[RenderableType]:
    """Stages, data, drafter, training and results."""
    folder = recipe.folder
    sources = ", ".join(" ".join(str(part) for part in _source(source)) for source in recipe.model_dump(mode="json")["data"]["sources"])
    yield _facts(f"Run {recipe.name} in {folder}", {
        "target": f"{recipe.target.model} ({recipe.target.dtype})", "drafter": recipe.drafter.name,
        "prompts from": recipe.data.existing or sources, "on disk": _size(_bytes(folder)),
    })  # fmt: skip
    table = _table(("stage", "state", "seconds", "finished", "result"))
    for stage in stages.STAGES:
        record = stages.read_record(recipe, stage)
        state = "not begun" if record is None else "done" if record.done else "half done"
        said = ", ".join(f"{key} {_short(value)}" for key, value in (record.notes if record else {}).items())
        table.add_row(stage, state, f"{record.seconds:.0f}" if record else "", record.finished if record else "", said)
    yield table
    for data in dict.fromkeys((stages.conversations_folder(recipe), folder / "features")):
        if (data / INDEX).exists():
            yield from of_store(data, samples, recipe.train.held_out, recipe.train.seed, recipe.train.row_length)
    if (folder / "drafter" / "config.json").exists():
        drafter = load_drafter(folder / "drafter")
        weights = sum(weight.numel() for weight in drafter.parameters())
        yield _facts(f"Drafter {drafter.config.name}", {
            "weights": f"{weights:,} ({_size(_bytes(folder / 'drafter'))})", "drafts for": drafter.target.fingerprint,
            "reads": ", ".join(sorted(drafter.needs)) or "tokens",
        })  # fmt: skip
    if (folder / RESULTS).exists():
        yield from of_results(folder / RESULTS)


def of_store(folder: Path, samples: int, held_out: float, seed: int, row_length: int) -> Iterator[RenderableType]:
    """Conversations, what was captured with them, and where they came from."""
    store = Store.open(folder, verify=False)
    index, origin, found = store.index, store.index.origin, summarise(store, held_out, seed, row_length)
    share = "" if found.read == found.conversations else f" (of {found.read:,} looked at)"
    features = ", ".join(f"{name} {width} numbers a token" for name, width in index.features.items()) or "none"
    yield _facts(f"Store {folder}" + ("" if index.complete else " (half done)"), {
        "conversations": f"{found.conversations:,}, {found.tokens:,} tokens in {len(index.shards)} shards",
        "prompts": f"{found.prompts:,} different{share}; {_spread(found.prompt_lengths)} tokens",
        "answers": f"{sum(found.answer_lengths):,} tokens{share}; {_spread(found.answer_lengths)} tokens",
        "looping": f"{found.looping:,} answers{share}, {found.looping / max(1, found.read):.0%}",
        "split": f"{found.conversations - found.held_out:,} to train on, {found.held_out:,} held out (train.held_out={held_out:g})",
        "left out": counted(index.left_out) or "nothing",
        "of no use to train": counted(found.left_out) + share if found.left_out else "nothing",
        "features": f"{features}; {origin.dtype}" if index.features else features,
        "on disk": f"{_size(found.bytes)}, {found.bytes / max(1, found.tokens):,.0f} bytes a token",
    })  # fmt: skip
    extra = {key: _short(value) for key, value in index.model_dump(mode="json").items() if key not in KNOWN}
    yield _facts("Provenance", {
        "written by": f"{origin.name} ({origin.target})", "tokenizer": origin.tokenizer, "chat template": origin.template,
        "layers of aux": ", ".join(map(str, origin.aux_layers)), "stage": index.stage or "unknown",
        "licences": "; ".join(f"{part}: {name}" for part, name in index.licences.items()) or "none recorded", **extra,
    })  # fmt: skip
    for key, counts in found.notes.items():
        if len(counts) <= KINDS:
            yield Text(f"{key}: " + ", ".join(f"{value} {count:,}" for value, count in counts.most_common()))
    yield from shown_samples(store, samples)


def shown_samples(store: Store, samples: int) -> Iterator[RenderableType]:
    """Some conversations, what is trained on in green; as token ids where the target's tokenizer is not at hand."""
    if not samples or not len(store):
        return
    tokenizer = tokenizer_of(store)
    if tokenizer is None:
        yield Text(f"samples as token ids: the tokenizer of '{store.index.origin.name}' is not at hand", "dim")
    for place in np.linspace(0, len(store) - 1, min(samples, len(store))).astype(int):
        one = store[int(place)]
        yield Text(f"\nconversation {one.id}: {', '.join(f'{key} {value}' for key, value in one.meta.items())}", "bold")
        yield Text(" ".join(map(str, one.tokens[:64].tolist()))) if tokenizer is None else marked(tokenizer, one)


def tokenizer_of(store: Store) -> Any | None:
    """The tokenizer that made the store, if it lies on this machine."""
    try:
        tokenizer = load_tokenizer(resolve(TargetConfig(model=store.index.origin.name), download=False), False)
    except (UserError, OSError, ValueError):
        return None
    return tokenizer if tokenizer_hash(tokenizer) == store.index.origin.tokenizer else None


def of_results(path: Path) -> Iterator[RenderableType]:
    """What was measured, evaluation by evaluation."""
    rows = [row for row in read_rows(path) if row.measured.task == ALL and row.measured.outputs == "all"]
    table = _table(("evaluation", "date", "suite", "contender", "prompts", "tokens", "tau", "speed-up", "looping", "differ"))
    for row in rows:
        one = row.measured
        differ = "" if one.exactness is None else f"{one.exactness.different} of {one.exactness.compared}"
        table.add_row(
            row.run, row.date[:10], row.suite, one.label, str(one.prompts), f"{one.tokens:,}", f"{one.tau:.2f}",
            interval(one.speedups[PLAIN]), f"{one.looping:.0%}", differ,
        )  # fmt: skip
    yield Text(f"\nResults {path}", "bold")
    yield table


def _source(source: dict[str, Any]) -> list[Any]:
    return [source[key] for key in ("kind", "path", "name", "count") if source.get(key) is not None]


def _facts(title: str, facts: dict[str, str]) -> Table:
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False
    )  # fmt: skip
    for name, value in facts.items():
        table.add_row(Text(name, "dim"), value)
    return table


def _table(heads: Sequence[str]) -> Table:
    return Table(*heads, box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)


def _spread(lengths: list[int]) -> str:
    """`4 / 12 / 30 / 55 / 96`: shortest, tenth, half, nine tenths, longest."""
    if not lengths:
        return "no"
    return f"{' / '.join(f'{value:.0f}' for value in np.percentile(lengths, PERCENTILES))} (min, 10%, median, 90%, max)"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "[" + ", ".join(_short(inner) for inner in value) + "]" if isinstance(value, list) else str(value)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(count: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} bytes"
