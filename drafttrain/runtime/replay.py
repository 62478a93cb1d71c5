"""Offline replay: the accepted length that decoding with chains would measure, read off the target's own texts without decoding.

Greedy acceptance is a function of the target's text alone: from each root, the drafter's guesses count up to the first wrong one.

Sampled acceptance is a matter of chance even where the text is given. A drafted token stands where it is the text's next token x and is
kept, which happens with probability q(x) min(1, p(x) / q(x)); given that x is what the text says, with w = min(1, q(x) / p(x)). So
the rounds of a text are a chain of roots whose expected number is exact. Before x is seen, a token stands with probability
g = sum_x min(p, q). 1 + g_1 + w_1 g_2 + w_1 w_2 g_3 + ... is an unbiased expected accepted length, and 1 + g_1 + g_1 g_2 + ... is not: how
likely a token is to stand depends on which tokens stood before it (HedgeSpec, Liu et al., 2025, arXiv:2510.20064, where g is 1 - TV).

B rows, T time, K draft length, A answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.errors import UserError
from drafttrain.core.sampling import Sampling
from drafttrain.core.types import TrainingBatch
from drafttrain.drafters.base import Drafter
from drafttrain.runtime.stats import Statistics
from drafttrain.target.head import TargetHead

TeacherForced = Callable[[TrainingBatch, int], Tensor]
"""(batch, K) -> [B, T, K] guesses, as `Drafter.teacher_forced_drafts` gives them."""
Stands = Callable[[TrainingBatch, int], tuple[Tensor, Tensor]]
"""(batch, K) -> g and w, [B, T, K] each, as `stands` gives them."""


@torch.no_grad()
def replay(drafts: TeacherForced, batches: Iterable[TrainingBatch], length: int) -> Statistics:
    """Chains of `length` over every answer in `batches`.

    Only texts that the target wrote greedily give the figure that greedy decoding measures; choose the conversations accordingly.
    """
    out = Statistics(attempts=[0] * length, accepts=[0] * length)
    for batch in batches:
        runs = matching_runs(batch, drafts(batch, length)).cpu().numpy()
        for row, start, stop in answers(batch):
            _walk_answer(out, runs[row], start, stop)
    return out


def matching_runs(batch: TrainingBatch, guesses: Tensor) -> Tensor:
    """[B, T, K] guesses -> [B, T] how many of them, from the first on, are what the text says after token t + 1."""
    right = []
    for step in range(guesses.shape[-1]):
        following, _ = batch.ahead(step + 2)
        right.append(guesses[..., step] == following)
    return torch.stack(right, -1).long().cumprod(-1).sum(-1)


def answers(batch: TrainingBatch) -> Iterator[tuple[int, int, int]]:
    """(row, start, stop) of every stretch of answer tokens within one document."""
    mask, document = batch.mask.cpu().numpy(), batch.document.cpu().numpy()
    for row in range(len(mask)):
        inside = mask[row] & (document[row] >= 0)
        new = inside & ~(np.roll(inside, 1) & (np.roll(document[row], 1) == document[row]))
        if len(inside):
            new[0] = inside[0]
        for start in np.nonzero(new)[0]:
            stop = start
            while stop < len(inside) and inside[stop] and document[row, stop] == document[row, start]:
                stop += 1
            yield row, int(start), int(stop)


def _walk_answer(out: Statistics, runs: np.ndarray, start: int, stop: int) -> None:
    """One answer: its first token comes from the prefill and is the first root; each round keeps the right guesses and one more."""
    root, depth = start, len(out.attempts)
    while root + 1 < stop:
        left = stop - 1 - root
        accepted = min(int(runs[root - 1]), left) if root > 0 else 0
        kept = min(accepted + 1, left)
        tried = accepted + (kept > accepted and accepted < depth)
        for level in range(tried):
            out.attempts[level] += 1
            out.accepts[level] += level < accepted
        out.rounds, out.tokens = out.rounds + 1, out.tokens + kept
        root += kept


@dataclass
class Expected:
    """What decoding is expected to count on given texts, answer by answer."""

    tokens: np.ndarray  # [A] tokens after the first
    rounds: np.ndarray  # [A] expected
    attempts: np.ndarray  # [A, K] expected rounds in which a node at depth k + 1 could have stood
    accepts: np.ndarray  # [A, K] expected rounds in which one does, whatever the text says there
    gained: np.ndarray  # [A] expected tokens beyond one a round; the text's last token, accepted, leaves no room for another

    @property
    def tau(self) -> float:
        """Tokens a round, the bonus token included: the texts' tokens over their expected rounds."""
        return float(self.tokens.sum() / self.rounds.sum())

    @property
    def alpha(self) -> list[float | None]:
        """alpha[k]: P(a node at depth k + 1 stands, given its parent does), by sum min(p, q); None where no node could."""
        return [float(yes / all_) if all_ else None for yes, all_ in zip(self.accepts.sum(0), self.attempts.sum(0), strict=True)]

    @property
    def length(self) -> float:
        """The mean of 1 + g_1 + w_1 g_2 + ... over the roots, each weighed by how likely it is to be one: `tau` estimated otherwise."""
        return float(1 + self.gained.sum() / self.rounds.sum())

    def interval(self, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
        """The middle 95% of `tau` over resampled answers."""
        answers = len(self.tokens)
        drawn = np.random.default_rng(seed).multinomial(answers, np.full(answers, 1 / answers), size=resamples)
        low, high = np.percentile((drawn @ self.tokens) / (drawn @ self.rounds), [2.5, 97.5])
        return float(low), float(high)


@torch.no_grad()
def replay_sampled(
    drafter: Drafter, batches: Iterable[TrainingBatch], head: TargetHead, sampling: Sampling, length: int, temperature: float | None = None,
    chunk: int = 256,
) -> Expected:
    """Chains of `length` over every answer in `batches`, whose features hold `last_hidden_state`.

    Only texts that the target sampled as `sampling` says give the figure that such decoding measures. temperature: the drafter's own;
    chunk: positions whose [V] distributions stand in memory at once. Raises `UserError` where the family has no states to replay.
    """
    return expect(lambda batch, steps: stands(drafter, batch, head, sampling, steps, temperature, chunk), batches, length)


@torch.no_grad()
def expect(standing: Stands, batches: Iterable[TrainingBatch], length: int) -> Expected:
    """`replay_sampled` with its distributions computed by `standing`, which may hold a drafter that is spread over processes."""
    counted: list[tuple[int, float, np.ndarray, np.ndarray, float]] = []
    for batch in batches:
        overlaps, weights = (values.cpu().double().numpy() for values in standing(batch, length))
        for row, start, stop in answers(batch):
            counted.append(_expect_answer(overlaps[row], weights[row], start, stop))
    if not counted:
        raise UserError("no answers to replay: the batches hold none")
    tokens, rounds, attempts, accepts, gained = zip(*counted, strict=True)
    return Expected(np.array(tokens), np.array(rounds), np.stack(attempts), np.stack(accepts), np.array(gained))


def stands(
    drafter: Drafter,
    batch: TrainingBatch,
    head: TargetHead,
    sampling: Sampling,
    length: int,
    temperature: float | None = None,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """g and w, [B, T, K] each: of the token at depth k + 1 in a round whose root is token t + 1, with the text's own before it.

    The arguments are those of `replay_sampled`.
    """
    own = sampling if temperature is None else sampling._replace(temperature=temperature)
    ids = drafter.draft_ids
    steps = list(drafter.teacher_forced_states(batch, head, length))  # [B, T, D] each; deeper than the family reaches: nothing stands
    roots = [batch.ahead(step + 2)[1] for step in range(len(steps))]  # [B, T] each: where a root's token at depth step + 1 is a label
    g = torch.zeros(*batch.tokens.shape, length, device=batch.tokens.device)
    w = torch.zeros_like(g)
    following, supervised = batch.ahead(1)
    for part in supervised.nonzero().split(chunk):
        row, place = part.unbind(1)  # the target's state here gives p, for every depth alike
        text = following[row, place]
        p = sampling.probs(head.logits(batch.features["last_hidden_state"][row, place]))
        stood = p.gather(1, text[:, None])[:, 0].clamp_min(1e-38)
        p = p if ids is None else p[:, ids]
        column, drafted = (text, torch.ones_like(text, dtype=torch.bool)) if ids is None else _columns(ids, text)
        for step, states in enumerate(steps):
            at = place - step - 1
            here = ((at >= 0) & roots[step][row, at]).nonzero()[:, 0]
            q = own.probs(drafter.readout(states[row[here], at[here]], step, head))
            said = q.gather(1, column[here, None])[:, 0] * drafted[here]
            g[row[here], at[here], step] = torch.minimum(p[here], q).sum(-1)
            w[row[here], at[here], step] = (said / stood[here]).clamp_max(1.0)
    return g, w


def _columns(ids: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Where `tokens` [n] stand in the draft vocabulary `ids` [Vd] ([n], 0 where they don't), and whether they do."""
    place = torch.searchsorted(ids, tokens).clamp_max(len(ids) - 1)
    found = ids[place] == tokens
    return torch.where(found, place, 0), found


def _expect_answer(g: np.ndarray, w: np.ndarray, start: int, stop: int) -> tuple[int, float, np.ndarray, np.ndarray, float]:
    """Tokens, expected rounds, attempts, accepts and gained tokens of the answer at [start, stop), whose first token is a root."""
    depth = g.shape[1]
    root = np.zeros(stop - start + depth + 1)  # probability that each token is a round's root
    root[0] = 1.0
    rounds, gained, attempts, accepts = 0.0, 0.0, np.zeros(depth), np.zeros(depth)
    for at in range(stop - start - 1):
        left, before = stop - start - 1 - at, start + at - 1
        run = root[at] if before >= 0 else 0.0  # a round is here, and the drafted tokens so far stood
        rounds += root[at]
        for level in range(min(depth, left)):
            attempts[level] += run
            accepts[level] += run * g[before, level]
            gained += run * g[before, level] if level + 1 < left else 0.0
            root[at + level + 1] += run * (1 - w[before, level])
            run *= w[before, level]
        root[at + min(depth, left) + 1] += run  # all stood: the bonus token is the next root, or the text has ended
    return stop - start - 1, rounds, attempts, accepts, gained
