"""What drafters share that read nothing of the target but its newest last state: Medusa's heads and those that follow each other.

Head k at token p guesses x[p + 2 + k]; the target's own head gives x[p + 1], the round's root. B rows, T time, W frontier nodes, K heads,
D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from drafttrain.core.losses import LossMix, OutputLayer, ScoringLayer
from drafttrain.core.plan import Plan
from drafttrain.core.rng import Rng, SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Features, Labels, TrainingBatch, gathered
from drafttrain.core.vocab import draft_vocab
from drafttrain.drafters.base import Drafter, DrafterConfig, DrafterState, Loss, bare_forward, distilled
from drafttrain.drafters.grow import Frontier, grow, widen_logits
from drafttrain.drafters.output import LOW_RANK, LowRankHead, OutputHead
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class LastStateConfig(DrafterConfig):
    """How many heads, and what turns their states into logits."""

    heads: int = Field(default=4, ge=1, le=64)
    """Tokens drafted ahead (K)."""
    own_heads: bool = False
    """Train an output matrix for each head, starting from the target's; otherwise all share the target's frozen one."""
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
    def _one_output(self) -> LastStateConfig:
        if self.output is not None and (self.draft_vocab_size is not None or self.own_heads):
            raise ValueError(LOW_RANK.format(other="own_heads" if self.own_heads else "draft_vocab_size"))
        return self


@dataclass
class LastState(DrafterState):
    """The target's state at the last token in its cache: all that heads read."""

    head: TargetHead
    last: Tensor  # [B, D]

    def select(self, rows: Tensor) -> LastState:
        return LastState(self.head, self.last[rows])

    def join(self, other: DrafterState) -> LastState:
        assert isinstance(other, LastState)
        return LastState(self.head, torch.cat([self.last, other.last]))


class LastStateDrafter(Drafter):
    """Heads on the target's last state. A family gives `teacher_forced_states`, `first_hidden` and `propose`."""

    config: LastStateConfig
    needs = frozenset({"last_hidden_state"})
    vocab: Tensor  # [Vd] ascending target ids

    def __init__(self, config: LastStateConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        draft_size = min(config.draft_vocab_size or target.vocab_size, target.vocab_size)
        self.register_buffer("vocab", torch.arange(draft_size))
        if config.own_heads:
            self.lm_heads = nn.ModuleList(nn.Linear(self.state_size, draft_size, bias=False) for _ in range(self.matrices))
        if config.output is not None:
            self.output = OutputHead(config.output, target)
        self._borrowed: tuple[TargetHead, OutputLayer] | None = None  # the target's head, cut to the draft vocabulary

    @property
    def state_size(self) -> int:
        """Numbers of a head's state."""
        return self.target.hidden_size

    @property
    def matrices(self) -> int:
        """Output matrices of its own, where it has any; heads beyond the last one share it."""
        return self.config.heads

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
        if self.config.own_heads and self.state_size == self.target.hidden_size:
            for own in self.lm_heads:
                own.get_parameter("weight").copy_(head.output[self.vocab])

    @property
    def reads_start_states(self) -> bool:
        return self.config.output is not None

    def start_output(self, head: TargetHead, counts: Tensor, states: Tensor) -> None:
        self.output.start_from(head, counts, states)

    @abstractmethod
    def first_hidden(self, last: Tensor, tokens: Tensor, head: TargetHead) -> Tensor:
        """The first head's states [B, T, D] in rounds whose roots are `tokens` [B, T], after the states `last` [B, T, D]."""

    # -- training ---------------------------------------------------------------------------------------------------------------------

    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        labels = batch.labels()
        states = self.teacher_forced_states(batch, head, self.config.heads)
        hidden = [labels.before(state, index + 2) for index, state in enumerate(states)]
        return self._distilled(batch, labels, hidden, head)

    def _distilled(self, batch: TrainingBatch, labels: Labels, hidden: list[Tensor], head: TargetHead) -> Loss:
        output_layers = [self._output_layer(index, head) for index in range(len(self.lm_heads) if self.config.own_heads else 1)]
        return distilled(
            batch, labels, hidden, output_layers, head, self.config.loss, self.draft_ids, self.config.loss_chunk,
            decay=self.config.head_decay,
        )  # fmt: skip

    @torch.no_grad()
    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> Tensor:
        guesses = torch.full((*batch.tokens.shape, length), -1, device=batch.tokens.device)  # deeper than the heads: never right
        for index, state in enumerate(self.teacher_forced_states(batch, head, length)):
            guesses[..., index] = self._output_layer(index, head).guesses(state, self.draft_ids, self.config.loss_chunk)
        return guesses

    def readout(self, states: Tensor, level: int, head: TargetHead) -> Tensor:
        return self._output_layer(level, head).logits(states)

    # -- decoding ---------------------------------------------------------------------------------------------------------------------

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> LastState:
        row = torch.arange(len(prompts), device=prompts.device)
        return LastState(head, features["last_hidden_state"][row, lengths - 1])

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, LastState)
        row = torch.arange(len(state.last), device=state.last.device)
        newest = committed.features["last_hidden_state"][row, (committed.count - 1).clamp_min(0)]
        state.last = torch.where((committed.count > 0)[:, None], newest, state.last)

    def teacher_forced_logits(self, state: DrafterState, committed: Committed) -> Tensor:
        """The first head on the states before each token."""
        assert isinstance(state, LastState)
        dtype = self._dtype
        before = torch.cat([state.last[:, None].to(dtype), committed.features["last_hidden_state"][:, :-1].to(dtype)], 1)
        logits = self._output_layer(0, state.head).logits(self.first_hidden(before, committed.tokens, state.head))
        self.calls += 1
        self.observe(state, committed)
        return widen_logits(logits, self.draft_ids, self.target.vocab_size)

    # -- parts ------------------------------------------------------------------------------------------------------------------------

    def _output_layer(self, index: int, head: TargetHead) -> ScoringLayer:
        """Head `index`'s."""
        if self.config.own_heads:
            return OutputLayer(self.lm_heads[min(index, len(self.lm_heads) - 1)].get_parameter("weight"))
        if self.config.output is not None:
            return self.output.layer(head)
        if self._borrowed is None or self._borrowed[0] is not head:
            rows = slice(None) if self.draft_ids is None else self.draft_ids
            bias = None if head.bias is None else head.bias[rows]
            self._borrowed = head, OutputLayer(head.output[rows], bias, head.finish)
        return self._borrowed[1]

    @property
    def _dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.parameters())


