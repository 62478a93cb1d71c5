"""The lines of rules.jsonl: what one rule made of one log of rounds (`evaluation/rules.py`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from drafttrain.core.errors import UserError
from drafttrain.core.renamed import current_row
from drafttrain.evaluation.journal import read_lines
from drafttrain.evaluation.rows import Interval

FORMAT = 2
CHAIN: Literal["first chain"] = "first chain"
Form = Literal["whole", "first chain"]
"""The tree as it was logged, or the chain of first-born children in it: a chain drawn as a chain would have been, on the same contexts."""


@dataclass(frozen=True)
class RuleComparison:
    """One rule against the first on the same rounds."""

    tau: Interval
    """Tokens a round, the bonus token counted."""
    difference: Interval
    relative: Interval
    limit: tuple[float, ...] = ()
    """P* by level: the mean over the nodes whose children the first rule tried; none where siblings were not drawn iid."""
    accepted: tuple[float, ...] = ()
    """At the same nodes, the probability that this rule accepts one of the children."""
    of_limit: tuple[Interval, ...] = ()
    """The second over the first."""


@dataclass(frozen=True)
class RuleRow:
    """A line of rules.jsonl: one rule on one log of rounds."""

    log: str
    contender: str
    target: str
    target_fingerprint: str
    dtype: str
    drafter_fingerprint: str
    suite: str
    suite_hash: str
    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    seed: int
    shape: dict[str, Any]
    draws: str
    decoded_by: str
    decoded_tau: float
    """Mean tokens a round when the rounds were logged, uncut by ends of texts."""
    rounds: int
    prompts: int
    chances: int
    rule: str
    tau: Interval
    reached: tuple[float, ...]
    against: str
    difference: Interval
    relative: Interval
    limit: tuple[float, ...]
    """P* by level: the mean over the nodes whose children `against` tried; none where siblings were not drawn iid."""
    accepted: tuple[float, ...]
    """At the same nodes, the probability that this rule accepts one of the children."""
    of_limit: tuple[Interval, ...]
    """The second over the first."""
    probs_gap: float
    """Largest difference between recomputed and logged probabilities of drafted tokens, over the first rounds."""
    device: str
    versions: dict[str, str]
    commit: str | None
    date: str
    looping: float | None = None
    """Share of the logged answers that go round in circles; older rows do not say."""
    not_looping: RuleComparison | None = None
    """The figures over the rounds of the other answers; None where there are none, or nobody knows."""

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> RuleRow:
        """Raises `UserError` for a row of another format, or a broken one."""
        if data.get("format") != FORMAT:
            raise UserError(f"{where}: not a row of rules in format {FORMAT}; replay again with this drafttrain")
        given = {name: value for name, value in current_row(data).items() if name != "format"}
        try:
            if given.get("not_looping") is not None:
                given["not_looping"] = RuleComparison(**_compared(given["not_looping"]))
            return cls(**{**given, **_compared(given), "reached": tuple(given["reached"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: a broken row of rules ({error}); replay again, or remove the line") from error


def _compared(data: dict[str, Any]) -> dict[str, Any]:
    """A comparison's fields among those of a line."""
    found: dict[str, Any] = {name: Interval(**data[name]) for name in ("tau", "difference", "relative")}
    found |= {name: tuple(data[name]) for name in ("limit", "accepted")}
    return {**found, "of_limit": tuple(Interval(**share) for share in data["of_limit"])}


def read_rule_rows(path: Path) -> list[RuleRow]:
    """All rows of a rules.jsonl, in the order in which they were made."""
    if not path.is_file():
        raise UserError(f"results '{path}': no such file; `drafttrain eval --replay-rules` writes it")
    return [RuleRow.from_json(entry, f"'{path}', line {number}") for number, entry in enumerate(read_lines(path), 1)]
