"""Block drafters: all positions of a draft in one pass, from the target's states injected as keys and values (DFlash, 2026).

A block is an anchor, the round's root, and mask slots behind it. Its attention reads the fused target states of every token before the
anchor through the layers' own key and value projections, and the block itself, in both directions or causally. Families say what
turns the block's states into distributions. B rows, T time, N blocks, K drafted tokens, S slots of a block, D hidden, V vocabulary,
Vd draft vocabulary, A captured layers, L layers, H heads, d head size, M cache slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.errors import UserError
from drafttrain.core.layers import GatedMLP, RMSNorm, block_attention, heads, repeat_heads, rotate
from drafttrain.core.losses import LossMix, decay_weights, dpace_weights, overlap, summed_in_chunks
from drafttrain.core.plan import Plan
from drafttrain.core.rng import Rng, SeededRng
from drafttrain.core.sampling import Sampling, likeliest
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Features, TrainingBatch
from drafttrain.drafters.base import CATCH_UP, DrafterConfig, DrafterState, Loss, bare_forward
from drafttrain.drafters.grow import Parallel, Step, grow
from drafttrain.drafters.output import FullHead, OutputConfig, OutputDrafter, OutputHead
from drafttrain.drafters.sizes import LayerSizes
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead
from drafttrain.target.rope import target_rotary


class BlockConfig(DrafterConfig):
    """What all block drafters can be told. Sizes follow the target's where they are not given."""

    layers: int = Field(default=2, ge=1, le=8)
    """Decoder layers over the block."""
    block: int = Field(default=7, ge=1, le=64)
    """Tokens drafted in one pass (K), the deepest tree it can draft."""
    causal: bool = False
    """Slots see the slots before them alone, instead of the whole block."""
    anchor_predicts: bool = True
    """The anchor's own slot gives the first token; otherwise the first mask behind it does, which costs one slot more."""
    qk_norm: bool = False
    """Normalise queries and keys, head by head."""
    conv_group: int | None = Field(default=None, ge=1)
    """Causal two-tap convolutions along the block, one kernel for so many channels (a divisor of the hidden size); None: none."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Width of the gated MLP."""
    num_attention_heads: int | None = Field(default=None, ge=1)
    """Query heads, a multiple of the key-value heads."""
    num_key_value_heads: int | None = Field(default=None, ge=1)
    """Key-value heads."""
    output: OutputConfig = FullHead()
    """What turns states into logits: the target's own matrix, some rows of it, or one of low rank."""
    anchors: int = Field(default=512, ge=1)
    """Blocks trained on in each document and step, at most: short documents are not starved by long ones."""
    decay: float | None = Field(default=4.0, gt=0)
    """Position k of a block weighs exp(-k / decay) in training; None: all the same."""
    dpace: bool = False
    """Weigh positions by how much accepted length hangs on each (D-PACE) instead."""
    loss: LossMix = LossMix()
    """What each position learns from the target's distribution."""
    loss_chunk: int = Field(default=1024, ge=1)
    """Labels whose [V] logits stand in memory at once."""

    @property
    def max_depth(self) -> int:
        return self.block


