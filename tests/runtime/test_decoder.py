"""The loop: rows, limits, ends, counts. Exactness of rules is in tests/contract."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic, Static
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.files import save_drafter
from drafttrain.drafters.hybrid import HybridConfig
from drafttrain.runtime.decoder import RESOLVED, RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.rows import Request
from tests.data.stores import make_target
from tests.tiny import VOCAB, fitted, greedy_text, tiny_eagle3, tiny_target

SHAPES = [Chain(length=4), Static(children=(3, 2)), Dynamic(depth=3, beam=3, top_k=3, nodes=8)]
PROMPTS = [[5, 9, 11, 30, 2, 7], [1, 2, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48]]


def decoder(shape: Any, seed: int = 0, **target_options: Any) -> SpeculativeDecoder:
    target = tiny_target(seed, **target_options)
    return SpeculativeDecoder(target, fitted_eagle3(seed), RuntimeConfig(shape=shape))


@lru_cache
def fitted_eagle3(seed: int) -> Drafter:
    target = tiny_target(seed)
    return fitted(tiny_eagle3(target, seed, ttt_steps=4), target, PROMPTS)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.shape)
def test_greedy_text_is_the_models_own_for_every_shape_alone_and_in_a_batch(shape: Any) -> None:
    speculative = decoder(shape)
    expected = [greedy_text(speculative.target.model, prompt, 24) for prompt in PROMPTS]
    together = speculative.generate(PROMPTS, max_new_tokens=24)
    alone = [speculative.generate(prompt, max_new_tokens=24)[0] for prompt in PROMPTS]
    assert [one.tokens for one in together] == expected
    assert [one.tokens for one in alone] == expected
    assert sum(one.statistics.tokens for one in together) > sum(one.statistics.rounds for one in together)  # something was accepted


def test_a_round_takes_one_target_forward_one_wait_and_a_chain_of_k_takes_k_drafter_calls() -> None:
    speculative = decoder(Chain(length=3))
    statistics = speculative.generate(PROMPTS[0], max_new_tokens=20)[0].statistics
    assert statistics.target_forwards == statistics.rounds + 1  # the prefill
    assert statistics.syncs == statistics.rounds + 1
    assert statistics.drafter_calls == 3 * statistics.rounds + 1  # one over the prompt


def test_sampled_text_does_not_depend_on_the_batch() -> None:
    speculative = decoder(Chain(length=3))
    together = speculative.generate(PROMPTS, max_new_tokens=16, temperature=1.0, seed=3, n=2)
    one_by_one = speculative.generate(PROMPTS, max_new_tokens=16, temperature=1.0, seed=3, n=2, batch_size=1)
    assert [one.tokens for one in together] == [one.tokens for one in one_by_one]
    assert together[0].tokens != together[1].tokens  # two samples of a prompt are drawn apart


def test_end_token_inside_an_accepted_block_cuts_exactly_there() -> None:
    plain = decoder(Chain(length=4))
    text = plain.generate(PROMPTS[0], max_new_tokens=24)[0].tokens
    cut = 0
    for end in set(text):
        speculative = decoder(Chain(length=4), eos_token_id=end)
        got = speculative.generate(PROMPTS[0], max_new_tokens=24)[0]
        assert got.tokens == text[: text.index(end) + 1]
        assert got.finish == "eos"
        cut += got.origins[-1] == 1  # the drafter wrote the end token
    assert cut > 0


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.shape)
def test_the_host_knows_every_rows_length_whichever_token_of_a_block_ends_it(shape: Any, stopped: bool) -> None:
    text = decoder(shape).generate(PROMPTS[0], max_new_tokens=24)[0].tokens
    ended = 0  # rows that a drafted token ended
    for end in sorted(set(text)):
        batch = decoder(shape, eos_token_id=end).batch(Sampling())
        batch.stopper = (lambda row, tokens: min(len(tokens), 8 + 3 * row)) if stopped else None
        batch.start([Request(prompt, number, 20 + number) for number, prompt in enumerate(PROMPTS)])
        while not batch.done:
            ended += sum(one.done and 0 < len(one.tokens) == one.accepted for one in batch.step())
            assert batch.done or batch.rows.lengths == batch.cache.lengths.tolist()
    assert ended > 0


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_the_length_limit_holds_to_the_token(limit: int) -> None:
    got = decoder(Dynamic(depth=3, beam=3, top_k=3, nodes=8)).generate(PROMPTS, max_new_tokens=limit)
    assert [len(one.tokens) for one in got] == [limit] * 3
    assert {one.finish for one in got} == {"length"}


def test_statistics_add_up_to_the_tokens_after_the_first() -> None:
    got = decoder(Static(children=(3, 2))).generate(PROMPTS, max_new_tokens=17)
    for one in got:
        assert one.statistics.tokens == len(one.tokens) - 1
        assert one.statistics.accepts[0] <= one.statistics.attempts[0] <= one.statistics.rounds
        assert sum(one.origins) == sum(one.statistics.accepts)


def test_options_that_no_rule_honours_are_refused_by_name() -> None:
    speculative = decoder(Chain(length=2))
    with pytest.raises(UserError, match="'num_beams' is refused"):
        speculative.generate(PROMPTS[0], num_beams=2)
    with pytest.raises(UserError, match="'temprature' is unknown"):
        speculative.generate(PROMPTS[0], temprature=1.0)
    with pytest.raises(UserError, match="seed 9223372036854775808"):
        speculative.generate(PROMPTS[0], seed=2**63)
    with pytest.raises(UserError, match="temperature -1"):
        speculative.generate(PROMPTS[0], temperature=-1.0)


def test_a_prompt_beyond_the_context_and_an_empty_one_are_refused() -> None:
    speculative = decoder(Chain(length=2))
    with pytest.raises(UserError, match="context of 256"):
        speculative.generate([1] * 250, max_new_tokens=20)
    with pytest.raises(UserError, match="empty prompt"):
        speculative.generate([[]])


def test_draws_that_a_shape_cannot_keep_exact_are_refused() -> None:
    with pytest.raises(UserError, match="dynamic trees"):
        decoder(SHAPES[2]).runtime.model_copy(update={"draws": "iid"}).fitted(sampling=_at(1.0))


def _at(temperature: float) -> Any:
    from drafttrain.core.sampling import Sampling

    return Sampling(temperature)


class Letters:
    """A tokenizer of one letter a token."""
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012
    all_special_tokens: tuple[str, ...] = ()
    all_special_ids: tuple[int, ...] = ()

    chat_template = None
    eos_token_id = None

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("0") + token) for token in tokens)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("0") for letter in text]}


def test_a_stop_string_ends_the_text_before_it_wherever_it_falls_in_a_block() -> None:
    speculative = decoder(Chain(length=4))
    speculative.target.tokenizer = Letters()
    whole = speculative.generate(PROMPTS[0], max_new_tokens=24)[0]
    for at in range(1, 20):
        stop = whole.text[at : at + 2]
        got = speculative.generate(PROMPTS[0], max_new_tokens=24, stop=[stop])[0]
        assert got.text == whole.text[: whole.text.index(stop)]
        assert got.finish == "stop"


def test_streamed_pieces_join_to_the_generated_text_with_both_origins() -> None:
    speculative = decoder(Chain(length=4))
    speculative.target.tokenizer = Letters()
    answer = speculative.stream(PROMPTS[0], max_new_tokens=24)
    pieces = list(answer)
    assert "".join(piece.text for piece in pieces) == speculative.generate(PROMPTS[0], max_new_tokens=24)[0].text
    assert {piece.origin for piece in pieces} == {0, 1}
    assert answer.statistics.tokens == 23
    assert answer.statistics.decode_seconds == answer.statistics.decode_seconds > 0  # told as often as asked


def test_streams_of_one_decoder_do_not_mix_their_figures() -> None:
    speculative = decoder(Chain(length=4))
    speculative.target.tokenizer = Letters()
    long, short = (speculative.stream(PROMPTS[0], max_new_tokens=count) for count in (24, 9))
    next(long)
    list(short)
    list(long)
    alone = speculative.generate(PROMPTS[0], max_new_tokens=24)[0].statistics
    assert (long.statistics.tokens, short.statistics.tokens) == (23, 8)
    assert (long.statistics.target_forwards, long.statistics.drafter_calls) == (alone.target_forwards, alone.drafter_calls)


def test_no_part_of_a_stop_string_is_ever_streamed() -> None:
    speculative = decoder(Chain(length=4))
    speculative.target.tokenizer = Letters()
    whole = speculative.generate(PROMPTS[0], max_new_tokens=24)[0].text
    for at in range(1, 20):
        stop = [whole[at : at + 3], whole[-2:] + "never"]  # the second begins at the text's end and never comes
        pieces = list(speculative.stream(PROMPTS[0], max_new_tokens=24, stop=stop))
        assert "".join(piece.text for piece in pieces) == speculative.generate(PROMPTS[0], max_new_tokens=24, stop=stop)[0].text
    assert "".join(piece.text for piece in speculative.stream(PROMPTS[0], max_new_tokens=24, stop=whole[-2:] + "never")) == whole


class Halves(Letters):
    """Each odd token is the first half of a letter, which the next token makes whole."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        text, half = "", False
        for token in tokens:
            text, half = text + ("" if not half and token % 2 else chr(ord("0") + token)), not half and token % 2 == 1
        return text + ("\ufffd" if half else "")


