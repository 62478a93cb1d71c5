"""Words of users and models are shown as they are, and control no terminal."""

from __future__ import annotations

import io

import pytest
from rich.table import Table
from rich.text import Text

from drafttrain.core.console import SafeConsole, printable


def shown(*parts: object) -> str:
    file = io.StringIO()
    SafeConsole(file=file, width=80, force_terminal=False).print(*parts)
    return file.getvalue().strip()


@pytest.mark.parametrize("text", ["[/INST]", "eagle3 [wide]", "mend a[i] = [red]x[/red] and [b]", "[/x]", ":smile: [link=x]y[/link]"])
def test_brackets_and_colons_are_no_markup(text: str) -> None:
    table = Table("head", title=text)
    table.add_row(text)
    assert shown(text) == text
    assert shown(Text(text, "bold")) == text
    assert shown(table).count(text) == 2


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("\x1b]0;title\x07a", "a"), ("\x1b]8;;http://x\x1b\\a", "a"), ("\x1b[31mred\x1b[0m", "red"), ("\x9b2Ja", "2Ja"), ("a\rb", "ab"),
        ("\ud83d", "?"),
        ("\x1b[2J\x1b[Ha", "a"), ("\x1bPq\x1b\\a", "a"), ("\x1b", ""), ("a\tb\nc", "a\tb\nc"), ("café ☕ 漢字", "café ☕ 漢字"),
        ("\x1b]0;never ended", "]0;never ended"),
    ],
)  # fmt: skip
def test_sequences_that_control_a_terminal_are_left_out(text: str, left: str) -> None:
    assert printable(text) == left
    assert "\x1b" not in shown(text)


def test_our_own_styles_stay() -> None:
    file = io.StringIO()
    SafeConsole(file=file, force_terminal=True, color_system="standard").print(Text("\x1b[31mgreen", "green"))
    assert file.getvalue() == "\x1b[32mgreen\x1b[0m\n"
