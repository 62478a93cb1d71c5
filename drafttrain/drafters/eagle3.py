"""EAGLE-3: one decoder layer over fused target features, trained as it drafts (Li et al., 2025, arXiv:2503.01840).

Pair p joins the embedding of token x[p+1] with the target's feature g[p] and predicts x[p+2]. Drafting on, step k >= 1 takes the drafter's
own last state in place of a feature it cannot have; training unrolls the same steps ("training-time test"), so that both meet the same
inputs. B rows, T time, D hidden, V vocabulary, Vd draft vocabulary, A captured layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from drafttrain.core.errors import UserError
from drafttrain.core.layers import (
    GatedMLP,
    RMSNorm,
    document_bias,
    heads,
    repeat_heads,
    rotate,
    unrolled_attention,
)
from drafttrain.core.losses import LossMix, OutputLayer, ScoringLayer
from drafttrain.core.plan import Plan
from drafttrain.core.rng import Rng, SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Features, TrainingBatch, gathered
from drafttrain.core.vocab import draft_vocab
from drafttrain.drafters.base import CATCH_UP, Drafter, DrafterConfig, DrafterState, Loss, bare_forward, distilled
from drafttrain.drafters.grow import Frontier, grow, widen_logits
from drafttrain.drafters.output import LOW_RANK, LowRankHead, OutputHead
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead
from drafttrain.target.rope import target_rotary

Share = Annotated[float, Field(ge=0, le=1)]


class Eagle3Config(DrafterConfig):
    """Sizes follow the target's where they are not given."""

    name: Literal["eagle3"] = "eagle3"
    draft_vocab_size: int | None = Field(default=None, ge=2)
    """Tokens the drafter can propose, the most frequent of the training answers; None: all of the target's."""
    output: LowRankHead | None = None
    """`{kind: low_rank}`: two thin matrices over the whole vocabulary instead of an output matrix of its own."""
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
    norm_features: bool = False
    """Normalise each captured layer before fusing them (`fc_norm` in the engines' formats)."""

    @model_validator(mode="after")
    def _one_output(self) -> Eagle3Config:
        if self.output is not None and self.draft_vocab_size is not None:
            raise ValueError(LOW_RANK.format(other="draft_vocab_size"))
        return self

    @model_validator(mode="after")
    def _ramp_rises(self) -> Eagle3Config:
        if self.ttt_ramp[0] > self.ttt_ramp[1]:
            raise ValueError(f"ttt_ramp {list(self.ttt_ramp)} ends before it begins; give [begin, end], shares of training in order")
        return self


READERS = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
"""What reads the embedding beside the feature."""


class Eagle3Layer(nn.Module):
    """One decoder layer whose attention reads [embedding, feature] and whose residual stream is the feature."""

    def __init__(self, size: int, inner: int, query_heads: int, kv_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.query_heads, self.kv_heads = query_heads, kv_heads
        self.input_layernorm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(2 * size, query_heads * head_dim, bias=False),
                "k_proj": nn.Linear(2 * size, kv_heads * head_dim, bias=False),
                "v_proj": nn.Linear(2 * size, kv_heads * head_dim, bias=False),
                "o_proj": nn.Linear(query_heads * head_dim, size, bias=False),
            }
        )
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = GatedMLP(size, inner)

    def attend(self, embedded: Tensor, feature: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] each -> query [B, H, T, d], key and value [B, Hkv, T, d]."""
        both = torch.cat([self.input_layernorm(embedded), self.hidden_norm(feature)], -1)  # [B, T, 2 D]
        query = rotate(heads(self.self_attn["q_proj"](both), self.query_heads), cos, sin)
        key = rotate(heads(self.self_attn["k_proj"](both), self.kv_heads), cos, sin)
        return query, key, heads(self.self_attn["v_proj"](both), self.kv_heads)

    def finish(self, feature: Tensor, mixed: Tensor) -> Tensor:
        """The feature [B, T, D] and what attention read [B, H, T, d] -> the layer's output [B, T, D]."""
        hidden = feature + self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    @property
    def groups(self) -> int:
        return self.query_heads // self.kv_heads


