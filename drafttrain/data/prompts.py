"""Where prompts come from: files, a data set, or the target itself (`turns.py`); and how they are tokenized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from drafttrain.core.config import Config
from drafttrain.core.console import SafeConsole
from drafttrain.core.errors import UserError, nearest, refuse_halves
from drafttrain.data.layouts import Messages, UnfitRowError, asked
from drafttrain.data.tables import Row, file_rows, hub_rows, is_saved, numbered, saved_rows, split_files
from drafttrain.target.template import plain_ids, render

if TYPE_CHECKING:
    from datasets import Dataset

DOMAINS = ("chat", "code", "math", "qa", "translation", "summarization", "rag")


class JsonlPrompts(Config):
    """A file of prompts (JSON Lines, JSON, parquet, Arrow, CSV), or a folder of such files, in any layout of docs/recipe.md.

    What follows the last user turn is dropped, what stands before it is context. Parts of type `text` are joined; a row that cannot be used
    (an image, an unknown role) is refused by its line.
    """

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """The file or folder."""
    column: str | None = None
    """Column with the prompt, text or messages; by default the layout is found by the names of the columns."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts to take at most."""


class DatasetPrompts(Config):
    """A data set by its Hub name, local folder or file, in any layout of docs/recipe.md. Rows that are no prompts are left out, counted."""

    kind: Literal["dataset"] = "dataset"
    name: str
    """What `datasets.load_dataset` takes, or a folder that its `save_to_disk` wrote."""
    subset: str | None = None
    """The data set's configuration, where it has several."""
    split: str = "train"
    """Which split. A saved folder may hold a single one, which is then taken."""
    column: str | None = None
    """Column with the prompt, text or messages; by default the layout is found by the names of the columns."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts to take at most."""


class SelfPrompts(Config):
    """The target writes the user turns. Turns that it doesn't end, empty ones and repetitions are dropped."""

    kind: Literal["self"] = "self"
    count: int = Field(default=512, ge=1)
    """Turns to write; some will be dropped."""
    domains: tuple[str, ...] = DOMAINS
    """Domains to go through in turn, each with its openings."""
    openings: str | None = None
    """A JSONL file with `domain` and `opening` (may be empty) a line, in place of those that come with the package."""
    temperature: float = Field(default=0.9, gt=0, allow_inf_nan=False)
    """At which the turns are drawn."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus from which they are drawn."""
    max_tokens: int = Field(default=160, ge=1)
    """Longest turn."""


Source = Annotated[JsonlPrompts | DatasetPrompts | SelfPrompts, Field(discriminator="kind")]


@dataclass
class DataPrompt:
    """A rendered and tokenized prompt."""

    tokens: list[int]
    domain: str = ""


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, where: str, tools: list[Any] | None = None
) -> list[int]:
    """A prompt's ids: messages through the chat template, text as a user turn (or plainly, where there is no template).

    Special tokens come from the template alone: adding the tokenizer's would double the first (pitfall P6).
    """
    refuse_halves(prompt, where)
    refuse_halves(tools, where)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise UserError(f"{where}: the prompt is empty; give it some text, or remove it")
    if not tokenizer.chat_template:
        if isinstance(prompt, str):
            return plain_ids(tokenizer, prompt)
        raise UserError(f"{where}: `messages` need a chat template, which this target lacks; give `prompt` texts")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return list(tokenizer(render(tokenizer, messages, where, tools), add_special_tokens=False)["input_ids"])


def read_prompts(
    source: JsonlPrompts | DatasetPrompts, tokenizer: PreTrainedTokenizerBase, left_out: Counter[str] | None = None
) -> list[DataPrompt]:
    """All prompts of a file or data set. left_out: rows that are no prompts are counted there too, by reason.

    Raises `UserError` for a row of a file that cannot be used. Such rows of a data set, which others wrote, are left out; a line on stderr
    says how many for which reason, and why the first. Raises too where no prompt is left.
    """
    prompts: list[DataPrompt] = []
    unfit, first = Counter[str](), ""
    for where, record in records(source):
        if source.limit is not None and len(prompts) == source.limit:
            break
        try:
            row = asked(record, where, source.column)
            prompts.append(DataPrompt(tokenize(tokenizer, row.prompt, where, row.tools), row.domain))
        except UserError as error:
            if isinstance(source, JsonlPrompts):
                raise
            unfit[error.reason if isinstance(error, UnfitRowError) else "the chat template refuses it"] += 1
            first = first or str(error)
    reasons = counted(unfit)
    if not prompts:
        found = f"no prompts ({unfit.total():,} rows cannot be used: {reasons}; the first: {first})" if unfit else "no prompts"
        raise UserError(f"prompt source '{source.kind}' holds {found}; give at least one")
    if unfit:
        said = f"{unfit.total():,} of {len(prompts) + unfit.total():,} rows left out: {reasons}; the first: {first}"
        SafeConsole(stderr=True).print(said, soft_wrap=True)
    if left_out is not None:
        left_out.update({f"rows: {reason}": count for reason, count in unfit.items()})
    return prompts


def counted(left_out: Mapping[str, int]) -> str:
    """`12 an unknown role, 3 no prompt`: the most frequent reason first."""
    order = sorted(left_out.items(), key=lambda entry: -entry[1])
    return ", ".join(f"{count:,} {reason}" for reason, count in order if count)


def records(source: JsonlPrompts | DatasetPrompts) -> Iterator[Row]:
    """(where, columns) of each row. Raises `UserError` where nothing can be read, or no row has the named column."""
    if isinstance(source, JsonlPrompts):
        return _with_column(file_rows(Path(source.path)), source.column, f"prompts '{source.path}'")
    return _with_column(_dataset_records(source), source.column, f"data set '{source.name}'")


def dataset_rows(source: DatasetPrompts) -> Dataset:
    """One split of a saved or published data set, or a `UserError`."""
    if not is_saved(Path(source.name)):
        return hub_rows(source.name, source.subset, source.split)
    if source.subset is not None:
        raise UserError(f"data set '{source.name}' was saved by `save_to_disk`, which knows no subsets; leave `subset` out")
    return saved_rows(Path(source.name), source.split)


def _dataset_records(source: DatasetPrompts) -> Iterator[Row]:
    """A local folder is read file by file as a source of files is; what was saved or published, by the library."""
    path, where = Path(source.name), f"data set '{source.name}'"
    if path.is_file():
        yield from file_rows(path)
    elif path.is_dir() and not is_saved(path):
        for file in split_files(path, source.subset, source.split):
            yield from file_rows(file)
    else:
        yield from numbered(dataset_rows(source), where)


def _with_column(rows: Iterator[Row], column: str | None, name: str) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        return
    if column is not None and column not in first[1]:
        hint, names = nearest(column, first[1]), ", ".join(first[1])
        raise UserError(f"{name}: no column '{column}'{hint}; it has {names}")
    yield first
    yield from rows
