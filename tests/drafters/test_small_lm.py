"""A small LM drafts with a cache of its own, which must always be what reading the text afresh would leave there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen3Config,
)

from drafttrain.core.errors import UserError
from drafttrain.core.layers import in_precision
from drafttrain.core.plan import Chain, Dynamic, Plan, Shape, Static
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.corrupt import Corrupt
from drafttrain.drafters.files import load_drafter, save_drafter
from drafttrain.drafters.small_lm import SmallLM, SmallLMConfig, SmallLMState, shallow_config
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.target.adapter import Target
from drafttrain.target.head import final_norm
from tests.tiny import VOCAB, fitted, greedy_text, packed, tiny_llama, tiny_target

SHAPES: list[Shape] = [Chain(length=4), Static(children=(3, 2, 1)), Dynamic(depth=4, beam=3, top_k=3, nodes=10)]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
HEADS: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, **HEADS, tie_word_embeddings=True),
    "mistral, window 3": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=3),
    "gemma2, capped": Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=2.0, sliding_window=64),
    "gemma3, windows 3": Gemma3TextConfig(
        **SIZES, **HEADS, sliding_window=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "phi, biased head": PhiConfig(**SIZES),
}


@lru_cache
def family(name: str) -> Target:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name])
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    norm = final_norm(model.base_model)
    assert norm is not None
    torch.nn.init.uniform_(norm.get_parameter("weight"), 0.5, 1.5)
    return Target(model)


def small_lm(target: Target, **options: Any) -> SmallLM:
    torch.manual_seed(1)
    drafter = SmallLM(SmallLMConfig(**options), target.shape)
    drafter.start_from(target.head, torch.ones(target.vocab_size))
    return drafter.eval()


def begun(target: Target, drafter: SmallLM, rows: Sequence[list[int]]) -> SmallLMState:
    """A state after these texts, padded to one width."""
    lengths = torch.tensor([len(row) for row in rows])
    prompts = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return drafter.begin(prompts, lengths, {}, target.head, 128)


def proposed(drafter: Drafter, state: SmallLMState, roots: list[int], shape: Shape) -> Tree:
    return drafter.propose(state, torch.tensor(roots), Plan(shape), Sampling(), SeededRng(0, torch.arange(len(roots))))


def texts(*lengths: int, seed: int = 3) -> list[list[int]]:
    torch.manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,)).tolist() for length in lengths]


def narrow_path(tmp_path: Path, seed: int = 9, **changes: Any) -> str:
    """An existing causal LM in a folder."""
    tiny_llama(seed, hidden_size=16, intermediate_size=32, num_hidden_layers=2, **changes).save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


# -- training -------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_drafter_of_all_the_target_layers_has_no_loss_and_guesses_the_target_next_tokens(name: str) -> None:
    target = family(name)
    drafter = small_lm(target, layers=3, loss_chunk=5)
    documents = texts(12, 9)
    batch = packed(target, documents, [3, 2])
    loss = drafter.loss(batch, target.head)
    assert loss.count == (12 - 4) + (9 - 3)  # the first token of an answer is never drafted
    assert abs(loss.sum / loss.count) < 1e-5  # KL(p || q) = 0 needs the same rows, positions, masks, scales, caps and biases
    likeliest = target.head.logits(batch.features["last_hidden_state"]).argmax(-1)[0]
    guesses = drafter.teacher_forced_drafts(batch, target.head, 3)[0]
    for at in range(20 - 3):
        assert guesses[at].tolist() == likeliest[at + 1 : at + 4].tolist()
    assert guesses[19].tolist() == [int(likeliest[20]), -1, -1]  # the row ends: nothing is guessed there


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3, windows 3"])
@pytest.mark.parametrize("options", [{"layers": 2}, {"layers": 1, "hidden_size": 16}], ids=["borrowing", "narrow"])
def test_training_walks_guess_what_decoding_drafts_while_it_is_right(name: str, options: dict[str, Any]) -> None:
    target = family(name)
    drafter = small_lm(target, **options)
    (first, *_), K = texts(4), 4
    document = first + _own_text(target, drafter, first, 10)  # every guess is right from the prompt's end on
    other = texts(6, seed=4)[0]
    guesses = drafter.teacher_forced_drafts(packed(target, [other, document], [0, 0]), target.head, K)[0, len(other) :]
    for at in range(len(document) - 1):
        drafted = proposed(drafter, begun(target, drafter, [document[: at + 1]]), [document[at + 1]], Chain(length=K)).tokens[0, 1:]
        for step in range(K):
            place = at + 2 + step  # where the guess would stand
            if place - 1 >= len(document):
                break
            assert guesses[at, step] == drafted[step], (at, step)
            if place >= len(document) or document[place] != drafted[step]:
                break  # from here on decoding is fed its own token, training the true one


def _own_text(target: Target, drafter: SmallLM, prompt: list[int], new_tokens: int) -> list[int]:
    return greedy_text(drafter.to_causal_lm(target.head), prompt, new_tokens)


@torch.no_grad()
def test_in_bf16_a_drafter_of_all_the_target_layers_has_its_distribution_at_long_positions_too() -> None:
    target = Target(in_precision(tiny_llama(max_position_embeddings=2048), torch.device("cpu"), torch.bfloat16))
    drafter = SmallLM(SmallLMConfig(layers=3), target.shape)
    drafter.start_from(target.head, torch.ones(VOCAB))
    SpeculativeDecoder(target, drafter)  # brings it to the target's precision
    text = torch.randint(VOCAB, (2048,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = packed(target, [text], [0])
    states = next(iter(drafter.teacher_forced_states(batch, target.head, 1))).roll(1, 1)
    assert states.dtype == torch.bfloat16
    torch.testing.assert_close(states, batch.features["last_hidden_state"])  # the same sums: nothing is rounded otherwise


def test_the_label_at_each_token_is_the_next_one() -> None:
    target = family("llama")
    prompt = texts(4)[0]
    document = prompt + greedy_text(target.model, prompt, 12)
    loss = small_lm(target, layers=3).loss(packed(target, [document], [4]), target.head)
    assert loss.metrics["alpha_0"] == loss.metrics["alpha_0_count"] == loss.count == 11


def test_training_lowers_the_loss_and_leaves_the_target_alone() -> None:
    target = tiny_target()
    before = {name: value.clone() for name, value in target.model.state_dict().items()}
    batch = packed(target, texts(30), [4])
    drafter = small_lm(target, layers=2)
    start = drafter.loss(batch, target.head).sum
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    for _ in range(40):
        drafter.loss(batch, target.head).sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert drafter.loss(batch, target.head).sum < 0.3 * start
    assert all(value.equal(before[name]) for name, value in target.model.state_dict().items())
    assert not any("embed" in name or "lm_head" in name for name in drafter.state_dict())


@torch.no_grad()
def test_a_new_drafter_starts_from_the_targets_first_layers_its_last_one_and_its_norm() -> None:
    target = tiny_target(num_hidden_layers=4)
    drafter = SmallLM(SmallLMConfig(layers=2), target.shape)
    drafter.start_from(target.head, torch.ones(VOCAB))
    own, theirs = drafter.lm.state_dict(), target.model.model.state_dict()
    for here, there in ((0, 0), (1, 3)):
        name = "layers.{}.mlp.up_proj.weight"
        assert own[name.format(here)].equal(theirs[name.format(there)])
    assert own["norm.weight"].equal(theirs["norm.weight"])


# -- decoding -------------------------------------------------------------------------------------------------------------------------


def random_round(tree: Tree, alive: Tensor, generator: torch.Generator) -> Committed:
    """Commits the root and a random path below it, of any length, in the rows that are alive."""
    rows, depth = [], tree.max_depth + 1
    for row in range(len(alive)):
        path, wanted = [0], int(torch.randint(0, depth + 1, (1,), generator=generator))
        while len(path) <= wanted:
            children = [child for child in tree.children[row, path[-1]].tolist() if child >= 0]
            if not children:
                break
            path.append(children[int(torch.randint(0, len(children), (1,), generator=generator))])
        rows.append(path)
    nodes = torch.tensor([path + [0] * (depth - len(path)) for path in rows])
    count = torch.where(alive, torch.tensor([len(path) for path in rows]), 0)
    return Committed(tree.tokens.gather(1, nodes), count, {}, nodes)


def assert_as_if_read_afresh(target: Target, drafter: SmallLM, state: SmallLMState, rows: list[list[int]]) -> None:
    """Rows: everything committed. What was fed is the text up to what waits, and its keys and values are those of a fresh reading."""
    fresh = begun(target, drafter, rows)
    for row, text in enumerate(rows):
        fed = int(state.cache.lengths[row])
        waiting = int(state.waiting[row])
        assert [*text[:fed], *state.pending[row, :waiting].tolist()] == text
        for ours, theirs in zip(state.cache.storage, fresh.cache.storage, strict=True):
            torch.testing.assert_close(ours[:, row, :, :fed], theirs[:, row, :, :fed], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3, windows 3"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.shape)
@pytest.mark.parametrize("seed", [0, 1])
def test_after_any_acceptances_the_cache_equals_recomputation_from_scratch(name: str, shape: Shape, seed: int) -> None:
    target = family(name)
    drafter, generator = small_lm(target, layers=2), torch.Generator().manual_seed(seed)
    rows = texts(53, 58, 55, 4)  # they will grow past a bucket of slots
    state, roots = begun(target, drafter, rows), [1, 2, 3, 4]
    for number in range(10):
        alive = torch.rand(4, generator=generator) < 0.8  # a row that is done commits nothing and stays
        tree = proposed(drafter, state, roots, shape)
        if number == 6:  # drafted twice before anything was committed
            assert proposed(drafter, state, roots, shape).tokens.equal(tree.tokens)
        committed = random_round(tree, alive, generator)
        if number in (3, 4, 8):  # another one's proposal
            committed.nodes = None
        observe(drafter, state, committed, rows)
        if number == 5:  # rows part, change places and meet again, some after a round without a proposal
            parts, order = [state.select(torch.tensor(part)) for part in ([2, 0], [3, 1])], [2, 0, 3, 1]
            rows = [rows[row] for row in order]
            observe(drafter, parts[0], Committed(torch.tensor([[7, 8, 9], [4, 5, 6]]), torch.tensor([3, 2])), rows)
            state = parts[0].join(parts[1])
        if number == 9:
            observe(drafter, state, Committed(torch.arange(8).view(4, 2), torch.tensor([2, 1, 0, 2])), rows)
        if number % 3 == 0:  # in between the host has learnt nothing yet
            state.set_lengths([len(row) for row in rows])
        roots = torch.randint(0, VOCAB, (4,), generator=generator).tolist()
        assert_as_if_read_afresh(target, drafter, state, rows)
    assert max(len(row) for row in rows) > 64


@torch.no_grad()
def test_where_a_swapped_token_stands_the_cache_keeps_nothing_of_the_drafted_one() -> None:
    target = family("llama")
    drafter, generator, rows = small_lm(target, layers=2), torch.Generator().manual_seed(0), texts(5, 9)
    spoilt, state = Corrupt(0.7, drafter), begun(target, drafter, rows)
    for _ in range(3):
        tree = proposed(spoilt, state, [1, 2], Chain(length=4))
        observe(spoilt, state, random_round(tree, torch.tensor([True, True]), generator), rows)
        assert_as_if_read_afresh(target, drafter, state, rows)


def observe(drafter: Drafter, state: SmallLMState, committed: Committed, rows: list[list[int]]) -> None:
    """Commits in the drafter's state and in the first of `rows`."""
    drafter.observe(state, committed)
    for row, count in enumerate(committed.count.tolist()):
        rows[row] = rows[row] + committed.tokens[row, :count].tolist()


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.shape)
def test_every_drafted_node_is_the_likeliest_after_its_own_path(shape: Shape) -> None:
    target = family("gemma3, windows 3")
    drafter = small_lm(target, layers=2)
    text, root = texts(7)[0], 5
    tree = proposed(drafter, begun(target, drafter, [text]), [root], shape)
    model = drafter.to_causal_lm(target.head)
    for node in range(tree.tokens.shape[1]):
        children = [child for child in tree.children[0, node].tolist() if child >= 0]
        if children:
            path, length = tree.path_to(torch.tensor([node]))
            drafted = tree.tokens[0, path[0, : length[0]]].tolist() if node else []
            logits = model(torch.tensor([[*text, root, *drafted]])).logits[0, -1]
            assert tree.tokens[0, children].tolist() == logits.topk(len(children)).indices.tolist()


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.shape)
def test_rows_of_different_lengths_draft_what_each_drafts_alone(shape: Shape) -> None:
    target = tiny_target(2)
    drafter, rows = small_lm(target), texts(4, 9, 1)
    together = proposed(drafter, begun(target, drafter, rows), [1, 2, 3], shape)
    for row in range(3):
        alone = proposed(drafter, begun(target, drafter, rows[row : row + 1]), [row + 1], shape)
        assert alone.tokens[0].equal(together.tokens[row])


