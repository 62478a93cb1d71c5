"""Transformer parts that drafter families share: RMS norm, rotary positions, a gated MLP, attention over an unrolled draft.

B rows, T time, H heads, d head size, D hidden, J unrolled steps before this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def again(function: Callable[..., Tensor], *given: Any) -> Tensor:
    """`function(*given)`, of which the backward pass finds the inputs only and computes the rest again.

    For what is large to keep and cheap to compute: norms, gates.
    """
    if not torch.is_grad_enabled():
        return function(*given)
    return checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False)


AnyModule = TypeVar("AnyModule", bound=nn.Module)


def in_precision(module: AnyModule, device: torch.device, dtype: torch.dtype) -> AnyModule:
    """The module itself, moved, with its parameters in `dtype`. Buffers keep theirs: rotary frequencies rounded to bf16 turn long
    positions to wrong angles, and training and transformers keep them in fp32 too."""
    for parameter in module.to(device).parameters():
        parameter.data = parameter.data.to(dtype)
    return module


BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")  # Intel's and AMD's, and ARM's


def native_dtype(device: torch.device) -> Literal["bfloat16", "float32"]:
    """bf16 where the device has instructions that multiply it, else fp32: a processor that must do without is many times slower in bf16.

    Asked, not timed: milliseconds of a busy machine measure its scheduler.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch: then it is not known
        native = any(known.get(name, False) for name in BFLOAT16_INSTRUCTIONS)
    else:
        native = True
    return "bfloat16" if native else "float32"


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32 (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return again(self._normed, x)

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return again(self._down, self.gate_proj(x), self.up_proj(x))

    def _down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(F.silu(gate) * up)


class Rotary(nn.Module):
    """Rotary positions with the half-split layout of Llama (Su et al., 2021, arXiv:2104.09864)."""

    def __init__(self, frequency: Tensor, scale: float = 1.0) -> None:
        """frequency: [d / 2] fp32, radians a position; scale: of cosine and sine (YaRN's attention factor)."""
        super().__init__()
        self.frequency: Tensor
        self.register_buffer("frequency", frequency, persistent=False)
        self.scale = scale

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] positions -> cos, sin [B, 1, T, d] fp32."""
        angle = position[:, None, :, None].float() * self.frequency  # [B, 1, T, d / 2]
        angle = torch.cat([angle, angle], -1)
        return angle.cos() * self.scale, angle.sin() * self.scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, H, T, d] -> the same, turned to its positions."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def heads(x: Tensor, count: int) -> Tensor:
    """[B, T, count * d] -> [B, count, T, d]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Key-value heads for every query head: [B, Hkv, T, d] -> [B, Hkv * times, T, d]."""
    return x if times == 1 else x.repeat_interleave(times, 1)


def unrolled_attention_plain(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, *own: Tensor) -> Tensor:
    """Attention of one unrolled draft step, written out: every row sees the first step's keys under `bias`, and of the later steps only
    what the draft that started at this very row left behind.

    query, keys, values: [B, H, T, d]; bias: additive [B, 1, T, T]; own: keys and values of steps 1.., alternating, [B, H, T, d] each.
    Returns [B, H, T, d]. Scores and sums are fp32.
    """
    scale = query.shape[-1] ** -0.5
    scores = [query.float() @ keys.float().transpose(-1, -2) * scale + bias.float()]
    scores += [(query.float() * key.float()).sum(-1, keepdim=True) * scale for key in own[::2]]
    weight = torch.cat(scores, -1).softmax(-1)
    T = keys.shape[2]
    out = weight[..., :T] @ values.float()
    for step, value in enumerate(own[1::2]):
        out = out + weight[..., T + step, None] * value.float()
    return out.to(query.dtype)


def unrolled_attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, *own: Tensor) -> Tensor:
    """`unrolled_attention_plain` through the fused kernel: no [T, T] scores ever stand in memory."""
    return _UnrolledAttention.apply(query, keys, values, bias, *own)


class _UnrolledAttention(torch.autograd.Function):
    """The fused kernel gives the first step's output and its log-sum-exp; the few own scores are merged in. Backwards, the kernel is
    handed the merged output and the merged log-sum-exp, which makes it compute the exact gradient of its share of one softmax."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, *own: Tensor) -> Tensor:
        scale = query.shape[-1] ** -0.5
        shared, lse, extra = _fused_forward(query, keys, values, bias, scale)
        scores = [(query * key).sum(-1, dtype=torch.float32) * scale for key in own[::2]]  # each [B, H, T]
        total = torch.stack([lse, *scores]).logsumexp(0)
        out = shared * (lse - total).exp()[..., None]
        for score, value in zip(scores, own[1::2], strict=True):
            out = out + value * (score - total).exp()[..., None]
        out = out.to(query.dtype)
        ctx.save_for_backward(query, keys, values, bias, out, total, *own)
        ctx.extra = extra
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, bias, out, total, *own = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grad = grad.contiguous()
        d_query, d_keys, d_values = _fused_backward(grad, query, keys, values, bias, out, total, ctx.extra, scale)
        delta = (grad * out).sum(-1, dtype=torch.float32)  # [B, H, T]
        d_own: list[Tensor] = []
        for key, value in zip(own[::2], own[1::2], strict=True):
            weight = ((query * key).sum(-1, dtype=torch.float32) * scale - total).exp()
            d_score = (weight * ((grad * value).sum(-1, dtype=torch.float32) - delta) * scale)[..., None]
            d_query = d_query + (d_score * key).to(query.dtype)
            d_own += [(d_score * query).to(key.dtype), (weight[..., None] * grad).to(value.dtype)]
        return d_query, d_keys, d_values, None, *d_own


