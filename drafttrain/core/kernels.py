"""Which kernel multiplies few rows by a matrix fastest: measured on this processor, once for each shape and precision, and remembered.

Decoding multiplies 1 to 64 rows. What is fastest differs by processor, precision, shape and number of rows, and by factors: on an AMD EPYC
in fp32, 210 matrices of a small model take 80 ms for two rows by `F.linear`, 32 ms by oneDNN in blocks, 19 ms as `W @ x.T`.

D columns, V rows of a matrix, r rows that are multiplied.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle, islice, product
from statistics import median
from typing import Any, Literal

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from drafttrain.core.config import fingerprint
from drafttrain.core.disk import cache_root, processor, remember, remembered

KernelName = Literal["linear", "transposed", "blocks"]
Kernel = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
Times = dict[str, list[float]]
"""Kernel -> seconds at each of `ROWS`."""

ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rows that are measured; a number between them goes by the next larger one."""
MOST_ROWS = ROWS[-1]
SMALLEST = 1 << 16  # elements of a matrix: smaller ones stay in the processor's caches, and Python takes longer than their product
PIECE, POOL, SAMPLE = 4 << 20, 64 << 20, 2 << 20  # bytes: of a slice at most; of all slices, more than caches hold; of one sample
PASSES, ENOUGH = 9, 3  # samples of each kernel; fewer than ENOUGH are used, but not remembered
CALM = 1.5  # times of a busy machine, whose median is as much above the fastest sample, are used, but not remembered
BUSY = 1.25  # runnable processes for each processor, beyond which nothing is remembered either
SECONDS = 2.0  # that measuring the shapes of a model may take
WORTH = 0.9  # of the time of the kernel that is best in all: what changes the kernel, and so the rounding, with the number of rows


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor | None) -> Tensor:
    """[r, D] and [V, D] -> [r, V]: what torch does by itself."""
    return F.linear(x, weight, bias)


def transposed(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor | None) -> Tensor:
    """The same as `W @ x.T`. A lone row gets a second one of zeros: the product of one row is another kernel, which uses one thread."""
    rows = F.pad(x, (0, 0, 0, 1)) if len(x) == 1 else x
    columns = weight @ rows.t() if bias is None else torch.addmm(bias[:, None], weight, rows.t())  # [V, r]
    return columns[:, : len(x)].t().contiguous()


def blocked(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor | None) -> Tensor:
    """The same by oneDNN, from the matrix in `blocks`."""
    assert blocks is not None
    return torch.ops.mkldnn._linear_pointwise.default(x, blocks, bias, "none", [], "")


KERNELS: dict[str, Kernel] = {"linear": plain, "transposed": transposed, "blocks": blocked}

BUCKETS = tuple(next(place for place, rows in enumerate(ROWS) if rows >= count) for count in range(MOST_ROWS + 1))
"""Number of rows -> its place in `ROWS`."""


def in_blocks(weight: Tensor) -> Tensor:
    """A second copy of the matrix, in the order that oneDNN reads fastest."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


@cache
def blocks_work(dtype: torch.dtype) -> bool:
    """Whether oneDNN has instructions for products in this precision here."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32


def measurable(weight: Tensor) -> bool:
    """Whether a choice can be worth its measuring."""
    return weight.device.type == "cpu" and weight.dim() == 2 and weight.dtype.is_floating_point and weight.numel() >= SMALLEST


def chosen(times: Times, copies: bool) -> tuple[Kernel, ...]:
    """The kernel for each of `ROWS`. copies: whether there is memory for the matrix in blocks.

    One kernel for all numbers of rows, where another is not clearly faster: then drafted and plain decoding round alike.
    """
    able = {name: times[name] for name in KERNELS if name in times and (copies or name != "blocks")}
    best_in_all = min(able, key=lambda name: sum(math.log(seconds) for seconds in able[name]))
    names = []
    for place in range(len(ROWS)):
        fastest = min(able, key=lambda name: able[name][place])
        names.append(fastest if able[fastest][place] < WORTH * able[best_in_all][place] else best_in_all)
    return tuple(KERNELS[name] for name in names)


