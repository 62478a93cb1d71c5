"""Any decoder-only model, unmodified, scores a tree as it would score each of its paths alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Phi3Config,
    Qwen3Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from drafttrain.core.errors import UserError
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.target.adapter import Target, read_shape
from drafttrain.target.files import TargetConfig
from drafttrain.target.head import TargetHead

VOCAB = 48
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.2,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.2}
MODELS: dict[str, Any] = {
    "llama-untied": LlamaConfig(**COMMON, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON),
    "mistral-window-5": MistralConfig(**COMMON, sliding_window=5),
    "gemma3-mixed-windows": Gemma3TextConfig(
        **COMMON, sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"], query_pre_attn_scalar=8
    ),
    "gemma2-soft-cap": Gemma2Config(
        **COMMON, sliding_window=6, final_logit_softcapping=5.0, query_pre_attn_scalar=8, attn_logit_softcapping=None
    ),
    "cohere-logit-scale": CohereConfig(**COMMON, logit_scale=0.3),
    "mixtral-experts": MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "gpt2-absolute": GPT2Config(**GPT, n_embd=32, n_layer=3, n_head=4, n_positions=128),
    "gpt-neox": GPTNeoXConfig(
        **GPT, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128
    ),
    "phi3": Phi3Config(**COMMON, sliding_window=None),
}
LENGTHS = [9, 4]


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name]).float().eval()


@pytest.fixture(scope="module", params=sorted(MODELS))
def target(request: pytest.FixtureRequest) -> Target:
    return Target(build(request.param))


def prompts() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def tree() -> Tree:
    """Two rows: a branching tree with a twin pair, and one with a dead node."""
    tokens = torch.tensor([[3, 7, 8, 9, 7, 11], [5, 6, 2, 4, 1, 0]])
    parents = torch.tensor([[0, 0, 0, 1, 1, 3], [0, 0, 1, 2, 0, 0]])
    live = torch.tensor([[True] * 6, [True] * 5 + [False]])
    return Tree(tokens, parents, live, "deterministic", max_depth=3, max_children=2)


def alone(target: Target, text: list[int]) -> torch.Tensor:
    """[V] after `text` by one plain forward."""
    return target.model(torch.tensor([text])).logits[0, -1]


def path_tokens(grown: Tree, row: int, node: int) -> list[int]:
    path, length = grown.path_to(torch.full((2,), node))
    return [int(grown.tokens[row, 0]), *grown.tokens[row, path[row, : length[row]]].tolist()]


@torch.inference_mode()
def test_tree_attention_equals_one_forward_per_path(target: Target) -> None:
    cache = target.new_cache(2, 40)
    read = target.prefill(cache, prompts(), torch.tensor(LENGTHS))
    cache.set_lengths(LENGTHS)
    scored = target.score(cache, tree().layout(), Sampling(), ["last_hidden_state", "aux_hidden_states"])
    for row, length in enumerate(LENGTHS):
        text = prompts()[row, :length].tolist()
        torch.testing.assert_close(read.logits[row], alone(target, text), rtol=1e-4, atol=1e-4)  # fp32, another order of sums
        for node in range(6):
            if tree().live[row, node]:
                expected = alone(target, text + path_tokens(tree(), row, node))
                torch.testing.assert_close(scored.logits[row, node], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target.head.logits(scored.features["last_hidden_state"]), scored.logits)


@torch.inference_mode()
def test_reading_in_chunks_equals_reading_whole(target: Target) -> None:
    found = []
    for chunk in (2, 512):
        cache = target.new_cache(2, 40)
        read = target.prefill(cache, prompts(), torch.tensor(LENGTHS), ["aux_hidden_states"], chunk=chunk)
        found.append((read.logits, read.features["aux_hidden_states"]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_commit_equals_recomputing_from_scratch_for_rows_of_different_lengths(target: Target) -> None:
    cache = target.new_cache(2, 60)
    target.prefill(cache, prompts(), torch.tensor(LENGTHS))
    cache.set_lengths(LENGTHS)
    texts = [prompts()[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    verdicts = [([[1, 3, 5], [1, 0, 0]], [3, 1]), ([[2, 0, 0], [1, 2, 3]], [1, 3]), ([[0, 0, 0], [4, 0, 0]], [0, 1])]
    for path, length in verdicts:
        grown = tree()
        scored = target.score(cache, grown.layout(), Sampling())
        verdict = Verdict(torch.tensor(path), torch.tensor(length), torch.tensor([1, 2]))
        committed = target.commit(cache, grown, scored, verdict, torch.tensor([True, True]))
        for row, text in enumerate(texts):
            text += [int(grown.tokens[row, 0]), *grown.tokens[row, path[row][: length[row]]].tolist()]
            assert committed.tokens[row, : committed.count[row]].tolist() == text[-int(committed.count[row]) :]
        cache.set_lengths([len(text) for text in texts])
        assert cache.lengths.tolist() == [len(text) for text in texts]
    scored = target.score(cache, tree().layout(), Sampling())
    for row, text in enumerate(texts):
        torch.testing.assert_close(scored.logits[row, 0], alone(target, [*text, int(tree().tokens[row, 0])]), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_packed_documents_are_encoded_as_if_alone(target: Target) -> None:
    tokens = prompts()[:1]
    document, position = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, -1]]), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 0]])
    last = target.encode(tokens, position, document, {"last_hidden_state"})["last_hidden_state"]
    for start in (0, 4):
        expected = alone(target, tokens[0, start : start + 4].tolist())
        torch.testing.assert_close(target.head.logits(last[0, start + 3]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_head_read_from_files_gives_the_models_own_logits(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    head, tokens = TargetHead.from_folder(tmp_path), prompts()
    with torch.no_grad():
        last = model.base_model(tokens).last_hidden_state
        torch.testing.assert_close(head.logits(last), model(tokens).logits, rtol=1e-5, atol=1e-5)
    own = dict(model.named_parameters())
    assert head.layer_weights(2)
    assert all(any(value.equal(p) for p in own.values() if p.shape == value.shape) for value in head.layer_weights(2).values())


@torch.inference_mode()
def test_bfloat16_tree_follows_the_paths_within_its_rounding() -> None:
    target = Target(build("llama-tied").bfloat16())
    cache = target.new_cache(2, 40)
    target.prefill(cache, prompts(), torch.tensor(LENGTHS))
    cache.set_lengths(LENGTHS)
    scored: Scored = target.score(cache, tree().layout(), Sampling())
    expected = alone(target, prompts()[0].tolist() + path_tokens(tree(), 0, 5))
    gap = (scored.logits[0, 5] - expected).abs().max() / expected.abs().max()
    assert gap < 0.05  # bf16 keeps 8 bits


def test_linear_attention_layers_are_refused_by_number() -> None:
    config = Qwen3NextConfig(
        **{**COMMON, "num_hidden_layers": 2}, layer_types=["full_attention", "linear_attention"], num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    with pytest.raises(UserError, match="target layer 1 is of type 'linear_attention'"):
        Target(AutoModelForCausalLM.from_config(config).eval())


SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
STATE: dict[str, Any] = {**COMMON, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "mamba": (MambaConfig(**SMALL, state_size=4), "target layer 0 is of type 'linear_attention'"),
    "mamba2": (Mamba2Config(**SMALL, num_heads=8, head_dim=8, state_size=8, n_groups=1), "target layer 0 is of type 'linear_attention'"),
    "rwkv": (RwkvConfig(**SMALL, attention_hidden_size=32), "target layer 0 is of type 'rwkv'"),
    "recurrent-gemma": (RecurrentGemmaConfig(**COMMON, attention_window_size=8), "target layer 0 is of type 'linear_attention'"),
    "falcon-h1": (FalconH1Config(**STATE, mamba_d_ssm=64), "target layer 0 is of type 'hybrid'"),
    "jamba": (
        JambaConfig(**COMMON, use_mamba_kernels=False, num_experts=2, attn_layer_period=2, attn_layer_offset=0),
        "target layer 1 is of type 'linear_attention'",
    ),
    "bamba": (BambaConfig(**STATE, attn_layer_indices=[1]), "target layer 0 is of type 'linear_attention'"),
    "bloom": (BloomConfig(**GPT, hidden_size=32, n_layer=2, n_head=4), "a 'bloom' target .*ALiBi"),
    "mpt": (MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=256), "a 'mpt' target .*ALiBi"),
    "falcon-alibi": (FalconConfig(**SMALL, num_attention_heads=4, alibi=True), "a 'falcon' target .*ALiBi"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_target_that_no_tree_can_follow_is_refused_at_load_and_without_its_weights(name: str, tmp_path: Path) -> None:
    config, message = UNSUPPORTED[name]
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=message):
        Target(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        read_shape(TargetConfig(model=str(tmp_path), device="cpu"))


def test_a_target_whose_own_code_fails_under_our_masks_is_refused_in_one_line() -> None:
    model = build("llama-tied")
    model.model.layers[1].register_forward_pre_hook(lambda *_: fail())
    with pytest.raises(UserError, match=r"'in-memory' \(LlamaForCausalLM\): cannot be run .* \(first line\)") as caught:
        Target(model)
    assert "\n" not in str(caught.value)


def fail() -> None:
    raise TypeError("first line\nsecond line")
