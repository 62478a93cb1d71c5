"""CTC drafter: frames that may be blank, trained on every alignment of the text they spell (Wen et al., 2024, arXiv:2412.00061).

One pass gives F frames over the vocabulary and a blank. Frames collapse to a string: repeats merge, then blanks go. Training maximises
the probability of the text, summed over all alignments. Drafting never builds an alignment: the tree holds strings, and a node's
distribution is

    q(y | string) ~ sum over t of P(frames before t spell the string, and frame t begins y),

which needs the string alone. Two alignments of a string are one node, positions and masks are those of ordinary text, and tokens drawn
from q stay exact. N blocks, F frames, K tokens, W nodes, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.losses import overlap
from drafttrain.core.sampling import likeliest
from drafttrain.core.types import TrainingBatch, gathered
from drafttrain.drafters.base import bare_forward
from drafttrain.drafters.block import Anchors, BlockConfig, BlockDrafter, BlockLabels, BlockState, every_anchor
from drafttrain.drafters.grow import Frontier, Parallel, Step
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead

LEAST = 1e-30
"""What a probability of 0 counts as where its logarithm is taken."""
NEVER = -1e9
"""Logarithm of a probability that is 0; unlike -inf it has a gradient."""


class CtcConfig(BlockConfig):
    """Frames, and what they learn."""

    name: Literal["ctc"] = "ctc"
    block: int = Field(default=5, ge=1, le=64)
    """Tokens that frames spell in training (K), the deepest tree it can draft."""
    frames: int = Field(default=8, ge=1, le=128)
    """Frames of a pass (F), at least `block`; a text with repeated neighbours needs one more for each of them."""
    anchor_predicts: bool = False
    """The anchor's own slot gives the first frame; otherwise the first mask behind it does, which costs one slot more."""
    ctc: float = Field(default=1.0, ge=0)
    """Weight of the CTC loss beside `loss`, which frame k learns from the target's distribution of token k. 0, for comparison: frames are
    positions, there is no blank, and nothing collapses."""

    @model_validator(mode="after")
    def _enough_frames(self) -> CtcConfig:
        if self.frames < self.block:
            raise ValueError(f"{self.frames} frames cannot spell block = {self.block} tokens; give at least as many frames")
        return self


@dataclass
class Prefixes:
    """Strings, and how frames spell them: each value times any factor of the string, as only ratios count."""

    blank: Tensor  # [..., F + 1] that the first t frames spell it and the last of them is blank (or there is none)
    label: Tensor  # [..., F + 1] that they spell it and the last of them is its last token
    last: Tensor  # [...] its last token's draft id; -1: the string is empty

    @classmethod
    def empty(cls, blank: Tensor) -> Prefixes:
        """[..., F] probabilities of a blank -> the empty string, which blanks alone spell."""
        spelled = F.pad(blank.cumprod(-1), (1, 0), value=1.0)
        return cls(spelled, torch.zeros_like(spelled), torch.full(spelled.shape[:-1], -1, device=blank.device))

    @property
    def before_other(self) -> Tensor:
        """[..., F] that the frames before t spell it, so that frame t may begin any other token than its last."""
        return (self.blank + self.label)[..., :-1]

    @property
    def before_same(self) -> Tensor:
        """[..., F] the same for its last token, which only a blank separates from itself."""
        return self.blank[..., :-1]

    def extended(self, token: Tensor, frame: Tensor, blank: Tensor) -> Prefixes:
        """The strings with one more token [...]; frame: [..., F] its probability, blank: [..., F]."""
        begins = torch.where((token == self.last)[..., None], self.before_same, self.before_other) * frame
        ends_blank = ends_label = torch.zeros_like(begins[..., 0])
        blanks, labels = [ends_blank], [ends_label]
        for t in range(frame.shape[-1]):
            ends_blank, ends_label = blank[..., t] * (ends_blank + ends_label), frame[..., t] * ends_label + begins[..., t]
            blanks.append(ends_blank)
            labels.append(ends_label)
        both = torch.stack([torch.stack(blanks, -1), torch.stack(labels, -1)])
        spelled = both / both.amax((0, -1)).clamp_min(LEAST)[None, ..., None]  # or long strings would fall below fp32's least number
        return Prefixes(spelled[0], spelled[1], token)


def next_scores(other: Tensor, same: Tensor, last: Tensor, probs: Tensor) -> Tensor:
    """Log of the probability, but for a factor, that each token follows a string.

    other, same: [n, W, F] `before_other` and `before_same`; last: [n, W]; probs: [n, F, Vd] of tokens. Returns [n, W, Vd].
    """
    scores = other @ probs
    column = last.clamp_min(0)[..., None]
    repeated = (same * picked(probs, last)).sum(-1, keepdim=True)  # [n, W, 1]
    scores = scores.scatter(-1, column, torch.where(last[..., None] < 0, scores.gather(-1, column), repeated))
    return scores.clamp_min(LEAST).log()