class KernelTable:
    """What was measured with this processor, torch and number of threads."""

    def __init__(self, name: str) -> None:
        """name: under which it is remembered."""
        self.name = name
        self.times: dict[str, Times] = {shape: times for shape, times in remembered(name).items() if _whole(times)}

    def measure(self, shapes: Sequence[Sequence[Tensor]], seconds: float = SECONDS) -> None:
        """Fills in what is not known yet, in about `seconds`. shapes: matrices of one shape and precision each."""
        unknown = [weights for weights in shapes if shape_name(weights[0]) not in self.times]
        end, lasting = time.perf_counter() + seconds, {}
        for place, weights in enumerate(unknown):
            share = (end - time.perf_counter()) / (len(unknown) - place)
            times, lasts = measured(weights, time.perf_counter() + share)
            self.times[shape_name(weights[0])] = times
            if lasts:
                lasting[shape_name(weights[0])] = times
        if lasting:
            remember(self.name, lasting)

    def kernels(self, weight: Tensor, copies: bool) -> tuple[Kernel, ...]:
        """Those for this matrix, by the places of `ROWS`; measured now where it must be."""
        if shape_name(weight) not in self.times:
            self.measure([[weight]], SECONDS / 5)
        return chosen(self.times[shape_name(weight)], copies)


def _whole(times: Any) -> bool:
    if not isinstance(times, dict) or "linear" not in times:
        return False
    return all(isinstance(seconds, list) and len(seconds) == len(ROWS) for seconds in times.values())


def shape_name(weight: Tensor) -> str:
    return f"{weight.shape[0]}x{weight.shape[1]} {str(weight.dtype).removeprefix('torch.')}"


def kernel_table() -> KernelTable:
    """This process's, for as many threads as torch uses now."""
    return _table(torch.get_num_threads(), str(cache_root()))


@cache
def _table(threads: int, root: str) -> KernelTable:
    made_with = (processor(), psutil.cpu_count(), torch.backends.cpu.get_cpu_capability(), torch.__version__, threads, ROWS)
    return KernelTable(f"kernels-{fingerprint(*made_with)}")


@torch.no_grad()
def measured(weights: Sequence[Tensor], end: float) -> tuple[Times, bool]:
    """Seconds of each kernel that works here, and whether they are worth remembering. All are sampled by turns, until `end`.

    The fastest sample counts: other processes only ever make one slower, by whole time slices. Samples go through more matrices than the
    processor's caches hold, as decoding does.
    """
    pieces = _pieces(weights)
    blocks = [in_blocks(piece) for piece in pieces] if blocks_work(weights[0].dtype) else []
    names = [name for name in KERNELS if (name != "blocks" or blocks) and _right(KERNELS[name], pieces[0], blocks)]
    samples: dict[str, list[list[float]]] = {name: [[] for _ in ROWS] for name in names}
    width = max(1, min(len(pieces), SAMPLE // pieces[0].nbytes))  # matrices in a sample
    groups = cycle(range(len(pieces)))
    for number, (place, rows) in product(range(PASSES), enumerate(ROWS)):
        x = torch.ones(rows, pieces[0].shape[1], dtype=pieces[0].dtype)
        for name in names if number % 2 else names[::-1]:
            group = list(islice(groups, width))
            start = time.perf_counter()
            for index in group:
                KERNELS[name](x, pieces[index], None, blocks[index] if blocks else None)
            samples[name][place].append(time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    times = {name: _fastest(taken, width) for name, taken in samples.items()}
    delay = median(median(some) / min(some) for taken in samples.values() for some in taken if some)
    return times, len(samples["linear"][-1]) >= ENOUGH and delay < CALM and not busy()


def busy() -> bool:
    """Whether other processes want the processors too: the last minute's load, where the system tells it."""
    return psutil.getloadavg()[0] > BUSY * (psutil.cpu_count() or 1)


def _fastest(taken: Sequence[Sequence[float]], width: int) -> list[float]:
    """Seconds of one product at each of `ROWS`; those that there was no time for go by the largest that there was time for."""
    seconds: list[float] = []
    for samples in taken:
        seconds.append(min(samples) / width if samples else seconds[-1])
    return seconds


def _pieces(weights: Sequence[Tensor]) -> list[Tensor]:
    """Slices of whole rows, alike, of the first of these matrices."""
    first = weights[0]
    height = max(1, min(first.shape[0], PIECE // (first.shape[1] * first.element_size())))
    pieces = [weight.detach()[start : start + height] for weight in weights for start in range(0, first.shape[0] - height + 1, height)]
    return pieces[: max(1, POOL // pieces[0].nbytes)]


def _right(kernel: Kernel, piece: Tensor, blocks: Sequence[Tensor]) -> bool:
    """Whether it runs here, and gives torch's own product."""
    x = torch.linspace(-1, 1, 2 * piece.shape[1], dtype=torch.float32).view(2, -1).to(piece.dtype)
    try:
        result = kernel(x, piece, None, blocks[0] if blocks else None).float()
    except RuntimeError:  # no such kernel in this build
        return False
    expected = F.linear(x, piece).float()
    return bool((result - expected).abs().max() <= 0.05 * expected.abs().max().clamp_min(1e-3))
