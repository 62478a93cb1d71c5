"""Labels for a judge without humans, and its training (the recipe of AutoJudge, 2025, arXiv:2504.20039).

On questions whose answers a program can check: put the drafter's token where the target wrote another, let the target go on greedily
from there, and call the token good iff the answer is still right. The head of `verify/judge.py` learns this from the target's state at
the token. A drafter's mismatches are all plausible, and a head that saw nothing else lets anything else through: random tokens, put
into the same answers and called bad, are learnt beside them. M mismatches, random ones included, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.core.config import Config, Seed
from drafttrain.core.console import SafeConsole
from drafttrain.core.disk import load_tensors, write_whole
from drafttrain.core.errors import UserError
from drafttrain.core.layers import in_precision
from drafttrain.core.types import TrainingBatch
from drafttrain.drafters.base import Drafter
from drafttrain.target.adapter import Target
from drafttrain.target.sample import Finished, Job, Sampler
from drafttrain.train.heads import apart, auroc, descend
from drafttrain.verify.judge import JudgeHead

Right = Callable[[int, list[int]], bool]
"""(number of the question, tokens of an answer) -> whether the answer is right."""


PART = 16
"""Questions that are labelled together: what a stopped labelling loses at most."""
PART_NAMES = ("last", "good", "random", "question", "counts")
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)
FOLDS = 4


class JudgeTrainConfig(Config):
    """How a judge's head is trained: all examples every step."""

    steps: int = Field(default=500, ge=1)
    """Steps of Adam."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate, on states scaled to mean 0 and deviation 1."""
    penalty: float | None = Field(default=None, ge=0)
    """Times half of |w|^2, it joins the loss. By default that of `PENALTIES` with the best AUC in cross-validation over the questions to
    train on: a few hundred answers are few for as many weights as the target has hidden sizes."""
    wrong_weight: float = Field(default=1.0, gt=0)
    """How much more a bad token counts than a good one (lambda)."""
    held_out: float = Field(default=0.2, ge=0, lt=1)
    """Share of questions kept out of training, whose mismatches give the AUC."""
    seed: Seed = 0
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
class JudgeExamples:
    """What a judge learns from."""

    last: Tensor  # [M, D] fp32: the target's state at the drafted token
    good: Tensor  # [M] bool
    question: Tensor  # [M] int64
    random: Tensor  # [M] bool: a random token, not the drafter's

    def at(self, chosen: Tensor) -> JudgeExamples:
        """Some of them; chosen: [M] bool."""
        return JudgeExamples(self.last[chosen], self.good[chosen], self.question[chosen], self.random[chosen])


@dataclass
class Labelled:
    """Examples and where they come from."""

    examples: JudgeExamples
    asked: int  # questions
    solved: int  # of them answered rightly by the target
    found: int  # places where the drafter differs, unsolved questions included


@dataclass
class JudgeResult:
    """A trained head and how it did."""

    head: JudgeHead
    penalty: float
    trained_on: int
    held_out: int
    auc: float | None  # on the drafter's held-out mismatches; None where they are all good, or all bad
    let_through: float | None  # share of the held-out random tokens that it is more than half certain of; None where there are none


def ask(target: Target, prompts: Sequence[list[int]], max_new_tokens: int, batch: int = 16) -> list[Answered]:
    """The target's own greedy answers."""
    jobs = [Job(number, list(prompt), max_new_tokens) for number, prompt in enumerate(prompts)]
    done = {one.id: one for one in _run(target, jobs, batch)}
    return [Answered(list(prompt), done[number].tokens[len(prompt) :]) for number, prompt in enumerate(prompts)]


@torch.no_grad()
def mismatches(target: Target, drafter: Drafter, answered: Sequence[Answered]) -> list[Mismatch]:
    """Every place of the answers where the drafter's first guess is another token; an answer's first token is never drafted."""
    drafter = in_precision(drafter, target.device, target.dtype).eval()
    out = []
    for number, one in enumerate(answered):
        tokens = torch.tensor([one.prompt + one.answer], device=target.device)
        order = torch.arange(tokens.shape[1], device=target.device)[None]
        batch = TrainingBatch(tokens, order >= len(one.prompt), torch.zeros_like(order), order)
        batch.features = target.encode(tokens, order, batch.document, drafter.needs | drafter.teacher_needs)
        guesses = drafter.teacher_forced_drafts(batch, target.head, 1)[0, :, 0].tolist()  # guess t is for token t + 2
        for at in range(1, len(one.answer)):
            drafted = guesses[len(one.prompt) + at - 2]
            if drafted != one.answer[at]:
                out.append(Mismatch(number, at, drafted))
    return out


