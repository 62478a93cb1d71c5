"""Rounds on disk: logged once while decoding, and read again by whatever wants to judge the same trees (rules, decision models).

A log keeps tokens and hidden states, and the distributions p and q are recomputed from these through the frozen heads in fp32: the
distributions themselves would take a hundred times the room. B rows, n rounds, N nodes, R drafter states, D hidden, V vocabulary.

    FOLDER/rounds-00000.safetensors ...    FOLDER/answers.json    what was written, prompt by prompt (token ids)
    FOLDER/index.json                      what the rounds are of; written last: without it there is no log
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.core.config import Config, parse
from drafttrain.core.disk import check_format, load_tensors, read_bytes, read_json, writable, write_text, write_whole
from drafttrain.core.errors import UserError, first_line
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Tree
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.grow import widen
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.runtime.generate import DecodingLoop, RoundRecord, served
from drafttrain.runtime.policy import Fixed
from drafttrain.runtime.proposer import Drafting
from drafttrain.runtime.rows import Request
from drafttrain.target.head import TargetHead

FORMAT = 1
MEND = "delete the folder and log again"
INDEX, ANSWERS = "index.json", "answers.json"
SHARD_BYTES = 256 << 20
FOREIGN = 0.05
"""Recomputed distributions of the same weights differ from the logged ones by rounding, in the mean far less than this; other weights'
don't."""


