"""Assisted generation in transformers: decodes a job's prompts one by one and counts the target's passes."""

import json
import sys

import torch
import transformers


def main(path: str) -> None:
    with open(path) as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    target, drafter = (load(job[name], dtype=torch.float32).eval() for name in ("target", "drafter"))
    settings = drafter.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = job["length"], "constant"
    settings.assistant_confidence_threshold = 0.0
    passes: list[int] = []
    target.register_forward_hook(lambda *_: passes.append(1))
    answers = []
    for prompt in job["prompts"]:
        passes.clear()
        ids = torch.tensor([prompt])
        done = target.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=drafter, do_sample=False, max_new_tokens=job["max_new_tokens"],
            eos_token_id=job["eos_ids"], pad_token_id=0,
        )  # fmt: skip
        tokens = done[0, len(prompt) :].tolist()
        # its first round drafts before the prompt is read: that pass is a round and gives the first token too
        answers.append({"tokens": tokens, "rounds": len(passes), "accepted": [len(tokens) - len(passes)]})
    with open(job["answers"], "w") as file:
        json.dump({"version": f"transformers {transformers.__version__}", "answers": answers}, file)


if __name__ == "__main__":
    main(sys.argv[1])
