"""Training the decision model (`runtime/decision.py`) from logged rounds, and how well it tells what will stand.

Adam, binary cross entropy, the epoch with the lowest held-out loss is kept; prompts are held out whole. M drawn nodes, F inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from drafttrain.core.config import Config, Seed
from drafttrain.core.errors import UserError
from drafttrain.runtime.decision import Decision, DecisionShape, probs_features
from drafttrain.runtime.rounds import LoggedProbs, LoggedRounds, RoundLog
from drafttrain.train.heads import apart, auroc, descend

CHUNK = 32
"""Rounds whose [N, V] logits stand in memory at once."""


class DecisionTraining(Config):
    """How a decision model is trained; the defaults are the paper's."""

    labels: Literal["soft", "hard"] = "hard"
    hidden: int = Field(default=64, ge=1)
    """Width of its one hidden layer."""
    epochs: int = Field(default=10, ge=1)
    batch: int = Field(default=50, ge=1)
    """Drawn nodes a step."""
    lr: float = Field(default=1e-3, gt=0)
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the prompts."""
    seed: Seed = 0


@dataclass
class DecisionExamples:
    """Every live drawn node of some rounds."""

    inputs: Tensor  # [M, F]
    label: Tensor  # [M] in [0, 1]
    entropy: Tensor  # [M] of the distribution that the node was drawn from
    prompt: Tensor  # [M]

    def at(self, chosen: Tensor) -> DecisionExamples:
        return DecisionExamples(self.inputs[chosen], self.label[chosen], self.entropy[chosen], self.prompt[chosen])


@dataclass
class Fitted:
    """A trained model and what it does on held-out prompts."""

    model: Decision
    trained_on: int  # nodes, after balancing
    held_out: int  # nodes
    loss: float  # held-out cross entropy
    prior_loss: float  # that of the held-out labels' own mean; lower for `hard` ones, which are balanced for training only
    auroc: float  # P(a node that stands scores above one that does not)
    entropy_auroc: float  # the same of the distribution's negative entropy, which needs no training


def examples(log: RoundLog, logged_probs: LoggedProbs, labels: Literal["soft", "hard"]) -> DecisionExamples:
    """soft labels: min(1, p(x) / q(x)), with q = 1 where x was chosen with certainty. hard ones: x is the target's argmax."""
    parts = [_examples(rounds, logged_probs, labels) for shard in log.parts() for rounds in shard.split(CHUNK)]
    names = ("inputs", "label", "entropy", "prompt")
    return DecisionExamples(*(torch.cat([vars(part)[name] for part in parts]) for name in names))


def _examples(rounds: LoggedRounds, logged_probs: LoggedProbs, labels: Literal["soft", "hard"]) -> DecisionExamples:
    features = probs_features(logged_probs.drafter_logits(rounds)).cpu()  # [n, R, 11]
    assert rounds.states is not None and rounds.probs_row is not None
    drawn = rounds.live.clone()
    drawn[:, 0] = False
    row, node = drawn.nonzero(as_tuple=True)
    source = rounds.probs_row[row, node]
    if labels == "hard":
        best = logged_probs.logits(rounds).argmax(-1).cpu()  # [n, N]
        label = (best[row, rounds.parents[row, node]] == rounds.tokens[row, node]).float()
    else:
        q = torch.ones_like(rounds.p) if rounds.q is None else rounds.q
        label = (rounds.p[row, node] / q[row, node].clamp_min(1e-38)).clamp_max(1.0)
    inputs = features if labels == "hard" else torch.cat([features, rounds.states.float()], -1)
    return DecisionExamples(inputs[row, source].clone(), label.clone(), features[row, source, 0].clone(), rounds.prompt[row])


def fit(log: RoundLog, logged_probs: LoggedProbs, config: DecisionTraining) -> Fitted:
    """Trains a decision model on a log. Raises `UserError` where it holds too little to learn from."""
    known = examples(log, logged_probs, config.labels)
    generator = torch.Generator().manual_seed(config.seed)
    prompts = known.prompt.unique()
    if len(prompts) < 2:
        raise UserError(f"rounds '{log.folder}': {len(prompts)} prompt; at least 2 are needed, one of them to be held out")
    out = apart(known.prompt, config.held_out, generator, at_least=1)
    train, held = known.at(~out), known.at(out)
    if config.labels == "hard":
        train = _balanced(train, generator)
    if not len(train.label) or not len(held.label):
        raise UserError(f"rounds '{log.folder}': too few drawn nodes of one kind to learn from; log more rounds")
    info = log.info
    shape = DecisionShape(
        labels=config.labels, inputs=known.inputs.shape[1], hidden=config.hidden, temperature=info.temperature, top_k=info.top_k,
        top_p=info.top_p, drafter=info.drafter,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = Decision(shape)
    model.mean.copy_(train.inputs.mean(0))
    model.spread.copy_(train.inputs.std(0, correction=0).clamp_min(1e-6))
    loss = _train(model, train, held, config, generator)
    with torch.no_grad():
        scores = model(held.inputs)
    prior = held.label.mean().clamp(1e-6, 1 - 1e-6).expand_as(held.label)
    return Fitted(
        model, len(train.label), len(held.label), loss, float(F.binary_cross_entropy(prior, held.label)),
        auroc(scores.numpy(), held.label.numpy()), auroc(-held.entropy.numpy(), held.label.numpy()),
    )


def _train(model: Decision, train: DecisionExamples, held: DecisionExamples, config: DecisionTraining, generator: torch.Generator) -> float:
    """Leaves the best epoch's weights in the model; its held-out loss."""
    def loss(known: DecisionExamples) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(known.inputs), known.label)

    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    best = descend(
        model, optimizer, lambda chosen: loss(train.at(chosen)), len(train.label), config.epochs, config.batch, generator,
        held=lambda: float(loss(held)),
    )  # fmt: skip
    assert best is not None
    return best


def _balanced(known: DecisionExamples, generator: torch.Generator) -> DecisionExamples:
    """As many nodes that stand as nodes that do not."""
    yes, no = (known.label > 0.5).nonzero()[:, 0], (known.label <= 0.5).nonzero()[:, 0]
    count = min(len(yes), len(no))
    chosen = [kind[torch.randperm(len(kind), generator=generator)[:count]] for kind in (yes, no)]
    return known.at(torch.cat(chosen))