class RoundsInfo(Config):
    """`index.json`."""

    format: int = FORMAT
    target: str
    """Fingerprint of the target that scored."""
    drafter: str
    """Fingerprint of the drafter that proposed."""
    temperature: float
    top_k: int
    top_p: float
    drafter_temperature: float | None
    """None: the target's."""
    draws: Draws
    max_depth: int
    max_children: int
    rule: str
    """The rule that decoded."""
    dtype: str
    """What the models computed in."""
    seed: int
    max_new_tokens: int
    states: bool
    """Whether the drafter's states are there; trees that were drawn need them."""
    prompts: int
    rounds: int = 0
    shards: tuple[str, ...] = ()
    made_from: dict[str, Any] = Field(default_factory=dict)
    """What else the maker wants to remember."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def drafter_sampling(self) -> Sampling:
        own = self.drafter_temperature
        return self.sampling if own is None else self.sampling._replace(temperature=own)


@dataclass
class LoggedRounds:
    """Some logged rounds, one a row."""

    tokens: Tensor  # [n, N]
    parents: Tensor  # [n, N]
    live: Tensor  # [n, N] bool
    last: Tensor  # [n, N, D] the target's hidden states at the nodes, as its head reads them
    p: Tensor  # [n, N] the target's probability of each node after its parent, as it was when decoding
    accepted: Tensor  # [n] nodes that stood, before anything was cut
    prompt: Tensor  # [n] number of the prompt
    probs_row: Tensor | None = None  # [n, N] which of `states` a node was drawn from
    states: Tensor | None = None  # [n, R, D'] the drafter's
    q: Tensor | None = None  # [n, N] the probability each node was drawn with, as it was when decoding; None for deterministic draws

    def __len__(self) -> int:
        return len(self.tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        every = {field.name: vars(self)[field.name] for field in fields(self)}
        return {name: value for name, value in every.items() if value is not None}

    def split(self, size: int) -> Iterator[LoggedRounds]:
        """`size` rounds at a time."""
        for start in range(0, len(self), size):
            yield LoggedRounds(**{name: value[start : start + size] for name, value in self.tensors().items()})


class RoundRecorder:
    """An `on_round` hook that keeps what a log needs of the rows that go on."""

    needs = frozenset({"last_hidden_state"})
    """Features that it reads: the loop is asked for them."""

    def __init__(self, states: bool = False) -> None:
        """states: of `deterministic` trees too."""
        self.states, self.parts = states, list[LoggedRounds]()
        self.depth = self.children = 1  # the most that a tree had

    def __call__(self, record: RoundRecord) -> None:
        tree = record.tree
        row = torch.arange(len(tree.tokens), device=tree.tokens.device)[:, None]
        q = None
        if (self.states or tree.draws != "deterministic") and tree.draft_states is None:
            raise UserError(
                "this drafter hands over no states of the tokens it draws: its rounds cannot be logged with their distributions"
            )
        if tree.draws != "deterministic":
            assert tree.draft_probs is not None and tree.probs_row is not None
            q = tree.draft_probs[row, tree.probs_row, tree.tokens]
        p = record.scored.target_probs[row, tree.parents, tree.tokens]
        whole = LoggedRounds(
            tree.tokens,
            tree.parents,
            tree.live,
            record.features["last_hidden_state"],
            p,
            record.verdict.length,
            torch.tensor(record.rows),
            tree.probs_row,
            tree.draft_states,
            q,
        )
        self.depth = max(self.depth, int(tree.depth.masked_fill(~tree.live, 0).max()))
        self.children = max(self.children, int((tree.children >= 0).sum(-1).max()))
        alive = record.alive.cpu()
        self.parts.append(LoggedRounds(**{name: value.cpu()[alive] for name, value in whole.tensors().items()}))

    def take(self) -> LoggedRounds:
        """Everything since the last call."""
        whole, self.parts = joined(self.parts), []
        return whole


def log_rounds(
    decoder: SpeculativeDecoder, prompts: Sequence[list[int]], sampling: Sampling, max_new_tokens: int, folder: Path, drafter: str,
    seed: int = 0, batch_size: int = 8, made_from: dict[str, Any] | None = None, states: bool = False,
) -> RoundLog:
    """Decodes the prompts (token ids) with the decoder's drafter, shape and rule, and logs every round.

    drafter: its fingerprint. states: keep the drafter's states of `deterministic` trees too. The policy is left
    out: whole shapes are logged. A finished log in `folder` that was made from the same is opened instead of decoding again. Raises
    `UserError` where the family cannot hand over the states of drawn tokens, or the disk is full.
    """
    rule, plan = decoder.runtime.fitted(sampling.check(), decoder.drafter)
    temperature, top_k, top_p = sampling[:3]
    if sampling != Sampling(temperature, top_k, top_p) or decoder.target.own_options:
        asked = ", ".join(decoder.target.own_options) or "min_p, typical_p or top_n_sigma"
        raise UserError(
            f"rounds are logged with temperature, top_k and top_p alone, not with {asked}: a log could not give distributions again; "
            f"leave them out (target.ignore_generation_options for the target's own)"
        )
    draws: Draws = decoder.runtime.treat_as or plan.draws
    info = RoundsInfo(
        target=decoder.target.fingerprint, drafter=drafter, temperature=temperature, top_k=top_k, top_p=top_p,
        drafter_temperature=plan.temperature,
        draws=draws, states=states or draws != "deterministic", max_depth=1, max_children=1, rule=rule.config.name,
        dtype=str(decoder.target.dtype).removeprefix("torch."), seed=seed, max_new_tokens=max_new_tokens, prompts=len(prompts),
        made_from=made_from or {},
    )  # fmt: skip
    if (folder / INDEX).exists() and (folder / ANSWERS).exists():  # logs of earlier versions have no answers: they are made again
        held = RoundLog.open(folder)
        if held.info.model_copy(update={"rounds": 0, "shards": (), "max_depth": 1, "max_children": 1}) == info:
            return held
    writer = RoundWriter(folder)
    policy = Fixed(replace(plan, keep_states=info.states))
    recorder = RoundRecorder(info.states)
    requests = [Request(prompt, number, max_new_tokens) for number, prompt in enumerate(prompts)]
    proposer = None if decoder.drafter is None else Drafting(decoder.drafter, decoder.runtime.treat_as, rule.leaves_next_open)
    loop = DecodingLoop(
        decoder.target, proposer, rule, policy, sampling, seed, None, recorder, decoder.runtime.prefill_chunk, recorder.needs
    )
    for _ in served(loop, requests, batch_size):
        if recorder.parts:
            writer.add(recorder.take())
    answers = loop.written
    depth, children = recorder.depth, recorder.children  # as the trees have them: a lookup's may be deeper and wider than the plan's shape
    return writer.finish(info.model_copy(update={"max_depth": depth, "max_children": children}), answers)


class RoundWriter:
    """Writes a log shard by shard; an unfinished one of an earlier attempt is written over."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shards, self.rounds = folder, list[str](), 0
        self.parts: list[LoggedRounds] = []  # not on the disk yet
        with writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / INDEX).unlink(missing_ok=True)

    def add(self, rounds: LoggedRounds) -> None:
        """Writes a shard once there is enough for one."""
        self.parts.append(rounds)
        if sum(value.nbytes for part in self.parts for value in part.tensors().values()) >= SHARD_BYTES:
            self._flush()

    def finish(self, info: RoundsInfo, answers: Sequence[Sequence[int]]) -> RoundLog:
        """Writes what is left, the answers, and the index."""
        self._flush()
        info = info.model_copy(update={"rounds": self.rounds, "shards": tuple(self.shards)})
        with writable(self.folder):
            write_text(self.folder / ANSWERS, json.dumps(answers))
            write_text(self.folder / INDEX, info.model_dump_json(indent=1))
        return RoundLog.open(self.folder)

    def _flush(self) -> None:
        if not self.parts:
            return
        whole, self.parts = joined(self.parts), []
        name = f"rounds-{len(self.shards):05d}.safetensors"
        with writable(self.folder):
            write_whole(self.folder / name, lambda path: save_file(whole.tensors(), path))
        self.shards.append(name)
        self.rounds += len(whole)


def joined(parts: Sequence[LoggedRounds]) -> LoggedRounds:
    """All rounds of the parts, in order."""
    return LoggedRounds(**{name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()})


