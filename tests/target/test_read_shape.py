"""What is read of a target without its weights equals what the loaded target says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GPT2Config

from drafttrain.core.errors import UserError
from drafttrain.drafters import DRAFTERS
from drafttrain.target.adapter import Target, read_shape
from drafttrain.target.files import TargetConfig, TargetShape
from tests.data.stores import make_target


@pytest.fixture
def config(tmp_path: Path) -> TargetConfig:
    made = make_target()
    made.model.generation_config.eos_token_id = [2, 9]
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    return TargetConfig(model=str(tmp_path), dtype="float32", device="cpu", aux_layers=(0, 2, 3))


@pytest.mark.parametrize("with_generation_config", [True, False])
def test_a_shape_read_without_weights_is_the_loaded_targets(config: TargetConfig, with_generation_config: bool) -> None:
    if not with_generation_config:
        (Path(config.model) / "generation_config.json").unlink()
    read, loaded = read_shape(config), Target.load(config).shape
    assert read == loaded
    assert read.eos_ids == ((2, 9) if with_generation_config else (2,))


def test_a_layer_that_the_target_lacks_is_refused_without_weights(config: TargetConfig) -> None:
    with pytest.raises(UserError, match=r"aux_layers \[1, 4\]: the target has hidden states 0..3"):
        read_shape(config.model_copy(update={"aux_layers": (1, 4)}))


@pytest.fixture
def gpt2(tmp_path: Path) -> TargetConfig:
    """A target whose configuration calls everything by names of its own."""
    made = make_target()
    sizes = GPT2Config(vocab_size=made.vocab_size, n_embd=32, n_layer=3, n_head=4, n_positions=96, bos_token_id=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(sizes).save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    return TargetConfig(model=str(tmp_path), dtype="float32", device="cpu")


@pytest.mark.parametrize("options", [{"name": "eagle3"}, {"name": "medusa"}, {"name": "small_lm"}, {"name": "small_lm", "hidden_size": 16}])
def test_every_family_is_built_for_a_target_that_names_its_sizes_in_its_own_way(gpt2: TargetConfig, options: dict[str, Any]) -> None:
    shape = read_shape(gpt2)
    assert shape == Target.load(gpt2).shape
    assert shape.max_context == 96
    family, saved = DRAFTERS[options["name"]], json.dumps(shape.to_json())
    first, again = (family(family.Config(**options), known) for known in (shape, TargetShape.from_json(json.loads(saved))))
    assert [weight.shape for weight in first.parameters()] == [weight.shape for weight in again.parameters()]
