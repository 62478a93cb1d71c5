#!/usr/bin/env bash
# Lint, types, and the tests that take minutes; --all adds the slow ones. Further words go to pytest, whose exit code is this script's.
#   bash scripts/test.sh [--all] [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment dev

selection=(-m "not slow")
words=()
for word in "$@"; do
  if [[ $word == --all ]]; then selection=(); else words+=("$word"); fi
done

ruff check .
mypy
exec python -m pytest ${selection[@]+"${selection[@]}"} ${words[@]+"${words[@]}"}
