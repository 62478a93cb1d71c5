"""Checkpoints whose language model stands beside other parts, or whose files say less than they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from drafttrain.core.errors import UserError
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.target.adapter import Target, check_same_tokens, check_tokenizer, read_shape
from drafttrain.target.files import TargetConfig
from drafttrain.target.head import TargetHead
from tests.data.stores import V, make_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
EYE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip
VISION_LANGUAGE: dict[str, Any] = {
    "llava": lambda: LlavaConfig(
        text_config=LlamaConfig(**SIZES), vision_config=CLIPVisionConfig(projection_dim=16, **EYE), image_token_index=V - 1,
        tie_word_embeddings=False,
    ),
    "gemma3": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(head_dim=8, sliding_window=8, **SIZES), vision_config=SiglipVisionConfig(**EYE), mm_tokens_per_image=4,
    ),
}  # fmt: skip
"""Kind -> its configuration; one ties its output head, the other does not."""


def saved(config: Any, folder: Path, auto: Any = AutoModelForCausalLM) -> tuple[Any, TargetConfig]:
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model, TargetConfig(model=str(folder), dtype="float32", device="cpu")


@pytest.mark.parametrize("kind", VISION_LANGUAGE)
def test_the_text_model_of_a_vision_language_checkpoint_writes_what_the_whole_writes(kind: str, tmp_path: Path) -> None:
    whole, config = saved(VISION_LANGUAGE[kind](), tmp_path, AutoModelForImageTextToText)
    target = Target.load(config)
    assert read_shape(config) == target.shape
    prompt = list(range(6, 20))
    theirs = whole.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, len(prompt) :].tolist()
    ours = SpeculativeDecoder(target).generate([prompt], max_new_tokens=12)[0].tokens
    assert ours == theirs[: len(ours)]
    assert len(ours) == 12 or ours[-1] == 2
    head = TargetHead.from_folder(tmp_path)
    last = torch.randn(3, 32)
    torch.testing.assert_close(head.logits(last), target.head.logits(last), rtol=0, atol=0)


def test_images_are_refused_loudly() -> None:
    from drafttrain.target.template import render

    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1"}]}
    with pytest.raises(UserError, match="here: a message holds a part of type 'image'; only text is served"):
        render(make_tokenizer(), [image], "here")


def test_an_output_head_tuned_beside_the_tied_flag_is_read(tmp_path: Path) -> None:
    model, config = saved(LlamaConfig(**SIZES, tie_word_embeddings=False), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    head = TargetHead.from_folder(tmp_path)
    assert torch.equal(head.output, model.lm_head.weight)
    assert torch.equal(Target.load(config).head.output, head.output)


@pytest.mark.parametrize(("key", "value"), [("num_attention_heads", 0), ("hidden_size", 7), ("vocab_size", -1)])
def test_sizes_that_make_no_model_are_refused_without_weights(key: str, value: int, tmp_path: Path) -> None:
    _, config = saved(LlamaConfig(**SIZES), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError) as caught:
        read_shape(config)
    assert "config.json" in str(caught.value)


def more_tokens(count: int) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<more{number}>" for number in range(count)])
    return tokenizer


def test_tokens_added_beyond_the_rows_are_refused_only_in_a_prompt_that_holds_one(tmp_path: Path) -> None:
    _, config = saved(LlamaConfig(**SIZES), tmp_path)
    more_tokens(2).save_pretrained(tmp_path)
    decoder = SpeculativeDecoder(Target.load(config))
    assert decoder.generate(["w1 w2"], max_new_tokens=2)
    with pytest.raises(UserError, match=f"token id {V} in a prompt"):
        decoder.generate(["w1 <more0>"], max_new_tokens=2)
    with pytest.raises(UserError, match="belongs to another model"):
        check_tokenizer(make_tokenizer(), V - 1)


def test_one_tokenizer_under_tables_of_other_sizes_is_one_tokenizer(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    check_same_tokens(make_tokenizer(), str(tmp_path), V)
    with pytest.raises(UserError, match=f"has a vocabulary of {V}, the target's tokenizer {V + 1}"):
        check_same_tokens(more_tokens(1), str(tmp_path), V)
