"""Sees where Python waits for the device: methods that hand a tensor's values over, and operations whose result has a size to be known.

On a CPU nothing has to wait, so the calls themselves are looked at; on a GPU `torch.cuda.set_sync_debug_mode` sees the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select", "__array__"}
OPERATIONS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2", "unique_dim", "equal"}

Report = Callable[[str], None]
"""Is called with the name of each call that waits."""


class Waited(Exception):  # noqa: N818 - what the code did
    """Something asked the device for a value."""


class _Methods(TorchFunctionMode):
    """Reports the methods that hand a tensor's values to Python."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in METHODS:
            self.report(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Reports operations whose result, or its size, the host must know; indexing by a mask is one."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in OPERATIONS:
            self.report(name)
        if name in ("index", "index_put", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.report(f"{name} by a mask")
        if name == "repeat_interleave" and kwargs is not None and kwargs.get("output_size") is None and len(args) < 3:
            self.report(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def reported_waits(report: Report) -> Iterator[None]:
    """Calls `report` for every wait inside."""
    with _Operations(report), _Methods(report):
        yield


@contextmanager
def refused_waits() -> Iterator[None]:
    """Raises `Waited` at the first wait inside."""

    def refuse(name: str) -> NoReturn:
        raise Waited(name)

    with reported_waits(refuse):
        yield
