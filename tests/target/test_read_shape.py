"""What is read of a target without its weights equals what the loaded target says."""

from __future__ import annotations

from pathlib import Path

import pytest

from drafttrain.core.errors import UserError
from drafttrain.target.adapter import Target, read_shape
from drafttrain.target.files import TargetConfig
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
