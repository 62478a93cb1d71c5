"""A drafter is fed the layers it was trained on, or the decoder refuses: others draft badly without any error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain
from drafttrain.drafters.files import save_drafter
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.target.adapter import Target
from drafttrain.target.files import TargetConfig
from drafttrain.train import judge
from tests.data.stores import make_target
from tests.tiny import fitted, tiny_eagle3

PROMPTS = [[5, 9, 11, 30, 7], [10, 12, 13]]
RUNTIME = RuntimeConfig(shape=Chain(length=3))
OTHERS = r"trained on the target's layers \[0, 1, 3\], but this one hands over \[1, 2, 3\]; load it with aux_layers=\[0, 1, 3\]"


@pytest.fixture
def trained(tmp_path: Path) -> tuple[TargetConfig, Path, SpeculativeDecoder]:
    """A target on disk, a drafter on disk that reads other layers than the usual ones, and both in memory."""
    made = make_target()
    made.model.save_pretrained(tmp_path / "target")
    made.tokenizer.save_pretrained(tmp_path / "target")
    config = TargetConfig(model=str(tmp_path / "target"), dtype="float32", device="cpu")
    target = Target.load(config.model_copy(update={"aux_layers": (0, 1, 3)}))
    drafter = fitted(tiny_eagle3(target, ttt_steps=3), target, PROMPTS)
    save_drafter(drafter, tmp_path / "drafter")
    return config, tmp_path / "drafter", SpeculativeDecoder(target, drafter, RUNTIME)


def test_a_target_loaded_for_a_drafter_hands_over_the_layers_it_was_trained_on(
    trained: tuple[TargetConfig, Path, SpeculativeDecoder],
) -> None:
    config, folder, expected = trained
    loaded = SpeculativeDecoder.from_pretrained(config.model, folder, RUNTIME, dtype="float32", device="cpu")
    assert loaded.target.aux_layers == (0, 1, 3)
    here, there = (each.generate(PROMPTS, max_new_tokens=20) for each in (loaded, expected))
    assert [one.tokens for one in here] == [one.tokens for one in there]
    assert [one.statistics.rounds for one in here] == [one.statistics.rounds for one in there]


def test_other_layers_than_those_trained_on_are_refused_with_both(
    trained: tuple[TargetConfig, Path, SpeculativeDecoder], tmp_path: Path
) -> None:
    config, folder, own = trained
    chosen = config.model_copy(update={"aux_layers": (1, 2, 3)})
    for target in (chosen, Target.load(chosen)):
        with pytest.raises(UserError, match=OTHERS):
            SpeculativeDecoder.from_pretrained(target, folder)
    assert own.drafter is not None
    with pytest.raises(UserError, match=OTHERS):
        judge.labelled(Target.load(chosen), own.drafter, PROMPTS, lambda number, answer: True, 8, tmp_path / "labels")


def test_options_change_a_configuration_and_are_refused_where_they_would_change_nothing(
    trained: tuple[TargetConfig, Path, SpeculativeDecoder],
) -> None:
    config, folder, own = trained
    assert SpeculativeDecoder.from_pretrained(config, folder, dtype="bfloat16").target.dtype == torch.bfloat16
    for target in (config, config.model):
        with pytest.raises(UserError, match=r"unknown key 'dtyp' \(did you mean 'dtype'\?\)"):
            SpeculativeDecoder.from_pretrained(target, folder, dtyp="float32")
    with pytest.raises(UserError, match="option 'dtype' beside a target that is loaded already"):
        SpeculativeDecoder.from_pretrained(own.target, folder, dtype="float32")
    assert own.target.aux_layers == (0, 1, 3)
