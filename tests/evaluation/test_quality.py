"""Quality of texts: what the target says of each token, final answers, and the control with spoilt drafts."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain
from drafttrain.core.sampling import Sampling
from drafttrain.evaluation.bench import EvaluationConfig, evaluate, judged_labels, read_rows
from drafttrain.evaluation.check import AnswerCheck
from drafttrain.evaluation.quality import JudgedText, excess_surprisal, judge, pooled, read_text
from drafttrain.evaluation.rows import Row, Sample
from drafttrain.evaluation.runners import PLAIN, Contender, Facts
from drafttrain.evaluation.suites import Suite
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from tests.evaluation.toys import CONFIG, SUITE, Letters, TrustingRuntime, contender, sample, target

PROMPT = [5, 10, 12, 30, 3]
OPTIONS = [Sampling(), Sampling(1.0), Sampling(0.7), Sampling(1.3, top_k=5), Sampling(0.7, top_p=0.8), Sampling(1.0, 7, 0.9)]


def test_the_targets_word_on_every_token_is_that_of_its_plain_forward() -> None:
    tokens = torch.randint(64, (150,), generator=torch.Generator().manual_seed(0)).tolist()  # more than the logits held at once
    logits = target().model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) : -1]
    read = read_text(target(), PROMPT, tokens, Sampling())
    chosen = torch.tensor(tokens[1:])
    assert torch.equal(read.agreed, logits.argmax(-1) == chosen)
    probs = logits.softmax(-1)
    naive = (probs.max(-1).values / probs.gather(-1, chosen[:, None])[:, 0]).log()
    torch.testing.assert_close(read.excess, naive, rtol=1e-4, atol=1e-4)  # fp32 through two cache layouts


@pytest.mark.parametrize("sampling", OPTIONS, ids=str)
def test_excess_is_zero_in_expectation_where_plain_decoding_draws(sampling: Sampling) -> None:
    logits = 3 * torch.randn(1, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    every = excess_surprisal(logits.expand(20, -1), torch.arange(20), sampling)
    assert float((sampling.probs(logits)[0] * every).sum()) == pytest.approx(0, abs=1e-5)
    assert every.isfinite().all()
    assert float(every.max()) > 1  # an unlikely token costs nats


def test_excess_of_sampling_is_against_the_distribution_at_its_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    _, middle, high = (logits / 0.5).softmax(-1)[0].log().tolist()
    found = float(excess_surprisal(logits, torch.tensor([1]), Sampling(0.5, top_k=2)))
    kept = torch.tensor([middle, high]).softmax(0)  # what top-k leaves, renormalised
    assert found == pytest.approx(-middle + float(kept[0]) * middle + float(kept[1]) * high, rel=1e-5)


def test_excess_of_greedy_decoding_is_positive_but_for_the_argmax() -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(2))
    every = excess_surprisal(logits.expand(20, -1), torch.arange(20), Sampling())
    assert every[logits.argmax()] == 0
    assert (every > 0).sum() == 19


def test_an_answer_of_the_prefills_token_alone_has_no_committed_tokens() -> None:
    judged = judge(target(), PROMPT, [4], "4", "4", None, Sampling())
    assert judged == JudgedText(0, 0, 0.0)
    assert pooled([judged]) == {
        "tokens": 0, "argmax_agreement": None, "excess_kl": None, "checked": 0, "right": None, "compared": 0, "same_answer": None,
    }  # fmt: skip


def test_shares_are_pooled_over_tokens_and_over_the_answers_that_could_be_checked() -> None:
    judged = [
        JudgedText(10, 10, 0.0, True, True),
        JudgedText(30, 20, 8.0, False, True),
        JudgedText(40, 40, 0.0),
        JudgedText(20, 20, 2.0, False, None),
    ]
    assert pooled(judged) == {
        "tokens": 100, "argmax_agreement": 0.9, "excess_kl": 0.1, "checked": 3, "right": 1 / 3, "compared": 2, "same_answer": 1.0,
    }  # fmt: skip
    assert pooled([]) is None


@pytest.mark.parametrize(
    ("text", "plain", "right", "same"),
    [
        ("so 4", "is 4", True, True), ("so 5", "is 4", False, False), ("so 5", "5 it is", False, True),
        ("so what", "is 4", False, False), ("so 4", "what", True, False),
        ("so", "what", False, None),  # two texts without an answer do not agree on one
    ],
)
def test_an_answer_is_compared_with_the_right_one_and_with_plain_decodings(text: str, plain: str, right: bool, same: bool | None) -> None:
    judged = judge(target(), PROMPT, [4, 5], text, plain, AnswerCheck("number", ("4",)), Sampling())
    assert (judged.right, judged.same) == (right, same)


@pytest.mark.parametrize(("body", "right"), [("return 2 * x", True), ("return 3 * x", False)])
def test_programs_are_run_only_where_that_is_asked_for(body: str, right: bool) -> None:
    check = AnswerCheck("code", ("assert twice(2) == 4",), header="def twice(x):\n")
    text = f"```python\n    {body}\n```"
    assert judge(target(), PROMPT, [4, 5], text, text, check, Sampling(), execute=True).right is right
    assert judge(target(), PROMPT, [4, 5], text, text, check, Sampling()).right is None


def test_lossy_contenders_are_judged_and_plain_decoding_beside_them_or_everyone_where_asked() -> None:
    facts = {PLAIN: Facts(), "exact": Facts(rule="greedy"), "lossy": Facts(rule="typical", lossless=False)}
    assert judged_labels(facts, EvaluationConfig()) == {PLAIN, "lossy"}
    assert judged_labels({PLAIN: Facts(), "exact": Facts()}, EvaluationConfig()) == set()
    assert judged_labels(facts, EvaluationConfig(quality=True)) == judged_labels(facts, EvaluationConfig(execute_code=True)) == set(facts)


def test_programs_are_refused_where_they_could_not_be_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drafttrain.evaluation.bench.can_execute", lambda: False)
    with pytest.raises(UserError, match="execute_code"):
        evaluate(target(), [], SUITE, CONFIG.model_copy(update={"execute_code": True}), tmp_path / "results.jsonl")


def spoilt(label: str, runtime: RuntimeConfig, probability: float) -> Contender:
    drafter = contender().decoder.drafter
    assert drafter is not None
    return Contender(label, SpeculativeDecoder(target(), drafter, runtime.model_copy(update={"corrupt": probability})))


@lru_cache
def answered() -> Suite:
    """The toy suite, each item's answer being what plain decoding writes."""
    texts = [SpeculativeDecoder(target()).generate([item.turns[0]], max_new_tokens=20)[0].text for item in SUITE.items]
    checks = [AnswerCheck("word", (text,)) for text in texts]
    return Suite("answered", tuple(replace(item, check=check) for item, check in zip(SUITE.items, checks, strict=True)))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """Rows of clean and spoilt drafts (every second token swapped), under a lossless rule and under a lossy one."""
    kept, trusted = RuntimeConfig(shape=Chain(length=3)), TrustingRuntime(shape=Chain(length=3))
    kinds = product((("exact", kept), ("lossy", trusted)), (0, 0.5))
    runs = [spoilt(f"{name} {probability}", runtime, probability) for (name, runtime), probability in kinds]
    path = tmp_path_factory.mktemp("control") / "results.jsonl"
    measured = evaluate(target(), runs, answered(), CONFIG.model_copy(update={"quality": True}), path)
    return {row.measured.label: row for row in measured if (row.measured.task, row.measured.outputs) == ("all", "all")}