def picked(probs: Tensor, token: Tensor) -> Tensor:
    """[n, F, Vd] at tokens [n, W] -> [n, W, F]."""
    index = token.clamp_min(0)[:, None].expand(-1, probs.shape[1], -1)
    return probs.gather(2, index).transpose(1, 2)


def ctc_loss(labels: Tensor, blank: Tensor, tokens: Tensor, length: Tensor) -> Tensor:
    """-log of the probability that F frames spell a string, summed over its alignments (Graves et al., 2006), [N].

    labels: [N, F, K] log probability of the string's tokens in each frame; blank: [N, F]; tokens: [N, K] their ids, by which repeats are
    seen; length: [N] tokens of each string, 1 to K. A string that needs more frames gives a very large number.
    """
    N, frames, K = labels.shape
    emitted = torch.stack([blank[..., None].expand_as(labels), labels], -1).flatten(2)  # [N, F, 2 K]: blank, token, blank, token ..
    emitted = torch.cat([emitted, blank[..., None]], -1)  # [N, F, 2 K + 1]
    repeats = F.pad(tokens[:, 1:] == tokens[:, :-1], (1, 0), value=True)
    skips = torch.zeros(N, 2 * K + 1, dtype=torch.bool, device=labels.device)
    skips[:, 1::2] = ~repeats  # from a token straight to the next, without a blank between
    state = torch.arange(2 * K + 1, device=labels.device)
    forward = torch.where(state <= 1, emitted[:, 0], NEVER)  # a path begins with a blank or the first token
    for t in range(1, frames):
        one = F.pad(forward[:, :-1], (1, 0), value=NEVER)
        two = torch.where(skips, F.pad(forward[:, :-2], (2, 0), value=NEVER), NEVER)
        forward = torch.stack([forward, one, two]).logsumexp(0) + emitted[:, t]
    ends = torch.stack([2 * length - 1, 2 * length], -1)
    return -forward.gather(1, ends).logsumexp(1)


