"""What `verify` found, in words and as rows of a results file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafttrain.engines.compare import Comparison, Verdict
from drafttrain.engines.verify import Order, TensorVerdict


def verdict_text(verdict: Verdict) -> str:
    """Prompt by prompt, the sums, and the likely cause of the first difference."""
    lines = [f"{verdict.engine} {verdict.version}, chains of {verdict.length}, greedy, fp32"]
    lines.append("prompt  rounds ours/theirs  accepted ours / theirs  text")
    for number, one in enumerate(verdict.comparisons):
        counts = f"{_counts(one.ours.accepted)} / {_counts(one.theirs.accepted)}"
        lines.append(f"{number:6}  {one.ours.rounds:6} / {one.theirs.rounds:<9}  {counts:24}  {_text(one)}")
    (rounds, accepted), (their_rounds, their_accepted) = verdict.totals("ours"), verdict.totals("theirs")
    lines.append(f"all     {rounds:6} / {their_rounds:<9}  {_counts(accepted)} / {_counts(their_accepted)}")
    return "\n".join([*lines, *_conclusion(verdict)])


def _counts(accepted: Sequence[int]) -> str:
    return " ".join(map(str, accepted))


def _text(one: Comparison) -> str:
    if one.same_text:
        return "equal" if one.same_rounds else "equal, ROUNDS DIFFER"
    assert one.tie is not None
    return f"parts at a near tie ({one.tie:.1e})" if not one.differs else f"DIFFERS (margin {one.tie:.3f})"


def _conclusion(verdict: Verdict) -> list[str]:
    if not verdict.differs:
        return ["equal up to the end of the texts: the engine drafts and accepts what we do"]
    causes = [f"likely cause: {cause}" for cause in verdict.causes]
    summary = f"DIFFERENT on {len(verdict.differing)} of {len(verdict.comparisons)} prompts"
    return [summary, *(causes or ["no known fault gives these rounds"])]


def tensors_text(verdict: TensorVerdict) -> str:
    """Tensor by tensor."""
    lines = [verdict.version, f"{'tensor':12} {'largest gap':>12} {'same argmax':>12}"]
    lines += [f"{gap.name:12} {gap.gap:12.1e} {gap.agree:12.1%}{'  DIFFERS' if gap.differs else ''}" for gap in verdict.gaps]
    if verdict.first is None:
        return "\n".join([*lines, "equal: the peer's own class computes what ours does"])
    causes = [f"likely cause: {cause}" for cause in verdict.causes] or ["no known fault gives these tensors"]
    return "\n".join([*lines, f"first difference: {verdict.first.name}", *causes])


def append_result(path: Path, order: Order, result: Verdict | TensorVerdict) -> None:
    """One line of the results file."""
    row: dict[str, Any] = {"engine": order.engine, "version": result.version, "format": order.form, "length": order.length}
    row |= {"max_new_tokens": order.max_new_tokens, "suite": order.suite, "differs": result.differs, "causes": result.causes}
    if isinstance(result, TensorVerdict):
        row |= {"tensors": {gap.name: [gap.gap, gap.agree] for gap in result.gaps}}
    else:
        (rounds, accepted), (their_rounds, their_accepted) = result.totals("ours"), result.totals("theirs")
        texts = sum(one.same_text for one in result.comparisons)
        row |= {"prompts": len(result.comparisons), "texts_equal": texts, "rounds": rounds, "accepted": accepted}
        row |= {"engine_rounds": their_rounds, "engine_accepted": their_accepted}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