def test_spoilt_drafts_cost_a_lossless_rule_speed_but_no_quality(rows: dict[str, Row]) -> None:
    assert rows["exact 0.5"].measured.tau < rows["exact 0"].measured.tau
    for label in (PLAIN, "exact 0", "exact 0.5"):
        quality = rows[label].measured.quality
        assert quality is not None
        assert quality["tokens"] == 4 * 19
        assert (quality["argmax_agreement"], quality["right"], quality["same_answer"]) == (1.0, 1.0, 1.0)
        assert quality["excess_kl"] == 0.0


def test_spoilt_drafts_cost_a_lossy_rule_quality_but_no_speed(rows: dict[str, Row]) -> None:
    clean, broken = rows["lossy 0"].measured, rows["lossy 0.5"].measured
    assert clean.tau == broken.tau
    assert clean.quality is not None
    assert broken.quality is not None
    assert not broken.lossless
    assert broken.quality["argmax_agreement"] < clean.quality["argmax_agreement"] < 1  # type: ignore[operator]
    assert broken.quality["excess_kl"] > clean.quality["excess_kl"] > 0  # type: ignore[operator]
    assert broken.quality["right"] == broken.quality["same_answer"] == 0


def test_a_lossy_row_has_quality_unasked_and_it_comes_back_from_the_files(tmp_path: Path) -> None:
    runs = [spoilt("lossy", TrustingRuntime(shape=Chain(length=3)), 0.5), contender("exact")]
    rows = evaluate(target(), runs, answered(), CONFIG, tmp_path / "results.jsonl")
    assert read_rows(tmp_path / "results.jsonl") == rows
    assert {row.measured.label for row in rows if row.measured.quality is not None} == {PLAIN, "lossy"}
    written = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["label"] for line in written if line["quality"] is None} == {"exact"}


def test_samples_and_rows_written_before_quality_was_measured_are_still_read(tmp_path: Path) -> None:
    old = sample("a", "mine", 1.0, 4, 2).to_json()
    del old["quality"]
    assert Sample.from_json(old) == sample("a", "mine", 1.0, 4, 2)
    judged = sample("a", "mine", 1.0, 4, 2, quality=JudgedText(4, 3, 0.5, True, False))
    assert Sample.from_json(json.loads(json.dumps(judged.to_json()))) == judged
    (row, *_) = evaluate(target(), [], SUITE, CONFIG, tmp_path / "results.jsonl")
    written = row.to_json()
    del written["quality"]
    assert Row.from_json(json.loads(json.dumps(written)), "here") == row


def test_the_text_that_is_judged_is_the_contenders_own(tmp_path: Path) -> None:
    lossy = spoilt("lossy", TrustingRuntime(shape=Chain(length=3)), 0.5)
    evaluate(target(), [lossy], answered(), CONFIG, tmp_path / "results.jsonl")
    (journal,) = (tmp_path / "measurements").glob("*.jsonl")
    for entry in map(json.loads, journal.read_text().splitlines()):
        for one in entry["samples"]:
            prompt = next(Letters()(item.turns[0])["input_ids"] for item in SUITE.items if item.id == one["item"])
            read = read_text(target(), prompt, one["outcome"]["tokens"], Sampling())
            assert one["quality"]["agreed"] == int(read.agreed.sum())
