"""Tensors of foreign folders: read and checked whole before anything is built of them, and written in one precision.

Every message names the file and the key.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.core.errors import UserError, first_line

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000
"""Bytes of a safetensors header at most; the format's own reader has the same limit."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MEND = "download it again, or ask who made it"


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, or a `UserError`."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"drafter '{folder}': no {CONFIG} there; give the folder of a drafter") from error
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}': cannot be read as JSON ({first_line(error)}); {MEND}") from error
    if not isinstance(config, dict):
        raise UserError(f"'{path}': expected an object, got {type(config).__name__}; {MEND}")
    return config


class Values:
    """A configuration's entries; a missing or unfit one becomes a `UserError` that names the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def inside(self, key: str) -> Values:
        """The object under `key`."""
        return Values(self.path, self._typed(key, dict, None, "an object"))

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.unfit(key, "a whole number above 0")
        return value

    def real(self, key: str) -> float:
        value = self.values.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.unfit(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._typed(key, bool, default, "true or false"))

    def numbers(self, key: str) -> tuple[int, ...] | None:
        """A list of whole numbers, or None where the key is missing."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not value or not all(isinstance(one, int) and one >= 0 for one in value):
            raise self.unfit(key, "a list of whole numbers")
        return tuple(value)

    def _typed(self, key: str, kind: type, default: Any, expected: str) -> Any:
        value = self.values.get(key, default)
        if not isinstance(value, kind):
            raise self.unfit(key, expected)
        return value

    def unfit(self, key: str, expected: str) -> UserError:
        found = f"is {self.values[key]!r}" if key in self.values else "is missing"
        return UserError(f"'{self.path}': key '{key}' {found}, expected {expected}; {MEND}")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, or a `UserError` that names the damaged file."""
    path = folder / WEIGHTS
    files = _shards(folder) if (folder / INDEX).exists() else [path]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_file(file)
    return tensors


def _shards(folder: Path) -> list[Path]:
    path = folder / INDEX
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"'{path}': has no readable 'weight_map' ({first_line(error)}); {MEND}") from error
    outside = [name for name in names if Path(str(name)).name != name]
    if outside:
        raise UserError(f"'{path}': key 'weight_map' names '{outside[0]}', which is not a file of this folder; {MEND}")
    return [folder / name for name in sorted(set(names))]


def read_file(path: Path) -> dict[str, Tensor]:
    """One safetensors file, or a `UserError`."""
    if not path.exists():
        pickled = [other.name for other in path.parent.glob("*") if other.suffix in (".bin", ".pt", ".pth")]
        if pickled:
            raise UserError(f"'{path}': missing; '{pickled[0]}' is a pickle, which can run code and is not read; convert it to safetensors")
        raise UserError(f"'{path}': missing; {MEND}")
    _check_header(path)
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # a safetensors file is no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"'{path}': truncated or corrupt ({first_line(error)}); {MEND}") from error


def _check_header(path: Path) -> None:
    """Its size, before a reader is asked to believe it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) < 8:
        raise UserError(f"'{path}': {size} bytes are no safetensors file; {MEND}")
    (header,) = struct.unpack("<Q", start)
    if header > min(size - 8, HEADER_LIMIT):
        raise UserError(f"'{path}': its header says it is {header} bytes long, the file has {size}; truncated or corrupt; {MEND}")


class Weights:
    """A folder's tensors, taken one by one under their expected shapes; what nobody took is an error too."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor], file: str = WEIGHTS) -> None:
        self.path, self.tensors = folder / file, dict(tensors)

    def take(self, key: str, shape: Iterable[int]) -> Tensor:
        """A weight as fp32."""
        tensor = self._pop(key, tuple(shape))
        if tensor.dtype not in FLOATS:
            raise UserError(f"'{self.path}': tensor '{key}' holds {tensor.dtype}, expected float32, bfloat16 or float16; {MEND}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"'{self.path}': tensor '{key}' holds NaN or infinity; {MEND}")
        return tensor.float()

    def take_ids(self, key: str, count: int) -> Tensor:
        """[count] int64."""
        tensor = self._pop(key, (count,))
        if tensor.dtype not in (torch.int64, torch.int32):
            raise UserError(f"'{self.path}': tensor '{key}' holds {tensor.dtype}, expected int64; {MEND}")
        return tensor.long()

    def skip(self, *keys: str) -> None:
        """Tensors that may be there and are not needed."""
        for key in keys:
            self.tensors.pop(key, None)

    def end(self) -> None:
        """A `UserError` where a tensor is left: what it would have done is not known."""
        if self.tensors:
            raise UserError(f"'{self.path}': tensor '{sorted(self.tensors)[0]}' is not of this format; this version cannot read it")

    def _pop(self, key: str, shape: tuple[int, ...]) -> Tensor:
        if key not in self.tensors:
            raise UserError(f"'{self.path}': tensor '{key}' is missing; {MEND}")
        tensor = self.tensors.pop(key)
        if tuple(tensor.shape) != shape:
            raise UserError(f"'{self.path}': tensor '{key}' is {list(tensor.shape)}, expected {list(shape)}; {MEND}")
        return tensor


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """config.json and model.safetensors of a new folder."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    separate = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(separate, folder / WEIGHTS, metadata={"format": "pt"})


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating tensors in `dtype`, ids and masks as they are."""
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def in_numpy(tensor: Tensor) -> Any:
    """As an fp32 array."""
    return tensor.detach().cpu().float().contiguous().numpy()
