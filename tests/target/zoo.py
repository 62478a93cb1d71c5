"""Tiny random models of every causal architecture in transformers, and the check that one decodes greedily as `generate` does.

`check` decodes in fp32: plainly and with a drafter that knows the text but for some tokens, alone and in a ragged batch, past sliding
windows, past the buckets that the cache reads, and past the context before rotary scaling. What comes out is a line of `docs/targets.md`
(`scripts/render_targets.py`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Plan, Static
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed
from drafttrain.drafters.base import Drafter, DrafterConfig, DrafterState
from drafttrain.drafters.grow import Frontier, grow
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.target.adapter import Target

VOCAB, LAYERS, NEW_TOKENS = 64, 2, 36
WINDOW, ORIGINAL_CONTEXT = 6, 48  # both are passed
PROMPTS = [[(7 * n + 3) % VOCAB for n in range(41)], [5, 9, 11], [(11 * n + 1) % VOCAB for n in range(20)]]  # 41 + 36 is past a bucket
MARGIN = 1e-4
"""Between the target's two likeliest tokens, in fp32 logits: below it either may come first."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "n_embed"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff", "moe_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"), None),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    "head_dim": 8, "initializer_range": 0.3, "init_std": 0.3, "use_cache": True, "num_kv_shared_layers": 0, "first_k_dense_replace": 1,
    "query_pre_attn_scalar": 8, "shared_expert_intermediate_size": 48, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
    "word_embed_proj_dim": 32, "swin_norm": False, "altup_num_inputs": 2,
}  # fmt: skip
"""What makes a model tiny, by the names that configurations have for it; each takes those it knows."""

SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL_CONTEXT},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL_CONTEXT},
    "longrope": {
        "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0], "factor": 4.0, "original_max_position_embeddings": ORIGINAL_CONTEXT,
    },
    "llama3": {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL_CONTEXT,
    },
}  # fmt: skip
"""Kinds of rotary scaling, each beyond its original context."""


def scaled(model_type: str, kind: str, **further: Any) -> tuple[str, dict[str, Any]]:
    return model_type, {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **SCALED[kind], **further}}


LONG_PHI3 = (
    "phi3", {**scaled("phi3", "longrope", partial_rotary_factor=1.0)[1], "original_max_position_embeddings": ORIGINAL_CONTEXT},
)  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"llama, {kind} rotary": scaled("llama", kind) for kind in SCALED},
    "phi3, longrope rotary": LONG_PHI3, "phi3, longrope rotary, max_context 48": LONG_PHI3,
    "mistral, all layers windowed": ("mistral", {"sliding_window": WINDOW}),
    "qwen2, one layer windowed": (
        "qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "falcon, ALiBi": ("falcon", {"alibi": True, "new_decoder_architecture": False, "multi_query": True}),
    "falcon, rotary": ("falcon", {"alibi": False, "new_decoder_architecture": True}),
    "gemma2, soft-capped": ("gemma2", {"final_logit_softcapping": 5.0}),
}  # fmt: skip
"""Further ways of an architecture: label -> model type, options."""
MAX_CONTEXT = {"phi3, longrope rotary, max_context 48": ORIGINAL_CONTEXT}
"""`target.max_context`, where it is given."""

OPTIONS: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "mpt": {"max_seq_len": 128},
    **{kind: {"num_key_value_heads": 4} for kind in ("deepseek_v2", "deepseek_v3", "minicpm3", "longcat_flash", "youtu")},
    **{
        kind: {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1} for kind in ("bamba", "granitemoehybrid")
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
}  # fmt: skip
"""What a model type needs beside `SIZES`."""


ARCHITECTURES = (
    "bamba", "bloom", "codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1", "ernie4_5",
    "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "gemma", "gemma2", "gemma3_text",
    "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese",
    "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hyperclovax", "internlm3", "jais2", "jamba", "jetmoe", "kimi_linear", "laguna", "lfm2", "llama",
    "llama4_text", "longcat_flash", "mamba", "mamba2", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2", "ministral",
    "ministral3", "mistral", "mixtral", "mpt", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid",
    "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_moe",
    "qwen3_next", "recurrent_gemma", "rwkv", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm",
    "youtu",
)  # fmt: skip
"""Decoder-only model types, as transformers names them."""


def tiny_config(model_type: str, **options: Any) -> PretrainedConfig:
    """A configuration of that type with everything small that it has a name for."""
    kind = CONFIG_MAPPING[model_type]
    known = kind().to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in known or name in kind.attribute_map}
    return kind(**{**sizes, **OPTIONS.get(model_type, {}), **options})