@dataclass
class Eagle3State(DrafterState):
    """The layer's cache over committed pairs, and what was committed since the last proposal."""

    head: TargetHead
    keys: Tensor  # [B, Hkv, M, d]
    values: Tensor  # [B, Hkv, M, d]
    lengths: Tensor  # [B] committed pairs
    pending: Committed | None
    newest: Tensor  # [B, 1, D] the layer's output at the last committed pair

    def select(self, rows: Tensor) -> Eagle3State:
        waiting = None if self.pending is None else _select(self.pending, rows)
        return Eagle3State(self.head, self.keys[rows], self.values[rows], self.lengths[rows], waiting, self.newest[rows])

    def join(self, other: DrafterState) -> Eagle3State:
        assert isinstance(other, Eagle3State) and (self.pending is None) == (other.pending is None)
        both = None if self.pending is None or other.pending is None else _join(self.pending, other.pending)
        slots = max(self.keys.shape[2], other.keys.shape[2])
        keys = [F.pad(part, (0, 0, 0, slots - part.shape[2])) for part in (self.keys, other.keys)]
        values = [F.pad(part, (0, 0, 0, slots - part.shape[2])) for part in (self.values, other.values)]
        lengths, newest = torch.cat([self.lengths, other.lengths]), torch.cat([self.newest, other.newest])
        return Eagle3State(self.head, torch.cat(keys), torch.cat(values), lengths, both, newest)


