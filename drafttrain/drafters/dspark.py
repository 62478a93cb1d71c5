"""DSpark: a block with a cheap sequential head, and a confidence that ends drafts early (2026, arXiv:2607.05147).

Position k says p_k = softmax(U h_k + W2 W1[x_{k-1}]): what stands before it moves its logits by a product of low rank. Its
confidence c_k = sigmoid(w [h_k ; W1[x_{k-1}]] / t_k) learns how likely x_k is accepted. Both know x_{k-1} and nothing of x_k, so that
drafts drawn by p_k and ended by c_k stay exact. N blocks, K positions, r rank, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from drafttrain.core.losses import LossMix, confidence_bce, overlap
from drafttrain.core.packed import linear
from drafttrain.core.plan import Plan
from drafttrain.drafters.base import bare_forward
from drafttrain.drafters.block import BlockConfig, BlockDrafter, BlockLabels, BlockState
from drafttrain.drafters.grow import Frontier, Step
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class DSparkConfig(BlockConfig):
    """A block and its Markov head."""

    name: Literal["dspark"] = "dspark"
    markov_rank: int = Field(default=256, ge=1)
    """Rank of what the token before a position adds to its logits."""
    loss: LossMix = LossMix(forward_kl=0, l1=0.9, ce=0.1)
    """What each position learns from the target's distribution."""
    confidence: float = Field(default=1.0, ge=0)
    """Weight of the confidence's own loss; 0: there is no confidence."""
    stop_below: float = Field(default=0.0, ge=0, lt=1)
    """A draft ends before the level at which the product of confidences falls below this; 0: it has its full length."""

    @model_validator(mode="after")
    def _confident(self) -> DSparkConfig:
        if self.stop_below and not self.confidence:
            raise ValueError("stop_below ends drafts by the confidence, whose weight is 0; set `confidence`, or leave stop_below out")
        return self


Stop = Callable[[int, Tensor], Tensor]
"""`Plan.stop`."""


class DSpark(BlockDrafter):
    """Each position reads the token before it."""

    Config = DSparkConfig
    config: DSparkConfig
    temperature: Tensor  # [K] what each position's confidence is divided by before its sigmoid; 1 until calibrated

    def __init__(self, config: DSparkConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        self.extra_size = config.markov_rank
        draft_size = target.vocab_size if self.draft_ids is None else len(self.draft_ids)
        self.markov_w1 = nn.Embedding(target.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, draft_size, bias=False)
        nn.init.normal_(self.markov_w1.weight, std=0.02)
        nn.init.zeros_(self.markov_w2.weight)  # a fresh head says what the block says
        if config.confidence:
            self.confidence = nn.Linear(target.hidden_size + config.markov_rank, 1)
            self.register_buffer("temperature", torch.ones(config.block))

    def extra_of_text(self, hidden: Tensor, previous: Tensor, head: TargetHead) -> Tensor:
        return self.markov_w1(previous).to(hidden.dtype)

    def extra_logits(self, extra: Tensor) -> Tensor:
        return linear(extra.to(self.markov_w2.weight.dtype), self.markov_w2.weight)

    def extra_parameters(self) -> list[nn.Parameter]:
        return [self.markov_w2.weight, *(self.confidence.parameters() if self.config.confidence else ())]

    def more_loss(self, states: Tensor, base: Tensor, p: Tensor, log_q: Tensor, labels: BlockLabels, progress: float) -> Tensor | None:
        if not self.config.confidence:
            return None
        return self.config.confidence * confidence_bce(self.score(states), overlap(p, log_q))

    def score(self, states: Tensor) -> Tensor:
        """[..., D + r] -> [...] the confidence before its temperature and sigmoid."""
        return self.confidence(states.to(self.confidence.weight.dtype))[..., 0].float()

    @bare_forward
    def confidence_at(self, states: Tensor, level: int) -> Tensor:
        """[B, W, D + r] -> [B, W] how likely the token below each node is accepted."""
        return (self.score(states) / self.temperature[level]).sigmoid()

    def step(self, base: Tensor, hidden: Tensor, states: list[Tensor], state: BlockState, roots: Tensor) -> MarkovStep:
        return MarkovStep(self, base, hidden, states)

    def fitted(self, plan: Plan, step: Step) -> Plan:
        if not self.config.stop_below:
            return plan
        assert isinstance(step, MarkovStep)
        return replace(plan, stop=either(plan.stop, step.unlikely))


class MarkovStep:
    """The growing of one round's trees: each node's token moves the distribution below it, and its confidence ends the row."""

    def __init__(self, drafter: DSpark, base: Tensor, hidden: Tensor, states: list[Tensor]) -> None:
        """base: [B, K, Vd] the block's own logits; hidden: [B, K, D]; states: see `grow`."""
        self.drafter, self.base, self.hidden, self.states = drafter, base, hidden, states
        self.survival: Tensor | None = None  # [B, W] how likely the path to a node, and a token below it, are accepted

    def __call__(self, frontier: Frontier) -> Tensor:
        level, hidden = frontier.level, self.hidden
        markov = self.drafter.markov_w1(frontier.tokens).to(hidden.dtype)  # [B, W, r]
        state = torch.cat([hidden[:, level, None].expand(-1, markov.shape[1], -1), markov], -1)
        self.states.append(state)
        if self.drafter.config.stop_below:
            confidence = self.drafter.confidence_at(state, level)
            self.survival = confidence if self.survival is None else confidence * self.survival.gather(1, frontier.parent)
        return self.drafter.combined(self.base[:, level, None], markov)

    def unlikely(self, level: int, logits: Tensor) -> Tensor:
        """[B] bool: rows of which no token of this level, none of which is drawn yet, is likely enough to be accepted."""
        assert self.survival is not None, "asked after the level was fed"
        return self.survival.amax(1) < self.drafter.config.stop_below


def either(first: Stop | None, second: Stop) -> Stop:
    """Rows that one of them ends."""
    if first is None:
        return second
    return lambda level, logits: first(level, logits) | second(level, logits)
