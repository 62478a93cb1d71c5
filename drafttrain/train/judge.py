"""Labels for a judge without humans, and its training (the recipe of AutoJudge, 2025, arXiv:2504.20039).

On questions whose answers a program can check: put the drafter's token where the target wrote another, let the target go on greedily
from there, and call the token good iff the answer is still right. The head of `verify/judge.py` learns this from the target's state at
the token. M mismatches, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from drafttrain.core.config import Config
from drafttrain.core.errors import UserError
from drafttrain.core.types import Batch
from drafttrain.drafters.base import Drafter
from drafttrain.target.adapter import Target
from drafttrain.target.sample import Finished, Job, Sampler
from drafttrain.verify.judge import JudgeHead

Right = Callable[[int, list[int]], bool]
"""(number of the question, tokens of an answer) -> whether the answer is right."""


class JudgeTrainConfig(Config):
    """How a judge's head is trained: all examples every step."""

    steps: int = Field(default=500, ge=1)
    """Steps of AdamW."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate, on states scaled to mean 0 and deviation 1."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled, on w."""
    wrong_weight: float = Field(default=1.0, gt=0)
    """How much more a bad token counts than a good one (lambda)."""
    held_out: float = Field(default=0.2, ge=0, lt=1)
    """Share of questions kept out of training, whose mismatches give the AUC."""
    seed: int = 0
    """Of the split."""


@dataclass(frozen=True)
class Answered:
    """A question and the target's own greedy answer, as token ids."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Mismatch:
    """A place where the drafter would have written another token than the target did."""

    question: int
    at: int  # index in the answer
    drafted: int


@dataclass
class Examples:
    """What a judge learns from."""

    last: Tensor  # [M, D] fp32: the target's state at the drafted token
    good: Tensor  # [M] bool
    question: Tensor  # [M] int64


@dataclass
class JudgeResult:
    """A trained head and how it did."""

    head: JudgeHead
    trained_on: int
    held_out: int
    auc: float | None  # on the held-out mismatches; None where they are all good, or all bad


def ask(target: Target, prompts: Sequence[list[int]], max_new_tokens: int, batch: int = 16) -> list[Answered]:
    """The target's own greedy answers."""
    jobs = [Job(number, list(prompt), max_new_tokens) for number, prompt in enumerate(prompts)]
    done = {one.id: one for one in _run(target, jobs, batch)}
    return [Answered(list(prompt), done[number].tokens[len(prompt) :]) for number, prompt in enumerate(prompts)]


@torch.no_grad()
def mismatches(target: Target, drafter: Drafter, answered: Sequence[Answered]) -> list[Mismatch]:
    """Every place of the answers where the drafter's first guess is another token; an answer's first token is never drafted."""
    drafter = drafter.to(target.device, target.dtype).eval()
    out = []
    for number, one in enumerate(answered):
        tokens = torch.tensor([one.prompt + one.answer], device=target.device)
        order = torch.arange(tokens.shape[1], device=target.device)[None]
        batch = Batch(tokens, order >= len(one.prompt), torch.zeros_like(order), order)
        batch.features = target.encode(tokens, order, batch.document, drafter.needs | drafter.teacher_needs)
        guesses = drafter.walk(batch, target.head, 1)[0, :, 0].tolist()  # guess t is for token t + 2
        for at in range(1, len(one.answer)):
            drafted = guesses[len(one.prompt) + at - 2]
            if drafted != one.answer[at]:
                out.append(Mismatch(number, at, drafted))
    return out


def label(
    target: Target, answered: Sequence[Answered], found: Sequence[Mismatch], right: Right, max_new_tokens: int, batch: int = 16
) -> Examples:
    """Good is what leaves the answer right; of questions that the target itself gets wrong nothing is learnt.

    max_new_tokens: what a whole answer may take. The states come from the passes that write the continuations. Raises `UserError` where no
    mismatch is left.
    """
    solved = {number for number, one in enumerate(answered) if right(number, one.answer)}
    kept = [one for one in found if one.question in solved]
    if not kept:
        raise UserError(
            f"no mismatch can be labelled: the target is right on {len(solved)} of {len(answered)} questions, and the drafter differs in "
            f"{len(found)} places, none of them there; give easier or more questions"
        )
    jobs = [Job(index, _until(answered, one), max(1, max_new_tokens - one.at - 1)) for index, one in enumerate(kept)]
    done = {one.id: one for one in _run(target, jobs, batch, ("last",))}
    last = torch.stack([done[index].features["last"][done[index].prompt_len - 1] for index in range(len(kept))]).float()
    good = [right(one.question, _answer(target, answered, one, done[index], max_new_tokens)) for index, one in enumerate(kept)]
    return Examples(last.cpu(), torch.tensor(good), torch.tensor([one.question for one in kept]))


def _until(answered: Sequence[Answered], one: Mismatch) -> list[int]:
    """The question, the answer up to the mismatch, and the drafted token."""
    return [*answered[one.question].prompt, *answered[one.question].answer[: one.at], one.drafted]


def _answer(target: Target, answered: Sequence[Answered], one: Mismatch, done: Finished, max_new_tokens: int) -> list[int]:
    """The whole answer with the drafted token in it."""
    start = len(answered[one.question].prompt)
    if one.drafted in target.eos_ids:  # the draft ended it: what was written behind does not count
        return done.tokens[start : start + one.at + 1]
    return done.tokens[start : start + max_new_tokens]


def fit(examples: Examples, fingerprint: str, config: JudgeTrainConfig) -> JudgeResult:
    """Trains a head. fingerprint: of the target whose states these are.

    Raises `UserError` where all examples to train on are good, or all bad.
    """
    held = _held_out(examples.question, config)
    last, good = examples.last[~held], examples.good[~held]
    if bool(good.all()) or not bool(good.any()):
        raise UserError(
            f"a judge needs good and bad mismatches to learn from, but {int(good.sum())} of the {len(good)} to train on are good; "
            f"label more questions"
        )
    head = JudgeHead(last.shape[1], fingerprint)
    mean, spread = last.mean(0), last.std(0).clamp_min(1e-6)
    weight, bias = head.linear.weight, head.linear.bias
    torch.nn.init.zeros_(weight)
    torch.nn.init.zeros_(bias)
    groups = [{"params": [weight], "weight_decay": config.weight_decay}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    for _ in range(config.steps):
        optimizer.zero_grad()
        head.loss((last - mean) / spread, good, config.wrong_weight).mean().backward()
        optimizer.step()
    with torch.no_grad():  # the scaling moves into w and b
        weight.div_(spread)
        bias.sub_(weight @ mean)
        scores = head(examples.last[held])
    return JudgeResult(head.eval(), len(good), int(held.sum()), auc(scores, examples.good[held]))


def _held_out(question: Tensor, config: JudgeTrainConfig) -> Tensor:
    """[M] bool: mismatches of the questions that are kept out; a question's stay together."""
    known = question.unique()
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(config.seed))
    return torch.isin(question, known[order[: int(config.held_out * len(known))]])


def auc(scores: Tensor, good: Tensor) -> float | None:
    """Probability that a good one scores above a bad one (ties count half): [M], [M] bool."""
    above, below = scores[good][:, None], scores[~good]
    if not above.numel() or not below.numel():
        return None
    return float(((above > below).double() + (above == below).double() / 2).mean())


def _run(target: Target, jobs: list[Job], batch: int, features: Sequence[str] = ()) -> list[Finished]:
    capacity = max((len(job.prompt) + job.max_new_tokens for job in jobs), default=1)
    return list(Sampler(target, min(batch, max(1, len(jobs))), capacity).run(jobs, features))
