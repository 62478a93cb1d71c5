"""What drafters share that run one decoder layer over pairs of a token's embedding and the target's feature before it (EAGLE, MTP).

Pair p joins the embedding of token x[p+1] with the feature of token x[p] and predicts x[p+2]. Step k >= 1 takes the layer's own output in
place of a feature it cannot have; training unrolls the same steps ("training-time test"), so that both meet the same inputs. B rows,
T time, R labels, D hidden, F of a feature, V vocabulary, Vd draft vocabulary, M cache slots.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from drafttrain.core.layers import document_bias, repeat_heads, unrolled_attention
from drafttrain.core.losses import LossMix, ScoringLayer
from drafttrain.core.plan import Plan
from drafttrain.core.rng import Rng, SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Features, Labels, TrainingBatch, gathered
from drafttrain.drafters.base import CATCH_UP, Drafter, DrafterConfig, DrafterState, Loss, bare_forward, distilled
from drafttrain.drafters.block import BlockLayer
from drafttrain.drafters.grow import Frontier, grow, widen_logits
from drafttrain.drafters.output import FullHead, OutputConfig, OutputDrafter, OutputHead
from drafttrain.drafters.sizes import LayerSizes
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead
from drafttrain.target.rope import target_rotary

Share = Annotated[float, Field(ge=0, le=1)]


class FeatureConfig(DrafterConfig):
    """Sizes of the layer follow the target's where they are not given."""

    intermediate_size: int | None = Field(default=None, ge=1)
    """Width of the gated MLP."""
    num_attention_heads: int | None = Field(default=None, ge=1)
    """Query heads, a multiple of the key-value heads."""
    num_key_value_heads: int | None = Field(default=None, ge=1)
    """Key-value heads."""
    ttt_steps: int = Field(default=7, ge=1)
    """Draft steps unrolled in training; about the longest chain the drafter is good for."""
    ttt_ramp: tuple[Share, Share] = (0.0, 0.0)
    """The share of training at which the training-time test begins to grow from one step, and where it reaches `ttt_steps`."""
    step_decay: float = Field(default=0.8, gt=0, le=1)
    """Step k's loss weighs `step_decay ** k`."""
    loss: LossMix = LossMix()
    """What each step learns from the target's distribution."""
    loss_chunk: int = Field(default=1024, ge=1)
    """Labels whose [V] logits stand in memory at once."""
    recompute: bool = False
    """Recompute each whole step in the backward pass, not only its norms and gates: less memory, more work."""
    @model_validator(mode="after")
    def _ramp_rises(self) -> FeatureConfig:
        if self.ttt_ramp[0] > self.ttt_ramp[1]:
            raise ValueError(f"ttt_ramp {list(self.ttt_ramp)} ends before it begins; give [begin, end], shares of training in order")
        return self


@dataclass
class FeatureState(DrafterState):
    """The layer's cache over committed pairs, and what was committed since the last proposal."""

    head: TargetHead
    keys: Tensor  # [B, Hkv, M, d]
    values: Tensor  # [B, Hkv, M, d]
    lengths: Tensor  # [B] committed pairs
    pending: Committed | None
    newest: Tensor  # [B, 1, D] the layer's output at the last committed pair

    def select(self, rows: Tensor) -> FeatureState:
        waiting = None if self.pending is None else _select(self.pending, rows)
        return FeatureState(self.head, self.keys[rows], self.values[rows], self.lengths[rows], waiting, self.newest[rows])

    def join(self, other: DrafterState) -> FeatureState:
        assert isinstance(other, FeatureState) and (self.pending is None) == (other.pending is None)
        both = None if self.pending is None or other.pending is None else _join(self.pending, other.pending)
        slots = max(self.keys.shape[2], other.keys.shape[2])
        keys = [F.pad(part, (0, 0, 0, slots - part.shape[2])) for part in (self.keys, other.keys)]
        values = [F.pad(part, (0, 0, 0, slots - part.shape[2])) for part in (self.values, other.values)]
        lengths, newest = torch.cat([self.lengths, other.lengths]), torch.cat([self.newest, other.newest])
        return FeatureState(self.head, torch.cat(keys), torch.cat(values), lengths, both, newest)


