"""EAGLE-3: one decoder layer over fused target features, trained as it drafts (Li et al., 2025, arXiv:2503.01840).

Pair p joins the embedding of token x[p+1] with the target's feature g[p] and predicts x[p+2]; `drafters/feature.py` drafts on and unrolls
it in training. T time, D hidden, Vd draft vocabulary, A captured layers.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from drafttrain.core.layers import GatedMLP, RMSNorm, heads, rotate
from drafttrain.core.losses import OutputLayer, ScoringLayer
from drafttrain.core.vocab import draft_vocab
from drafttrain.drafters.feature import FeatureConfig, FeatureDrafter
from drafttrain.drafters.output import LOW_RANK, LowRankHead, OutputHead
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead


class Eagle3Config(FeatureConfig):
    """Sizes follow the target's where they are not given."""

    name: Literal["eagle3"] = "eagle3"
    draft_vocab_size: int | None = Field(default=None, ge=2)
    """Tokens the drafter can propose, the most frequent of the training answers; None: all of the target's."""
    output: LowRankHead | None = None
    """`{kind: low_rank}`: two thin matrices over the whole vocabulary instead of an output matrix of its own."""
    norm_features: bool = False
    """Normalise each captured layer before fusing them (`fc_norm` in the engines' formats)."""

    @model_validator(mode="after")
    def _one_output(self) -> Eagle3Config:
        if self.output is not None and self.draft_vocab_size is not None:
            raise ValueError(LOW_RANK.format(other="draft_vocab_size"))
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


class Eagle3(FeatureDrafter):
    """Drafts with one decoder layer over fused features of several target layers; see the module for the alignment."""

    Config = Eagle3Config
    config: Eagle3Config
    needs = frozenset({"aux_hidden_states"})
    feature: ClassVar[str] = "aux_hidden_states"
    vocab: Tensor  # [Vd] ascending target ids

    def __init__(self, config: Eagle3Config, target: TargetShape) -> None:
        super().__init__(config, target)
        size, eps = target.hidden_size, self.eps
        self.fc = nn.Linear(size * len(target.aux_layers), size, bias=False)
        if config.norm_features:
            self.fc_norm = nn.ModuleList(RMSNorm(size, eps) for _ in target.aux_layers)
        self.midlayer = Eagle3Layer(size, self.inner, self.query_heads, self.kv_heads, self.head_dim, eps)
        self.norm = RMSNorm(size, eps)
        draft_size = min(config.draft_vocab_size or target.vocab_size, target.vocab_size)
        if config.output is None:
            self.lm_head = nn.Linear(size, draft_size, bias=False)
        else:
            self.output = OutputHead(config.output, target)
        self.register_buffer("vocab", torch.arange(draft_size))

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
        head.start_norm(self.norm)
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

    # -- parts ------------------------------------------------------------------------------------------------------------------------

    def read_feature(self, value: Tensor) -> Tensor:
        """[..., A * D] captured states -> [..., D]."""
        value = value.to(self.fc.weight.dtype)
        if self.config.norm_features:
            parts = value.unflatten(-1, (len(self.fc_norm), -1))
            value = torch.cat([norm(parts[..., index, :]) for index, norm in enumerate(self.fc_norm)], -1)
        return self.fc(value)

    def attend(self, embedded: Tensor, feature: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return feature, *self.midlayer.attend(embedded, feature, cos, sin)

    def finish(self, residual: Tensor, mixed: Tensor) -> Tensor:
        return self.midlayer.finish(residual, mixed)

    def last_norm(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)

    def output_layer(self, head: TargetHead) -> ScoringLayer:
        return OutputLayer(self.lm_head.weight) if self.config.output is None else self.output.layer(head)
