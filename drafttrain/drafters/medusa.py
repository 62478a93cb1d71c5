"""Medusa: K residual heads on the target's last hidden state (Cai et al., 2024, arXiv:2401.10774).

Head k at token p predicts x[p + 2 + k]; the target's own head gives x[p + 1]. Heads don't see each other's tokens, so one call drafts a
whole round. B rows, T time, K heads, D hidden, V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.losses import LossMix, OutputLayer, ScoringLayer
from drafttrain.core.plan import Plan
from drafttrain.core.rng import Rng, SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Features, TrainingBatch
from drafttrain.core.vocab import draft_vocab
from drafttrain.drafters.base import Drafter, DrafterConfig, DrafterState, Loss, bare_forward, distilled
from drafttrain.drafters.grow import Parallel, grow, widen_logits
from drafttrain.drafters.output import LOW_RANK, LowRankHead, OutputHead
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class MedusaConfig(DrafterConfig):
    """Residual blocks are small; an output matrix of its own is what a head costs."""

    name: Literal["medusa"] = "medusa"
    heads: int = Field(default=4, ge=1, le=64)
    """Tokens drafted ahead (K)."""
    layers: int = Field(default=1, ge=1)
    """Residual blocks a head."""
    own_heads: bool = False
    """Train an output matrix for each head, starting from the target's; otherwise all share the target's frozen one."""
    root: bool = False
    """The heads read the embedding of the round's first token, x[p + 1], beside the last state; the paper's read the state alone."""
    draft_vocab_size: int | None = Field(default=None, ge=2)
    """Tokens the heads can propose, the most frequent of the training answers; None: all of the target's."""
    output: LowRankHead | None = None
    """`{kind: low_rank}`: two thin matrices over the whole vocabulary, which all heads share, instead of a draft vocabulary."""
    head_decay: float = Field(default=0.8, gt=0, le=1)
    """Head k's loss weighs `head_decay ** k`."""
    loss: LossMix = LossMix()
    """What each head learns from the target's distribution."""
    loss_chunk: int = Field(default=1024, ge=1)
    """Labels whose [V] logits stand in memory at once."""

    @property
    def max_depth(self) -> int:
        return self.heads

    @model_validator(mode="after")
    def _one_output(self) -> MedusaConfig:
        if self.output is not None and (self.draft_vocab_size is not None or self.own_heads):
            raise ValueError(LOW_RANK.format(other="own_heads" if self.own_heads else "draft_vocab_size"))
        return self


