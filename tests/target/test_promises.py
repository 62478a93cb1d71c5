"""What a checkpoint asks for is served, or refused by name: lengths that change rotary factors, missing tensors, generation options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from drafttrain.core.errors import UserError
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.target.adapter import Target, read_shape
from drafttrain.target.files import TargetConfig, target_fingerprint, weight_files
from tests.data.stores import make_target

ORIGINAL = 24  # positions before longrope switches its factors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make_target()
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def config(folder: Path, **options: Any) -> TargetConfig:
    return TargetConfig(model=str(folder), dtype="float32", device="cpu", **options)


def longrope(**parameters: Any) -> Any:
    rope = {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 7.0, 9.0], "rope_theta": 10000.0,
        "original_max_position_embeddings": ORIGINAL, "attention_factor": 1.0, **parameters,
    }  # fmt: skip
    torch.manual_seed(0)
    made = AutoConfig.for_model(
        "phi3", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, original_max_position_embeddings=ORIGINAL, rope_parameters=rope, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    return model


def test_longrope_is_refused_with_the_context_up_to_which_it_is_exact() -> None:
    with pytest.raises(UserError, match=rf"longrope.*target.max_context={ORIGINAL}"):
        Target(longrope())


def test_longrope_whose_factors_are_alike_is_served_over_its_whole_context() -> None:
    assert Target(longrope(long_factor=[1.0] * 4)).max_context == 128


def test_longrope_within_its_original_context_decodes_as_generate_does() -> None:
    model = longrope()
    target = Target(model, max_context=ORIGINAL)
    prompts = [[5, 9, 4], [7, 8, 20, 33, 6, 11]]
    together = SpeculativeDecoder(target).generate(prompts, max_new_tokens=ORIGINAL - 6)
    for prompt, made in zip(prompts, together, strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=ORIGINAL - 6)[0, len(prompt) :].tolist()
        assert made.tokens == expected
    with pytest.raises(UserError, match="24"):
        SpeculativeDecoder(target).generate([prompts[0]], max_new_tokens=ORIGINAL)


def test_a_target_without_one_tensor_is_refused_and_the_tensor_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"tensor '{name}'"):
        Target.load(config(folder))


def test_a_configuration_of_more_layers_than_the_file_holds_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "num_hidden_layers": values["num_hidden_layers"] + 1, "layer_types": None}))
    with pytest.raises(UserError, match=r"tensor '.*' and \d+ more is missing"):
        Target.load(config(folder))


def test_the_fingerprint_is_of_the_files_that_are_loaded(folder: Path) -> None:
    before = target_fingerprint(folder)
    save_file({"unrelated": torch.zeros(3)}, folder / "adapter_model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"nothing that is read")
    assert target_fingerprint(folder) == before


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/elsewhere/model.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="outside of the folder"):
        weight_files(folder)


def test_a_pickle_alone_is_no_target(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        Target.load(config(folder))


@pytest.mark.parametrize(
    ("option", "value"),
    [("min_new_tokens", 4), ("begin_suppress_tokens", [5]), ("num_beams", 2), ("epsilon_cutoff", 0.1)],
)
def test_what_a_generation_config_asks_for_is_refused_by_name_or_left_out_by_name(folder: Path, option: str, value: Any) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    for read in (read_shape, Target.load):
        with pytest.raises(UserError, match=rf"asks for {option}="):
            read(config(folder))
    assert read_shape(config(folder, ignore_generation_options=(option,))).hidden_size


def test_what_decoding_applies_is_no_reason_to_refuse_a_checkpoint_and_is_left_out_by_name(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.1, "min_p": 0.1}))
    assert read_shape(config(folder)).hidden_size
    assert Target.load(config(folder)).own_options == {"repetition_penalty": 1.1, "min_p": 0.1}
    assert Target.load(config(folder, ignore_generation_options=("repetition_penalty",))).own_options == {"min_p": 0.1}


def test_an_option_that_nobody_knows_cannot_be_ignored(folder: Path) -> None:
    with pytest.raises(UserError, match="'repetition_penalti' is no option"):
        read_shape(config(folder, ignore_generation_options=("repetition_penalti",)))


def test_an_end_token_beyond_the_vocabulary_is_refused_before_any_work(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 151645}))
    for read in (read_shape, Target.load):
        with pytest.raises(UserError, match="end token 151645"):
            read(config(folder))


def test_attention_by_place_in_the_cache_is_refused_however_short_the_first_texts_are() -> None:
    torch.manual_seed(0)
    made = AutoConfig.for_model(
        "gpt_neo", vocab_size=64, hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4, window_size=8,
        max_position_embeddings=128, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with pytest.raises(UserError, match=r"not supported|differ"):
        Target(model)