class Eagle3(Drafter):
    """Drafts with one decoder layer over fused features of several target layers; see the module for the alignment."""

    Config = Eagle3Config
    config: Eagle3Config
    needs = frozenset({"aux_hidden_states"})
    vocab: Tensor  # [Vd] ascending target ids

    def __init__(self, config: Eagle3Config, target: TargetShape) -> None:
        super().__init__(config, target)
        size, known = target.hidden_size, target.text_config
        eps = float(known.get("rms_norm_eps") or 1e-5)
        query_heads = config.num_attention_heads or int(known["num_attention_heads"])
        kv_heads = config.num_key_value_heads or int(known.get("num_key_value_heads") or query_heads)
        self.head_dim = int(known.get("head_dim") or size // query_heads)
        if query_heads % kv_heads or self.head_dim < 2 or self.head_dim % 2:
            raise UserError(
                f"drafter.num_attention_heads {query_heads}, num_key_value_heads {kv_heads}, {self.head_dim} numbers a head: queries must "
                f"be a multiple of keys, and a head's numbers even; set both so that they fit the hidden size {size}, or leave both out"
            )
        inner = config.intermediate_size or int(known.get("intermediate_size") or 4 * size)
        self.fc = nn.Linear(size * len(target.aux_layers), size, bias=False)
        if config.norm_features:
            self.fc_norm = nn.ModuleList(RMSNorm(size, eps) for _ in target.aux_layers)
        self.midlayer = Eagle3Layer(size, inner, query_heads, kv_heads, self.head_dim, eps)
        self.norm = RMSNorm(size, eps)
        draft_size = min(config.draft_vocab_size or target.vocab_size, target.vocab_size)
        if config.output is None:
            self.lm_head = nn.Linear(size, draft_size, bias=False)
        else:
            self.output = OutputHead(config.output, target)
        self.register_buffer("vocab", torch.arange(draft_size))
        self.rotary = target_rotary(target, self.head_dim)

    @property
    def draft_ids(self) -> Tensor | None:
        """[Vd] target ids of the draft vocabulary; None where it is the target's own."""
        return self.vocab if len(self.vocab) < self.target.vocab_size else None

    # -- start ------------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_from(self, head: TargetHead, counts: Tensor) -> None:
        """Head, norm and draft vocabulary from the target; attention over features and the MLP from its last layer, where they fit."""
        self.vocab.copy_(draft_vocab(counts, len(self.vocab), list(self.target.eos_ids)))
        if self.config.output is None:
            self.lm_head.weight.copy_(head.output[self.vocab])
        else:
            self.output.start_from(head, counts)
        if head.norm is not None and head.norm.shape == self.norm.weight.shape:
            self.norm.weight.copy_(head.norm)
        size = self.target.hidden_size
        self.fc.weight.zero_()
        self.fc.weight[:, -size:].copy_(torch.eye(size))  # the highest captured layer, as it is
        own = {name: p for name, p in self.midlayer.named_parameters() if name != "input_layernorm.weight"}
        borrowed = dict(head.layer_weights(self.target.num_layers - 1))
        borrowed["hidden_norm.weight"] = borrowed.get("input_layernorm.weight", own["hidden_norm.weight"])
        for name, parameter in own.items():
            source = borrowed.get(name)
            if source is None or name.endswith("bias"):
                continue
            if parameter.shape == source.shape:
                parameter.copy_(source)
            elif name in READERS and parameter.shape == (source.shape[0], 2 * source.shape[1]):  # [embedding, feature]
                parameter[:, :size].mul_(0.5)
                parameter[:, size:].copy_(source)

    @property
    def reads_start_states(self) -> bool:
        return self.config.output is not None

    def start_output(self, head: TargetHead, counts: Tensor, states: Tensor) -> None:
        self.output.start_from(head, counts, states)

    def _readout(self, head: TargetHead) -> ScoringLayer:
        return OutputLayer(self.lm_head.weight) if self.config.output is None else self.output.layer(head)

    # -- training ---------------------------------------------------------------------------------------------------------------------

    def teacher_forced_states(self, batch: TrainingBatch, head: TargetHead, steps: int) -> Iterator[Tensor]:
        """The layer's output [B, T, D] at draft step 0, 1, ..., every row a start of its own and fed the true tokens."""
        feature = self._fuse(batch.features["aux_hidden_states"])
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
        query, key, value = self.midlayer.attend(embedded, feature, *self.rotary(position))
        key, value = repeat_heads(key, self.midlayer.groups), repeat_heads(value, self.midlayer.groups)
        shared, own = (seen[:2], (*seen[2:], key, value)) if seen else ((key, value), ())
        mixed = unrolled_attention(query, *shared, bias.to(query.dtype), *own)
        return self.midlayer.finish(feature, mixed), key, value

    def readout(self, states: Tensor, level: int, head: TargetHead) -> Tensor:
        return self._logits(states, head)

    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        labels, states = batch.labels(), self.teacher_forced_states(batch, head, self._steps_at(batch.progress))
        hidden = [self.norm(labels.before(state, step + 2)) for step, state in enumerate(states)]
        return distilled(
            batch, labels, hidden, [self._readout(head)], head, self.config.loss, self.draft_ids, self.config.loss_chunk,
            decay=self.config.step_decay,
        )

    @torch.no_grad()
    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> Tensor:
        guesses = [self._guess(hidden, head) for hidden in self.teacher_forced_states(batch, head, length)]
        return torch.stack(guesses, -1)

    def _guess(self, hidden: Tensor, head: TargetHead) -> Tensor:
        """[B, T, D] -> [B, T] the likeliest token."""
        return self._readout(head).guesses(self.norm(hidden), self.draft_ids, self.config.loss_chunk)

    def _steps_at(self, progress: float) -> int:
        start, end = self.config.ttt_ramp
        if progress >= end:
            return self.config.ttt_steps
        share = max(0.0, (progress - start) / (end - start))
        return 1 + int(share * (self.config.ttt_steps - 1))

    @bare_forward
    def _fuse(self, aux: Tensor) -> Tensor:
        """[..., A * D] captured states -> [..., D]."""
        aux = aux.to(self.fc.weight.dtype)
        if self.config.norm_features:
            parts = aux.unflatten(-1, (len(self.fc_norm), -1))
            aux = torch.cat([norm(parts[..., index, :]) for index, norm in enumerate(self.fc_norm)], -1)
        return self.fc(aux)

    @bare_forward
    def _logits(self, hidden: Tensor, head: TargetHead) -> Tensor:
        return self.lm_head(self.norm(hidden)) if self.config.output is None else self.output.logits(self.norm(hidden), head)

    # -- decoding ---------------------------------------------------------------------------------------------------------------------

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> Eagle3State:
        B, P = prompts.shape
        slots = capacity + CATCH_UP
        storage = torch.zeros(B, self.midlayer.kv_heads, slots, self.head_dim, device=prompts.device, dtype=self.fc.weight.dtype)
        newest = storage.new_zeros(B, 1, self.target.hidden_size)
        state = Eagle3State(head, storage, torch.zeros_like(storage), torch.zeros_like(lengths), None, newest)
        if P > 1:  # all pairs but the last, which waits for the first root
            place = torch.arange(P - 1, device=prompts.device).expand(B, -1)
            causal = place[0][:, None] >= torch.arange(slots, device=prompts.device)
            self._run(state, prompts[:, 1:], self._fuse(features["aux_hidden_states"][:, :-1]), place, causal.expand(B, -1, -1))
        state.lengths = lengths - 1
        last = (lengths - 1)[:, None]
        state.pending = Committed(
            prompts.gather(1, last), torch.ones_like(lengths), {"aux_hidden_states": gathered(features["aux_hidden_states"], last)}
        )
        return state

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        assert isinstance(state, Eagle3State)
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
        assert isinstance(state, Eagle3State)
        waiting = state.pending  # not None: proposed nothing in between
        if waiting is not None and waiting.tokens.shape[1] + committed.tokens.shape[1] > CATCH_UP:
            self._refresh(state, committed.tokens[:, 0])  # the next committed token completes what waited
            waiting = None
        state.pending = committed if waiting is None else waiting.then(committed)

    def teacher_forced_logits(self, state: DrafterState, committed: Committed) -> Tensor:
        """One call over the pairs that the committed tokens complete; the newest token's own waits for what follows it."""
        assert isinstance(state, Eagle3State)
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
        aux = gathered(committed.features["aux_hidden_states"], last)
        state.pending = Committed(newest_token, (committed.count > 0).long(), {"aux_hidden_states": aux})
        return widen_logits(self._logits(hidden, state.head), self.draft_ids, self.target.vocab_size)

    def _refresh(self, state: Eagle3State, roots: Tensor) -> Tensor:
        """Reads the pairs of what was committed; returns the newest one's output [B, 1, D]; of a row that committed nothing, the one it
        had."""
        self._read_pending(state, roots)
        return state.newest

    def _read_pending(self, state: Eagle3State, roots: Tensor) -> Tensor:
        """Pairs of what was committed, with the target's features: writes them; [B, T, D]."""
        pending = state.pending
        assert pending is not None, "propose comes after begin or observe"
        T = pending.tokens.shape[1]
        order = torch.arange(T, device=roots.device)
        last = (pending.count - 1).clamp_min(0)[:, None]
        following = torch.cat([pending.tokens[:, 1:], roots[:, None]], 1).scatter(1, last, roots[:, None])
        slots = state.lengths[:, None] + order
        seen = torch.arange(state.keys.shape[2], device=roots.device) <= slots[:, :, None]
        hidden = self._run(state, following, self._fuse(pending.features["aux_hidden_states"]), slots, seen)
        state.lengths, state.pending = state.lengths + pending.count, None
        state.newest = torch.where((pending.count > 0)[:, None, None], gathered(hidden, last), state.newest)
        return hidden

    @bare_forward
    def _run(
        self, state: Eagle3State, tokens: Tensor, feature: Tensor, slots: Tensor, seen: Tensor, position: Tensor | None = None
    ) -> Tensor:
        """The layer over [B, W] pairs written at `slots`, each seeing `seen` [B, W, M] -> [B, W, D]. position: [B, W], or [B, 1] of all."""
        self.calls += 1
        cos, sin = self.rotary(slots if position is None else position)
        query, key, value = self.midlayer.attend(state.head.embed(tokens).to(feature.dtype), feature, cos, sin)
        row = torch.arange(len(slots), device=slots.device)[:, None]
        state.keys[row, :, slots] = key.transpose(1, 2)  # indexed: [B, W, Hkv, d]
        state.values[row, :, slots] = value.transpose(1, 2)
        groups = self.midlayer.groups
        mixed = F.scaled_dot_product_attention(
            query, repeat_heads(state.keys, groups), repeat_heads(state.values, groups), attn_mask=seen[:, None]
        )
        return self.midlayer.finish(feature, mixed)


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
