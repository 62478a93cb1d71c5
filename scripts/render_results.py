"""Renews tables and plots between `<!-- results:NAME -->` marks in Markdown pages (README, docs/results, model cards) from NAME.jsonl files
that `drafttrain eval` wrote, and whole HTML reports (NAME.html). Plots are drawn beside their file. A new page: `drafttrain report
RUN --output docs/results`.

    python scripts/render_results.py README.md docs/results/*.md docs/results/*.html ... [--results docs/results] [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from drafttrain.core.errors import UserError
from drafttrain.report.page import is_stale, renew
from drafttrain.report.tables import draw, plotted, render, stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="+", help="Markdown files and HTML reports")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the NAME.jsonl files")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table or plot is stale")
    args = parser.parse_args()
    reports, pages = ([page for page in args.pages if (page.suffix == ".html") == whole] for whole in (True, False))
    try:
        if args.check:
            old = [f"{page}: {name}" for page in pages for name in stale(page, args.results)]
            old += [str(page) for page in reports if is_stale(page, args.results)]
            print("\n".join(old) if old else "all tables and plots are up to date")
            raise SystemExit(bool(old))
        for name in dict.fromkeys(name for page in pages for name in plotted(page.read_text(encoding="utf-8"))):
            print(*draw(name, args.results), sep="\n")
        for page in pages:
            print(f"{page}: {'rendered' if render(page, args.results) else 'unchanged'}")
        for page in reports:
            print(f"{page}: {'rendered' if renew(page, args.results) else 'unchanged'}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
