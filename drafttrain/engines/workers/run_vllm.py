"""Runs in vLLM's own environment: decodes a job's prompts one by one. No part of drafttrain is imported."""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams  # the environment must be set first
from vllm import __version__ as version

PREFIX = "vllm:spec_decode_num_"


def counters(llm: LLM) -> dict:
    """What was drafted and accepted so far."""
    found = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0, "accepted_tokens_per_pos": []}
    for metric in llm.get_metrics():
        name = metric.name.removeprefix(PREFIX)
        if name in found:
            found[name] = list(metric.values) if name.endswith("per_pos") else metric.value
    return found


def main(path: str) -> None:
    with open(path) as file:
        job = json.load(file)
    speculative = {"model": job["drafter"], "method": job["method"], "num_speculative_tokens": job["length"]}
    llm = LLM(
        model=job["target"], dtype="float32", enforce_eager=True, disable_log_stats=False, max_model_len=job["context"],
        max_num_seqs=1, enable_prefix_caching=False, speculative_config=speculative,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=job["max_new_tokens"])
    answers, before = [], counters(llm)
    for prompt in job["prompts"]:
        (done,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        after = counters(llm)
        earlier = before["accepted_tokens_per_pos"] or [0] * len(after["accepted_tokens_per_pos"])
        answers.append(
            {
                "tokens": list(done.outputs[0].token_ids),
                "rounds": after["drafts"] - before["drafts"],
                "accepted": [now - then for now, then in zip(after["accepted_tokens_per_pos"], earlier, strict=True)],
            }
        )
        before = after
    with open(job["answers"], "w") as file:
        json.dump({"version": version, "answers": answers}, file)


if __name__ == "__main__":
    main(sys.argv[1])
