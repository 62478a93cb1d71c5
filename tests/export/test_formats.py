"""What is written in a format reads back bit for bit, over sizes, vocabularies, layers, precisions and rotary scalings."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from drafttrain.core.errors import UserError
from drafttrain.drafters.small_lm import SmallLM
from drafttrain.export import FORMATS
from drafttrain.export.base import FormatConfig
from drafttrain.export.gguf import GGUF
from drafttrain.export.gguf_file import llama3_factors, paired, unpaired
from drafttrain.export.load import IMPORTS, load_drafter
from drafttrain.export.medusa import MedusaFormat
from drafttrain.export.mlp_speculator import MLPSpeculatorFormat
from drafttrain.export.sglang import SGLang
from drafttrain.export.speculators import Speculators
from drafttrain.target.files import DTYPES, TargetConfig
from tests.export.published import ROPES, byte_tokenizer, random_drafter, rounded, save_target, source_of, written

SIZES = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(40, 70), "hidden_size": st.sampled_from([16, 32]), "intermediate_size": st.sampled_from([24, 40]),
        "num_hidden_layers": st.integers(4, 8), "num_key_value_heads": st.sampled_from([1, 2, 4]), "head_dim": st.sampled_from([4, 8]),
        "tie_word_embeddings": st.booleans(), "model_type": st.sampled_from(["llama", "qwen3"]), "rope": st.sampled_from(sorted(ROPES)),
    }
)  # fmt: skip
EXAMPLES = settings(max_examples=12, deadline=None)


def comes_back(form: FormatConfig, sizes: dict[str, Any], family: str, dtype: str, aux_layers: list[int] | None, **options: Any) -> None:
    """Written in `form` and read again: equal weights, equal target, equal configuration where the format holds it."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        target = save_target(home / "target", **sizes)
        drafter = random_drafter(target, family, None if aux_layers is None else tuple(aux_layers), **options)
        form.check(drafter.config, drafter.target)
        folder = written(form, source_of(drafter, target, home / "drafter"), home / "out")
        again = load_drafter(folder, target=target)
        wanted = rounded(drafter, DTYPES[dtype])
        assert again.state_dict().keys() == wanted.keys()
        for key, value in again.state_dict().items():
            assert torch.equal(value, wanted[key]), key
        assert again.target == dataclasses.replace(drafter.target, text_config=again.target.text_config)


def layers_of(data: st.DataObject, sizes: dict[str, Any], count: int | None = None) -> list[int]:
    depth = sizes["num_hidden_layers"]
    chosen = data.draw(st.lists(st.integers(1, depth), min_size=count or 1, max_size=count or 4, unique=True))
    return sorted(chosen)


@EXAMPLES
@given(SIZES, st.data(), st.sampled_from(sorted(DTYPES)), st.booleans(), st.booleans())
def test_speculators_folders_come_back(sizes: dict[str, Any], data: st.DataObject, dtype: Any, reduced: bool, norms: bool) -> None:
    form = Speculators(dtype=dtype, embedding=data.draw(st.booleans()))
    size = 30 if reduced else None
    comes_back(form, sizes, "eagle3", dtype, layers_of(data, sizes), draft_vocab_size=size, norm_features=norms)


@EXAMPLES
@given(SIZES, st.data(), st.sampled_from(sorted(DTYPES)), st.booleans(), st.booleans())
def test_sglang_folders_come_back(sizes: dict[str, Any], data: st.DataObject, dtype: Any, reduced: bool, norms: bool) -> None:
    form = SGLang(dtype=dtype, embedding=data.draw(st.booleans()))
    size = 30 if reduced else None
    comes_back(form, sizes, "eagle3", dtype, layers_of(data, sizes), draft_vocab_size=size, norm_features=norms)