@torch.no_grad()
def test_prompts_read_in_chunks_leave_what_one_reading_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target()
    drafter, rows = small_lm(target), texts(23, 11)
    whole = begun(target, drafter, rows)
    monkeypatch.setattr("drafttrain.drafters.small_lm.PREFILL_CHUNK", 7)
    parts = begun(target, drafter, rows)
    for ours, theirs in zip(parts.cache.storage, whole.cache.storage, strict=True):
        torch.testing.assert_close(ours[:, :, :, :23], theirs[:, :, :, :23], rtol=1e-4, atol=1e-5)
    assert drafter.calls == 1 + 4


@torch.no_grad()
@pytest.mark.parametrize(("shape", "calls"), zip(SHAPES, (4, 3, 4), strict=True), ids=["chain", "static", "dynamic"])
def test_a_round_makes_one_call_a_level_so_a_chain_of_k_makes_k_whatever_waits(shape: Shape, calls: int) -> None:
    target = tiny_target()
    drafter, generator = small_lm(target), torch.Generator().manual_seed(0)
    rows = texts(5, 3)
    state = begun(target, drafter, rows)
    for _ in range(4):
        before = drafter.calls
        tree = proposed(drafter, state, [1, 2], shape)
        assert drafter.calls == before + calls
        drafter.observe(state, random_round(tree, torch.ones(2).bool(), generator))
        assert drafter.calls == before + calls


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.shape)
def test_greedy_decoding_is_the_target_own_text_and_a_perfect_drafter_is_always_right(shape: Shape) -> None:
    target = tiny_target(6)
    prompts = texts(6, 3, 9)
    written = [greedy_text(target.model, prompt, 25) for prompt in prompts]
    trained = fitted(small_lm(target, layers=1), target, prompts, 24, steps=40)
    clueless = SmallLM(SmallLMConfig(layers=1, hidden_size=8), target.shape)
    for drafter in (clueless, trained, small_lm(target, layers=3)):
        made = SpeculativeDecoder(target, drafter, RuntimeConfig(shape=shape)).generate(prompts, max_new_tokens=25)
        assert [generation.tokens for generation in made] == written
        assert drafter is clueless or sum(generation.statistics.rounds for generation in made) < 3 * 24
    depth = 3 if isinstance(shape, Static) else 4
    if not isinstance(shape, Dynamic):  # a dynamic tree may leave the likeliest path early
        assert all(generation.statistics.tau > depth for generation in made)


