"""User turns that the target writes itself, from the bare chat prefix: the template up to where the user's words begin.

An opening behind the prefix sets the domain (after Magpie, Xu et al., 2024, arXiv:2406.08464).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from drafttrain.core.errors import UserError, nearest
from drafttrain.core.sampling import Sampling
from drafttrain.data.prompts import DataPrompt, SelfPrompts, tokenize
from drafttrain.data.tables import json_rows
from drafttrain.target.adapter import Target
from drafttrain.target.sample import Job
from drafttrain.target.template import render

OPENINGS = Path(__file__).with_name("openings.jsonl")
MARK = "\u2063USERTURN\u2063"  # stands for the user's words while a template is rendered


@dataclass
class Turn:
    """What the target wrote behind an opening."""

    head: list[int]  # the prefix and the opening
    words: list[int]  # without the token that ended them
    ended: bool
    opening: str
    domain: str


def turn_jobs(source: SelfPrompts, target: Target) -> list[Job]:
    """One job a turn. Raises `UserError` where the target cannot write user turns."""
    assert target.tokenizer is not None
    prefix, suffix = frame(target.tokenizer)
    ends = turn_ends(target.tokenizer, suffix)
    if not ends and not target.eos_ids:
        raise UserError("prompt source 'self': the target has no token that ends a turn; use 'jsonl' or 'dataset'")
    sampling = Sampling(source.temperature, top_p=source.top_p)
    texts = [prefix + opening for _, opening in openings(source)]
    heads = [target.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [Job(id, list(head), source.max_tokens, sampling, ends) for id, head in enumerate(heads)]


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The rendered template before and behind a user turn. Raises `UserError` where there is none."""
    if not tokenizer.chat_template:
        raise UserError("prompt source 'self' needs a chat template, which this target lacks; use 'jsonl' or 'dataset'")
    turn = [{"role": "user", "content": MARK}]
    prefix, found, suffix = render(tokenizer, turn, "prompt source 'self'").partition(MARK)
    if not found:
        raise UserError("prompt source 'self': the chat template changes the user's words; use 'jsonl' or 'dataset'")
    return prefix, suffix


def turn_ends(tokenizer: PreTrainedTokenizerBase, suffix: str) -> tuple[int, ...]:
    """Tokens that end a user turn: the special token that the template puts behind it."""
    first = tokenizer(suffix, add_special_tokens=False)["input_ids"][:1]
    return tuple(token for token in first if token in tokenizer.all_special_ids)


def openings(source: SelfPrompts) -> list[tuple[str, str]]:
    """(domain, opening) of each turn to write: domains in turn, and each one's openings in turn."""
    known = all_openings(source)
    laps = [(source.domains[at % len(source.domains)], at // len(source.domains)) for at in range(source.count)]
    return [(domain, known[domain][lap % len(known[domain])]) for domain, lap in laps]


def all_openings(source: SelfPrompts) -> dict[str, list[str]]:
    """Openings by domain. Raises `UserError` for a domain without any."""
    path = Path(source.openings) if source.openings else OPENINGS
    by_domain: dict[str, list[str]] = {}
    for where, record in json_rows(path):
        if not isinstance(record.get("domain"), str) or not isinstance(record.get("opening"), str):
            raise UserError(f"{where}: expected `domain` and `opening`, got {sorted(record)}")
        by_domain.setdefault(record["domain"], []).append(record["opening"])
    for domain in source.domains:
        if domain not in by_domain:
            known = ", ".join(by_domain)
            raise UserError(f"domain '{domain}' has no opening in '{path}'{nearest(domain, by_domain)}; known: {known}")
    return by_domain


def kept_prompts(tokenizer: PreTrainedTokenizerBase, turns: Iterable[Turn]) -> tuple[list[DataPrompt], dict[str, int]]:
    """Prompts of the turns that are worth answering, and how many turns were dropped for which reason."""
    special = set(tokenizer.all_special_ids)
    dropped = {"unfinished": 0, "empty": 0, "repeated": 0}
    seen: set[str] = set()
    out: list[DataPrompt] = []
    for turn in turns:
        # decoded behind the head: some tokenizers drop the space before a text's first word
        written = tokenizer.decode(turn.head + turn.words)[len(tokenizer.decode(turn.head)) :]
        words = (turn.opening + written).strip()
        key = " ".join(words.casefold().split())
        if not turn.ended or special & set(turn.words):
            dropped["unfinished"] += 1
        elif not written.strip():
            dropped["empty"] += 1
        elif key in seen:
            dropped["repeated"] += 1
        else:
            seen.add(key)
            out.append(DataPrompt(tokenize(tokenizer, words, "self-written prompt"), turn.domain))
    return out, dropped