def tiny_model(model_type: str, **options: Any) -> Any:
    """A random causal LM in fp32, whose greedy text does not end by itself."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **options), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    return model


# -- a drafter that is right often -------------------------------------------------------------------------------------------------------


class KnowingState(DrafterState):
    """Each row's text, and how much of it is written."""

    def __init__(self, texts: list[list[int]], written: list[int]) -> None:
        self.texts, self.written = texts, written

    def select(self, rows: Tensor) -> KnowingState:
        chosen = rows.tolist()
        return KnowingState([self.texts[row] for row in chosen], [self.written[row] for row in chosen])

    def join(self, other: DrafterState) -> KnowingState:
        assert isinstance(other, KnowingState)
        return KnowingState(self.texts + other.texts, self.written + other.written)


class Knowing(Drafter):
    """Drafts the texts that it is told, every fourth token of them wrong; its second choices are arbitrary."""

    def __init__(self, target: Target, texts: list[list[int]]) -> None:
        super().__init__(DrafterConfig(name="knowing"), target.shape)
        self.texts = texts

    def loss(self, *_: Any) -> Any:
        raise AssertionError("it knows everything")

    def teacher_forced_drafts(self, *_: Any) -> Any:
        raise AssertionError("it is not replayed")

    def begin(self, prompts: Tensor, lengths: Tensor, *_: Any) -> KnowingState:
        rows = [prompt[:length] for prompt, length in zip(prompts.tolist(), lengths.tolist(), strict=True)]
        texts = [next(text for text in self.texts if text[: len(row)] == row) for row in rows]
        return KnowingState(texts, lengths.tolist())

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Any) -> Tree:
        assert isinstance(state, KnowingState)
        V = self.target.vocab_size

        def step(frontier: Frontier) -> Tensor:
            logits = (frontier.tokens[..., None] * 5 + torch.arange(V) * 3) % V / V  # [B, W, V]
            for row, (text, written) in enumerate(zip(state.texts, state.written, strict=True)):
                index = written + 1 + frontier.level
                token = text[index] if index < len(text) else 0
                logits[row, :, (token + 1) % V if index % 4 == 0 else token] = 9.0
            return logits

        return grow(step, roots, plan, sampling, rng).tree

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, KnowingState)
        state.written = [before + count for before, count in zip(state.written, committed.count.tolist(), strict=True)]


# -- the check ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Finding:
    """How one architecture is served."""

    label: str
    served: bool
    reason: str = ""  # why it is refused
    tau: float = 0.0  # accepted length with the knowing drafter


class Differs(AssertionError):  # noqa: N818 - what the text does
    """A text was not the target's own."""


def check(label: str) -> Finding:
    """Raises `Differs` where a text differs from `generate`'s; a `UserError` at load is a refusal."""
    model_type, options = VARIANTS.get(label, (label, {}))
    model = tiny_model(model_type, **options)
    try:
        target = Target(model, name=label, max_context=MAX_CONTEXT.get(label))
    except UserError as error:
        return Finding(label, False, str(error))
    prompts = [prompt for prompt in PROMPTS if len(prompt) + NEW_TOKENS <= target.max_context]
    own = [own_text(model, prompt) for prompt in prompts]
    knowing = Knowing(target, [prompt + text for prompt, text in zip(prompts, own, strict=True)])
    drafting = SpeculativeDecoder(target, knowing, RuntimeConfig(shape=Static(children=(2, 1, 1))))
    for how, decoder in {"plainly": SpeculativeDecoder(target), "drafted": drafting}.items():
        together = [one.tokens for one in decoder.generate(prompts, max_new_tokens=NEW_TOKENS)]
        compare(model, prompts, own, together, f"{how}, in a batch")
        alone = decoder.generate(prompts[0], max_new_tokens=NEW_TOKENS)[0]
        compare(model, prompts, own, [alone.tokens], f"{how}, alone")
    return Finding(label, True, tau=alone.statistics.tau)


def own_text(model: Any, prompt: list[int]) -> list[int]:
    """What transformers' own greedy decoding writes."""
    ids = torch.tensor([prompt])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    written: list[int] = text[0, len(prompt) :].tolist()
    return written


def compare(model: Any, prompts: list[list[int]], own: list[list[int]], ours: list[list[int]], how: str) -> None:
    """Raises `Differs` unless they are equal, up to a token at which the target itself is undecided."""
    for prompt, theirs, text in zip(prompts, own, ours, strict=False):
        if text == theirs:
            continue
        at = next(index for index, pair in enumerate(zip(theirs, text, strict=True)) if pair[0] != pair[1])
        with torch.no_grad():
            best = model(torch.tensor([prompt + theirs[:at]])).logits[0, -1].topk(2).values
        if float(best[0] - best[1]) > MARGIN:
            raise Differs(f"{how}: token {at} after a prompt of {len(prompt)} differs")