class RoundLog:
    """A finished log."""

    def __init__(self, folder: Path, info: RoundsInfo) -> None:
        self.folder, self.info = folder, info

    @classmethod
    def open(cls, folder: Path) -> RoundLog:
        """Raises `UserError` where there is none, or one of another format."""
        path = folder / INDEX
        if not path.exists():
            raise UserError(f"rounds '{folder}': no {INDEX} there; log them with `drafttrain eval RECIPE --replay-rules`")
        data = read_json(path, f"rounds '{folder}'", MEND)
        check_format(data, FORMAT, f"rounds '{folder}'", MEND)
        return cls(folder, parse(RoundsInfo, data, str(path)))

    def __len__(self) -> int:
        return self.info.rounds

    def answers(self) -> list[list[int]]:
        """What was written (token ids), prompt by prompt."""
        path = self.folder / ANSWERS
        data = read_bytes(path, f"'{path}'", MEND)
        try:
            answers: list[list[int]] = json.loads(data)
        except ValueError as error:
            raise UserError(f"'{path}' is corrupt ({first_line(error)}); {MEND}") from error
        return answers

    def parts(self) -> Iterator[LoggedRounds]:
        """Shard after shard."""
        for name in self.info.shards:
            yield LoggedRounds(**load_tensors(self.folder / name, f"'{self.folder / name}'", MEND))


class LoggedProbs:
    """What logged tokens were drawn from and judged by, recomputed in fp32 from the hidden states of a log.

    Where the models computed in less than fp32 the distributions differ from those of the decoding by that rounding.
    """

    def __init__(self, info: RoundsInfo, drafter: Drafter, head: TargetHead) -> None:
        """drafter and head: those that the log was made with."""
        self.info, self.drafter = info, drafter
        if any(weight.dtype != torch.float32 for weight in drafter.parameters()):
            self.drafter = copy.deepcopy(drafter).float()
        self.head = head.to(head.device, torch.float32)

    @torch.inference_mode()
    def logits(self, rounds: LoggedRounds) -> Tensor:
        """[n, N, V] the target's."""
        return self.head.logits(rounds.last.to(self.head.device))

    @torch.inference_mode()
    def tree(self, rounds: LoggedRounds) -> Tree:
        """The trees as they were proposed, with the distributions [n, R, V] that their tokens were drawn from."""
        device = self.head.device
        bare = Tree(
            rounds.tokens.to(device), rounds.parents.to(device), rounds.live.to(device), self.info.draws, self.info.max_depth,
            self.info.max_children,
        )
        if self.info.draws == "deterministic":
            return bare
        assert rounds.probs_row is not None
        probs, ids = self.info.drafter_sampling.probs(self.drafter_logits(rounds)), self.drafter.draft_ids
        return replace(
            bare, probs_row=rounds.probs_row.to(device), draft_probs=probs if ids is None else widen(probs, ids, self.head.vocab_size)
        )

    @torch.inference_mode()
    def drafter_logits(self, rounds: LoggedRounds) -> Tensor:
        """[n, R, Vd] the drafter's, at the nodes whose states were logged."""
        if rounds.states is None:
            raise UserError("these rounds were logged without the drafter's states; delete the log and make it with them")
        states, levels = rounds.states.to(self.head.device).float(), _levels(rounds).to(self.head.device)
        out: Tensor | None = None
        for level in range(self.info.max_depth):
            at = (levels == level).nonzero(as_tuple=True)
            if len(at[0]):
                logits = self.drafter.readout(states[at], level, self.head)
                out = logits.new_zeros(*states.shape[:2], logits.shape[-1]) if out is None else out
                out[at] = logits
        assert out is not None
        return out

    def check(self, rounds: LoggedRounds) -> float:
        """The largest difference between recomputed and logged probabilities of drawn tokens; a `UserError` for other weights."""
        tree, row = self.tree(rounds), torch.arange(len(rounds), device=self.head.device)[:, None]
        p = self.info.sampling.probs(self.logits(rounds))[row, tree.parents, tree.tokens]
        gaps = [(p.cpu() - rounds.p).abs()[:, 1:]]
        if rounds.q is not None and tree.draft_probs is not None and tree.probs_row is not None:
            gaps.append((tree.draft_probs[row, tree.probs_row, tree.tokens].cpu() - rounds.q).abs()[:, 1:])
        gap = torch.cat(gaps)[torch.cat([rounds.live[:, 1:]] * len(gaps))]
        if len(gap) and float(gap.mean()) > FOREIGN:
            raise UserError(
                f"distributions recomputed from logged states differ from those of the decoding by {float(gap.mean()):.2f} in the mean: "
                f"the log was made with another drafter or target; delete it and log again"
            )
        return float(gap.max()) if len(gap) else 0.0


def _levels(rounds: LoggedRounds) -> Tensor:
    """[n, R] depth of the nodes that the states are of; 0 where no logged node was drawn from one."""
    assert rounds.states is not None and rounds.probs_row is not None
    depth = torch.zeros_like(rounds.parents)
    for node in range(1, depth.shape[1]):  # parents stand before their children
        depth[:, node] = depth.gather(1, rounds.parents[:, node : node + 1])[:, 0] + 1
    levels = torch.zeros(rounds.states.shape[:2], dtype=torch.long)
    return levels.scatter(1, rounds.probs_row[:, 1:], depth[:, 1:] - 1)