# -- other people's models ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_export_is_a_plain_causal_lm_with_the_drafter_own_logits(name: str, tmp_path: Path) -> None:
    target = family(name)
    drafter = small_lm(target, layers=2)
    drafter.to_causal_lm(target.head).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = packed(target, texts(9), [0])
    ours = drafter._readout(target.head).logits(drafter._encode(batch, target.head))
    torch.testing.assert_close(plain(batch.tokens).logits, ours, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_transformers_own_assisted_generation_accepts_the_export() -> None:
    target = tiny_target(6)
    drafter = small_lm(target, layers=3)
    assistant, prompt = drafter.to_causal_lm(target.head), torch.tensor(texts(6))
    expected = greedy_text(target.model, prompt[0].tolist(), 20)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    target.model.register_forward_hook(count)
    made = target.model.generate(prompt, assistant_model=assistant, max_new_tokens=20, do_sample=False)
    assert made[0, 6:].tolist() == expected
    assert passes < 12  # it drafts for the target: plain decoding takes 20


@torch.no_grad()
def test_an_existing_model_drafts_and_its_saved_drafter_no_longer_needs_it(tmp_path: Path) -> None:
    target, path = tiny_target(), narrow_path(tmp_path)
    drafter = small_lm(target, path=path)
    text = texts(7)[0]
    drafted = proposed(drafter, begun(target, drafter, [text[:-1]]), text[-1:], Chain(length=4)).tokens[0, 1:].tolist()
    assert drafted == greedy_text(tiny_llama(9, hidden_size=16, intermediate_size=32, num_hidden_layers=2), text, 4)
    save_drafter(drafter, tmp_path / "drafter")
    (tmp_path / "lm").rename(tmp_path / "gone")
    loaded = load_drafter(tmp_path / "drafter")
    assert isinstance(loaded, SmallLM)
    again = proposed(loaded, begun(target, loaded, [text[:-1]]), text[-1:], Chain(length=4)).tokens[0, 1:].tolist()
    assert again == drafted


@torch.no_grad()
def test_rows_that_an_existing_model_has_beyond_the_target_vocabulary_are_never_drafted(tmp_path: Path) -> None:
    target, path = tiny_target(), narrow_path(tmp_path, vocab_size=VOCAB + 8)
    drafter = small_lm(target, path=path)
    plain, batch = AutoModelForCausalLM.from_pretrained(path), packed(target, texts(20), [2])
    logits = drafter._readout(target.head).logits(drafter._encode(batch, target.head))
    torch.testing.assert_close(logits, plain(batch.tokens).logits[..., :VOCAB])
    assert drafter.loss(batch, target.head).sum.isfinite()


def test_adapters_alone_are_trained_saved_and_merged(tmp_path: Path) -> None:
    target, path = tiny_target(), narrow_path(tmp_path)
    drafter = small_lm(target, path=path, lora_rank=2)
    batch = packed(target, texts(20), [2])
    trained = [name for name, parameter in drafter.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in drafter.parameters() if p.requires_grad], lr=0.02)
    start = drafter.loss(batch, target.head).sum
    for _ in range(10):
        drafter.loss(batch, target.head).sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert drafter.loss(batch, target.head).sum < 0.9 * start
    save_drafter(drafter, tmp_path / "drafter")
    loaded = load_drafter(tmp_path / "drafter")
    assert isinstance(loaded, SmallLM)
    with torch.no_grad():
        expected = drafter._readout(target.head).logits(drafter._encode(batch, target.head))
        torch.testing.assert_close(loaded._readout(target.head).logits(loaded._encode(batch, target.head)), expected)
        merged = drafter.to_causal_lm(target.head)
        torch.testing.assert_close(merged(batch.tokens).logits, expected, rtol=1e-4, atol=1e-4)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        assert any("lora" in name for name, _ in drafter.named_parameters())  # merging was done on a copy