def _fused_forward(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Output [B, H, T, d], log-sum-exp [B, H, T] fp32, and what the kernel wants back."""
    if query.is_cuda:
        wide = aligned(bias).expand(query.shape[0], query.shape[1], -1, -1)
        out, lse, seed, offset = torch.ops.aten._scaled_dot_product_efficient_attention(query, keys, values, wide, True, scale=scale)
        return out, lse[..., : query.shape[2]], (seed, offset)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, attn_mask=bias, scale=scale)
    return out, lse, None


def _fused_backward(
    grad: Tensor, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, out: Tensor, lse: Tensor,
    extra: tuple[Tensor, Tensor] | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if extra is not None:
        wide = aligned(bias).expand(query.shape[0], query.shape[1], -1, -1)
        padded = F.pad(lse, (0, -lse.shape[-1] % 32))  # the kernel's own layout
        d_query, d_keys, d_values, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad, query, keys, values, wide, out, padded, *extra, 0.0, [True, True, True, False], scale=scale
        )
        return d_query, d_keys, d_values
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, keys, values, out, lse, 0.0, False, attn_mask=bias, scale=scale
    )


def aligned(bias: Tensor) -> Tensor:
    """[..., T] the same numbers, rows a multiple of 8 apart: CUDA's fused attention asks for it."""
    T = bias.shape[-1]
    return bias if bias.stride(-2) % 8 == 0 else F.pad(bias, (0, -T % 8))[..., :T]


def document_mask(document: Tensor) -> Tensor:
    """[B, T] document numbers (-1: padding) -> [B, T, T] bool: causal, documents apart; padding sees itself."""
    order = torch.arange(document.shape[1], device=document.device)
    same = (document[:, :, None] == document[:, None, :]) & (document >= 0)[:, :, None]
    return (same & (order[:, None] >= order)) | (order[:, None] == order)


def document_bias(document: Tensor, dtype: torch.dtype) -> Tensor:
    """`document_mask` as an additive mask [B, 1, T, T]."""
    seen = document_mask(document)
    bias = torch.zeros(seen.shape, dtype=dtype, device=document.device)
    return bias.masked_fill_(~seen, -math.inf)[:, None]


BLOCKS = 64
"""Blocks whose attention is computed at once: a mask has so many rows of slots, whatever the length of the text."""


def block_attention(
    query: Tensor, keys: Tensor, values: Tensor, context_keys: Tensor, context_values: Tensor, row: Tensor, first: Tensor, last: Tensor,
    causal: bool, blocks: int = BLOCKS,
) -> Tensor:
    """Attention of N blocks of S slots, each over its own slots and a stretch of a text.

    query: [N, H, S, d]; keys, values: [N, Hkv, S, d] of the slots; context_keys, context_values: [B, Hkv, T, d] of the texts. Block n
    sees places first[n] .. last[n] - 1 of text row[n] ([N] each, in the order of the texts). Returns [N, H, S, d].
    """
    S, groups = query.shape[2], query.shape[1] // keys.shape[1]
    inner = torch.ones(S, S, dtype=torch.bool, device=query.device)
    inner = inner.tril() if causal else inner
    out = []
    for text, start, stop, low, high in _stretches(row, first, last, blocks):
        n = stop - start
        place = torch.arange(low, high, device=query.device)
        context = (place >= first[start:stop, None]) & (place < last[start:stop, None])  # [n, C]
        itself = torch.eye(n, dtype=torch.bool, device=query.device)
        own = (itself[:, None, :, None] & inner[None, :, None, :]).reshape(n * S, n * S)
        mask = torch.cat([context.repeat_interleave(S, 0), own], 1)  # [n S, C + n S]
        key = torch.cat([context_keys[text, :, low:high], _slots_in_line(keys[start:stop])], 1)
        value = torch.cat([context_values[text, :, low:high], _slots_in_line(values[start:stop])], 1)
        mixed = F.scaled_dot_product_attention(
            _slots_in_line(query[start:stop])[None], repeat_heads(key[None], groups), repeat_heads(value[None], groups), attn_mask=mask
        )
        out.append(mixed[0].unflatten(1, (n, S)).transpose(0, 1))
    if not out:  # every projection still gets a gradient, of zeros: ranks that train together must not differ in that
        return query + 0 * sum(tensor.sum() for tensor in (keys, values, context_keys, context_values))
    return torch.cat(out)


def _slots_in_line(x: Tensor) -> Tensor:
    """[n, H, S, d] -> [H, n S, d]."""
    return x.transpose(0, 1).flatten(1, 2)


def _stretches(row: Tensor, first: Tensor, last: Tensor, blocks: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(text, start, stop, low, high): blocks start .. stop - 1 belong to one text and see no place outside low .. high - 1."""
    rows, firsts, lasts = row.tolist(), first.tolist(), last.tolist()
    start = 0
    while start < len(rows):
        stop = start
        while stop < len(rows) and stop - start < blocks and rows[stop] == rows[start]:
            stop += 1
        yield rows[start], start, stop, min(firsts[start:stop]), max(lasts[start:stop])
        start = stop
