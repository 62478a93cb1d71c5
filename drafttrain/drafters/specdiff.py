"""SpecDiff: a block that a masked diffusion model fills in a few passes (Christopher et al., 2024, arXiv:2408.05636).

Training masks each slot of a block with probability t ~ U(0, 1) and weighs the cross entropy of masked slots by 1 / t; the text before the
block is never masked. Drafting reveals K / T slots in each of T passes. What a slot is drawn from must not know a later token: with one
pass, or slots revealed from left to right, every draw is exact; revealed by confidence, only tokens chosen with certainty are.
N blocks, K positions, T passes, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from drafttrain.core.errors import UserError
from drafttrain.core.losses import LossMix
from drafttrain.core.plan import Plan
from drafttrain.core.rng import SeededRng
from drafttrain.core.tree import Draws
from drafttrain.core.types import TrainingBatch
from drafttrain.drafters.block import Anchors, BlockConfig, BlockDrafter, BlockLabels, BlockState
from drafttrain.drafters.grow import Frontier, Parallel, Step
from drafttrain.target.head import TargetHead

LEAST_MASKED = 0.05
"""Least probability of a mask: the loss is divided by it."""


class SpecDiffConfig(BlockConfig):
    """A block and how it is filled."""

    name: Literal["specdiff"] = "specdiff"
    anchor_predicts: Literal[False] = False
    """The anchor's own slot gives no token: each slot gives its own."""
    passes: int = Field(default=1, ge=1)
    """Denoising passes (T)."""
    order: Literal["left_to_right", "confidence"] = "left_to_right"
    """Which slots a pass reveals: the next ones, or those it is surest of (chosen with certainty only)."""
    decay: float | None = Field(default=None, gt=0)
    """Position k of a block weighs exp(-k / decay) in training; None: all the same."""
    loss: LossMix = LossMix(forward_kl=0, ce=1)
    """What each masked position learns."""

    @property
    def group(self) -> int:
        """Slots that a pass reveals."""
        return -(-self.block // self.passes)

    @property
    def chooses(self) -> bool:
        """Slots are revealed out of order, by tokens chosen with certainty."""
        return self.order == "confidence" and self.group < self.block

    def check_draws(self, draws: Draws) -> None:
        if self.chooses and draws != "deterministic":
            raise UserError(
                f"runtime.draws '{draws}': slots revealed by confidence know later tokens, so that only 'deterministic' draws stay exact; "
                f"set drafter.order to left_to_right, drafter.passes to 1, or runtime.draws to deterministic"
            )


Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(which slots are revealed [N, K] bool, their tokens [N, K]) -> states [N, K, D]."""


class SpecDiff(BlockDrafter):
    """Slots hold their own tokens once these are revealed."""

    Config = SpecDiffConfig
    config: SpecDiffConfig

    @property
    def group(self) -> int:
        return self.config.group

    @property
    def chooses(self) -> bool:
        return self.config.chooses

    def revealed(self, batch: TrainingBatch, anchors: Anchors, rng: SeededRng) -> tuple[Tensor, Tensor]:
        K, T = self.config.block, batch.tokens.shape[1]
        drawn = rng.uniform(T, K + 1)[anchors.row, anchors.place].float()  # [N, K + 1]
        masked = drawn[:, :1].clamp_min(LEAST_MASKED)
        return drawn[:, 1:] >= masked, (1 / masked).expand(-1, K)

    def _states_of_text(self, batch: TrainingBatch, anchors: Anchors, head: TargetHead) -> Tensor:
        tokens = BlockLabels.of(batch, anchors, self.config.block).tokens

        def denoiser(shown: Tensor, tokens: Tensor) -> Tensor:
            return self._hidden_of_text(batch, anchors, head, shown, tokens)

        if self.chooses:
            return self._surest_first(denoiser, tokens, head)
        order, parts = torch.arange(self.config.block, device=tokens.device), []
        for start in range(0, self.config.block, self.group):
            hidden = denoiser((order < start).expand_as(tokens), tokens)
            parts.append(hidden[:, start : start + self.group])
        return torch.cat(parts, 1)

    def _surest_first(self, denoiser: Denoiser, tokens: Tensor, head: TargetHead) -> Tensor:
        """[N, K, D] each slot's state in the pass that revealed it. tokens: [N, K] of any content."""
        tokens, ids = torch.zeros_like(tokens), self.draft_ids
        shown = torch.zeros_like(tokens, dtype=torch.bool)
        states: Tensor | None = None
        while states is None or not bool(shown.all()):
            hidden = denoiser(shown, tokens)
            best = self._logits(hidden, head).float().softmax(-1).max(-1)
            surest = best.values.masked_fill(shown, -1.0).topk(min(self.group, self.config.block), -1)
            new = torch.zeros_like(shown).scatter(1, surest.indices, surest.values >= 0)
            states = hidden if states is None else torch.where(new[..., None], hidden, states)
            tokens = torch.where(new, best.indices if ids is None else ids[best.indices], tokens)
            shown = shown | new
        return states

    def fitted(self, plan: Plan, step: Step) -> Plan:
        self.config.check_draws(plan.draws)
        return plan

    def step(self, base: Tensor, hidden: Tensor, states: list[Tensor], state: BlockState, roots: Tensor) -> Step:
        if self.group >= self.config.block:
            return Parallel(base, hidden, states)

        def denoiser(shown: Tensor, tokens: Tensor) -> Tensor:
            self.calls += 1
            return self._block(state, roots, shown, tokens)

        if self.chooses:
            depth = hidden.shape[1]
            chosen = self._surest_first(denoiser, roots[:, None].expand(-1, self.config.block), state.head)[:, :depth]
            return Parallel(self._base(chosen, state.head), chosen, states)
        return LeftToRight(self, base, hidden, states, denoiser, state.head)


class LeftToRight:
    """The growing of a chain whose every pass sees the tokens drawn before it."""

    def __init__(
        self, drafter: SpecDiff, base: Tensor, hidden: Tensor, states: list[Tensor], denoiser: Denoiser, head: TargetHead
    ) -> None:
        """base: [B, K, Vd] logits and hidden: [B, K, D] states of the first pass; states: see `grow`."""
        self.drafter, self.base, self.hidden, self.states, self.denoiser, self.head = drafter, base, hidden, states, denoiser, head
        self.tokens: list[Tensor] = []  # [B, 1] each, drawn so far

    def __call__(self, frontier: Frontier) -> Tensor:
        if frontier.tokens.shape[1] > 1:
            raise UserError(
                f"drafter.passes {self.drafter.config.passes} from left to right drafts chains only, and this tree is wider: set "
                f"runtime.shape to a chain, drafter.passes to 1, or drafter.order to confidence"
            )
        level = frontier.level
        if level:
            self.tokens.append(frontier.tokens)
        if level and level % self.drafter.group == 0:
            self._pass(level)
        self.states.append(self.hidden[:, level, None])
        return self.base[:, level, None]

    def _pass(self, level: int) -> None:
        """The slots from `level` on, given the tokens before them."""
        drawn = torch.cat(self.tokens, 1)
        tokens = drawn.new_zeros(len(drawn), self.drafter.config.block)
        tokens[:, :level] = drawn
        shown = torch.arange(tokens.shape[1], device=tokens.device) < level
        self.hidden = self.denoiser(shown.expand_as(tokens), tokens)
        self.base = self.drafter._base(self.hidden, self.head)
