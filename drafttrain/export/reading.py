"""What importers are given beside a folder: the target that the drafter in it drafts for."""

from __future__ import annotations

from dataclasses import dataclass

from drafttrain.core.errors import UserError
from drafttrain.export.tensors import Weights
from drafttrain.target.adapter import Target, read_shape
from drafttrain.target.files import TargetConfig, TargetShape, resolve
from drafttrain.target.head import TargetHead

EMBEDDING = "embed_tokens.weight"
SAME = 2.0**-6
"""Relative difference that rounding an embedding to a half precision may leave."""


@dataclass
class ImportTarget:
    """The target a published head is read for."""

    shape: TargetShape
    head: TargetHead

    @classmethod
    def of(cls, target: str | TargetConfig | Target) -> ImportTarget:
        """Only the configuration, the embedding and the head are read of a target that is not loaded."""
        if isinstance(target, Target):
            return cls(target.shape, target.head)
        config = TargetConfig(model=target) if isinstance(target, str) else target
        return cls(read_shape(config), TargetHead.from_folder(resolve(config), trust_remote_code=config.trust_remote_code))

    def check_embedding(self, weights: Weights) -> None:
        """Takes a stored embedding, or a `UserError` where it is not the target's: ours drafts with the target's."""
        if EMBEDDING not in weights.tensors:
            return
        own = self.head.embedding.float().cpu()
        stored = weights.take(EMBEDDING, own.shape)
        if (stored - own).abs().max() > SAME * own.abs().max():
            raise UserError(
                f"'{weights.path}': tensor '{EMBEDDING}' is not this target's embedding, with which drafters draft here; "
                f"give the target that it was trained for, or use a head without an embedding of its own"
            )
