"""transformers' own `generate` gives the same tokens with a drafter as without, whatever it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Static
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.files import save_drafter
from drafttrain.export.native import Native, write_custom_generate
from drafttrain.runtime.custom_generate import Speculative, drawing, speculative
from drafttrain.target.adapter import Target
from tests.tiny import fitted, tiny_eagle3, tiny_llama

PROMPTS = torch.tensor([[0, 0, 1, 2, 3], [9, 8, 7, 6, 5]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def model() -> Any:
    made: Any = tiny_llama()
    made.generation_config.pad_token_id = 0
    return made


@pytest.fixture(scope="module")
def drafted(model: Any) -> Speculative:
    target = Target(model)
    drafter = fitted(tiny_eagle3(target), target, [[1, 2, 3], [9, 8, 7, 6, 5]], steps=8)
    return speculative(drafter, {"shape": Static(children=(2, 1, 1))})


class Every(StoppingCriteria):
    """Ends a text at the third of a token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return (input_ids[:, 5:] == self.token).sum(1) >= 3


def even(input_ids: Tensor, scores: Tensor) -> Tensor:
    """Depends on how many tokens there are, pads included."""
    return scores.masked_fill(torch.arange(scores.shape[-1]) % 3 == input_ids.shape[1] % 3, float("-inf"))


ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "an end token": {"eos_token_id": "written"},
    "a repetition penalty": {"repetition_penalty": 1.5},
    "least tokens": {"min_new_tokens": 9, "eos_token_id": "written"},
    "processors": {"logits_processor": LogitsProcessorList([even])},
    "criteria": {"stopping_criteria": "of a token"},
    "a length": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(11)])},
}


@pytest.mark.parametrize("case", ASKED)
def test_tokens_are_those_of_plain_generate(model: Any, drafted: Speculative, case: str) -> None:
    asked = {"input_ids": PROMPTS, "attention_mask": MASK, "max_new_tokens": 20, "do_sample": False, **ASKED[case]}
    plain = model.generate(**{**asked, "eos_token_id": None, "stopping_criteria": None})
    if asked.get("eos_token_id"):
        asked["eos_token_id"] = [int(plain[0, 9]), int(plain[1, 11])]
    if case == "criteria":
        asked["stopping_criteria"] = StoppingCriteriaList([Every(int(plain[1, 5:].mode().values))])
    assert torch.equal(model.generate(**asked, custom_generate=drafted), model.generate(**asked))


class Heard:
    """A streamer."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_hears_every_token_as_from_plain_generate(model: Any, drafted: Speculative) -> None:
    heard = [Heard(), Heard()]
    model.generate(PROMPTS[1:], max_new_tokens=12, do_sample=False, streamer=heard[0])
    model.generate(PROMPTS[1:], max_new_tokens=12, do_sample=False, custom_generate=drafted.heard_by(heard[1]))
    assert heard[0].tokens == heard[1].tokens
    assert heard[0].ended == heard[1].ended == 1


def test_samples_follow_the_seed_and_the_warpers_are_shared_with_the_drafter(model: Any, drafted: Speculative) -> None:
    def sampled(seed: int) -> Any:
        torch.manual_seed(seed)
        return model.generate(
            PROMPTS[1:], max_new_tokens=12, do_sample=True, temperature=0.8, top_k=9, num_return_sequences=3, custom_generate=drafted,
            return_dict_in_generate=True,
        ).sequences

    assert torch.equal(sampled(1), sampled(1))
    assert not torch.equal(sampled(1), sampled(2))
    assert len({tuple(row) for row in sampled(1).tolist()}) > 1


def test_warpers_in_our_order_are_sampling_and_others_stay_processors() -> None:
    from transformers.generation.logits_process import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper

    temperature, top_k, min_p = TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), MinPLogitsWarper(0.1)
    assert drawing([even, temperature, top_k, min_p], True) == (Sampling(0.7, 5, min_p=0.1), [even])
    assert drawing([top_k, temperature], True) == (Sampling(0.7), [top_k])
    assert drawing([even], False) == (Sampling(), [even])


def test_a_pushed_folder_decodes_by_its_own_name(model: Any, drafted: Speculative, tmp_path: Path) -> None:
    folder = tmp_path / "pushed"
    save_drafter(drafted.drafter, folder)  # type: ignore[arg-type]
    write_custom_generate(folder, str(folder))
    asked = {"max_new_tokens": 10, "do_sample": False, "custom_generate": str(folder), "trust_remote_code": True}
    plain = model.generate(PROMPTS[1:], max_new_tokens=10, do_sample=False)
    found = model.generate(PROMPTS[1:], **asked, runtime={"shape": Chain(length=2)})
    assert torch.equal(found, plain)
    heard = Heard()
    assert torch.equal(model.generate(input_ids=PROMPTS[1:], streamer=heard, **asked), plain)
    assert heard.tokens == plain[0].tolist()
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(PROMPTS[1:], max_new_tokens=2, custom_generate=str(folder), trust_remote_code=False)
    assert "custom_generate" in Native().use("me/target")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams 2"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    ],
)
def test_what_rounds_cannot_give_is_refused(model: Any, drafted: Speculative, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=4, do_sample=False, custom_generate=drafted, **options)


def test_a_streamer_shows_one_text(model: Any, drafted: Speculative) -> None:
    with pytest.raises(UserError, match="there are 2 prompts"):
        model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=4, custom_generate=drafted.heard_by(Heard()))