def test_models_that_cannot_draft_for_the_target_are_refused_with_what_to_do(tmp_path: Path) -> None:
    shape = tiny_target().shape
    AutoModelForCausalLM.from_config(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "bloom")
    refusals = [
        ({"path": str(tmp_path / "bloom")}, "bloom' cannot draft a tree, as it could not be a target: .*ALiBi"),
        ({"path": str(tmp_path / "nothing")}, "not a causal LM that can be loaded"),
        ({"layers": 4}, "drafter.layers 4: the target has 3 layers"),
    ]
    for options, message in refusals:
        with pytest.raises(UserError, match=message):
            SmallLM(SmallLMConfig(**options), shape)  # type: ignore[arg-type]
    for options, message in (({"lora_rank": 4}, "give its `path`"), ({"hidden_size": 16, "path": "x"}, "give one of them")):
        with pytest.raises(ValueError, match=message):
            SmallLMConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [VOCAB - 14, VOCAB + 14])
def test_a_model_whose_table_is_padded_to_another_size_drafts_the_targets_own_text(rows: int, tmp_path: Path) -> None:
    target = tiny_target()
    drafter = SmallLM(SmallLMConfig(path=narrow_path(tmp_path, vocab_size=rows)), target.shape)
    prompts = [[3, 1, 4], [VOCAB - 1, 5]]
    drafted = SpeculativeDecoder(target, drafter).generate(prompts, max_new_tokens=12)
    assert [one.tokens for one in drafted] == [one.tokens for one in SpeculativeDecoder(target).generate(prompts, max_new_tokens=12)]
    loss = drafter.loss(packed(target, [[3, 1, 4, 1, 5, 9, 2, 6]], [2]), target.head)
    assert torch.isfinite(loss.sum)