class SequentialHeads(LastStateDrafter):
    """Heads that read the tokens drafted before them: each takes what the one before it handed on, and one more token."""

    @abstractmethod
    def handed_first(self, last: Tensor) -> Tensor:
        """The target's states [..., D] -> what the first head takes [..., C]."""

    @abstractmethod
    def advance(self, level: int, handed: Tensor, tokens: Tensor, head: TargetHead) -> tuple[Tensor, Tensor]:
        """Head `level`: [..., C] and tokens [...] -> what it hands on [..., C'], and its state [..., D], of which logits are made."""

    def first_hidden(self, last: Tensor, tokens: Tensor, head: TargetHead) -> Tensor:
        return self.advance(0, self.handed_first(last), tokens, head)[1]

    def teacher_forced_states(self, batch: TrainingBatch, head: TargetHead, steps: int) -> Iterator[Tensor]:
        handed = self.handed_first(batch.features["last_hidden_state"].to(self._dtype))
        for level in range(min(steps, self.config.heads)):
            handed, hidden = self.advance(level, handed, batch.ahead(level + 1)[0], head)
            yield hidden

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        assert isinstance(state, LastState)
        handed = self.handed_first(state.last.to(self._dtype))[:, None]  # [B, 1, C]
        states: list[Tensor] = []

        def step(frontier: Frontier) -> Tensor:
            nonlocal handed
            before = gathered(handed, frontier.parent) if frontier.level else handed
            handed, logits = self._head(frontier.level, before, frontier.tokens, state.head, states)
            return logits

        return grow(step, roots, plan, sampling, rng, self.draft_ids, self.target.vocab_size, states).tree

    @bare_forward
    def _head(self, level: int, before: Tensor, tokens: Tensor, head: TargetHead, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        """One level: what its nodes hand on, and their logits; their states go to `states`."""
        self.calls += 1
        handed, hidden = self.advance(level, before, tokens, head)
        states.append(hidden)
        return handed, self._output_layer(level, head).logits(hidden)
