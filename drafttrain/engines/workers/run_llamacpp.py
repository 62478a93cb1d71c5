"""Runs in xllamacpp's own environment (llama.cpp): decodes a job's prompts one by one. No part of drafttrain is imported."""

import json
import sys
from importlib.metadata import version

import xllamacpp as xlc

KINDS = {"eagle3": "COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3", "draft_model": "COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE"}


def server(job: dict) -> xlc.Server:
    params = xlc.CommonParams()
    params.model.path = job["target"]
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = job["context"], 1, False, 0
    params.cache_type_k = params.cache_type_v = xlc.ggml_type.GGML_TYPE_F32  # half precision by default
    params.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # its kernel rounds to half, whatever the cache is
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.speculative.types = [getattr(xlc.common_speculative_type, KINDS[job["method"]])]
    draft = params.speculative.draft
    draft.mparams.path, draft.n_max, draft.n_min, draft.p_min = job["drafter"], job["length"], 0, 0.0
    draft.cache_type_k = draft.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
    draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = job["threads"]
    return xlc.Server(params)


def main(path: str) -> None:
    with open(path) as file:
        job = json.load(file)
    engine, answers = server(job), []
    for prompt in job["prompts"]:
        request = {
            "prompt": prompt, "max_tokens": job["max_new_tokens"], "temperature": 0.0, "cache_prompt": False, "logprobs": 1,
        }  # fmt: skip
        done = engine.handle_completions(request)
        tokens = [entry["id"] for entry in done["choices"][0]["logprobs"]["content"]]
        accepted = done["timings"].get("draft_n_accepted", 0)
        answers.append({"tokens": tokens, "rounds": done["timings"]["predicted_n"] - 1 - accepted, "accepted": [accepted]})
    with open(job["answers"], "w") as file:
        json.dump({"version": f"xllamacpp {version('xllamacpp')} (llama.cpp)", "answers": answers}, file)


if __name__ == "__main__":
    main(sys.argv[1])