@EXAMPLES
@given(SIZES, st.data(), st.sampled_from(["f32", "f16", "bf16"]), st.booleans())
def test_gguf_eagle3_files_come_back(sizes: dict[str, Any], data: st.DataObject, precision: Any, reduced: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        home, layers = Path(name), tuple(layers_of(data, sizes, 3))
        target = save_target(home / "target", **sizes)
        drafter = random_drafter(target, "eagle3", layers, draft_vocab_size=30 if reduced else None)
        folder = written(GGUF(quantization=precision), source_of(drafter, target, home / "drafter"), home / "out")
        again = load_drafter(folder, target=target)
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[precision]
        for key, value in drafter.state_dict().items():
            stored = value.to(dtype).float() if value.dim() > 1 else value  # vectors are fp32 always
            assert torch.equal(again.state_dict()[key], stored), key
        assert again.target.aux_layers == layers


@EXAMPLES
@given(SIZES, st.integers(1, 3), st.integers(1, 2), st.booleans(), st.sampled_from(sorted(DTYPES)))
def test_medusa_folders_come_back(sizes: dict[str, Any], heads: int, layers: int, own: bool, dtype: Any) -> None:
    form = MedusaFormat(dtype=dtype)
    comes_back(form, sizes, "medusa", dtype, None, heads=heads, layers=layers, own_heads=own)


@EXAMPLES
@given(SIZES, st.integers(2, 3), st.booleans(), st.booleans(), st.sampled_from([None, 24]), st.sampled_from(sorted(DTYPES)))
def test_mlp_speculator_folders_come_back(sizes: dict[str, Any], heads: int, tie: bool, scale: bool, inner: int | None, dtype: Any) -> None:
    form = MLPSpeculatorFormat(dtype=dtype)
    comes_back(form, sizes, "mlp_speculator", dtype, None, heads=heads, tie_weights=tie, scale_input=scale, inner_size=inner)


@EXAMPLES
@given(SIZES, st.integers(1, 3), st.integers(1, 2), st.sampled_from(sorted(DTYPES)))
def test_medusa_folders_with_the_originals_keys_come_back(sizes: dict[str, Any], heads: int, layers: int, dtype: Any) -> None:
    form = MedusaFormat(layout="original", dtype=dtype)
    comes_back(form, sizes, "medusa", dtype, None, heads=heads, layers=layers, own_heads=True)


@EXAMPLES
@given(SIZES, st.integers(1, 2), st.booleans(), st.sampled_from(sorted(DTYPES)))
def test_causal_lm_folders_come_back(sizes: dict[str, Any], layers: int, narrow: bool, dtype: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        target = save_target(home / "target", **sizes)
        drafter = random_drafter(target, "small_lm", layers=layers, **({"hidden_size": 16} if narrow else {}))
        source = source_of(drafter, target, home / "drafter")
        folder = written(FORMATS["causal_lm"](name="causal_lm", dtype=dtype), source, home / "out")
        again = load_drafter(folder, target=target)
        assert isinstance(drafter, SmallLM) and isinstance(again, SmallLM)
        wanted = drafter.to_causal_lm(source.head).to(DTYPES[dtype]).float().state_dict()
        assert again.lm.state_dict().keys() == wanted.keys()
        for key, value in again.lm.state_dict().items():
            assert torch.equal(value, wanted[key]), key


@pytest.fixture
def target(tmp_path: Path) -> TargetConfig:
    return save_target(tmp_path / "target")


def test_layer_ids_stand_in_both_conventions(tmp_path: Path, target: TargetConfig) -> None:
    source = source_of(random_drafter(target, "eagle3", (1, 3, 6)), target, tmp_path / "drafter")
    config = json.loads((written(SGLang(), source, tmp_path / "out") / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 5]
    assert config["num_aux_hidden_states"] == 3


@pytest.mark.parametrize("dropped", ["eagle_aux_hidden_state_layer_ids", "eagle_config"])
def test_either_layer_list_is_enough_to_read(tmp_path: Path, target: TargetConfig, dropped: str) -> None:
    folder = written(SGLang(), source_of(random_drafter(target, "eagle3", (1, 4, 6)), target, tmp_path / "drafter"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    del config[dropped]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_drafter(folder, target=target).target.aux_layers == (1, 4, 6)


def test_maps_are_offsets_and_a_mask(tmp_path: Path, target: TargetConfig) -> None:
    drafter = random_drafter(target, "eagle3", draft_vocab_size=20)
    folder = written(Speculators(), source_of(drafter, target, tmp_path / "drafter"), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["d2t"] + torch.arange(20), drafter.draft_ids)
    assert torch.equal(tensors["t2d"].nonzero().flatten(), drafter.draft_ids)
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool


def test_a_map_in_another_order_gives_the_same_drafter(tmp_path: Path, target: TargetConfig) -> None:
    drafter = random_drafter(target, "eagle3", draft_vocab_size=20)
    folder = written(SGLang(), source_of(drafter, target, tmp_path / "drafter"), tmp_path / "out")
    path = folder / "model.safetensors"
    tensors, order = load_file(path), torch.randperm(20)
    ids = (tensors["d2t"] + torch.arange(20))[order]
    from safetensors.torch import save_file

    save_file({**tensors, "d2t": ids - torch.arange(20), "lm_head.weight": tensors["lm_head.weight"][order].contiguous()}, path)
    again = load_drafter(folder, target=target)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in drafter.state_dict().items())


def test_speculators_folders_name_their_target(tmp_path: Path, target: TargetConfig) -> None:
    folder = written(Speculators(), source_of(random_drafter(target, "eagle3"), target, tmp_path / "drafter"), tmp_path / "out")
    assert load_drafter(folder).config.name == "eagle3"


def test_pairing_rows_turns_neighbours_as_halves_are_turned() -> None:
    weight = torch.randn(12, 5)
    assert torch.equal(unpaired(paired(weight, 2), 2), weight)
    assert torch.equal(paired(weight, 2)[:4], weight[[0, 3, 1, 4]])


def test_llama3_factors_are_transformers_scaling() -> None:
    from transformers import LlamaConfig

    own = LlamaRotaryEmbedding(LlamaConfig(head_dim=16, max_position_embeddings=128, rope_parameters=ROPES["llama3"])).inv_freq
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / llama3_factors(ROPES["llama3"], 16), own)


@pytest.mark.parametrize(
    ("form", "family", "options", "layers", "reason"),
    [
        ("gguf", "eagle3", {"norm_features": True}, None, "llama.cpp has no norm for each captured layer"),
        ("gguf", "eagle3", {}, (1, 2), "exactly three captured layers"),
        ("gguf", "medusa", {}, None, "llama.cpp has no such drafter"),
        ("openvino", "eagle3", {"norm_features": True}, None, "OpenVINO GenAI has no norm"),
        ("openvino", "eagle3", {}, (1, 2, 3, 4), "exactly three captured layers"),
        ("openvino", "small_lm", {}, None, "holds eagle3 drafters"),
        ("medusa", "medusa", {"root": True}, None, "drafter.root"),
        ("medusa", "medusa", {"draft_vocab_size": 20}, None, "drafter.draft_vocab_size 20"),
        ("medusa", "eagle3", {}, None, "holds medusa drafters"),
        ("mlp_speculator", "mlp_speculator", {"draft_vocab_size": 20}, None, "drafter.draft_vocab_size 20"),
        ("mlp_speculator", "mlp_speculator", {"heads": 1}, None, "vLLM ties only several heads"),
        ("mlp_speculator", "medusa", {}, None, "holds mlp_speculator drafters"),
        ("speculators", "medusa", {}, None, "holds eagle3 drafters"),
        ("sglang", "small_lm", {}, None, "holds eagle3 drafters"),
        ("causal_lm", "medusa", {}, None, "is no causal LM of its own"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_say_is_refused_by_name(
    target: TargetConfig, form: str, family: str, options: dict[str, Any], layers: tuple[int, ...] | None, reason: str
) -> None:
    drafter = random_drafter(target, family, layers, **options)
    with pytest.raises(UserError, match=reason) as refused:
        FORMATS[form](name=form).check(drafter.config, drafter.target)
    assert f"export format '{form}'" in str(refused.value)


def test_formats_and_importers_are_the_same_list() -> None:
    assert set(IMPORTS) | {"native"} == set(FORMATS)


def test_a_split_that_is_not_known_is_refused_and_can_be_given(tmp_path: Path, target: TargetConfig) -> None:
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = byte_tokenizer(64)
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save_pretrained(target.model)
    source = source_of(random_drafter(target, "eagle3"), target, tmp_path / "drafter")
    with pytest.raises(UserError, match="splits text \\(Whitespace\\) has no name known here"):
        written(GGUF(), source, tmp_path / "out")
    written(GGUF(pre_tokenizer="gpt-2"), source, tmp_path / "given")
