"""How decoding looks in a terminal: text as it comes, coloured by who wrote it, and what it took."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from drafttrain.runtime.decoder import Piece, Prompt, SpeculativeDecoder, Stream
from drafttrain.runtime.stats import Statistics, alpha_text

STYLES = {0: "", 1: "green"}
"""By origin: the target's tokens plain, the drafter's accepted ones green."""


def stream(decoder: SpeculativeDecoder, prompt: Prompt, text: Console, notes: Console, **options: Any) -> Stream:
    """Writes one answer to `text` as it is decoded, then its statistics to `notes`. options: of `SpeculativeDecoder.stream`."""
    answer = decoder.stream(prompt, **options)
    show(answer, text)
    notes.print(summary(answer.statistics, decoder.drafter is not None))
    return answer


def show(pieces: Iterator[Piece], text: Console) -> None:
    """The pieces one after another, a line break at the end."""
    for piece in pieces:
        text.print(Text(piece.text, STYLES[piece.origin]), end="", soft_wrap=True)
    text.print()


def summary(statistics: Statistics, drafted: bool) -> Text:
    """Rounds, accepted length, conditional acceptance by depth, speed."""
    seconds = statistics.decode_seconds
    speed = f"{statistics.tokens / seconds:.1f} tokens/s" if seconds > 0 else "no rounds"
    line = Text(f"{statistics.tokens} tokens in {statistics.rounds} rounds, {speed}", "dim")
    if drafted:
        reached = [value for value in statistics.alpha if value is not None]
        line.append(f"; tau {statistics.tau:.2f}, alpha {alpha_text(reached)}; ")
        line.append("green", "green")
        line.append(": the drafter's tokens, plain: the target's")
    if statistics.by_drafter:
        shares = [f"{label} {counts['rounds'] / max(1, statistics.rounds):.0%}" for label, counts in statistics.by_drafter.items()]
        line.append(f"; rounds drafted by: {', '.join(shares)}")
    if statistics.prefetched:
        line.append(
            f"; prefetch: {statistics.prefetch_hits / statistics.prefetched:.0%} of {statistics.prefetched} prefetched drafts hit, "
        )
        line.append(f"{statistics.calls_saved} drafter calls saved for {statistics.prefetch_calls} prefetched")
    return line