class ResidualBlock(nn.Module):
    """x + silu(W [x, more] + b). W starts at 0, so that a fresh head says what the target's own would."""

    def __init__(self, size: int, more: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(size + more, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D + more] -> [..., D]."""
        return x[..., : self.linear.out_features] + F.silu(self.linear(x))


@dataclass
class MedusaState(DrafterState):
    """The target's state at the last token in its cache: all that heads read."""

    head: TargetHead
    last: Tensor  # [B, D]

    def select(self, rows: Tensor) -> MedusaState:
        return MedusaState(self.head, self.last[rows])

    def join(self, other: DrafterState) -> MedusaState:
        assert isinstance(other, MedusaState)
        return MedusaState(self.head, torch.cat([self.last, other.last]))


class Medusa(Drafter):
    """Drafts with K heads that each guess one token further ahead from the same state; see the module for the alignment."""

    Config = MedusaConfig
    config: MedusaConfig
    needs = frozenset({"last_hidden_state"})
    vocab: Tensor  # [Vd] ascending target ids

    def __init__(self, config: MedusaConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        size, draft_size = target.hidden_size, min(config.draft_vocab_size or target.vocab_size, target.vocab_size)
        beside = [size * config.root, *[0] * (config.layers - 1)]  # the first block alone reads the root
        self.blocks = nn.ModuleList(nn.Sequential(*(ResidualBlock(size, more) for more in beside)) for _ in range(config.heads))
        self.register_buffer("vocab", torch.arange(draft_size))
        if config.own_heads:
            self.lm_heads = nn.ModuleList(nn.Linear(size, draft_size, bias=False) for _ in range(config.heads))
        if config.output is not None:
            self.output = OutputHead(config.output, target)
        self._borrowed: tuple[TargetHead, OutputLayer] | None = None  # the target's head, cut to the draft vocabulary

    @property
    def draft_ids(self) -> Tensor | None:
        """[Vd] target ids of the draft vocabulary; None where it is the target's own."""
        return self.vocab if len(self.vocab) < self.target.vocab_size else None

    @torch.no_grad()
    def start_from(self, head: TargetHead, counts: Tensor) -> None:
        self.vocab.copy_(draft_vocab(counts, len(self.vocab), list(self.target.eos_ids)))
        self._borrowed = None
        if self.config.output is not None:
            self.output.start_from(head, counts)
        if self.config.own_heads:
            for own in self.lm_heads:
                own.get_parameter("weight").copy_(head.output[self.vocab])

    @property
    def reads_start_states(self) -> bool:
        return self.config.output is not None

    def start_output(self, head: TargetHead, counts: Tensor, states: Tensor) -> None:
        self.output.start_from(head, counts, states)

    # -- training ---------------------------------------------------------------------------------------------------------------------

    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        labels, read = batch.labels(), self._read_text(batch, head)
        hidden = [block(labels.before(read, index + 2)) for index, block in enumerate(self.blocks)]
        output_layers = [self._readout(index, head) for index in range(len(self.lm_heads) if self.config.own_heads else 1)]
        return distilled(
            batch,
            labels,
            hidden,
            output_layers,
            head,
            self.config.loss,
            self.draft_ids,
            self.config.loss_chunk,
            decay=self.config.head_decay,
        )

    @torch.no_grad()
    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> Tensor:
        read = self._read_text(batch, head)
        guesses = torch.full((*batch.tokens.shape, length), -1, device=read.device)  # deeper than the heads: never right
        for index, block in enumerate(self.blocks[:length]):
            guesses[..., index] = self._readout(index, head).guesses(block(read), self.draft_ids, self.config.loss_chunk)
        return guesses

    def teacher_forced_states(self, batch: TrainingBatch, head: TargetHead, steps: int) -> Iterator[Tensor]:
        read = self._read_text(batch, head)
        for block in self.blocks[:steps]:
            yield block(read)

    def readout(self, states: Tensor, level: int, head: TargetHead) -> Tensor:
        return self._readout(level, head).logits(states)

    # -- decoding ---------------------------------------------------------------------------------------------------------------------

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> MedusaState:
        row = torch.arange(len(prompts), device=prompts.device)
        return MedusaState(head, features["last_hidden_state"][row, lengths - 1])

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        assert isinstance(state, MedusaState)
        self.calls += 1
        hidden = self._hidden(state, roots, plan.shape.depth)  # [B, K, D]
        logits = self._logits(hidden, state.head)  # [B, K, Vd]
        states: list[Tensor] = []
        step = Parallel(logits, hidden, states)
        return grow(step, roots, plan, sampling, rng, self.draft_ids, self.target.vocab_size, states).tree

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, MedusaState)
        row = torch.arange(len(state.last), device=state.last.device)
        newest = committed.features["last_hidden_state"][row, (committed.count - 1).clamp_min(0)]
        state.last = torch.where((committed.count > 0)[:, None], newest, state.last)

    def teacher_forced_logits(self, state: DrafterState, committed: Committed) -> Tensor:
        """The first head on the states before each token."""
        assert isinstance(state, MedusaState)
        before = torch.cat([state.last[:, None].to(self._dtype), committed.features["last_hidden_state"][:, :-1].to(self._dtype)], 1)
        hidden = self.blocks[0](self._read(before, committed.tokens, state.head))
        logits = self._readout(0, state.head).logits(hidden)
        self.calls += 1
        self.observe(state, committed)
        return widen_logits(logits, self.draft_ids, self.target.vocab_size)

    def _read_text(self, batch: TrainingBatch, head: TargetHead) -> Tensor:
        """`_read` at every token of a text, which says what came next."""
        return self._read(batch.features["last_hidden_state"], batch.ahead(1)[0], head)

    def _read(self, last: Tensor, roots: Tensor, head: TargetHead) -> Tensor:
        """States [..., D] and the tokens after them [...] -> [..., D], or [..., 2 D] with the tokens' normed embeddings."""
        last = last.to(self._dtype)
        if not self.config.root:
            return last
        embedded = head.embed(roots).to(last.dtype)
        return torch.cat([last, F.rms_norm(embedded, embedded.shape[-1:])], -1)

    @bare_forward
    def _hidden(self, state: MedusaState, roots: Tensor, depth: int) -> Tensor:
        """[B, depth, D] of the first heads."""
        read = self._read(state.last, roots, state.head)
        return torch.stack([block(read) for block in self.blocks[:depth]], 1)

    @bare_forward
    def _logits(self, hidden: Tensor, head: TargetHead) -> Tensor:
        """[B, depth, D] -> [B, depth, Vd]; a shared output matrix is read once."""
        if not self.config.own_heads:
            return self._readout(0, head).logits(hidden)
        return torch.stack([self._readout(index, head).logits(hidden[:, index]) for index in range(hidden.shape[1])], 1)

    # -- parts ------------------------------------------------------------------------------------------------------------------------

    def _readout(self, index: int, head: TargetHead) -> ScoringLayer:
        """Head `index`'s output layer."""
        if self.config.own_heads:
            return OutputLayer(self.lm_heads[index].get_parameter("weight"))
        if self.config.output is not None:
            return self.output.layer(head)
        if self._borrowed is None or self._borrowed[0] is not head:
            rows = slice(None) if self.draft_ids is None else self.draft_ids
            bias = None if head.bias is None else head.bias[rows]
            self._borrowed = head, OutputLayer(head.output[rows], bias, head.finish)
        return self._borrowed[1]

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.blocks.parameters()).dtype
