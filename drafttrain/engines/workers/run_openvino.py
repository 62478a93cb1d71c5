"""Runs in OpenVINO GenAI's own environment: decodes a job's prompts one by one. No part of drafttrain is imported."""

import json
import sys

import numpy as np
import openvino as ov
import openvino_genai as genai


def main(path: str) -> None:
    with open(path) as file:
        job = json.load(file)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    draft = genai.draft_model(job["drafter"], "CPU", **options)
    pipeline = genai.LLMPipeline(job["target"], "CPU", scheduler_config=scheduler, draft_model=draft, **options)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.num_assistant_tokens = job["max_new_tokens"], False, job["length"]
    config.eos_token_id, config.stop_token_ids = job["eos_ids"][0], set(job["eos_ids"])
    answers = []
    for prompt in job["prompts"]:
        ids = np.array([prompt], dtype=np.int64)
        done = pipeline.generate(genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), config)
        metrics = done.extended_perf_metrics
        passes = len(metrics.main_model_metrics.raw_metrics.m_durations)
        answers.append({"tokens": list(done.tokens[0]), "rounds": passes - 1, "accepted": [metrics.get_num_accepted_tokens()]})
    with open(job["answers"], "w") as file:
        json.dump({"version": f"OpenVINO GenAI {genai.__version__}", "answers": answers}, file)


if __name__ == "__main__":
    main(sys.argv[1])
