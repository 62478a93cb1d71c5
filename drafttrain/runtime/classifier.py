"""Which drafter suits a prompt: a linear classifier on the target's mean last hidden state over the prompt (TaskSpec: Ge et al., 2025,
arXiv:2505.08600). The router `task` reads it. P prompts, D hidden, A classes (numbers of drafters in the pool).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from drafttrain.core.disk import open_tensors, write_tensors
from drafttrain.core.errors import UserError
from drafttrain.target.adapter import Target

FORMAT = "1"
MEND = "train it again with `drafttrain router`"
TENSORS = {"weight", "bias", "mean", "scale", "arms"}
WEIGHT_DECAY = 1e-2
"""On standardised states: many more numbers a prompt than prompts."""
STEPS = 200


@torch.inference_mode()
def prompt_states(target: Target, prompts: Iterable[Sequence[int]]) -> Tensor:
    """[P, D] fp32: the target's last hidden state, mean over each prompt's tokens."""
    states = []
    for prompt in prompts:
        tokens = torch.tensor([list(prompt)], device=target.device)
        position = torch.arange(tokens.shape[1], device=target.device)[None]
        features = target.encode(tokens, position, torch.zeros_like(tokens), {"last_hidden_state"})
        states.append(mean_states(features["last_hidden_state"], torch.tensor([tokens.shape[1]], device=target.device)).cpu())
    return torch.cat(states)


def mean_states(states: Tensor, lengths: Tensor) -> Tensor:
    """[B, P, D] of right-padded prompts -> [B, D] fp32, the mean over each prompt's own tokens."""
    real = torch.arange(states.shape[1], device=states.device) < lengths[:, None]  # [B, P]
    return (states.float() * real[..., None]).sum(1) / lengths[:, None]


class PromptClassifier:
    """softmax(W (x - mean) / scale + b) over the arms it was trained with."""

    def __init__(self, tensors: dict[str, Tensor], target: str) -> None:
        """tensors: weight [A, D], bias [A], mean [D], scale [D], arms [A]; target: its fingerprint."""
        self.tensors, self.target = tensors, target

    @property
    def arms(self) -> list[int]:
        return [int(arm) for arm in self.tensors["arms"].tolist()]

    def probabilities(self, states: Tensor) -> Tensor:
        """Mean hidden states [P, D] -> [P, A]."""
        standard = (states.float().cpu() - self.tensors["mean"]) / self.tensors["scale"]
        return F.linear(standard, self.tensors["weight"], self.tensors["bias"]).softmax(-1)

    def save(self, path: Path) -> None:
        about = {"classifier": FORMAT, "target": self.target}
        write_tensors(path, self.tensors, about)


def fit_classifier(states: Tensor, arms: Tensor, target: str) -> PromptClassifier:
    """Multinomial logistic regression of arms [P] on states [P, D]; the same input gives the same weights."""
    known, labels = arms.unique(return_inverse=True)  # [A], [P]
    if len(known) < 2:
        raise UserError("prompts of one drafter alone: there is nothing to tell apart; give prompts of at least two drafters")
    states = states.float()
    mean, scale = states.mean(0), states.std(0).clamp_min(1e-6)
    standard = (states - mean) / scale
    weight = torch.zeros(len(known), states.shape[1], requires_grad=True)
    bias = torch.zeros(len(known), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = F.cross_entropy(F.linear(standard, weight, bias), labels) + WEIGHT_DECAY * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    tensors = {"weight": weight.detach(), "bias": bias.detach(), "mean": mean, "scale": scale, "arms": known}
    return PromptClassifier(tensors, target)


def held_out_accuracy(states: Tensor, arms: Tensor, target: str, every: int = 5) -> float:
    """Share of every fifth prompt that a classifier trained on the others puts right."""
    held = torch.arange(len(arms)) % every == every - 1
    if len(arms[~held].unique()) < 2 or not held.any():
        return float("nan")
    fitted = fit_classifier(states[~held], arms[~held], target)
    chosen = torch.tensor(fitted.arms)[fitted.probabilities(states[held]).argmax(-1)]
    return float((chosen == arms[held]).float().mean())


def load_classifier(path: Path) -> PromptClassifier:
    """A `UserError` where the file is missing or damaged. Read once for all rows, and again when the file changes."""
    if not path.is_file():
        raise UserError(f"runtime.router.classifier '{path}': no such file; {MEND}")
    return _loaded(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _loaded(path: Path, changed: int) -> PromptClassifier:
    what = f"runtime.router.classifier '{path}'"
    file = open_tensors(path, what, MEND)
    about = file.metadata() or {}
    if about.get("classifier") != FORMAT or set(file.keys()) != TENSORS:
        raise UserError(f"{what}: not a classifier of this version; {MEND}")
    tensors = {name: file.get_tensor(name) for name in TENSORS}
    return PromptClassifier(tensors, about.get("target", ""))
