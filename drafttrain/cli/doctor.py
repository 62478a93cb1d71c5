"""Checks a recipe before any long work: every mistake that can be found without the target's weights is found here, in seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import torch
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from drafttrain import legality
from drafttrain.core.errors import UserError
from drafttrain.core.layers import native_dtype
from drafttrain.core.packed import SHARE, packs
from drafttrain.data.collate import label_count
from drafttrain.data.prompts import DataPrompt, SelfPrompts, read_prompts, tokenize
from drafttrain.data.shards import INDEX
from drafttrain.data.store import Conversation, Store, bytes_per_token
from drafttrain.data.turns import frame, openings
from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.base import Drafter
from drafttrain.evaluation.suites import load_suite
from drafttrain.recipe import Recipe
from drafttrain.stages import conversations_folder, new_drafter
from drafttrain.target.adapter import check_tokenizer, load_tokenizer, read_shape
from drafttrain.target.files import DTYPES, TargetShape, resolve
from drafttrain.target.template import check_answer_end

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
SHOWN = 160  # tokens of the sample


@dataclass
class HealthCheck:
    """What one look at the recipe found."""

    name: str
    ok: bool
    note: str


class Patient:
    """A recipe, and what can be known without the target's weights; each part is read when first asked for."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.sample: Text | None = None

    @cached_property
    def shape(self) -> TargetShape:
        return read_shape(self.recipe.target)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(resolve(self.recipe.target), self.recipe.target.trust_remote_code)

    @cached_property
    def drafter(self) -> Drafter:
        return new_drafter(self.recipe, self.shape)

    @cached_property
    def prompts(self) -> list[DataPrompt]:
        """Of files and data sets; the target's own are not written yet."""
        sources = [source for source in self.recipe.data.sources if not isinstance(source, SelfPrompts)]
        return [prompt for source in sources for prompt in read_prompts(source, self.tokenizer)]

    @cached_property
    def store(self) -> Store | None:
        """Conversations that exist already."""
        folder = conversations_folder(self.recipe)
        if self.recipe.data.existing is None and not (folder / INDEX).exists():
            return None
        store = Store.open(folder)
        return store if len(store) else None

    @property
    def context(self) -> int:
        return self.shape.max_context

    @property
    def tokens(self) -> int:
        """How many tokens the conversations will have at most."""
        data = self.recipe.data
        if self.store is not None:
            return self.store.tokens
        written = [source for source in data.sources if isinstance(source, SelfPrompts)]
        longest = [source.max_tokens for source in written for _ in range(source.count)]
        lengths = [len(prompt.tokens) for prompt in self.prompts] + longest
        most = round(data.count(len(lengths)) * (sum(lengths) / len(lengths) + data.max_new_tokens))
        return most if data.tokens is None else min(data.tokens, most)


def target(patient: Patient) -> str:
    shape = patient.shape
    return (
        f"{patient.recipe.target.model}: {shape.text_config['model_type']}, {shape.num_layers} layers of {shape.hidden_size}, vocabulary "
        f"{shape.vocab_size:,}, context {patient.context:,}"
    )


def precision(patient: Patient) -> str:
    target, train = patient.recipe.target, patient.recipe.train
    chosen = {"target.dtype": target.dtype, "train.precision": train.precision}
    said = ", ".join(f"{key} {value}" for key, value in chosen.items())
    if "bfloat16" not in chosen.values() or native_dtype(target.torch_device()) == "bfloat16":
        return said
    return f"{said}; SLOW: this device has no instructions for bfloat16 and takes many times as long as in float32; set both to auto"


def tokenizer(patient: Patient) -> str:
    rows = patient.shape.vocab_size
    check_tokenizer(patient.tokenizer, rows)
    return f"{len(patient.tokenizer):,} tokens for {rows:,} rows of the output head"


def end(patient: Patient) -> str:
    ids = patient.shape.eos_ids
    if not ids:
        raise UserError("the target has no end token, so no answer could end; set eos_token_id in generation_config.json")
    check_answer_end(patient.tokenizer, ids, patient.recipe.target.model)
    return ", ".join(f"{patient.tokenizer.convert_ids_to_tokens(id)!r} ({id})" for id in ids)


