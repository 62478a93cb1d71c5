"""P-EAGLE: EAGLE-3's layers draft all positions in one pass (2026; vLLM serves it as EAGLE-3 with `parallel_drafting`).

The layers read pairs, as EAGLE-3's do: the fused features of token t beside the embedding of token t + 1. The pair of the round's root
gives the first drafted token. Behind it stand mask pairs, a learnt embedding beside a learnt feature, each of which gives one token more
and sees the pairs before it. B rows, T time, N blocks, K drafted tokens, D hidden, A captured layers, M cache slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.layers import block_attention, document_bias, repeat_heads
from drafttrain.core.types import Committed, Features, TrainingBatch
from drafttrain.drafters.base import CATCH_UP, DrafterState, bare_forward
from drafttrain.drafters.block import Anchors, BlockConfig, BlockDrafter, BlockLayer, BlockState
from drafttrain.drafters.eagle3 import READERS, Eagle3Layer
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class PEagleConfig(BlockConfig):
    """A causal block of pairs; the published drafters have 4 layers."""

    name: Literal["p_eagle"] = "p_eagle"
    causal: Literal[True] = True
    """Slots see the slots before them alone."""
    anchor_predicts: Literal[True] = True
    """The root's pair gives the first token."""
    qk_norm: Literal[False] = False
    """EAGLE-3's layers have no such norms."""
    conv_group: None = None
    """EAGLE-3's layers have no convolutions."""


@dataclass
class PEagleState(BlockState):
    """`lengths` counts committed pairs, one less than the committed tokens: the newest token's waits for the root."""

    newest: Tensor  # [B, A * D] the newest committed token's features

    def select(self, rows: Tensor) -> PEagleState:
        return PEagleState(**vars(super().select(rows)), newest=self.newest[rows])

    def join(self, other: DrafterState) -> PEagleState:
        assert isinstance(other, PEagleState)
        return PEagleState(**vars(super().join(other)), newest=torch.cat([self.newest, other.newest]))


