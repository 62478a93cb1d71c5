"""Runs in the speculators package's own environment: its own class of the drafter over one text, every tensor written down.

`hidden_states` [L + 1, T, D] are the target's; which of them are features is read from the folder, as any reader would.
"""

import json
import sys
from importlib.metadata import version

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorModelConfig


def first(output: tuple | torch.Tensor) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def main(path: str) -> None:
    with open(path) as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    config = SpeculatorModelConfig.from_pretrained(job["drafter"])
    config.transformer_layer_config._attn_implementation = "eager"  # the default needs compiled kernels
    model = SpeculatorModel.from_pretrained(job["drafter"], config=config).float().eval()
    given = load_file(job["tensors"])
    layers = model.config.eagle_aux_hidden_state_layer_ids
    features = torch.cat([given["hidden_states"][layer] for layer in layers], -1)[None]  # [1, T, A * D]
    seen: dict[str, list[torch.Tensor]] = {"fused": [], "state": [], "logits": []}
    model.fc.register_forward_hook(lambda _, inputs, output: seen["fused"].append(first(output).detach()))
    model.layers[-1].register_forward_hook(lambda _, inputs, output: seen["state"].append(first(output).detach()))
    model.lm_head.register_forward_hook(lambda _, inputs, output: seen["logits"].append(first(output).detach()))
    with torch.no_grad():
        model(
            hidden_states=features, input_ids=given["following"][None], document_ids=torch.zeros(1, features.shape[1], dtype=torch.long),
            ttt_steps=job["length"],
        )  # fmt: skip
    tensors = {"features": features[0].clone(), "fused": seen["fused"][0][0].clone()}
    offsets = model.d2t if getattr(model, "d2t", None) is not None else torch.zeros(model.lm_head.out_features, dtype=torch.long)
    ids = offsets + torch.arange(len(offsets))
    for step in range(job["length"]):
        tensors[f"state_{step}"], tensors[f"logits_{step}"] = seen["state"][step][0].clone(), seen["logits"][step][0].clone()
        tensors[f"drafted_{step}"] = ids[seen["logits"][step][0].argmax(-1)]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, job["seen"])
    with open(job["answers"], "w") as file:
        json.dump({"version": f"speculators {version('speculators')}", "answers": []}, file)


if __name__ == "__main__":
    main(sys.argv[1])