def label(
    target: Target, answered: Sequence[Answered], found: Sequence[Mismatch], right: Right, max_new_tokens: int, batch: int = 16
) -> JudgeExamples:
    """Good is what leaves the answer right; of questions that the target itself gets wrong nothing is learnt.

    max_new_tokens: what a whole answer may take. The states come from the passes that write the continuations. Raises `UserError` where no
    mismatch is left.
    """
    solved = {number for number, one in enumerate(answered) if right(number, one.answer)}
    kept = [one for one in found if one.question in solved]
    if not kept:
        raise UserError(_nothing(len(solved), len(answered), len(found)))
    jobs = [Job(index, _until(answered, one), max(1, max_new_tokens - one.at - 1)) for index, one in enumerate(kept)]
    done = {one.id: one for one in _run(target, jobs, batch, ("last_hidden_state",))}
    last = torch.stack([done[index].features["last_hidden_state"][done[index].prompt_len - 1] for index in range(len(kept))]).float()
    good = [right(one.question, _answer(target, answered, one, done[index], max_new_tokens)) for index, one in enumerate(kept)]
    drafted = torch.zeros(len(kept), dtype=torch.bool)
    return JudgeExamples(last.cpu(), torch.tensor(good), torch.tensor([one.question for one in kept]), drafted)


def spoil(target: Target, answered: Sequence[Answered], found: Sequence[Mismatch], batch: int = 16) -> JudgeExamples:
    """As many random tokens as mismatches, each at a random place of the same answer, all called bad; the same ones every time."""
    dice = [torch.Generator().manual_seed(sum(one.prompt) + len(one.answer)) for one in answered]
    swapped = []
    for one in found:
        at, token = (
            int(torch.randint(low, high, (), generator=dice[one.question]))
            for low, high in ((1, len(answered[one.question].answer)), (0, target.vocab_size))
        )
        swapped.append(Mismatch(one.question, at, token))
    jobs = [Job(index, _until(answered, one), 1) for index, one in enumerate(swapped)]
    done = {one.id: one for one in _run(target, jobs, batch, ("last_hidden_state",))}
    last = torch.stack([done[index].features["last_hidden_state"][done[index].prompt_len - 1] for index in range(len(swapped))]).float()
    bad = torch.zeros(len(swapped), dtype=torch.bool)
    return JudgeExamples(last.cpu(), bad, torch.tensor([one.question for one in swapped]), ~bad)


def _nothing(solved: int, asked: int, found: int) -> str:
    return (
        f"no mismatch can be labelled: the target is right on {solved} of {asked} questions, and the drafter differs in "
        f"{found} places, none of them there; give easier or more questions"
    )


def labelled(
    target: Target, drafter: Drafter, prompts: Sequence[list[int]], right: Right, max_new_tokens: int, folder: Path, batch: int = 16
) -> Labelled:
    """Asks, finds the mismatches and labels them, `PART` questions at a time; every part is written whole, and one that stands in
    `folder` already is read instead of made again.

    right: sees the numbers of `prompts`. Raises `UserError` where no mismatch can be labelled, a part cannot be read, or the drafter was
    trained on other layers of the target.
    """
    drafter.check_layers(target.aux_layers)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*shown, console=SafeConsole(stderr=True)) as progress:
        bar = progress.add_task("labelling questions", total=len(prompts))
        for first in range(0, len(prompts), PART):
            path, some = folder / f"{first:06d}.safetensors", prompts[first : first + PART]
            if not path.exists():
                part = _part(target, drafter, some, first, right, max_new_tokens, batch)
                write_whole(path, partial(save_file, part))
            parts.append(_read(path))
            progress.advance(bar, len(some))
    last, good, random, question, counts = (torch.cat([part[name] for part in parts]) for name in PART_NAMES)
    solved, found = counts.view(-1, 2).sum(0).tolist()
    if not len(good):
        raise UserError(_nothing(solved, len(prompts), found))
    return Labelled(JudgeExamples(last, good, question, random), len(prompts), solved, found)


def _part(
    target: Target, drafter: Drafter, prompts: Sequence[list[int]], first: int, right: Right, max_new_tokens: int, batch: int
) -> dict[str, Tensor]:
    """What `PART_NAMES` names; the numbers of questions begin at `first`."""

    def ours(number: int, answer: list[int]) -> bool:
        return right(first + number, answer)

    answered = ask(target, prompts, max_new_tokens, batch)
    found = mismatches(target, drafter, answered)
    solved = {number for number, one in enumerate(answered) if ours(number, one.answer)}
    kept = [one for one in found if one.question in solved]
    nothing = torch.zeros(0, dtype=torch.long)
    both = [JudgeExamples(torch.zeros(0, target.shape.hidden_size), nothing.bool(), nothing, nothing.bool())]
    if kept:
        both = [label(target, answered, found, ours, max_new_tokens, batch), spoil(target, answered, kept, batch)]
    last, good, random, question = (torch.cat([vars(made)[name] for made in both]) for name in PART_NAMES[:-1])
    return {
        "last": last,
        "good": good,
        "random": random,
        "question": question + first,
        "counts": torch.tensor([len(solved), len(found)]),
    }


