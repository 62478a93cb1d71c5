"""A table of what `drafttrain verify ... --output FILE` found in real engines: the last row of each setting.

    <!-- results:engines engines -->
    <!-- /results:engines -->
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drafttrain.core.errors import UserError, first_line

HEADS = ("engine", "format", "chain", "prompts x tokens", "texts equal", "rounds, here / engine", "accepted, here / engine", "verdict")
NAMES = {
    "vllm": "vLLM", "llamacpp": "llama.cpp", "openvino": "OpenVINO GenAI", "transformers": "transformers", "speculators": "speculators",
}  # fmt: skip
SETTING = ("engine", "version", "format", "drafter", "length", "max_new_tokens", "suite", "prompts")


def engines_table(path: Path) -> str:
    """Markdown. Raises `UserError` where the file is missing or no results of `verify`."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        latest = {tuple(row.get(key) for key in SETTING): row for row in rows}
        lines = [_line(row) for row in latest.values()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}': no results of `drafttrain verify --output` ({first_line(error)}); verify again") from error
    table = [HEADS, tuple("---" for _ in HEADS), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    engine = f"{NAMES[row['engine']]} {_version(row['version'])}"
    start = (engine, row["format"] or "its own", str(row["length"]))
    if "tensors" in row:
        gap = max(gap for name, (gap, _) in row["tensors"].items() if not name.startswith("drafted"))
        same = all(agree == 1 for name, (_, agree) in row["tensors"].items() if name.startswith("drafted"))
        verdict = f"tensors within {gap:.1e}, drafted tokens {'equal' if same else 'differ'}"
        return *start, f"1 x {row['max_new_tokens']}", "", "", "", verdict
    verdict = "equal" if not row["differs"] else "differs: " + ("; ".join(row["causes"]) or "no known fault gives these rounds")
    by_position = len(row["engine_accepted"]) > 1
    ours = row["accepted"] if by_position else [sum(row["accepted"])]
    return (
        *start, f"{row['prompts']} x {row['max_new_tokens']}", str(row["texts_equal"]), f"{row['rounds']} / {row['engine_rounds']}",
        f"{_counts(ours)} / {_counts(row['engine_accepted'])}", verdict,
    )  # fmt: skip


def _version(version: str) -> str:
    """Without the engine's own name before it, or a build's hash behind it."""
    for name in (*NAMES.values(), "xllamacpp"):
        version = version.removeprefix(f"{name} ")
    return version.removesuffix(" (llama.cpp)").split("-")[0]


def _counts(counts: Sequence[int]) -> str:
    return " ".join(map(str, counts))