def test_settings_by_layer_follow_the_layers_that_are_taken() -> None:
    shape = tiny_target().shape
    by_layer: dict[str, Any] = {}
    by_layer["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    by_layer["per_layer_config"] = {"2": {"head_dim": 4}, "1": {"head_dim": 8}}
    known = dataclasses.replace(shape, text_config={**shape.text_config, **by_layer})
    shallow = shallow_config(known, [0, 2])
    assert shallow.to_dict()["layer_types"] == ["full_attention", "full_attention"]
    assert {int(layer): value for layer, value in shallow.to_dict()["per_layer_config"].items()} == {1: {"head_dim": 4}}


# -- the context's end ----------------------------------------------------------------------------------------------------------------


def gpt2(positions: int, **changes: Any) -> torch.nn.Module:
    """A model with a learned position each, and none beyond."""
    torch.manual_seed(3)
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=VOCAB, n_positions=positions, **{**sizes, **changes})).eval()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.shape)
@pytest.mark.parametrize("own_context", [None, 20])
def test_decoding_up_to_the_last_learned_position_gives_the_target_own_text(
    shape: Shape, own_context: int | None, tmp_path: Path
) -> None:
    target = Target(gpt2(48))
    if own_context is not None:
        gpt2(own_context, n_layer=1).save_pretrained(tmp_path)
    drafter = small_lm(target, layers=1) if own_context is None else small_lm(target, path=str(tmp_path))
    prompts = texts(10, 7, 24)  # the last is longer than the shorter context
    written = [greedy_text(target.model, prompt, 24) for prompt in prompts]
    made = SpeculativeDecoder(target, drafter, RuntimeConfig(shape=shape)).generate(prompts, max_new_tokens=24)
    assert [generation.tokens for generation in made] == written


def test_texts_longer_than_an_existing_models_context_are_trained_on(tmp_path: Path) -> None:
    gpt2(20, n_layer=1).save_pretrained(tmp_path)
    target = Target(gpt2(48))
    loss = small_lm(target, path=str(tmp_path)).loss(packed(target, texts(40), [4]), target.head)
    loss.sum.backward()
    assert loss.sum.isfinite()