def _read(path: Path) -> dict[str, Tensor]:
    part = load_tensors(path, f"labels '{path}'", "delete it and run again")
    if part.keys() != set(PART_NAMES):
        raise UserError(f"labels '{path}': not a judge's labels (it holds {', '.join(sorted(part))}); delete it and run again")
    return part


def _until(answered: Sequence[Answered], one: Mismatch) -> list[int]:
    """The question, the answer up to the mismatch, and the drafted token."""
    return [*answered[one.question].prompt, *answered[one.question].answer[: one.at], one.drafted]


def _answer(target: Target, answered: Sequence[Answered], one: Mismatch, done: Finished, max_new_tokens: int) -> list[int]:
    """The whole answer with the drafted token in it."""
    start = len(answered[one.question].prompt)
    if one.drafted in target.eos_ids:  # the draft ended it: what was written behind does not count
        return done.tokens[start : start + one.at + 1]
    return done.tokens[start : start + max_new_tokens]


def fit(examples: JudgeExamples, fingerprint: str, config: JudgeTrainConfig) -> JudgeResult:
    """Trains a head. fingerprint: of the target whose states these are.

    Raises `UserError` where all examples to train on are good, or all bad.
    """
    held = apart(examples.question, config.held_out, torch.Generator().manual_seed(config.seed))
    known, unseen = examples.at(~held), examples.at(held)
    if bool(known.good.all()) or not bool(known.good.any()):
        raise UserError(
            f"a judge needs good and bad mismatches to learn from, but {int(known.good.sum())} of the {len(known.good)} to train on are "
            f"good; label more questions"
        )
    penalty = _best_penalty(known, config) if config.penalty is None else config.penalty
    head = _descended(known, fingerprint, penalty, config)
    with torch.no_grad():
        scores = head(unseen.last)
    drafted = unseen.good[~unseen.random]
    let_through = float((scores[unseen.random] > 0).float().mean()) if bool(unseen.random.any()) else None
    return JudgeResult(head, penalty, len(known.good), len(drafted), _auc(scores[~unseen.random], drafted), let_through)


def _best_penalty(known: JudgeExamples, config: JudgeTrainConfig) -> float:
    """By the AUC of the drafter's mismatches, each scored by a head that saw none of its question; of equals the largest."""
    questions = known.question.unique()
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(config.seed))
    reached = {}
    for penalty in PENALTIES:
        scores = torch.zeros(len(known.good))
        for some in questions[order].tensor_split(FOLDS):
            out = torch.isin(known.question, some)
            scores[out] = _descended(known.at(~out), "", penalty, config)(known.last[out]).detach()
        reached[penalty] = _auc(scores[~known.random], known.good[~known.random]) or 0.0
    return max(PENALTIES, key=lambda penalty: (reached[penalty], penalty))


def _descended(known: JudgeExamples, fingerprint: str, penalty: float, config: JudgeTrainConfig) -> JudgeHead:
    """A head trained on all of them."""
    head = JudgeHead(known.last.shape[1], fingerprint)
    mean, spread = known.last.mean(0), known.last.std(0).clamp_min(1e-6)
    weight, bias = head.linear.weight, head.linear.bias
    torch.nn.init.zeros_(weight)
    torch.nn.init.zeros_(bias)
    scaled, count = (known.last - mean) / spread, len(known.good)

    def loss(chosen: Tensor) -> Tensor:
        return head.loss(scaled[chosen], known.good[chosen], config.wrong_weight).mean() + penalty / 2 * weight.square().sum()

    optimizer = torch.optim.Adam(head.parameters(), lr=config.lr)
    descend(head, optimizer, loss, count, config.steps, count, torch.Generator().manual_seed(config.seed))
    with torch.no_grad():  # the scaling moves into w and b
        weight.div_(spread)
        bias.sub_(weight @ mean)
    return head


def _auc(scores: Tensor, good: Tensor) -> float | None:
    """P(a good one scores above a bad one), [M], [M] bool; None where there are only good ones, or only bad ones."""
    both = bool(good.any()) and not bool(good.all())
    return auroc(scores.numpy(), good.numpy()) if both else None


def _run(target: Target, jobs: list[Job], batch: int, features: Sequence[str] = ()) -> list[Finished]:
    capacity = max((len(job.prompt) + job.max_new_tokens for job in jobs), default=1)
    return list(Sampler(target, min(batch, max(1, len(jobs))), capacity).run(jobs, features))