class PEagle(BlockDrafter):
    """Pairs and mask pairs."""

    Config = PEagleConfig
    config: PEagleConfig

    def __init__(self, config: PEagleConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        size = target.hidden_size
        first = self._decoder_layers[0]
        inner, eps = first.mlp.get_parameter("gate_proj.weight").shape[0], self.norm.eps
        self.layers[0] = Eagle3Layer(size, inner, first.query_heads, first.kv_heads, self.head_dim, eps)
        self.mask_hidden = nn.Parameter(torch.randn(size * len(target.aux_layers)) * 0.02)
        del self.hidden_norm  # the features of a pair are normed by the layer that reads them

    @torch.no_grad()
    def start_from(self, head: TargetHead, counts: Tensor) -> None:
        super().start_from(head, counts)
        size, first = self.target.hidden_size, max(self.target.num_layers - len(self.layers), 0)
        borrowed, own = head.layer_weights(first), dict(self.layers[0].named_parameters())
        for name in READERS:
            source = borrowed.get(name)
            if source is not None and own[name].shape == (source.shape[0], 2 * source.shape[1]):  # [embedding, feature]
                own[name][:, :size].mul_(0.5)
                own[name][:, size:].copy_(source)

    @bare_forward
    def _fuse(self, aux: Tensor) -> Tensor:
        """[..., A * D] captured states -> [..., D]."""
        return self.fc(aux.to(self.fc.weight.dtype))

    def _pairs(self, roots: Tensor, feature: Tensor, head: TargetHead) -> tuple[Tensor, Tensor]:
        """Roots [N] and the fused features before them [N, D] -> embeddings and features [N, K, D] of the block's pairs."""
        masks = len(roots), self.config.block - 1, -1
        embedded = torch.cat([head.embed(roots).to(feature.dtype)[:, None], self.mask_embedding.to(feature.dtype).expand(masks)], 1)
        return embedded, torch.cat([feature[:, None], self._fuse(self.mask_hidden).to(feature.dtype).expand(masks)], 1)

    # -- training ---------------------------------------------------------------------------------------------------------------------

    def _hidden_of_text(
        self, batch: TrainingBatch, anchors: Anchors, head: TargetHead, shown: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        row, place = anchors
        text = self._fuse(batch.features["aux_hidden_states"])  # [B, T, D] of the texts' own pairs
        text_embedded = head.embed(batch.ahead(1)[0]).to(text.dtype)
        embedded, hidden = self._pairs(batch.tokens[row, place], text[row, place - 1], head)  # [N, K, D]
        position = batch.position[row, place]
        first, last = place - position, place - 1  # pairs of the document before the root's
        at_text = self.rotary(batch.position)
        at_block = self.rotary((position - 1)[:, None] + torch.arange(self.slots, device=row.device))
        seen = document_bias(batch.document, text.dtype)
        for layer in self.layers:
            query, text_keys, text_values = read(layer, text, text_embedded, *at_text)
            keys, values = repeat_heads(text_keys, self.groups), repeat_heads(text_values, self.groups)
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen.to(query.dtype))
            text = finish(layer, text, mixed)
            query, keys, values = read(layer, hidden, embedded, *at_block)
            mixed = block_attention(query, keys, values, text_keys, text_values, row, first, last, causal=True)
            hidden = finish(layer, hidden, mixed)
        return self.norm(hidden)

    # -- decoding ---------------------------------------------------------------------------------------------------------------------

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> PEagleState:
        (B, P), aux = prompts.shape, features["aux_hidden_states"]
        slots = capacity + CATCH_UP + self.slots
        keys = torch.zeros(B, len(self.layers), self.kv_heads, slots, self.head_dim, device=prompts.device, dtype=self.fc.weight.dtype)
        newest = aux[torch.arange(B, device=prompts.device), lengths - 1]
        state = PEagleState(head, keys, torch.zeros_like(keys), torch.zeros_like(lengths), P, newest)
        if P > 1:
            self._read_pairs(state, prompts[:, 1:], aux[:, :-1])
        state.lengths = lengths - 1
        return state

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, PEagleState)
        aux, count = committed.features["aux_hidden_states"], committed.count
        state.max_length += committed.tokens.shape[1]
        self._read_pairs(state, committed.tokens, torch.cat([state.newest[:, None].to(aux.dtype), aux[:, :-1]], 1))
        state.lengths = state.lengths + count
        newest = aux[torch.arange(len(count), device=count.device), (count - 1).clamp_min(0)]
        state.newest = torch.where((count > 0)[:, None], newest, state.newest)

    @bare_forward
    def _read_pairs(self, state: PEagleState, tokens: Tensor, aux: Tensor) -> None:
        """Writes the pairs of tokens [B, T] with the features before them [B, T, A * D]; those of padding are overwritten later."""
        feature = self._fuse(aux)
        self._through(state, feature, state.head.embed(tokens).to(feature.dtype))

    @bare_forward
    def _block(self, state: BlockState, roots: Tensor, shown: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        assert isinstance(state, PEagleState)
        embedded, feature = self._pairs(roots, self._fuse(state.newest), state.head)
        return self.norm(self._through(state, feature, embedded))

    def _through(self, state: PEagleState, hidden: Tensor, embedded: Tensor) -> Tensor:
        """All layers over pairs [B, T, D] behind the committed ones, each of which sees what stands up to it."""
        slots = state.lengths[:, None] + torch.arange(hidden.shape[1], device=hidden.device)
        reach = min(state.max_length + hidden.shape[1], state.keys.shape[3])
        seen = torch.arange(reach, device=hidden.device) <= slots[..., None]  # [B, T, reach]
        turned = self.rotary(slots)
        for index, layer in enumerate(self.layers):
            query, key, value = read(layer, hidden, embedded, *turned)
            self._write(state, index, slots, key, value)
            keys, values = (repeat_heads(kept[:, index, :, :reach], self.groups) for kept in (state.keys, state.values))
            hidden = finish(layer, hidden, F.scaled_dot_product_attention(query, keys, values, attn_mask=seen[:, None]))
        return hidden


def read(layer: nn.Module, hidden: Tensor, embedded: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of states [B, T, D]; the first layer reads the embeddings beside them."""
    if isinstance(layer, Eagle3Layer):
        return layer.attend(embedded, hidden, cos, sin)
    assert isinstance(layer, BlockLayer)
    x = layer.enter(hidden)
    return layer.queries(x, cos, sin), *layer.keys_and_values(x, cos, sin)


def finish(layer: nn.Module, hidden: Tensor, mixed: Tensor) -> Tensor:
    """States [B, T, D] and what attention read [B, H, T, d] -> the layer's output [B, T, D]."""
    assert isinstance(layer, Eagle3Layer | BlockLayer)
    return layer.finish(hidden, mixed)
