#!/usr/bin/env bash
# From a fresh clone to a trained drafter: environment, data written by the demo target, training, a table of results and a sample.
#   bash scripts/quickstart.sh [SECTION.KEY=VALUE ...]
# Under 25 minutes on 2 CPU cores after downloads. Run it again to go on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment plots
exec drafttrain run recipes/quickstart.yaml "$@"
