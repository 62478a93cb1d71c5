"""Real engines that serve an exported drafter, to prove that it drafts there as it does here. `ENGINES` is the whole list."""

from __future__ import annotations

from drafttrain.engines.base import Engine
from drafttrain.engines.llamacpp import LlamaCpp
from drafttrain.engines.openvino import OpenVINOEngine
from drafttrain.engines.speculators import SpeculatorsEngine
from drafttrain.engines.transformers import TransformersEngine
from drafttrain.engines.vllm import VLLM

ENGINES: dict[str, type[Engine]] = {
    "vllm": VLLM, "llamacpp": LlamaCpp, "openvino": OpenVINOEngine, "speculators": SpeculatorsEngine, "transformers": TransformersEngine,
}  # fmt: skip