class BlockConvolution(nn.Module):
    """A causal two-tap depthwise convolution along the block, its kernels predicted from the states; a fresh one changes nothing."""

    def __init__(self, size: int, group: int) -> None:
        super().__init__()
        self.group = group
        self.base_kernel = nn.Parameter(torch.stack([torch.ones(size), torch.zeros(size)]))  # [taps, D]
        self.kernel_projection = nn.Linear(size, 2 * (size // group), bias=False)
        nn.init.zeros_(self.kernel_projection.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N, S, D] -> [N, S, D]."""
        kernel = self.kernel_projection(x).unflatten(-1, (2, -1)).repeat_interleave(self.group, -1) + self.base_kernel  # [N, S, 2, D]
        before = F.pad(x[:, :-1], (0, 0, 1, 0))  # the slot before each
        return kernel[..., 0, :] * x + kernel[..., 1, :] * before


class BlockLayer(nn.Module):
    """One decoder layer. Context and block go through the same key and value projections."""

    def __init__(
        self, size: int, inner: int, query_heads: int, kv_heads: int, head_dim: int, eps: float, qk_norm: bool, conv_group: int | None
    ) -> None:
        super().__init__()
        self.query_heads, self.kv_heads = query_heads, kv_heads
        self.input_layernorm: nn.Module = RMSNorm(size, eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(size, query_heads * head_dim, bias=False),
                "k_proj": nn.Linear(size, kv_heads * head_dim, bias=False),
                "v_proj": nn.Linear(size, kv_heads * head_dim, bias=False),
                "o_proj": nn.Linear(query_heads * head_dim, size, bias=False),
            }
        )
        if qk_norm:
            self.self_attn["q_norm"], self.self_attn["k_norm"] = RMSNorm(head_dim, eps), RMSNorm(head_dim, eps)
        self.qk_norm = qk_norm
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = GatedMLP(size, inner)
        self.convolves = conv_group is not None
        if conv_group is not None:
            places = ("before_attention", "after_attention", "before_mlp", "after_mlp")
            self.convolutions = nn.ModuleDict({place: BlockConvolution(size, conv_group) for place in places})

    def enter(self, hidden: Tensor) -> Tensor:
        """The block's states as attention reads them: [N, S, D] -> [N, S, D]."""
        return self._convolved("before_attention", self.input_layernorm(hidden))

    def _convolved(self, place: str, x: Tensor) -> Tensor:
        return self.convolutions[place](x) if self.convolves else x

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> [B, Hkv, T, d] twice."""
        key = heads(self.self_attn["k_proj"](x), self.kv_heads)
        key = self.self_attn["k_norm"](key) if self.qk_norm else key
        return rotate(key, cos, sin), heads(self.self_attn["v_proj"](x), self.kv_heads)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, d]."""
        query = heads(self.self_attn["q_proj"](x), self.query_heads)
        query = self.self_attn["q_norm"](query) if self.qk_norm else query
        return rotate(query, cos, sin)

    def finish(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The block's states [B, S, D] and what attention read [B, H, S, d] -> the layer's output [B, S, D]."""
        read = self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        hidden = hidden + self._convolved("after_attention", read)
        normed = self._convolved("before_mlp", self.post_attention_layernorm(hidden))
        return hidden + self._convolved("after_mlp", self.mlp(normed))


class Anchors(NamedTuple):
    """Where N blocks of a training batch begin: the token at `place` is the root of each."""

    row: Tensor  # [N]
    place: Tensor  # [N]

    def part(self, rows: slice) -> Anchors:
        return Anchors(self.row[rows], self.place[rows])


def sampled_anchors(batch: TrainingBatch, per_document: int, rng: SeededRng) -> Anchors:
    """At most `per_document` roots of every document, drawn without replacement among those whose next token is a label; in the order of
    the text."""
    _, supervised = batch.ahead(1)
    row, place = (supervised & (batch.position > 0)).nonzero(as_tuple=True)  # a root at the start of a document has no context
    document = row * (int(batch.document.max()) + 1) + batch.document[row, place]
    shuffled = rng.uniform(batch.tokens.shape[1])[row, place].argsort()  # a place's number hangs on its row alone
    grouped = shuffled[document[shuffled].argsort(stable=True)]  # document by document, each in random order
    numbers = document[grouped]
    rank = torch.arange(len(row), device=row.device) - torch.searchsorted(numbers, numbers)
    chosen = grouped[rank < per_document].sort().values
    return Anchors(row[chosen], place[chosen])


def every_anchor(batch: TrainingBatch) -> Anchors:
    """All roots from which a round could start in the answers."""
    row, place = (batch.mask & (batch.position > 0) & (batch.document >= 0)).nonzero(as_tuple=True)
    return Anchors(row, place)


@dataclass
class BlockLabels:
    """What blocks learn: position k of block n guesses the token k + 1 places after its anchor."""

    tokens: Tensor  # [N, K]
    previous: Tensor  # [N, K] the token before each label: the anchor, then the labels before it
    real: Tensor  # [N, K] bool: there is a label, and one at every position before it
    teacher: Tensor  # [N, K, D] the target's states that give the labels

    @classmethod
    def of(cls, batch: TrainingBatch, anchors: Anchors, length: int) -> BlockLabels:
        row, place = anchors
        ahead = [batch.ahead(step + 1) for step in range(length)]
        tokens = torch.stack([following[row, place] for following, _ in ahead], 1)
        real = torch.stack([label[row, place] for _, label in ahead], 1).long().cumprod(1).bool()
        previous = torch.cat([batch.tokens[row, place][:, None], tokens[:, :-1]], 1)
        offset = torch.arange(length, device=row.device)
        last = batch.features["last_hidden_state"]
        teacher = last[row[:, None], (place[:, None] + offset).clamp_max(last.shape[1] - 1)]
        return cls(tokens, previous, real, teacher)


@dataclass
class BlockState(DrafterState):
    """Every layer's keys and values of the committed tokens. They grow by what is committed and are never computed again."""

    head: TargetHead
    keys: Tensor  # [B, L, Hkv, M, d]
    values: Tensor  # [B, L, Hkv, M, d]
    lengths: Tensor  # [B] committed tokens whose features are here; the root is not among them
    max_length: int  # at least the longest of them, known on the host

    def select(self, rows: Tensor) -> BlockState:
        return BlockState(self.head, self.keys[rows], self.values[rows], self.lengths[rows], self.max_length)

    def join(self, other: DrafterState) -> BlockState:
        assert isinstance(other, BlockState)
        slots = max(self.keys.shape[3], other.keys.shape[3])

        def stacked(ours: Tensor, theirs: Tensor) -> Tensor:
            return torch.cat([F.pad(part, (0, 0, 0, slots - part.shape[3])) for part in (ours, theirs)])

        lengths = torch.cat([self.lengths, other.lengths])
        longest = max(self.max_length, other.max_length)
        return BlockState(self.head, stacked(self.keys, other.keys), stacked(self.values, other.values), lengths, longest)

    def set_lengths(self, lengths: list[int]) -> None:
        self.max_length = max(lengths, default=0)


class BlockDrafter(OutputDrafter):
    """Drafts a block in one pass. A family adds numbers to a position's state where its distribution depends on the tokens before it."""

    config: BlockConfig
    needs = frozenset({"aux_hidden_states"})
    first_label = 1  # the anchor's row gives the token after it
    extra_size = 0  # numbers that `extra_of_text` adds to a position's state
    learns_base = False  # `loss` is of the block's own distribution; what the extra makes of it learns by `more_loss`

    def __init__(self, config: BlockConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        size = target.hidden_size
        query_heads, kv_heads, self.head_dim, inner, eps = LayerSizes.of(config, target)
        self.kv_heads, self.groups = kv_heads, query_heads // kv_heads
        self.fc = nn.Linear(size * len(target.aux_layers), size, bias=False)
        self.hidden_norm = RMSNorm(size, eps)
        self.mask_embedding = nn.Parameter(torch.randn(size) * 0.02)
        group = config.conv_group
        if group is not None and size % group:
            raise UserError(f"drafter.conv_group {group} does not divide the hidden size {size}; give a divisor, or null for none")
        self.layers = nn.ModuleList(
            BlockLayer(size, inner, query_heads, kv_heads, self.head_dim, eps, config.qk_norm, group) for _ in range(config.layers)
        )
        self.norm = RMSNorm(size, eps)
        self.output = OutputHead(config.output, target)
        self.rotary = target_rotary(target, self.head_dim)
        self.first_slot = 0 if config.anchor_predicts else 1
        self.slots = config.block + self.first_slot

    @property
    def _decoder_layers(self) -> list[BlockLayer]:
        return [layer for layer in self.layers if isinstance(layer, BlockLayer)]

    @torch.no_grad()
    def start_from(self, head: TargetHead, counts: Tensor) -> None:
        """Norm, output and layers from the target's last ones, where they fit; the highest captured layer as the context."""
        self.output.start_from(head, counts)
        head.start_norm(self.norm)
        size, first = self.target.hidden_size, self.target.num_layers - len(self.layers)
        self.mask_embedding.copy_(head.embedding.float().mean(0))
        self.fc.weight.zero_()
        self.fc.weight[:, -size:].copy_(torch.eye(size))
        for index, layer in enumerate(self.layers):
            head.start_layer(layer, max(first + index, 0))

    # -- what families add ------------------------------------------------------------------------------------------------------------

    def revealed(self, batch: TrainingBatch, anchors: Anchors, rng: SeededRng) -> tuple[Tensor, Tensor] | None:
        """Which slots hold their own label instead of a mask in training, [N, K] bool, and what the others' loss weighs, [N, K]."""
        return None

    def extra_of_text(self, hidden: Tensor, previous: Tensor, head: TargetHead) -> Tensor | None:
        """Of given texts: states and the token before each position, [N, K, D] and [N, K] -> [N, K, extra_size]."""
        return None

    def extra_logits(self, extra: Tensor) -> Tensor:
        """[..., extra_size] -> [..., Vd], added to what the block's own state says."""
        raise NotImplementedError(f"{type(self).__name__} has extra numbers and does not say what they add")

    @bare_forward
    def combined(self, base: Tensor, extra: Tensor) -> Tensor:
        """[..., 1, Vd] or [..., W, Vd] of the block's own states and [..., W, extra_size] -> [..., W, Vd]."""
        return base + self.extra_logits(extra)

    def extra_parameters(self) -> list[nn.Parameter]:
        """What `combined` and `more_loss` read and is to be trained."""
        return []

    def more_loss(self, states: Tensor, base: Tensor, p: Tensor, log_q: Tensor, labels: BlockLabels, progress: float) -> Tensor | None:
        """[n, K] what a family adds to each position's loss. states: [n, K, D + extra_size]; base: [n, K, Vd] logits without the
        extra; p, log_q: [n, K, Vd]."""
        return None

    def mix_share(self, progress: float) -> float:
        """How much `loss` weighs beside `more_loss` when a share `progress` of the training is over."""
        return 1.0

    def step(self, base: Tensor, hidden: Tensor, states: list[Tensor], state: BlockState, roots: Tensor) -> Step:
        """How a tree grows: base [B, K, Vd] logits and hidden [B, K, D] states of the block."""
        return Parallel(base, hidden, states)

    def slots_read(self, depth: int) -> int:
        """How many of a block's slots a tree of this depth is made of."""
        return depth

    def fitted(self, plan: Plan, step: Step) -> Plan:
        """The plan of a round, where a family has its own reasons to stop."""
        return plan

    # -- training ---------------------------------------------------------------------------------------------------------------------

    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        rng = rng or SeededRng(0, torch.arange(len(batch.tokens), device=batch.tokens.device))
        anchors = sampled_anchors(batch, self.config.anchors, rng)
        labels = BlockLabels.of(batch, anchors, self.config.block)
        shown, share = self.revealed(batch, anchors, rng) or (None, torch.ones_like(labels.real, dtype=torch.float32))
        states = self._states(self._hidden_of_text(batch, anchors, head, shown, labels.tokens), labels.previous, head)
        if shown is not None:
            labels.real = labels.real & ~shown
        K, rows = self.config.block, [states, labels.tokens, labels.previous, labels.real, labels.teacher, share]

        def loss_of(states: Tensor, tokens: Tensor, previous: Tensor, real: Tensor, teacher: Tensor, share: Tensor) -> Tensor:
            return self._chunk_loss(states, BlockLabels(tokens, previous, real, teacher), share, head, batch.progress)

        trained = [*self.output.parameters(), *self.extra_parameters()]
        total, hits = summed_in_chunks(loss_of, rows, trained, max(1, self.config.loss_chunk // K), figures=2 * K)
        counts = labels.real.sum(0).float()
        metrics: dict[str, Tensor] = {}
        for position in range(K):
            metrics |= {f"alpha_{position}": hits[position], f"alpha_{position}_count": counts[position]}
            metrics |= {f"overlap_{position}": hits[K + position], f"overlap_{position}_count": counts[position]}
        return Loss(total, counts.sum(), metrics)

    def _chunk_loss(self, states: Tensor, labels: BlockLabels, share: Tensor, head: TargetHead, progress: float) -> Tensor:
        """[n, K, D + extra] -> the loss of these blocks, then at how many labels each position was right, then their overlaps."""
        vocab, real = self.draft_ids, labels.real
        base, logits = self._both_logits(states, head)
        log_q = logits.float().log_softmax(-1)  # [n, K, Vd]
        with torch.no_grad():
            p = head.logits(labels.teacher, vocab).float().softmax(-1)
        index, inside = self.output.index(labels.tokens)
        learning = base.float().log_softmax(-1) if self.learns_base else log_q
        each = self.mix_share(progress) * self.config.loss.between(p, learning, labels.tokens, vocab)
        more = self.more_loss(states, base, p, log_q, labels, progress)
        each = each if more is None else each + more
        weight = share * self._weights(log_q, index, real & inside)
        with torch.no_grad():
            right = (likeliest(logits) == index) & inside & real
            accepted = overlap(p, log_q) * real
        return torch.cat([(each * weight * real).sum()[None], right.sum(0).float(), accepted.sum(0)])

    def _weights(self, log_q: Tensor, index: Tensor, real: Tensor) -> Tensor:
        """[K] or [n, K]: how much each position counts."""
        if self.config.dpace:
            return dpace_weights(log_q.gather(-1, index[..., None])[..., 0].exp(), real)
        if self.config.decay is None:
            return torch.ones(self.config.block, device=log_q.device)
        return decay_weights(self.config.block, self.config.decay, log_q.device)

    def _hidden_of_text(
        self, batch: TrainingBatch, anchors: Anchors, head: TargetHead, shown: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """[N, K, D] normed states of the blocks that begin at `anchors`, all in one forward.

        shown: [N, K] bool, slots that hold a token instead of a mask; tokens: [N, K].
        """
        row, place = anchors
        context = self._fuse(batch.features["aux_hidden_states"])  # [B, T, D]
        hidden = self._slots(head, batch.tokens[row, place], context.dtype, shown, tokens)  # [N, S, D]
        position = batch.position[row, place]
        first = place - position  # where the document begins
        slots = torch.arange(self.slots, device=row.device)
        at_context, at_block = self.rotary(batch.position), self.rotary(position[:, None] + slots)
        for layer in self._decoder_layers:
            context_keys, context_values = layer.keys_and_values(context, *at_context)
            x = layer.enter(hidden)
            keys, values = layer.keys_and_values(x, *at_block)
            query = layer.queries(x, *at_block)
            mixed = block_attention(query, keys, values, context_keys, context_values, row, first, place, self.config.causal)
            hidden = layer.finish(hidden, mixed)
        return self.norm(hidden)[:, self.first_slot :]

    @torch.no_grad()
    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> Tensor:
        guesses = torch.full((*batch.tokens.shape, length), -1, device=batch.tokens.device)  # deeper than the block: never right
        anchors = every_anchor(batch)
        ids, chunk = self.draft_ids, max(1, self.config.loss_chunk // self.config.block)
        for start in range(0, len(anchors.row), chunk):
            part = anchors.part(slice(start, start + chunk))
            best = likeliest(self._logits(self._states_of_text(batch, part, head)[:, :length], head))
            guesses[part.row, part.place - 1, : best.shape[1]] = best if ids is None else ids[best]
        return guesses

    def teacher_forced_states(self, batch: TrainingBatch, head: TargetHead, steps: int) -> Iterator[Tensor]:
        anchors = every_anchor(batch)
        states = self._states_of_text(batch, anchors, head)  # [N, K, D + extra]
        for step in range(min(steps, states.shape[1])):
            out = states.new_zeros(*batch.tokens.shape, states.shape[-1])
            out[anchors.row, anchors.place - 1] = states[:, step]
            yield out

    def readout(self, states: Tensor, level: int, head: TargetHead) -> Tensor:
        return self._logits(states, head)

    def _states_of_text(self, batch: TrainingBatch, anchors: Anchors, head: TargetHead) -> Tensor:
        """[N, K, D + extra_size] with the text's own tokens before each position."""
        place = anchors.place[:, None] + torch.arange(self.config.block, device=anchors.place.device)
        previous = batch.tokens[anchors.row[:, None], place.clamp_max(batch.tokens.shape[1] - 1)]
        return self._states(self._hidden_of_text(batch, anchors, head), previous, head)

    def _states(self, hidden: Tensor, previous: Tensor, head: TargetHead) -> Tensor:
        extra = self.extra_of_text(hidden, previous, head)
        return hidden if extra is None else torch.cat([hidden, extra], -1)

    def _both_logits(self, states: Tensor, head: TargetHead) -> tuple[Tensor, Tensor]:
        """[..., D + extra_size] -> [..., Vd] of the block's own states, and with the extra."""
        size = self.target.hidden_size
        base = self.output.logits(states[..., :size], head)
        return base, self.combined(base, states[..., size:]) if self.extra_size else base

    @bare_forward
    def _logits(self, states: Tensor, head: TargetHead) -> Tensor:
        return self._both_logits(states, head)[1]

    @bare_forward
    def _fuse(self, aux: Tensor) -> Tensor:
        """[..., A * D] captured states -> [..., D]."""
        return self.hidden_norm(self.fc(aux.to(self.fc.weight.dtype)))

    def _slots(
        self, head: TargetHead, roots: Tensor, dtype: torch.dtype, shown: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """[N] roots -> [N, S, D] what the block begins as: the root, then masks, or tokens [N, K] where they are `shown`."""
        masks = self.mask_embedding.to(dtype).expand(len(roots), self.slots - 1, -1)
        if shown is not None and tokens is not None:
            masks = torch.where(shown[..., None], head.embed(tokens).to(dtype), masks)
        return torch.cat([head.embed(roots).to(dtype)[:, None], masks], 1)

    # -- decoding ---------------------------------------------------------------------------------------------------------------------

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> BlockState:
        B, P = prompts.shape
        slots = capacity + CATCH_UP + self.slots
        keys = torch.zeros(B, len(self.layers), self.kv_heads, slots, self.head_dim, device=prompts.device, dtype=self.fc.weight.dtype)
        state = BlockState(head, keys, torch.zeros_like(keys), torch.zeros_like(lengths), P)
        self._read(state, features["aux_hidden_states"])
        state.lengths = lengths.clone()
        return state

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, BlockState)
        self._read(state, committed.features["aux_hidden_states"])
        state.lengths = state.lengths + committed.count
        state.max_length += committed.tokens.shape[1]

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        assert isinstance(state, BlockState)
        self.calls += 1
        hidden = self._block(state, roots)[:, : self.slots_read(plan.shape.depth)]
        base = self._base(hidden, state.head)
        states: list[Tensor] = []
        step = self.step(base, hidden, states, state, roots)
        return grow(step, roots, self.fitted(plan, step), sampling, rng, self.draft_ids, self.target.vocab_size, states).tree

    @bare_forward
    def _read(self, state: BlockState, aux: Tensor) -> None:
        """Writes the keys and values of T tokens [B, T, A * D] behind the committed ones; those of padding are overwritten later."""
        context = self._fuse(aux)
        slots = state.lengths[:, None] + torch.arange(aux.shape[1], device=aux.device)
        turned = self.rotary(slots)
        for index, layer in enumerate(self._decoder_layers):
            self._write(state, index, slots, *layer.keys_and_values(context, *turned))

    @staticmethod
    def _write(state: BlockState, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """[B, Hkv, T, d] at `slots` [B, T]."""
        row = torch.arange(len(slots), device=slots.device)[:, None]
        state.keys[row, layer, :, slots] = key.transpose(1, 2)  # indexed: [B, T, Hkv, d]
        state.values[row, layer, :, slots] = value.transpose(1, 2)

    @bare_forward
    def _block(self, state: BlockState, roots: Tensor, shown: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """[B] roots -> [B, K, D] normed states. The block's own keys stand behind the committed ones until others overwrite them."""
        hidden = self._slots(state.head, roots, state.keys.dtype, shown, tokens)
        slots = state.lengths[:, None] + torch.arange(self.slots, device=roots.device)
        reach = min(state.max_length + self.slots, state.keys.shape[3])
        end = slots if self.config.causal else slots[:, -1:].expand_as(slots)
        seen = torch.arange(reach, device=roots.device) <= end[..., None]  # [B, S, reach]
        turned = self.rotary(slots)
        for index, layer in enumerate(self._decoder_layers):
            x = layer.enter(hidden)
            self._write(state, index, slots, *layer.keys_and_values(x, *turned))
            keys, values = (repeat_heads(kept[:, index, :, :reach], self.groups) for kept in (state.keys, state.values))
            mixed = F.scaled_dot_product_attention(layer.queries(x, *turned), keys, values, attn_mask=seen[:, None])
            hidden = layer.finish(hidden, mixed)
        return self.norm(hidden)[:, self.first_slot :]

    @bare_forward
    def _base(self, hidden: Tensor, head: TargetHead) -> Tensor:
        return self.output.logits(hidden, head)