class Ctc(BlockDrafter):
    """A block whose slots are frames."""

    Config = CtcConfig
    config: CtcConfig

    def __init__(self, config: CtcConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        self.slots = config.frames + self.first_slot
        if config.ctc:
            self.blank = nn.Linear(target.hidden_size, 1)
            nn.init.zeros_(self.blank.weight)
            nn.init.constant_(self.blank.bias, -2.0)  # a fresh frame is seldom blank

    @property
    def collapses(self) -> bool:
        return self.config.ctc > 0

    def slots_read(self, depth: int) -> int:
        return self.config.frames if self.collapses else depth

    # -- training ---------------------------------------------------------------------------------------------------------------------

    def _chunk_loss(self, states: Tensor, labels: BlockLabels, share: Tensor, head: TargetHead, progress: float) -> Tensor:
        """[n, F, D] -> the loss of these blocks, then at how many labels each token was right, then the overlaps."""
        K, vocab = self.config.block, self.draft_ids
        index, inside = self.output.index(labels.tokens)
        base = self._base(states, head)  # [n, F, Vd]
        log_q = base.float().log_softmax(-1)
        with torch.no_grad():
            p = head.logits(labels.teacher, vocab).float().softmax(-1)
        each = self.config.loss.between(p, log_q[:, :K], labels.tokens, vocab)
        known = labels.real & inside
        total = (each * self._weights(log_q[:, :K], index, known) * share * known).sum()
        if self.collapses:
            total = total + self.config.ctc * self._ctc(states, log_q, index, known).sum()
        with torch.no_grad():
            logits = self._logits_along(states, base, index, inside)
            right = (likeliest(logits) == index) & inside & labels.real
            accepted = overlap(p, logits.log_softmax(-1)) * labels.real
        return torch.cat([total[None], right.sum(0).float(), accepted.sum(0)])

    def _ctc(self, states: Tensor, log_q: Tensor, index: Tensor, real: Tensor) -> Tensor:
        """[n] loss of each block's text, as far as it has labels of the draft vocabulary; 0 where frames are too few."""
        score = self.blank(states.to(self.blank.weight.dtype))[..., 0].float()  # [n, F]
        index = torch.where(real, index, 0)
        columns = index[:, None].expand(-1, log_q.shape[1], -1)
        spoken = log_q.gather(2, columns) + F.logsigmoid(-score)[..., None]
        length = real.long().cumprod(1).sum(1)
        repeats = ((index[:, 1:] == index[:, :-1]) & real[:, 1:].cumprod(1).bool()).sum(1)
        fits = (length > 0) & (length + repeats <= self.config.frames)
        loss = ctc_loss(spoken, F.logsigmoid(score), index, length.clamp_min(1))
        return torch.where(fits, loss, 0.0)

    def extra_parameters(self) -> list[nn.Parameter]:
        return list(self.blank.parameters()) if self.collapses else []

    @torch.no_grad()
    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> Tensor:
        guesses = torch.full((*batch.tokens.shape, length), -1, device=batch.tokens.device)  # deeper than the block: never right
        anchors, ids = every_anchor(batch), self.draft_ids
        chunk = max(1, self.config.loss_chunk // self.config.frames)
        for start in range(0, len(anchors.row), chunk):
            part = anchors.part(slice(start, start + chunk))
            states = self._hidden_of_text(batch, part, head)
            index, inside = self.output.index(BlockLabels.of(batch, part, self.config.block).tokens)
            best = likeliest(self._logits_along(states, self._base(states, head), index, inside)[:, :length])
            guesses[part.row, part.place - 1, : best.shape[1]] = best if ids is None else ids[best]
        return guesses

    def _logits_along(self, states: Tensor, base: Tensor, index: Tensor, inside: Tensor) -> Tensor:
        """[n, F, D] states and [n, F, Vd] their logits, along texts [n, K] -> [n, K, Vd] of each next token."""
        if not self.collapses:
            return base[:, : index.shape[1]].float()
        probs, blank = self._frames(states, base)
        levels = [next_scores(*numbers, probs) for numbers in self._along(probs, blank, index, inside)]
        return torch.cat(levels, 1)

    def _along(self, probs: Tensor, blank: Tensor, index: Tensor, inside: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What `next_scores` reads of the strings before each token of texts [n, K]: [n, 1, F] twice and [n, 1], K times."""
        prefix = Prefixes.empty(blank[:, None])
        for token, known in zip(index.split(1, 1), inside.split(1, 1), strict=True):
            yield prefix.before_other, prefix.before_same, prefix.last
            frame = picked(probs, token) * known[..., None]  # no frame spells a token outside of the draft vocabulary
            prefix = prefix.extended(token, frame, blank[:, None])

    def _states_of_text(self, batch: TrainingBatch, anchors: Anchors, head: TargetHead) -> Tensor:
        hidden = self._hidden_of_text(batch, anchors, head)  # [N, F, D]
        if not self.collapses:
            return hidden[:, : self.config.block]
        probs, blank = self._frames(hidden, self._base(hidden, head))
        index, inside = self.output.index(BlockLabels.of(batch, anchors, self.config.block).tokens)
        return torch.cat([self._node_states(hidden, *numbers) for numbers in self._along(probs, blank, index, inside)], 1)

    def _node_states(self, hidden: Tensor, other: Tensor, same: Tensor, last: Tensor) -> Tensor:
        """What `_logits` makes a node's logits of: [B, F, D], [B, W, F] twice and [B, W] -> [B, W, F * D + 2 * F + 1], in fp32."""
        frames = hidden.float().flatten(1)[:, None].expand(-1, last.shape[1], -1)
        return torch.cat([frames, other, same, last[..., None].float()], -1)

    @bare_forward
    def _logits(self, states: Tensor, head: TargetHead) -> Tensor:
        if not self.collapses:
            return self._base(states, head)
        frames, size = self.config.frames, self.target.hidden_size
        rows = states.flatten(0, -2)
        hidden, other, same, last = rows.split([frames * size, frames, frames, 1], -1)
        hidden = hidden.unflatten(-1, (frames, size)).to(self.fc.weight.dtype)
        probs, _ = self._frames(hidden, self._base(hidden, head))
        return next_scores(other[:, None], same[:, None], last.long(), probs)[:, 0].unflatten(0, states.shape[:-1])

    @bare_forward
    def _frames(self, hidden: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """[n, F, D] states, [n, F, Vd] logits -> [n, F, Vd] probabilities of tokens, [n, F] of a blank, together 1."""
        blank = self.blank(hidden.to(self.blank.weight.dtype))[..., 0].float().sigmoid()
        return base.float().softmax(-1) * (1 - blank)[..., None], blank

    # -- decoding ---------------------------------------------------------------------------------------------------------------------

    def step(self, base: Tensor, hidden: Tensor, states: list[Tensor], state: BlockState, roots: Tensor) -> Step:
        if not self.collapses:
            return Parallel(base, hidden, states)
        return Spelling(self, base, hidden, states)


class Spelling:
    """The growing of one round's trees, string by string."""

    def __init__(self, drafter: Ctc, base: Tensor, hidden: Tensor, states: list[Tensor]) -> None:
        """base: [B, F, Vd] logits and hidden: [B, F, D] states of the frames; states: see `grow`."""
        self.drafter, self.hidden, self.states = drafter, hidden, states
        self.probs, self.blank = drafter._frames(hidden, base)
        self.prefix = Prefixes.empty(self.blank[:, None])  # of the nodes fed last

    def __call__(self, frontier: Frontier) -> Tensor:
        if frontier.level:
            index, _ = self.drafter.output.index(frontier.tokens)
            above = Prefixes(
                gathered(self.prefix.blank, frontier.parent),
                gathered(self.prefix.label, frontier.parent),
                self.prefix.last.gather(1, frontier.parent),
            )
            self.prefix = above.extended(index, picked(self.probs, index), self.blank[:, None])
        numbers = self.prefix.before_other, self.prefix.before_same, self.prefix.last
        self.states.append(self.drafter._node_states(self.hidden, *numbers))
        return next_scores(*numbers, self.probs)