class FeatureDrafter(Drafter):
    """One decoder layer over pairs. A family says what the feature is, how the layer reads a pair, and what makes logits of its output."""

    config: FeatureConfig
    feature: ClassVar[str]
    """Which of the target's features pairs are made of."""

    def __init__(self, config: FeatureConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        self.query_heads, self.kv_heads, self.head_dim, self.inner, self.eps = LayerSizes.of(config, target)
        self.rotary = target_rotary(target, self.head_dim)

    @property
    def groups(self) -> int:
        """Query heads a key-value head."""
        return self.query_heads // self.kv_heads

    @abstractmethod
    def read_feature(self, value: Tensor) -> Tensor:
        """The target's feature [..., F] -> what a pair holds [..., D]."""

    @abstractmethod
    def attend(self, embedded: Tensor, feature: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pairs [B, T, D] each -> the residual stream [B, T, D], query [B, H, T, d], key and value [B, Hkv, T, d]."""

    @abstractmethod
    def finish(self, residual: Tensor, mixed: Tensor) -> Tensor:
        """The residual stream [B, T, D] and what attention read [B, H, T, d] -> the layer's output [B, T, D]."""

    @abstractmethod
    def last_norm(self, hidden: Tensor) -> Tensor:
        """The layer's output [..., D] -> what the output layer reads [..., D]."""

    @abstractmethod
    def output_layer(self, head: TargetHead) -> ScoringLayer:
        """What makes logits of it."""

    # -- training ---------------------------------------------------------------------------------------------------------------------

    def teacher_forced_states(self, batch: TrainingBatch, head: TargetHead, steps: int) -> Iterator[Tensor]:
        """The layer's output [B, T, D] at draft step 0, 1, ..., every row a start of its own and fed the true tokens."""
        feature = self._read_feature(batch.features[self.feature])
        bias = document_bias(batch.document, feature.dtype)
        seen: tuple[Tensor, ...] = ()  # keys and values of step 0, which rows share, then of the later ones, which they don't
        for step in range(steps):
            embedded = head.embed(batch.ahead(step + 1)[0]).to(feature.dtype)
            given = (embedded, feature, batch.position + step, bias, *seen)
            if self.config.recompute and torch.is_grad_enabled():
                feature, key, value = checkpoint(self._unrolled_step, *given, use_reentrant=False)
            else:
                feature, key, value = self._unrolled_step(*given)
            seen = (*seen, key, value)
            yield feature

    def _unrolled_step(
        self, embedded: Tensor, feature: Tensor, position: Tensor, bias: Tensor, *seen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        residual, query, key, value = self.attend(embedded, feature, *self.rotary(position))
        key, value = repeat_heads(key, self.groups), repeat_heads(value, self.groups)
        shared, own = (seen[:2], (*seen[2:], key, value)) if seen else ((key, value), ())
        mixed = unrolled_attention(query, *shared, bias.to(query.dtype), *own)
        return self.finish(residual, mixed), key, value

    def readout(self, states: Tensor, level: int, head: TargetHead) -> Tensor:
        return self._logits(states, head)

    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        labels = batch.labels()
        return self.distilled_steps(batch, labels, self.unrolled_at(batch, labels, head), head)

    def unrolled_at(self, batch: TrainingBatch, labels: Labels, head: TargetHead) -> list[Tensor]:
        """Each unrolled step's output [R, D] as the output layer reads it, where it guesses the labels."""
        states = self.teacher_forced_states(batch, head, self._steps_at(batch.progress))
        return [self.last_norm(labels.before(state, step + 2)) for step, state in enumerate(states)]

    def distilled_steps(self, batch: TrainingBatch, labels: Labels, hidden: list[Tensor], head: TargetHead) -> Loss:
        """What those states learn of the target's distributions."""
        return distilled(
            batch, labels, hidden, [self.output_layer(head)], head, self.config.loss, self.draft_ids, self.config.loss_chunk,
            decay=self.config.step_decay,
        )  # fmt: skip

    @torch.no_grad()
    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> Tensor:
        guesses = [self._guess(hidden, head) for hidden in self.teacher_forced_states(batch, head, length)]
        return torch.stack(guesses, -1)

    def _guess(self, hidden: Tensor, head: TargetHead) -> Tensor:
        """[B, T, D] -> [B, T] the likeliest token."""
        return self.output_layer(head).guesses(self.last_norm(hidden), self.draft_ids, self.config.loss_chunk)

    def _steps_at(self, progress: float) -> int:
        start, end = self.config.ttt_ramp
        if progress >= end:
            return self.config.ttt_steps
        share = max(0.0, (progress - start) / (end - start))
        return 1 + int(share * (self.config.ttt_steps - 1))

    @bare_forward
    def _read_feature(self, value: Tensor) -> Tensor:
        return self.read_feature(value)

    @bare_forward
    def _logits(self, hidden: Tensor, head: TargetHead) -> Tensor:
        return self.output_layer(head).logits(self.last_norm(hidden))

    # -- decoding ---------------------------------------------------------------------------------------------------------------------

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> FeatureState:
        B, P = prompts.shape
        slots = capacity + CATCH_UP
        storage = torch.zeros(B, self.kv_heads, slots, self.head_dim, device=prompts.device, dtype=next(self.parameters()).dtype)
        newest = storage.new_zeros(B, 1, self.target.hidden_size)
        state = FeatureState(head, storage, torch.zeros_like(storage), torch.zeros_like(lengths), None, newest)
        if P > 1:  # all pairs but the last, which waits for the first root
            place = torch.arange(P - 1, device=prompts.device).expand(B, -1)
            causal = place[0][:, None] >= torch.arange(slots, device=prompts.device)
            self._run(state, prompts[:, 1:], self._read_feature(features[self.feature][:, :-1]), place, causal.expand(B, -1, -1))
        state.lengths = lengths - 1
        last = (lengths - 1)[:, None]
        state.pending = Committed(
            prompts.gather(1, last), torch.ones_like(lengths), {self.feature: gathered(features[self.feature], last)}
        )
        return state

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        assert isinstance(state, FeatureState)
        hidden = self._refresh(state, roots)  # [B, 1, D]
        fed, base = 0, state.lengths[:, None]  # the root's pair stands among the committed ones
        seen = (torch.arange(state.keys.shape[2], device=roots.device) < base)[:, None]  # [B, W, M] of every node of the level

        states: list[Tensor] = []

        def step(frontier: Frontier) -> Tensor:
            nonlocal hidden, fed, seen
            if frontier.level:
                W = frontier.tokens.shape[1]
                slots = base + torch.arange(fed, fed + W, device=roots.device)
                seen = gathered(seen, frontier.parent).scatter_(2, slots[..., None], True)  # what the parent sees, and itself
                hidden = self._run(state, frontier.tokens, gathered(hidden, frontier.parent), slots, seen, base + (frontier.level - 1))
                fed += W
            states.append(hidden)
            return self._logits(hidden, state.head)

        return grow(step, roots, plan, sampling, rng, self.draft_ids, self.target.vocab_size, states).tree

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, FeatureState)
        waiting = state.pending  # not None: proposed nothing in between
        if waiting is not None and waiting.tokens.shape[1] + committed.tokens.shape[1] > CATCH_UP:
            self._refresh(state, committed.tokens[:, 0])  # the next committed token completes what waited
            waiting = None
        state.pending = committed if waiting is None else waiting.then(committed)

    def teacher_forced_logits(self, state: DrafterState, committed: Committed) -> Tensor:
        """One call over the pairs that the committed tokens complete; the newest token's own waits for what follows it."""
        assert isinstance(state, FeatureState)
        T, waiting, newest = committed.tokens.shape[1], state.pending, state.newest
        if waiting is not None and waiting.tokens.shape[1] + T > CATCH_UP:
            self._refresh(state, committed.tokens[:, 0])
            waiting, newest = None, state.newest
        completed = Committed(committed.tokens, (committed.count - 1).clamp_min(0), committed.features)
        state.pending = completed if waiting is None else waiting.then(completed)
        last = (committed.count - 1).clamp_min(0)[:, None]
        newest_token = committed.tokens.gather(1, last)
        outputs = torch.cat([newest, self._read_pending(state, newest_token[:, 0])], 1)
        order = torch.arange(T, device=committed.tokens.device)
        # without waiting pairs the root's has been read already: its output is the newest one
        places = order.expand(len(last), -1) if waiting is None else waiting.count[:, None] + order
        hidden = gathered(outputs, places.clamp_max(outputs.shape[1] - 1))
        aux = gathered(committed.features[self.feature], last)
        state.pending = Committed(newest_token, (committed.count > 0).long(), {self.feature: aux})
        return widen_logits(self._logits(hidden, state.head), self.draft_ids, self.target.vocab_size)

    def _refresh(self, state: FeatureState, roots: Tensor) -> Tensor:
        """Reads the pairs of what was committed; returns the newest one's output [B, 1, D]; of a row that committed nothing, the one it
        had."""
        self._read_pending(state, roots)
        return state.newest

    def _read_pending(self, state: FeatureState, roots: Tensor) -> Tensor:
        """Pairs of what was committed, with the target's features: writes them; [B, T, D]."""
        pending = state.pending
        assert pending is not None, "propose comes after begin or observe"
        T = pending.tokens.shape[1]
        order = torch.arange(T, device=roots.device)
        last = (pending.count - 1).clamp_min(0)[:, None]
        following = torch.cat([pending.tokens[:, 1:], roots[:, None]], 1).scatter(1, last, roots[:, None])
        slots = state.lengths[:, None] + order
        seen = torch.arange(state.keys.shape[2], device=roots.device) <= slots[:, :, None]
        hidden = self._run(state, following, self._read_feature(pending.features[self.feature]), slots, seen)
        state.lengths, state.pending = state.lengths + pending.count, None
        state.newest = torch.where((pending.count > 0)[:, None, None], gathered(hidden, last), state.newest)
        return hidden

    @bare_forward
    def _run(
        self, state: FeatureState, tokens: Tensor, feature: Tensor, slots: Tensor, seen: Tensor, position: Tensor | None = None
    ) -> Tensor:
        """The layer over [B, W] pairs written at `slots`, each seeing `seen` [B, W, M] -> [B, W, D]. position: [B, W], or [B, 1] of all."""
        self.calls += 1
        cos, sin = self.rotary(slots if position is None else position)
        residual, query, key, value = self.attend(state.head.embed(tokens).to(feature.dtype), feature, cos, sin)
        row = torch.arange(len(slots), device=slots.device)[:, None]
        state.keys[row, :, slots] = key.transpose(1, 2)  # indexed: [B, W, Hkv, d]
        state.values[row, :, slots] = value.transpose(1, 2)
        groups = self.groups
        mixed = F.scaled_dot_product_attention(
            query, repeat_heads(state.keys, groups), repeat_heads(state.values, groups), attn_mask=seen[:, None]
        )
        return self.finish(residual, mixed)


class LastFeatureConfig(FeatureConfig):
    """Pairs of the target's last state; no output matrix of its own."""

    output: OutputConfig = FullHead()
    """The target's own head, some rows of it, or one of low rank."""


class LastFeatureDrafter(OutputDrafter, FeatureDrafter):
    """A decoder layer over what `join` makes of the embedding and the target's last state, read by the target's head."""

    config: LastFeatureConfig
    needs = frozenset({"last_hidden_state"})
    feature: ClassVar[str] = "last_hidden_state"

    def __init__(self, config: LastFeatureConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        self.layer = BlockLayer(
            target.hidden_size, self.inner, self.query_heads, self.kv_heads, self.head_dim, self.eps, qk_norm=False, conv_group=None
        )
        self.output = OutputHead(config.output, target)

    @torch.no_grad()
    def start_from(self, head: TargetHead, counts: Tensor) -> None:
        """The layer from the target's last one, where shapes fit."""
        self.output.start_from(head, counts)
        head.start_layer(self.layer, self.target.num_layers - 1)

    @abstractmethod
    def join(self, embedded: Tensor, feature: Tensor) -> Tensor:
        """[B, T, D] each -> the layer's residual stream [B, T, D]."""

    def read_feature(self, value: Tensor) -> Tensor:
        return value.to(next(self.parameters()).dtype)

    def attend(self, embedded: Tensor, feature: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        residual = self.join(embedded, feature)
        read = self.layer.enter(residual)
        return residual, self.layer.queries(read, cos, sin), *self.layer.keys_and_values(read, cos, sin)

    def finish(self, residual: Tensor, mixed: Tensor) -> Tensor:
        return self.layer.finish(residual, mixed)

    def output_layer(self, head: TargetHead) -> ScoringLayer:
        return self.output.layer(head)


def _select(committed: Committed, rows: Tensor) -> Committed:
    features = {name: value[rows] for name, value in committed.features.items()}
    return Committed(committed.tokens[rows], committed.count[rows], features)


def _join(one: Committed, other: Committed) -> Committed:
    T = max(one.tokens.shape[1], other.tokens.shape[1])

    def stack(a: Tensor, b: Tensor) -> Tensor:
        widened = [F.pad(part, (0, 0) * (part.dim() - 2) + (0, T - part.shape[1])) for part in (a, b)]
        return torch.cat(widened)

    features = {name: stack(value, other.features[name]) for name, value in one.features.items()}
    return Committed(stack(one.tokens, other.tokens), torch.cat([one.count, other.count]), features)
