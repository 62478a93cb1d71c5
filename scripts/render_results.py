"""Renews tables and plots between `<!-- results:NAME -->` marks in Markdown pages (README, docs/results, model cards) from NAME.jsonl files
that `drafttrain eval` wrote. Plots are drawn beside their file; `drafttrain report RUN --output docs/results` makes a new page.

    python scripts/render_results.py README.md ... [--results docs/results] [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from drafttrain.core.errors import UserError
from drafttrain.evaluation.report import draw, plotted, render, stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="+", help="Markdown files")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the NAME.jsonl files")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table or plot is stale")
    args = parser.parse_args()
    try:
        if args.check:
            old = [f"{page}: {name}" for page in args.pages for name in stale(page, args.results)]
            print("\n".join(old) if old else "all tables and plots are up to date")
            raise SystemExit(bool(old))
        for name in dict.fromkeys(name for page in args.pages for name in plotted(page.read_text(encoding="utf-8"))):
            print(*draw(name, args.results), sep="\n")
        for page in args.pages:
            print(f"{page}: {'rendered' if render(page, args.results) else 'unchanged'}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
