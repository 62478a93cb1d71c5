#!/usr/bin/env bash
# Lint, types, and the tests that take minutes; --all adds the slow ones; --engines runs those in real engines alone. Further words go to
# pytest, whose exit code is this script's.
#   bash scripts/test.sh [--all | --engines] [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment dev

selection=(-m "not slow and not engines")
words=()
for word in "$@"; do
  case $word in
    --all) selection=(-m "not engines") ;;
    --engines) selection=(-m engines) ;;
    *) words+=("$word") ;;
  esac
done

ruff check .
mypy

# A process for each core and one thread in each: tests are small, and threads of one test would wait for each other.
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
workers=$((cores < 4 ? cores : 4))
export OMP_NUM_THREADS=$((cores / workers))
exec python -m pytest --numprocesses "$workers" --dist worksteal "${selection[@]}" ${words[@]+"${words[@]}"}