def template(patient: Patient) -> str:
    ids = tokenize(patient.tokenizer, QUESTION, "sample prompt")
    first = patient.tokenizer.bos_token_id
    if first is not None and ids[:2] == [first, first]:
        raise UserError(
            f"prompts begin with {patient.tokenizer.bos_token!r} twice; take it out of the chat template, or switch add_bos_token off"
        )
    kind = "chat template" if patient.tokenizer.chat_template else "no chat template: prompts are plain text"
    return f"{kind}; a prompt begins with {patient.tokenizer.decode(ids[:1])!r}, once"


def prompts(patient: Patient) -> str:
    data = patient.recipe.data
    if data.existing is not None:
        return f"none needed: data.existing {data.existing}"
    parts = []
    for source in data.sources:
        if isinstance(source, SelfPrompts):
            frame(patient.tokenizer)
            parts.append(f"{len(openings(source)):,} written by the target ({', '.join(source.domains)})")
    if len(parts) < len(data.sources):
        limit = data.max_prompt_tokens or patient.context
        lengths = [len(prompt.tokens) for prompt in patient.prompts if len(prompt.tokens) <= limit]
        if not lengths:
            raise UserError(f"no prompt is left; raise data.max_prompt_tokens ({data.max_prompt_tokens})")
        if max(lengths) + data.max_new_tokens > patient.context:
            raise UserError(
                f"the longest prompt has {max(lengths):,} tokens; with {data.max_new_tokens} new ones that exceeds the context of "
                f"{patient.context:,}: set data.max_prompt_tokens to {patient.context - data.max_new_tokens}, or lower data.max_new_tokens"
            )
        parts.append(f"{len(lengths):,} given, the longest of {max(lengths):,} tokens")
        if len(lengths) < len(patient.prompts):
            parts.append(f"{len(patient.prompts) - len(lengths):,} of more than {limit:,} tokens are left out")
    return "; ".join(parts)


def mask(patient: Patient) -> str:
    """Finds labels, and leaves one conversation to be shown."""
    store = patient.store
    if store is None:
        ids = patient.prompts[0].tokens if patient.prompts else tokenize(patient.tokenizer, QUESTION, "sample prompt")
        answer = [*patient.tokenizer(ANSWER, add_special_tokens=False)["input_ids"], *patient.shape.eos_ids[:1]]
        patient.sample = marked(patient.tokenizer, Conversation.answered([*ids, *answer], len(ids), {}, 0))
        return "no conversation is written yet; this is how one would be trained on"
    row_length = patient.recipe.train.row_length
    counts = [label_count(store[i].mask[:row_length]) for i in range(len(store))]
    patient.sample = marked(patient.tokenizer, store[counts.index(max(counts))])
    if not any(counts):
        raise UserError(f"store '{store.folder}': no conversation has an answer token to learn within {row_length} tokens; check its masks")
    empty = f"; {counts.count(0):,} without any are left out" if 0 in counts else ""
    return f"{sum(counts):,} tokens to learn in {len(counts):,} conversations{empty}"


def options(patient: Patient) -> str:
    """What the recipe's parts ask of each other and of this target, as every stage checks it before its first work."""
    legality.check(patient.recipe, patient.shape)
    return f"they fit together and fit the target; exports: {', '.join(form.name for form in patient.recipe.export.configs)}"


def drafter(patient: Patient) -> str:
    made = patient.drafter
    reads = sorted(made.needs | made.teacher_needs)
    return f"{made.config.name}, {_parameters(made) / 1e6:.1f} M parameters, trained on {', '.join(reads)}"


def rule(patient: Patient) -> str:
    runtime, sampling = patient.recipe.runtime, patient.recipe.evaluation.sampling
    fitted, plan = runtime.fitted(sampling, DRAFTERS[patient.recipe.drafter.name])
    exact = "lossless" if fitted.lossless else "LOSSY"
    return f"{fitted.config.name} ({exact}) for {plan.draws} draws in a {runtime.shape.shape} of {runtime.shape.nodes} nodes"


