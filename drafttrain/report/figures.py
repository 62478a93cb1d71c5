"""One figure of a results file inside a sentence or a table's cell.

    <!-- figure:NAME KEY=VALUE; KEY=VALUE -> PATH -->1.65 [1.52, 1.79]<!-- /figure -->

NAME.jsonl is any file of JSON lines; the last line in which all keys have these values is read, and PATH (`tau`, `speedups.plain`,
`alpha.0`) leads to a number, an interval or a word in it. A key may be a path too.
Rendered with the tables of the page (`report/tables.py`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from drafttrain.core.errors import UserError

FIGURE = re.compile(
    r"(?P<head><!-- figure:(?P<name>[\w.-]+) (?P<where>.+?) -> (?P<path>[\w.]+) -->)(?P<body>.*?)(?P<tail><!-- /figure -->)"
)


def render_figures(text: str, results: Path, where: str) -> str:
    """A page's text with its inline figures renewed. where: what an error calls the page.

    Raises `UserError` for a figure whose file, line or path is not there, and for a mark without its end.
    """

    def filled(mark: re.Match[str]) -> str:
        conditions = dict(_condition(part, where) for part in mark["where"].split("; "))
        return mark["head"] + shown(find(results / f"{mark['name']}.jsonl", conditions, mark["path"], where)) + mark["tail"]

    if text.count("<!-- figure:") != len(FIGURE.findall(text)):
        raise UserError(f"{where}: a mark 'figure:' is not of the form '<!-- figure:NAME KEY=VALUE -> PATH -->...<!-- /figure -->'")
    return FIGURE.sub(filled, text)


def stale_figures(text: str, results: Path, where: str) -> list[str]:
    """Names of the files whose inline figures differ from what they say now."""
    renewed = FIGURE.finditer(render_figures(text, results, where))
    return [old["name"] for old, new in zip(FIGURE.finditer(text), renewed, strict=True) if old["body"] != new["body"]]


def find(file: Path, conditions: dict[str, str], path: str, where: str) -> Any:
    """The value at `path` in the last line of `file` that fulfils all conditions."""
    if not file.exists():
        raise UserError(f"{where}: figure of '{file.name}': no such file in '{file.parent}'")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    fitting = [line for line in lines if all(str(_at(line, key)) == value for key, value in conditions.items())]
    if not fitting:
        said = ", ".join(f"{key}={value}" for key, value in conditions.items())
        raise UserError(f"{where}: figure of '{file.name}': no line with {said}")
    value = _at(fitting[-1], path)
    if value is None:
        raise UserError(f"{where}: figure of '{file.name}': the line has nothing at '{path}'")
    return value


def shown(value: Any) -> str:
    """`1.65`, `1.65 [1.52, 1.79]`, or a word as it is."""
    if isinstance(value, dict):
        low, high = value.get("low"), value.get("high")
        around = "" if low is None else f" [{low:.3g}, {high:.3g}]"
        return f"{value['value']:.3g}{around}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _condition(part: str, where: str) -> tuple[str, str]:
    key, equals, value = part.partition("=")
    if not equals:
        raise UserError(f"{where}: '{part}' in a mark 'figure:' is no KEY=VALUE")
    return key.strip(), value.strip()


def _at(line: Any, path: str) -> Any:
    """What a dotted path leads to; None where it ends early."""
    for step in path.split("."):
        if isinstance(line, list) and step.isdigit() and int(step) < len(line):
            line = line[int(step)]
        elif isinstance(line, dict):
            line = line.get(step)
        else:
            return None
    return line
