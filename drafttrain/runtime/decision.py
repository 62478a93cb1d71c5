"""The decision model: will anything drafted from this distribution stand? (Lu et al., 2024, arXiv:2409.10644)

A small MLP that scores a node from what the drafter knows there before a child is drawn. Two kinds:

    hard    reads the distribution's entropy and ten largest entries;     learns whether x is the target's argmax
    soft    reads these and the drafter's state [D];             learns min(1, p(x) / q(x)) of the token x that was drawn

(The paper's `soft` reads the state alone. From a thousand rounds that tells less than the entropy does; with the distribution beside it,
and half of the state hidden at each step of training, it tells more.)

The policy `decision` ends a tree where no node's score is above a threshold. `train/decision.py` trains it from logged rounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.config import Config, parse
from drafttrain.core.disk import CONFIG, WEIGHTS, load_weights, read_json, save_configured
from drafttrain.core.errors import UserError, first_line
from drafttrain.core.sampling import Sampling

LIKELIEST = 10
PROBS_FEATURES = LIKELIEST + 1
"""Numbers told of a distribution."""
HIDDEN_SHARE = 0.5
"""Of a state's numbers, at each step of training."""
MEND = "train it again"


class DecisionShape(Config):
    """`config.json` of a decision model."""

    labels: Literal["soft", "hard"]
    inputs: int = Field(ge=1)
    hidden: int = Field(default=64, ge=1)
    temperature: float
    """The sampling that the rounds it learnt from were decoded with."""
    top_k: int
    top_p: float
    drafter: str
    """Fingerprint of the drafter that it reads."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)


class Decision(nn.Module):
    """Scores nodes; inputs are standardised by the mean and spread of the training ones."""

    mean: Tensor
    spread: Tensor

    def __init__(self, shape: DecisionShape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("mean", torch.zeros(shape.inputs))
        self.register_buffer("spread", torch.ones(shape.inputs))
        self.net = nn.Sequential(nn.Linear(shape.inputs, shape.hidden), nn.ReLU(), nn.Linear(shape.hidden, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., F] -> [...] logits of the score. F: `LAW`, or `LAW` and D."""
        probs, state = ((inputs.float() - self.mean) / self.spread).tensor_split([PROBS_FEATURES], -1)
        return self.net(torch.cat([probs, F.dropout(state, HIDDEN_SHARE, self.training)], -1))[..., 0]

    def score(self, logits: Tensor, states: Tensor | None) -> Tensor:
        """The drafter's logits [B, W, Vd] and states [B, W, D] -> [B, W] in (0, 1)."""
        if self.mean.device != logits.device:
            self.to(logits.device)
        probs, size = probs_features(logits), self.shape.inputs - PROBS_FEATURES
        if self.shape.labels == "hard":
            return self(probs).sigmoid()
        if states is None or states.shape[-1] != size:
            given = "none" if states is None else str(states.shape[-1])
            raise UserError(f"decision model: it reads states of {size} numbers, this drafter gives {given}; train another")
        return self(torch.cat([probs, states.float()], -1)).sigmoid()

    def check(self, sampling: Sampling) -> None:
        """A `UserError` where it learnt from rounds of other sampling: acceptance changes with the temperature."""
        if self.shape.sampling != sampling:
            raise UserError(
                f"decision model: it learnt from rounds with {_shown(self.shape.sampling)}, but decoding uses {_shown(sampling)}; "
                f"decode with the same, or train one with `drafttrain decision`"
            )

    def save(self, folder: Path) -> None:
        """Writes it, whole or not at all."""
        weights = {name: value.cpu().contiguous() for name, value in self.state_dict().items()}
        save_configured(folder, lambda digest: self.shape.model_dump(mode="json"), weights)


def probs_features(logits: Tensor) -> Tensor:
    """[..., Vd] -> [..., 11]: entropy (nats) and the ten largest probabilities of their softmax, zeros where there are fewer tokens."""
    probs = logits.float().softmax(-1)
    best = probs.topk(min(LIKELIEST, probs.shape[-1]), -1).values
    return torch.cat([torch.special.entr(probs).sum(-1, keepdim=True), F.pad(best, (0, LIKELIEST - best.shape[-1]))], -1)


def load_decision(folder: Path) -> Decision:
    """The decision model in a folder, or a `UserError`."""
    if not (folder / CONFIG).exists():
        raise UserError(f"decision model '{folder}': no {CONFIG} there; give a folder that `drafttrain decision` wrote")
    what = f"decision model '{folder}'"
    shape = parse(DecisionShape, read_json(folder / CONFIG, what, MEND), str(folder / CONFIG))
    model = Decision(shape)
    weights = load_weights(folder, None, what, MEND)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{what}: {WEIGHTS} is of another shape ({first_line(error)}); {MEND}") from error
    return model.eval().requires_grad_(False)


def _shown(sampling: Sampling) -> str:
    return f"temperature {sampling.temperature}, top-k {sampling.top_k}, top-p {sampling.top_p}"
