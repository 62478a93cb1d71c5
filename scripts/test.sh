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

# A process for each core and one thread in each: tests are small, and threads of one test would wait for each other.
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
workers=$((cores < 4 ? cores : 4))
export OMP_NUM_THREADS=$((cores / workers))
exec python -m pytest --numprocesses "$workers" --dist worksteal ${selection[@]+"${selection[@]}"} ${words[@]+"${words[@]}"}
