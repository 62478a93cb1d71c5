"""Tiny models of transformers' architectures decode greedily as `generate` does, or are refused by name; docs/targets.md says which."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.target.zoo import ARCHITECTURES, VARIANTS, Finding, check

PAGE = Path("docs/targets.md")
SAMPLE = {"gpt2", "gemma2, soft-capped", "mixtral", "phi3, longrope rotary", "phi3, longrope rotary, max_context 48", "bloom", "gpt_oss"}
"""Kinds of attention, position and layer that differ most; the slow tests take the rest."""
LABELS = [*ARCHITECTURES, *VARIANTS]


def line(finding: Finding) -> str:
    return f"| {finding.label} | {'yes' if finding.served else 'no'} |"


@pytest.mark.parametrize("label", [pytest.param(label, marks=[] if label in SAMPLE else [pytest.mark.slow]) for label in LABELS])
def test_an_architecture_decodes_as_generate_does_or_is_refused_and_the_page_says_so(label: str) -> None:
    assert line(check(label)) in PAGE.read_text(encoding="utf-8")


def test_the_page_has_a_line_for_every_architecture_and_at_least_45_are_served() -> None:
    page = PAGE.read_text(encoding="utf-8")
    served = [label for label in LABELS if line(Finding(label, True)) in page]
    refused = [label for label in LABELS if line(Finding(label, False)) in page]
    assert sorted(served + refused) == sorted(LABELS)
    assert len(set(served) & set(ARCHITECTURES)) >= 45
