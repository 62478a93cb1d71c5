"""Matrices kept a second time in the order that a processor reads them fastest in, for the few rows that decoding multiplies.

Processors without bf16 instructions decode in fp32, where the BLAS behind `F.linear` takes for 2 rows twice as long as for 1 (measured on
an AVX2 machine: 160 MB of matrices, 1, 2, 4, 8, 16, 32 rows in 10.7, 20.5, 19.5, 17.4, 21.2, 28.6 ms). oneDNN, given them in blocks,
takes 8.0, 8.4, 9.7, 11.3, 15.8, 23.4 ms; from some 64 rows on both are the same.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.layers import native_dtype

MOST_ROWS = 64
SHARE = 0.5  # of the free memory: larger models are left as they are


class PackedWeights:
    """What is known of a matrix; hangs on the matrix itself, and is neither copied nor saved with it."""

    def __init__(self) -> None:
        self.version: tuple[int, int] | None = None  # of the matrix when it was last used
        self.blocks: Tensor | None = None

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: [..., D] and [V, D] -> [..., V]; equal but for rounding where the matrix is worth a second copy."""
    if 0 < x.numel() <= MOST_ROWS * x.shape[-1] and not torch.is_grad_enabled() and x.dtype is torch.float32:
        blocks = _blocks(weight)
        if blocks is not None:
            return torch.ops.mkldnn._linear_pointwise.default(x, blocks, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _blocks(weight: Tensor) -> Tensor | None:
    """The matrix in blocks; None at its first use, as it may be one that is made for every use, and where it is not worth packing."""
    known = getattr(weight, "_packed", None)
    if known is None:
        if not worth_packing(weight):
            return None
        known = weight._packed = PackedWeights()  # type: ignore[attr-defined]
    version = weight.data_ptr(), weight._version
    if known.version != version:
        known.version, known.blocks = version, None
    elif known.blocks is None and worth_packing(weight):
        known.blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return known.blocks


def worth_packing(weight: Tensor) -> bool:
    """Whether few rows times this matrix are slow as it is, and it can be told when it changes."""
    return packs(weight.dtype, weight.device) and not weight.is_inference()


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether few rows times such matrices are slow as they are."""
    return dtype == torch.float32 and device.type == "cpu" and slow_few_rows()


@cache
def slow_few_rows() -> bool:
    """Whether this processor is one of those that were measured: x86 without bf16 instructions."""
    able = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return able and platform.machine().lower() in ("x86_64", "amd64") and native_dtype(torch.device("cpu")) == "float32"


class PackedLinear(nn.Linear):
    """The same layer; see `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


AnyModule = TypeVar("AnyModule", bound=nn.Module)


def packed(module: AnyModule) -> AnyModule:
    """The module itself, whose linear layers use `linear` from here on where that is worth its memory; parameters keep their names.

    Matrices that change afterwards (training) are packed anew at the second use.
    """
    layers = [layer for layer in module.modules() if type(layer) is nn.Linear and worth_packing(layer.weight)]
    if sum(layer.weight.nbytes for layer in layers) <= SHARE * psutil.virtual_memory().available:
        for layer in layers:
            layer.__class__ = PackedLinear
    return module