def suite(patient: Patient) -> str:
    config = patient.recipe.evaluation
    chosen = config.chosen(load_suite(config.suite))
    longest = max(len(tokenize(patient.tokenizer, item.opening(), f"item '{item.id}'")) for item in chosen.items)
    if longest + config.max_new_tokens > patient.context:
        raise UserError(
            f"suite '{chosen.name}': a prompt of {longest} tokens and {config.max_new_tokens} new ones exceed the context of "
            f"{patient.context:,}; lower evaluation.max_new_tokens or leave its task out"
        )
    return f"{chosen.name}: {len(chosen.items)} prompts, the longest of {longest} tokens"


def disk(patient: Patient) -> str:
    recipe, made = patient.recipe, patient.drafter
    dtype, layers = recipe.target.dtype, len(patient.shape.aux_layers)
    stored = set(recipe.data.capture) if recipe.data.online else made.needs | made.teacher_needs
    per_token = bytes_per_token(stored, patient.shape.hidden_size, layers, dtype)
    checkpoints = (recipe.train.keep + 1) * 12 * _parameters(made)  # weights and two moments in float32
    need = per_token * patient.tokens + checkpoints
    free = shutil.disk_usage(_existing(recipe.folder)).free
    note = (
        f"{patient.tokens:,} tokens of {per_token:,} bytes and checkpoints: {_size(need)} of {_size(free)} free"
    )  # fmt: skip
    if need > free:
        raise UserError(f"{note}; write fewer tokens, set data.online=true, or choose another output folder")
    return note


def memory(patient: Patient) -> str:
    """Rough: weights, caches, optimizer, and the largest tables of logits; activations of long rows come on top."""
    recipe, shape = patient.recipe, patient.shape
    width = DTYPES[recipe.target.dtype].itemsize
    weights = sum(path.stat().st_size for path in resolve(recipe.target).glob("*.safetensors")) * width // 2
    device = recipe.target.torch_device()
    free = _free_memory(device)
    if packs(DTYPES[recipe.target.dtype], device) and weights <= SHARE * free:
        weights *= 2  # matrices once more, in blocks
    longest = recipe.data.max_new_tokens + max((len(prompt.tokens) for prompt in patient.prompts), default=256)
    cache = 2 * width * shape.num_layers * _kv_width(shape) * recipe.data.batch_size * longest
    writing = weights + cache + 4 * recipe.data.batch_size * shape.vocab_size
    rows = recipe.train.batch_rows * recipe.train.row_length
    training = 16 * _parameters(patient.drafter) + width * 2 * shape.vocab_size * shape.hidden_size + 4 * 12 * rows * shape.hidden_size
    note = f"about {_size(writing)} to write data, {_size(training)} and activations to train; {_size(free)} free"
    if max(writing, training) > free:
        raise UserError(f"{note}; lower data.batch_size or train.batch_rows")
    return note


CHECKS: tuple[Callable[[Patient], str], ...] = (
    target, precision, tokenizer, end, options, template, prompts, mask, drafter, rule, suite, disk, memory,
)  # fmt: skip


def examine(patient: Patient) -> Iterator[HealthCheck]:
    """Every check in turn. One that fails does not stop the others, but what can't be looked at without the target is left out."""
    for check in CHECKS:
        try:
            yield HealthCheck(check.__name__, True, check(patient))
        except UserError as error:
            yield HealthCheck(check.__name__, False, str(error))
            if check in (target, tokenizer):
                return


def marked(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Text:
    """A conversation with the tokens that are trained on in green; the first answer token comes from the prefill and is not."""
    labels = [bool(here and before) for before, here in zip([False, *conversation.mask], conversation.mask, strict=False)]
    first = max(0, labels.index(True) - SHOWN // 2) if True in labels else 0
    text = Text("… " if first else "")
    for token, label in list(zip(conversation.tokens.tolist(), labels, strict=True))[first : first + SHOWN]:
        text.append(tokenizer.decode([token]), "bold green underline" if label else "dim")
    return text


def _parameters(made: Drafter) -> int:
    return sum(p.numel() for p in made.parameters() if p.requires_grad)


def _kv_width(shape: TargetShape) -> int:
    known = shape.text_config
    heads = known.get("num_key_value_heads") or known["num_attention_heads"]
    return heads * int(known.get("head_dim") or shape.hidden_size // known["num_attention_heads"])


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return folder if folder.exists() else _existing(folder.absolute().parent)


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
