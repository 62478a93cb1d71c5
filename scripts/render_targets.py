"""Renews the table of architectures in docs/targets.md: each is built tiny and random, and decoded beside transformers' own `generate`.

    python scripts/render_targets.py [docs/targets.md] [--workers 2]

Takes about ten minutes on two cores. Exits with 1, the page unchanged, where a text differs.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.target.zoo import ARCHITECTURES, VARIANTS, Differs, Finding, check

MARKS = "<!-- targets -->", "<!-- /targets -->"


def found(label: str) -> Finding | str:
    """What `check` finds, or how a text differs."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    try:
        return check(label)
    except Differs as difference:
        return f"{label}: {difference}"


def table(findings: list[Finding]) -> str:
    """The architectures that are served first, then the refused ones with the reason."""
    served = [one for one in findings if one.served]
    refused = [one for one in findings if not one.served]
    lines = [
        f"{len(served)} served, {len(refused)} refused, 0 that decode anything else; transformers {transformers.__version__}.", "",
        "| architecture | served | |", "|---|---|---|",
    ]  # fmt: skip
    for finding in [*served, *refused]:
        lines.append(f"| {finding.label} | {'yes' if finding.served else 'no'} | {' '.join(finding.reason.split())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", default=Path("docs/targets.md"))
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args()
    labels = [*sorted(VARIANTS), *ARCHITECTURES]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        results = []
        for result in pool.map(found, labels):
            print(result if isinstance(result, str) else f"{result.label}: {'served' if result.served else 'refused'}", flush=True)
            results.append(result)
    findings = [result for result in results if isinstance(result, Finding)]
    if len(findings) < len(results):
        raise SystemExit(1)
    text = args.page.read_text(encoding="utf-8")
    between = re.compile(f"(?<={MARKS[0]}\n).*?(?={MARKS[1]})", re.DOTALL)
    args.page.write_text(between.sub(lambda _: table(findings) + "\n", text), encoding="utf-8")


if __name__ == "__main__":
    main()
