"""Exported directories hold the drafter itself: the native one, and a small LM as a plain causal LM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Plan
from drafttrain.core.renamed import Renamed
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.files import load_drafter, save_drafter
from drafttrain.drafters.small_lm import SmallLM, SmallLMConfig
from drafttrain.export import FORMATS, ExportConfig, export
from drafttrain.export.causal_lm import CausalLM
from drafttrain.export.native import Native
from drafttrain.report.card import Story, card
from drafttrain.target.adapter import Target
from drafttrain.target.files import TargetConfig
from drafttrain.train.loop import TrainConfig
from tests.data.stores import make_target
from tests.tiny import tiny_eagle3

PROMPT = [1, 3, 8, 9, 12, 2, 4, 20]
LENGTH = 6


@pytest.fixture
def target(tmp_path: Path) -> Target:
    """On disk too, in `tmp_path / "target"`."""
    made = make_target()
    made.model.save_pretrained(tmp_path / "target")
    made.tokenizer.save_pretrained(tmp_path / "target")
    return Target.load(config(tmp_path))


def config(folder: Path) -> TargetConfig:
    return TargetConfig(model=str(folder / "target"), dtype="float32", device="cpu")


def drafted(drafter: SmallLM, target: Target) -> list[int]:
    """A greedy chain behind the prompt, whose last token is the root."""
    lengths = torch.tensor([len(PROMPT) - 1])
    state = drafter.begin(torch.tensor([PROMPT[:-1]]), lengths, {}, target.head, 64)
    plan = Plan(Chain(length=LENGTH), "deterministic")
    with torch.inference_mode():
        tree = drafter.propose(state, torch.tensor(PROMPT[-1:]), plan, Sampling(), SeededRng(0, torch.tensor([0])))
    return tree.tokens[0, 1:].tolist()


@pytest.mark.parametrize("options", [{"layers": 2}, {"layers": 1, "hidden_size": 16}], ids=["borrows", "own"])
def test_the_causal_lm_directory_writes_what_the_small_lm_drafts(tmp_path: Path, target: Target, options: dict[str, int]) -> None:
    torch.manual_seed(3)
    drafter = SmallLM(SmallLMConfig(**options), target.shape).eval()
    with torch.no_grad():
        for name, weight in drafter.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.mul_(30.0)  # layers that say something, so that the text is not one token over and over
    save_drafter(drafter, tmp_path / "drafter")
    (folder,) = export(tmp_path / "drafter", config(tmp_path), ExportConfig(formats=("causal_lm",)), tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = drafted(drafter, target)
    tokens = list(PROMPT)
    for _ in range(LENGTH):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert tokens[len(PROMPT) :] == wanted
    assert len(set(wanted)) > 1
    assert AutoTokenizer.from_pretrained(folder).chat_template == target.tokenizer.chat_template


def test_the_native_directory_is_the_drafter(tmp_path: Path, target: Target) -> None:
    drafter = tiny_eagle3(target)
    save_drafter(drafter, tmp_path / "drafter")
    (folder,) = export(tmp_path / "drafter", config(tmp_path), ExportConfig(), tmp_path / "export")
    again = load_drafter(folder, target.fingerprint)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in drafter.state_dict().items())


def test_causal_lm_is_refused_for_a_drafter_that_is_no_language_model_and_leaves_nothing_behind(tmp_path: Path, target: Target) -> None:
    save_drafter(tiny_eagle3(target), tmp_path / "drafter")
    with pytest.raises(UserError, match=r"not eagle3 ones.*reads its target's hidden states"):
        export(tmp_path / "drafter", config(tmp_path), ExportConfig(formats=("causal_lm",)), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_causal_lm_is_refused_for_another_target(tmp_path: Path, target: Target) -> None:
    save_drafter(SmallLM(SmallLMConfig(layers=1), make_target(1, "another").shape), tmp_path / "drafter")
    with pytest.raises(UserError, match="was trained for target another"):
        export(tmp_path / "drafter", config(tmp_path), ExportConfig(formats=("causal_lm",)), tmp_path / "export")


def test_every_format_says_how_it_is_used_and_names_the_target() -> None:
    for name, form in FORMATS.items():
        text = form(name=name).use("someone/model")
        assert "```" in text and (name in ("gguf", "medusa") or "someone/model" in text)


def test_the_old_name_of_causal_lm_is_read_with_a_notice() -> None:
    with pytest.warns(Renamed, match="'plain' is called 'causal_lm' now"):
        formats = ExportConfig(formats=("native", "plain")).configs
    assert [type(form) for form in formats] == [Native, CausalLM]


def test_a_card_names_target_and_options_and_says_where_nothing_was_measured(tmp_path: Path, target: Target) -> None:
    notes = {"step": 1200, "tokens": 34000, "train": TrainConfig(steps=1200).model_dump(mode="json"), "held_out_tau": 1.234, "length": 2}
    save_drafter(tiny_eagle3(target, ttt_steps=3), tmp_path / "drafter", {**notes, "held_out_alpha": [0.2, 0.1]})
    hub = TargetConfig(model="someone/model")
    text = card(Native(), tmp_path / "drafter", Story("mine", hub, "3 conversations", tmp_path / "results.jsonl", "0.1"))
    for said in (
        "# mine", "base_model: someone/model", target.fingerprint, "1,200 steps over 34,000 tokens",
        "a chain of 2 has accepted length 1.23", "alpha 0.20 0.10", "3 conversations", "- `ttt_steps`: 3", "Not measured yet",
        'from_pretrained("someone/model"',
    ):  # fmt: skip
        assert said in text
    assert re.findall(r"\{[a-z_]+\}", text) == []  # every mark was filled in
