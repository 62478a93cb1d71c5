"""Linear layers and matrices that few rows are multiplied by with the fastest kernel of this processor (`core/kernels.py`).

One of the kernels reads matrices kept a second time, in blocks. A process can do without all this: `use_kernels("linear")`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Literal, TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.kernels import BUCKETS, MOST_ROWS, Kernel, blocked, blocks_work, in_blocks, kernel_table, measurable, shape_name

SHARE = 0.5  # of the free memory: larger models are not kept a second time

KernelOption = Literal["auto", "linear"]
_option: KernelOption = "auto"


def use_kernels(option: KernelOption) -> None:
    """Of the whole process from here on. `linear`: torch's own product, always."""
    global _option  # noqa: PLW0603  # the output heads of drafters that share a target's matrix go by it too
    _option = option


class PackedWeights:
    """What is known of a matrix; hangs on the matrix itself, and is neither copied nor saved with it."""

    def __init__(self, copies: bool = True) -> None:
        self.copies = copies  # whether there is memory for blocks
        self.version: tuple[int, int] | None = None  # of the matrix when it was last used
        self.kernels: tuple[Kernel, ...] | None = None  # by the places of `kernels.ROWS`
        self.blocks: Tensor | None = None

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: [..., D] and [V, D] -> [..., V]; equal but for rounding where another kernel is faster."""
    if _few_rows(x, weight):
        known = _prepared(weight)
        if known is not None and known.kernels is not None:
            rows = x.reshape(-1, x.shape[-1])
            return known.kernels[BUCKETS[len(rows)]](rows, weight, bias, known.blocks).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def _few_rows(x: Tensor, weight: Tensor) -> bool:
    return (
        0 < x.numel() <= MOST_ROWS * x.shape[-1] and not torch.is_grad_enabled() and x.dtype is weight.dtype and _option == "auto"
        and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    )  # fmt: skip


def _prepared(weight: Tensor) -> PackedWeights | None:
    """The matrix, ready for few rows; None where its size is not worth it. At a first use (or the first after a change) it has no kernels
    yet, as it may be a matrix that is made for every use."""
    known: PackedWeights | None = getattr(weight, "_packed", None)
    if known is None:
        if not worth_packing(weight):
            return None
        known = weight._packed = PackedWeights()  # type: ignore[attr-defined]
    version = weight.data_ptr(), weight._version
    if known.version != version:
        known.version, known.kernels, known.blocks = version, None, None
    elif known.kernels is None and worth_packing(weight):
        known.copies = known.copies and weight.nbytes <= SHARE * psutil.virtual_memory().available
        known.kernels = kernel_table().kernels(weight, known.copies)
        known.blocks = in_blocks(weight) if blocked in known.kernels else None
    return known


def worth_packing(weight: Tensor) -> bool:
    """Whether its kernel is worth choosing, and it can be told when it changes."""
    return measurable(weight) and not weight.is_inference()


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether such matrices may be kept a second time."""
    return device.type == "cpu" and blocks_work(dtype)


class PackedLinear(nn.Linear):
    """The same layer; see `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


AnyModule = TypeVar("AnyModule", bound=nn.Module)


def packed(module: AnyModule) -> AnyModule:
    """The module itself, whose linear layers use `linear` from here on; parameters keep their names. What is not known of their shapes is
    measured now (`kernels.SECONDS`).

    Matrices that change afterwards (training) are prepared anew at the second use.
    """
    usual = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and type(layer) in (nn.Linear, PackedLinear)]
    layers = [layer for layer in usual if worth_packing(layer.weight)]
    if _option == "auto":
        shapes = defaultdict(list)
        for layer in layers:
            shapes[shape_name(layer.weight)].append(layer.weight)
        kernel_table().measure(list(shapes.values()))
    copies = sum(layer.weight.nbytes for layer in layers) <= SHARE * psutil.virtual_memory().available
    for layer in layers:
        layer.__class__ = PackedLinear
        if not copies:
            layer.weight._packed = PackedWeights(copies=False)  # type: ignore[attr-defined]
    return module