def test_streamed_text_is_the_generated_one_where_characters_span_tokens() -> None:
    speculative = decoder(Chain(length=4))
    speculative.target.tokenizer = Halves()
    for count in range(1, 24):  # some of which end in half a character
        pieces = list(speculative.stream(PROMPTS[0], max_new_tokens=count))
        assert "".join(piece.text for piece in pieces) == speculative.generate(PROMPTS[0], max_new_tokens=count)[0].text
        assert not any("\ufffd" in piece.text for piece in pieces[:-1])


def test_a_lone_stop_string_is_one_and_not_its_letters() -> None:
    speculative = decoder(Chain(length=4))
    speculative.target.tokenizer = Letters()
    whole = speculative.generate(PROMPTS[0], max_new_tokens=24)[0].text
    parts = (whole[at : at + 3] for at in range(20))
    stop = next(part for part in parts if min(map(whole.index, part)) < whole.index(part))  # its letters stand earlier, too
    assert speculative.generate(PROMPTS[0], max_new_tokens=24, stop=stop)[0].text == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": ["x", ""]}, "stop '': an empty string"),
        ({"batch_size": 0}, "batch_size 0: at least one row"),
        ({"prompts": [[1, VOCAB]]}, f"token id {VOCAB} in a prompt: the target's ids are 0 to {VOCAB - 1}"),
        ({"prompts": [[-1]]}, "token id -1 in a prompt"),
        ({"stop": "x"}, "no tokenizer to read texts with"),
        ({"stop": 5}, "stop 5: expected a string or a list of strings"),
        ({"stop": ["x", None]}, "stop ['x', None]: expected a string"),
        ({"max_new_tokens": 4.0}, "max_new_tokens 4.0: an answer has at least one token; give a whole number from 1 up"),
        ({"max_new_tokens": None}, "max_new_tokens None"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": -3}, "max_new_tokens -3"),
        ({"n": 0}, "n 0: at least one sample"),
        ({"n": 1.5}, "n 1.5"),
        ({"batch_size": None}, "batch_size None"),
        ({"seed": None}, "seed None: expected a whole number"),
        ({"seed": 0.5}, "seed 0.5"),
        ({"temperature": "hot"}, "temperature 'hot' is not 0 or a finite positive number"),
        ({"temperature": None}, "temperature None"),
        ({"top_k": 1.5}, "top_k 1.5 is not a whole number"),
        ({"top_p": "0.9"}, "top_p '0.9' is outside"),
        ({"on_round": 1}, "on_round 1"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        decoder(Chain(length=2)).generate(**{"prompts": PROMPTS, "max_new_tokens": 4, **options})


NO_PROMPTS = (
    None, 5, 1.5, b"text", {"role": "user", "content": "Hello."}, [None], [5, "a"], [[5, "a"]], [[[5]]], torch.ones(3), torch.tensor(3)
)  # fmt: skip


@pytest.mark.parametrize("prompts", NO_PROMPTS)
def test_what_is_no_prompt_is_refused_with_what_would_be_one(prompts: Any) -> None:
    with pytest.raises(UserError, match=r"prompt .*: expected a message's text, a conversation .*, or a list of token ids"):
        decoder(Chain(length=2)).generate(prompts, max_new_tokens=4)
    with pytest.raises(UserError, match="prompt"):
        next(decoder(Chain(length=2)).stream(prompts, max_new_tokens=4))


def test_token_ids_may_come_as_integer_tensors_and_no_stop_as_none() -> None:
    speculative = decoder(Chain(length=2))
    expected = [one.tokens for one in speculative.generate([PROMPTS[0], PROMPTS[0]], max_new_tokens=4)]
    ids = torch.tensor(PROMPTS[0])
    for prompts in ([ids, ids], torch.stack([ids, ids]), [tuple(PROMPTS[0])] * 2):
        assert [one.tokens for one in speculative.generate(prompts, max_new_tokens=4, stop=None)] == expected
    assert speculative.generate(ids, max_new_tokens=4)[0].tokens == expected[0]


def test_the_folder_of_a_run_decodes_as_its_recipe_says(tmp_path: Path) -> None:
    target, drafter = tiny_target(0), fitted_eagle3(0)
    save_drafter(drafter, tmp_path / "run" / "drafter")
    chosen = RuntimeConfig(shape=SHAPES[2], hybrid=HybridConfig(draft_cost=0.2))
    recipe = tmp_path / "run" / RESOLVED
    recipe.write_text(yaml.safe_dump({"name": "tiny", "runtime": chosen.model_dump(mode="json")}))
    assert SpeculativeDecoder.from_pretrained(target, tmp_path / "run").runtime == chosen
    given = SpeculativeDecoder.from_pretrained(target, tmp_path / "run", {"shape": {"shape": "chain", "length": 2}})
    assert given.runtime == RuntimeConfig(shape=Chain(length=2))
    assert SpeculativeDecoder.from_pretrained(target, tmp_path / "run" / "drafter").runtime == RuntimeConfig()
    recipe.write_text("runtime: {shape: [")
    with pytest.raises(UserError, match=r"recipe\.resolved\.yaml': damaged"):
        SpeculativeDecoder.from_pretrained(target, tmp_path / "run")
    with pytest.raises(UserError, match=r"runtime: .*unknown key 'shap' \(did you mean 'shape'\?\)"):
        SpeculativeDecoder(target, drafter, {"shap": {}})


def test_a_hook_sees_every_round_before_it_is_cut() -> None:
    seen = []
    speculative = decoder(Chain(length=3))
    got = speculative.generate(PROMPTS[0], max_new_tokens=20, on_round=lambda record: seen.append(record.verdict.length))
    assert len(seen) == got[0].statistics.rounds


def test_committed_tokens_are_never_fed_to_the_target_again() -> None:
    speculative = decoder(Chain(length=3))
    widths: list[int] = []
    forward = speculative.target.backbone.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    speculative.target.backbone.forward = counted  # type: ignore[method-assign]
    speculative.generate(PROMPTS[0], max_new_tokens=20)
    assert widths[0] == len(PROMPTS[0])
    assert set(widths[1:]) == {4}  # the root and three drafted tokens, never more


def test_plain_decoding_goes_through_the_same_loop() -> None:
    target = tiny_target()
    plain = SpeculativeDecoder(target).generate(PROMPTS, max_new_tokens=16)
    assert [one.tokens for one in plain] == [greedy_text(target.model, prompt, 16) for prompt in PROMPTS]
    assert plain[0].statistics.tau == 1.0
    assert torch.tensor(plain[0].tokens).max() < VOCAB


def test_a_stop_string_that_is_a_special_token_ends_a_text_and_one_that_holds_one_is_refused() -> None:
    made = make_target()
    decoder = SpeculativeDecoder(made)
    text = decoder.generate([[4, 9, 11]], max_new_tokens=24)[0].tokens
    word = made.tokenizer.convert_ids_to_tokens(text[1])
    made.tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    stopped = decoder.generate([[4, 9, 11]], max_new_tokens=24, stop=word)[0]
    assert (stopped.tokens, stopped.finish) == (text[: text.index(text[1]) + 1], "stop")
    with pytest.raises(UserError, match="holds the special token"):
        decoder.generate([[4, 9, 11]], max_new_tokens=4, stop=f"{word}x")
