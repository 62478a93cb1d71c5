"""Consensus: N samples of one prompt draft for each other, from what they have written so far (multi-sample consensus drafting, paper 7).

Samples of one prompt share one index. The newest tokens of a row are looked up in the prompt, in its own text and in those of its siblings;
continuations that share a prefix are one node, and one that many samples wrote weighs more. A finished sample's text stays in the index.
Each row is verified with random numbers of its own, so that the samples are independent: what siblings wrote decides what is drafted, never
what is accepted. A prompt with one sample is drafted for as `ngram` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from drafttrain.core.suffix import SuffixAutomaton
from drafttrain.core.types import Features, Groups
from drafttrain.drafters.lookup import Lookup, LookupConfig, LookupState
from drafttrain.target.head import TargetHead


class ConsensusConfig(LookupConfig):
    """Looks up in the texts of all samples of a prompt."""

    name: Literal["consensus"] = "consensus"


@dataclass
class ConsensusState(LookupState):
    """The rows' texts; siblings share an index."""

    def set_groups(self, groups: Groups) -> None:
        shared: dict[int, SuffixAutomaton] = {}
        for text, group in zip(self.rows, groups.group, strict=True):
            # Siblings have read the same prompt: its end is the same state in each of their indices.
            text.index = shared.setdefault(group, text.index)


class Consensus(Lookup):
    """Drafts what followed the newest tokens in any sample of the same prompt."""

    Config = ConsensusConfig
    config: ConsensusConfig

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> ConsensusState:
        return ConsensusState(super().begin(prompts, lengths, features, head, capacity).rows)
