"""Options that change logits by the text before them hold at every node of a tree along its own path, whichever rule verifies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, NoBadWordsLogitsProcessor, NoRepeatNGramLogitsProcessor, SequenceBiasLogitsProcessor

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic, Static
from drafttrain.core.rng import ScriptedRng, branches
from drafttrain.core.sampling import Sampling
from drafttrain.runtime import generate as loops
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.runtime.rows import Request
from drafttrain.target.adapter import Target
from drafttrain.target.sample import Job, Sampler
from tests.tiny import tiny_eagle3, tiny_llama, tiny_target

PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7], [5, 5, 6, 5, 5, 6, 5]]
SHAPES = [Chain(length=3), Static(children=(3, 2)), Dynamic(depth=3, beam=3, top_k=3, nodes=8)]
NEW = 20


class Alternates:
    """A grammar: even tokens after odd ones and odd after even ones; raises for a text that cannot be."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answer = input_ids[:, self.prompt - 1 :] % 2
        assert (answer[:, 1:] != answer[:, :-1]).all(), "asked about a text that the grammar forbids"
        even = torch.arange(scores.shape[-1]) % 2
        return scores.masked_fill(even == answer[:, -1:], float("-inf"))


def generated(target: Target, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
    return out[0, len(prompt) :].tolist()


OURS_AND_THEIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "repetition penalty": ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    "n-grams": ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    "bias": (
        {"logit_bias": {3: 2.5, 7: -4.0}},
        {"logits_processor": LogitsProcessorList([SequenceBiasLogitsProcessor([[[3], 2.5], [[7], -4.0]])])},
    ),
    "several": (
        {"repetition_penalty": 1.3, "logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(3)])},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    ),
}  # fmt: skip


def decoder(target: Target, shape: Any = None, **runtime: Any) -> SpeculativeDecoder:
    return SpeculativeDecoder(target, tiny_eagle3(target) if shape else None, {"shape": shape, **runtime} if shape else None)


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.mark.parametrize("shape", [None, *SHAPES], ids=lambda shape: getattr(shape, "shape", "plain"))
@pytest.mark.parametrize("case", OURS_AND_THEIRS)
def test_greedy_texts_are_those_of_generate_with_the_same_options(target: Target, shape: Any, case: str) -> None:
    ours, theirs = OURS_AND_THEIRS[case]
    texts = [one.tokens for one in decoder(target, shape).generate(PROMPTS, max_new_tokens=NEW, **ours)]
    assert texts == [generated(target, prompt, **theirs) for prompt in PROMPTS]
    assert texts != [generated(target, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("shape", [None, *SHAPES], ids=lambda shape: getattr(shape, "shape", "plain"))
def test_words_are_never_completed_whatever_their_tokens_are_drafted_by(target: Target, shape: Any) -> None:
    plain = [generated(target, prompt) for prompt in PROMPTS]
    words = [plain[0][4:6], plain[1][2:5], plain[2][:1]]
    texts = [one.tokens for one in decoder(target, shape).generate(PROMPTS, max_new_tokens=NEW, bad_words=words)]
    processor = LogitsProcessorList([NoBadWordsLogitsProcessor(words)])
    assert texts == [generated(target, prompt, logits_processor=processor) for prompt in PROMPTS]
    assert texts != plain


@pytest.mark.parametrize("rule", ["auto", "longest", "reflective"])
def test_a_grammar_is_obeyed_and_only_asked_about_texts_that_may_be(target: Target, rule: str) -> None:
    for shape in SHAPES[:2]:
        for prompt in PROMPTS[:2]:
            rules = {"rule": {"name": "reflective", "prompt": (1, 2)} if rule == "reflective" else rule}
            grammar = Alternates(len(prompt))
            text = decoder(target, shape, **rules).generate(prompt, max_new_tokens=NEW, logits_processor=grammar)[0].tokens
            parity = [token % 2 for token in prompt[-1:] + text]
            assert all(left != right for left, right in pairwise(parity))
            if rule == "auto":
                assert text == generated(target, prompt, logits_processor=LogitsProcessorList([grammar]))


def test_penalties_of_an_answer_count_its_own_tokens_alone(target: Target) -> None:
    def penalised(ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.zeros_like(scores).scatter_add_(1, ids[:, 3:], torch.ones_like(ids[:, 3:], dtype=scores.dtype))
        return scores - 0.6 * (counts > 0) - 0.4 * counts

    options = {"presence_penalty": 0.6, "frequency_penalty": 0.4}
    for shape in (None, *SHAPES):
        text = decoder(target, shape).generate(PROMPTS[1], max_new_tokens=NEW, **options)[0].tokens  # type: ignore[arg-type]
        assert text == generated(target, PROMPTS[1], logits_processor=LogitsProcessorList([penalised]))


# -- the exact distribution -----------------------------------------------------------------------------------------------------------

V = 3
PROMPT = [0, 2, 1]


class OpensWithOne:
    """A grammar: an answer begins with token 1, and after two tokens of a kind comes another."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == len(PROMPT):
            return scores.masked_fill(torch.arange(V) != 1, float("-inf"))
        twice = (input_ids[:, -1] == input_ids[:, -2])[:, None] & (torch.arange(V) == input_ids[:, -1:])
        return scores.masked_fill(twice, float("-inf"))


OPTIONS = {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "logit_bias": {0: 0.4}, "bad_words": [[1, 2, 0]]}


def by_hand(model: torch.nn.Module, text: list[int], sampling: Sampling) -> Tensor:
    """[V] the distribution of the next token, from one plain forward and the options' definitions."""
    logits = model(torch.tensor([text])).logits[0, -1].detach()
    logits[0] += 0.4
    for token in range(V):
        if token in text:
            logits[token] *= 1.4 if logits[token] < 0 else 1 / 1.4
        logits[token] -= 0.3 * text[len(PROMPT) :].count(token)
    if text[-2:] == [1, 2]:
        logits[0] = float("-inf")
    return sampling.probs(OpensWithOne()(torch.tensor([text]), logits[None])[0]).double()


WHOLE, CUT = Sampling(1.0), Sampling(0.9, min_p=0.3)
RULED = [
    ("plain", None, {}, WHOLE),
    ("rejection", Chain(length=2), {}, WHOLE),
    ("rejection", Chain(length=2), {}, CUT),
    ("recursive", Static(children=(2, 1)), {}, WHOLE),
    ("traversal", Static(children=(2, 1)), {}, CUT),
    ("recursive", Dynamic(depth=2, beam=2, top_k=2, nodes=4), {}, WHOLE),
    ("multidraft", Static(children=(2, 1)), {"draws": "iid"}, CUT),
]


@pytest.mark.parametrize(("rule", "shape", "runtime", "sampling"), RULED)
def test_tokens_come_with_the_changed_targets_probability(
    rule: str, shape: Any, runtime: dict[str, Any], sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every branch of drafting, scoring, processing and verifying, through the loop itself; what a round leaves open goes on by hand."""
    target = tiny_target(1, vocab_size=V)
    made = SpeculativeDecoder(target, tiny_eagle3(target) if shape else None, {"shape": shape, "rule": rule, **runtime} if shape else None)
    _, processing = made._drawing(sampling, {**OPTIONS, "logits_processor": OpensWithOne()})  # type: ignore[typeddict-item]
    found: dict[tuple[int, ...], float] = defaultdict(float)
    exact = {text: by_hand(target.model, PROMPT + list(text), sampling) for text in [(), (1,), (1, 0), (1, 1), (1, 2)]}
    for rng in branches(1):
        monkeypatch.setattr(loops, "SeededRng", lambda *_, rng=rng: rng)
        loop = made.batch(sampling, processing=processing)
        loop.start([Request(PROMPT, 0, 3)])
        loop.step()
        assert isinstance(rng, ScriptedRng)
        text = tuple(loop.written[0])
        if len(text) == 3:
            found[text] += rng.probability
        else:
            for token, share in enumerate(exact[text].tolist()):
                found[(*text, token)] += rng.probability * share
    wanted = {
        (1, second, third): float(exact[1,][second] * exact[1, second][third]) for second in range(V) for third in range(V)
    }
    assert float(exact[()][1]) == 1
    assert sum(abs(found[text] - share) for text, share in wanted.items()) / 2 < 1e-6
    assert set(found) <= {text for text, share in wanted.items()}


# -- what the target asks for itself --------------------------------------------------------------------------------------------------

OWN = [
    {"repetition_penalty": 1.6}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [3, 5, 9]},
    {"sequence_bias": [[[4], 3.0]], "repetition_penalty": 1.4}, {"bad_words_ids": [[5], [6, 7]]},
]  # fmt: skip


def asking(**options: Any) -> Target:
    model: Any = tiny_llama()
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    return Target(model)


@pytest.mark.parametrize("options", OWN, ids=", ".join)
def test_what_a_targets_generation_config_asks_for_is_done_by_every_decoding(options: dict[str, Any]) -> None:
    target = asking(**options)
    wanted = [generated(target, prompt) for prompt in PROMPTS]
    for shape in (None, SHAPES[1]):
        assert [one.tokens for one in decoder(target, shape).generate(PROMPTS, max_new_tokens=NEW)] == wanted
    jobs = [Job(number, prompt, NEW) for number, prompt in enumerate(PROMPTS)]
    written = {one.id: one.tokens[one.prompt_len :] for one in Sampler(target, 2, 40).run(jobs)}
    assert [written[number] for number in range(len(PROMPTS))] == wanted


def test_the_caller_goes_before_the_targets_own_options_and_min_p_is_for_drawing_alone() -> None:
    target, plain = asking(repetition_penalty=1.6, min_p=0.9), tiny_target()
    ours = decoder(target).generate(PROMPTS, max_new_tokens=NEW, repetition_penalty=1.0)
    assert [one.tokens for one in ours] == [one.tokens for one in decoder(plain).generate(PROMPTS, max_new_tokens=NEW)]
    assert target.sampling(Sampling(1.0)).min_p == 0.9
    assert target.sampling(Sampling()).min_p == 0
    assert decoder(target)._drawing(Sampling(1.0), {"min_p": 0.0})[0].min_p == 0
    assert decoder(target)._drawing(Sampling(1.0), {"top_n_sigma": 1.0})[0] == Sampling(1.0, min_p=0.9, top_n_sigma=1.0)


def refused() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"repetition_penalty": 0.0}, "repetition_penalty 0"
    yield {"repetition_penalty": "much"}, "repetition_penalty 'much'"
    yield {"min_p": 1.5}, r"min_p 1\.5"
    yield {"typical_p": 0.0}, "typical_p 0"
    yield {"top_n_sigma": -1.0}, "top_n_sigma -1"
    yield {"frequency_penalty": float("nan")}, "frequency_penalty nan"
    yield {"logit_bias": {99: 1.0}}, "logit_bias: token 99"
    yield {"logit_bias": {1: float("inf")}}, "logit_bias of token 1"
    yield {"logit_bias": [1]}, "expected a mapping"
    yield {"bad_words": [[]]}, "empty word"
    yield {"bad_words": ["word"]}, "no tokenizer"
    yield {"bad_words": "word"}, "expected a list"
    yield {"bad_words": [[token] for token in range(64)]}, "forbid all 64"
    yield {"no_repeat_ngram_size": -1}, "no_repeat_ngram_size -1"
    yield {"logits_processor": 3}, "logits_processor holds 3"
    yield {"logits_processor": lambda ids, scores: scores[:, :2]}, "expected it to return logits of shape"
    yield {"logits_processor": lambda ids, scores: scores * 0 + float("-inf")}, "forbid every token"
    yield {"num_beams": 4}, "'num_beams' is refused"
    yield {"min_pp": 4}, "'min_pp' is unknown"


@pytest.mark.parametrize(("options", "message"), refused())
def test_options_that_make_no_sense_are_refused_by_name(target: Target, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        decoder(target, SHAPES[0]).generate(PROMPTS[0], max_new_tokens=4, **options)


def test_a_grammar_that_comes_to_an_end_must_allow_an_end(target: Target) -> None:
    def dead_after_six(ids: Tensor, scores: Tensor) -> Tensor:
        return scores if ids.shape[1] < len(PROMPTS[0]) + 6 else scores * 0 + float("-inf")

    speculative = decoder(target, SHAPES[1])
    assert len(speculative.generate(PROMPTS[0], max_new_tokens=6, logits_processor=dead_after_six)[0].tokens) == 6
    with pytest.raises(UserError, match="forbid every token"):
        speculative.generate(PROMPTS[0], max_new_tokens=12, logits_processor=dead_after_six)
