"""An EAGLE-3 drafter's tensors over one text, ours beside those of the speculators package's own class, from the features to the drafts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafttrain.core.types import TrainingBatch
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.eagle3 import Eagle3
from drafttrain.engines.base import Engine, Job
from drafttrain.engines.faults import FAULTS
from drafttrain.target.adapter import Target

TOLERANCE = 1e-4
"""Largest difference, relative to the tensor's largest number, that two correct programs leave in fp32."""


@dataclass
class TensorGap:
    """One tensor in both."""

    name: str
    gap: float  # largest difference, relative
    agree: float  # share of rows with the same likeliest token, or of equal ids

    @property
    def differs(self) -> bool:
        return self.gap > TOLERANCE


def tensors_of(drafter: Eagle3, target: Target, tokens: list[int], steps: int) -> dict[str, Tensor]:
    """Ours, by name, in the order in which they are computed; rows that have all their tokens."""
    ids = torch.tensor([tokens], device=target.device)
    position = torch.arange(len(tokens), device=target.device)[None]
    document = torch.zeros_like(ids)
    features = target.encode(ids, position, document, {"aux_hidden_states"})
    batch = TrainingBatch(ids, torch.ones_like(ids).bool(), document, position, features)
    rows = slice(0, len(tokens) - steps - 1)
    with torch.no_grad():
        fused = drafter.read_feature(features["aux_hidden_states"])
        found = {"features": features["aux_hidden_states"][0, rows], "fused": fused[0, rows]}
        for step, state in enumerate(drafter.teacher_forced_states(batch, target.head, steps)):
            logits = drafter.readout(state, step, target.head)
            found |= {f"state_{step}": state[0, rows], f"logits_{step}": logits[0, rows]}
            found[f"drafted_{step}"] = drafter.vocab[logits[0, rows].argmax(-1)]
    return found


def peers_tensors(engine: Engine, job: Job, target: Target, tokens: list[int]) -> tuple[str, dict[str, Tensor]]:
    """The version of the peer's class, and its tensors over the same text."""
    ids = torch.tensor([tokens], device=target.device)
    with torch.no_grad():
        states = torch.cat(target.backbone(input_ids=ids, output_hidden_states=True).hidden_states)  # [L + 1, T, D]
    with tempfile.TemporaryDirectory() as name:
        given, seen = Path(name) / "given.safetensors", Path(name) / "seen.safetensors"
        save_file({"hidden_states": states.float().contiguous(), "following": torch.tensor([*tokens[1:], 0])}, given)
        version = engine.run(job, {"tensors": str(given), "seen": str(seen)})["version"]
        rows = slice(0, len(tokens) - job.length - 1)
        return version, {key: tensor[rows] for key, tensor in load_file(seen).items()}


def gaps(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[TensorGap]:
    return [gap_of(name, ours[name], theirs[name]) for name in ours]


def gap_of(name: str, own: Tensor, other: Tensor) -> TensorGap:
    if own.shape != other.shape:
        return TensorGap(name, float("inf"), 0.0)
    if not own.is_floating_point():
        agree = (own == other).double().mean().item()
        return TensorGap(name, 0.0 if agree == 1 else float("inf"), agree)
    difference = (own - other).abs().max() / own.abs().max()
    return TensorGap(name, difference.item(), (own.argmax(-1) == other.argmax(-1)).double().mean().item())


def likely_cause(load: Callable[[], Drafter], target: Target, tokens: list[int], theirs: dict[str, Tensor], steps: int) -> list[str]:
    """The faults under which our tensors are the peer's."""
    causes, layers = [], target.aux_layers
    for fault in FAULTS.values():
        drafter = load()
        assert isinstance(drafter, Eagle3)
        try:
            fault.apply(drafter, target)
            if not any(gap.differs for gap in gaps(tensors_of(drafter, target, tokens, steps), theirs)):
                causes.append(f"{fault.tensor}: {fault.cause}")
        finally:
            target.aux_layers = layers
    return causes
