"""Interleaved runs: what is decoded, what is journaled, what comes out as rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic
from drafttrain.core.sampling import Sampling
from drafttrain.drafters import build
from drafttrain.drafters.files import load_drafter, save_drafter
from drafttrain.drafters.hybrid import HybridConfig
from drafttrain.drafters.ngram import NgramConfig
from drafttrain.evaluation.bench import ContenderConfig, EvaluationConfig, contenders, evaluate, peers, read_rows
from drafttrain.evaluation.rows import Row
from drafttrain.evaluation.runners import GENERATE, PLAIN, Contender, Facts, Outcome
from drafttrain.evaluation.suites import Item, Suite, load_suite
from drafttrain.runtime.costs import in_turn
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from tests.evaluation.toys import CONFIG, SUITE, Letters, contender, lines, target
from tests.tiny import tiny_eagle3


@dataclass
class Spy:
    """A contender that remembers its prompts, and is interrupted before the n-th."""

    inner: Contender
    stop_at: int = -1
    prompts: list[list[int]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.inner.label

    def facts(self, sampling: Sampling) -> Facts:
        return self.inner.facts(sampling)

    def run(self, prompt: list[int], max_new_tokens: int, sampling: Sampling, seed: int) -> Outcome:
        if len(self.prompts) == self.stop_at:
            raise KeyboardInterrupt
        self.prompts.append(prompt)
        return self.inner.run(prompt, max_new_tokens, sampling, seed)


class Wrong(Spy):
    """Writes another token at place 5 of every answer."""

    def run(self, prompt: list[int], max_new_tokens: int, sampling: Sampling, seed: int) -> Outcome:
        outcome = super().run(prompt, max_new_tokens, sampling, seed)
        return replace(outcome, tokens=[*outcome.tokens[:5], outcome.tokens[5] ^ 1, *outcome.tokens[6:]])


def pick(rows: list[Row], label: str, task: str = "all") -> Row:
    key = (label, task, "all")
    return next(row for row in rows if (row.measured.label, row.measured.task, row.measured.outputs) == key)


def journaled(folder: Path) -> list[dict]:
    (path,) = (folder / "measurements").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_greedy_contenders_are_compared_with_plain_decoding_and_equal_it_in_fp32(tmp_path: Path) -> None:
    rows = evaluate(target(), [contender()], SUITE, CONFIG, tmp_path / "results.jsonl")
    row = pick(rows, contender().label)
    assert row.measured.exactness is not None
    assert (row.measured.exactness.compared, row.measured.exactness.different) == (4, 0)
    assert row.measured.tau > 1.2  # the drafter was fitted to these very texts
    assert pick(rows, PLAIN).measured.tau == 1.0


def test_rows_say_what_auto_prices_were_measured_to_be_but_are_asked_for_as_auto(tmp_path: Path) -> None:
    def beside_a_lookup(label: str, node_cost: Any) -> Contender:
        runtime = RuntimeConfig(shape=Chain(length=3), hybrid=HybridConfig(node_cost=node_cost))
        return Contender(label, SpeculativeDecoder(target(), contender().decoder.drafter, runtime))

    with_costs = [beside_a_lookup("measured", "auto"), beside_a_lookup("fixed", 0.02)]
    rows = evaluate(target(), with_costs, SUITE, CONFIG, tmp_path / "results.jsonl")
    measured, fixed = (pick(rows, one.label).measured for one in with_costs)
    assert measured.hybrid_costs == {"node_cost": with_costs[0].decoder.drafter.node_cost}
    assert measured.options == {"hybrid": {"node_cost": "auto"}}
    assert fixed.hybrid_costs is None


def test_a_row_pools_what_the_decoder_itself_counts(tmp_path: Path) -> None:
    row = pick(evaluate(target(), [contender()], SUITE, CONFIG, tmp_path / "results.jsonl"), contender().label, "signs")
    prompts = [Letters()(item.turns[0])["input_ids"] for item in SUITE.items if item.task == "signs"]
    statistics = [one.statistics for one in contender().decoder.generate(prompts, max_new_tokens=20, batch_size=1)]
    assert row.measured.rounds == sum(one.rounds for one in statistics)
    assert row.measured.tokens == sum(one.tokens for one in statistics) == 2 * 19
    assert row.measured.nodes_per_round == 3.0
    assert (row.measured.draft_length, row.measured.slots) == (3, 3)
    assert (row.measured.rule, row.measured.draws, row.measured.policy) == ("greedy", "deterministic", "fixed")
    assert [sum(counts) for counts in zip(*row.measured.positions, strict=True)] == [row.measured.rounds, row.measured.tokens]


def test_times_of_all_phases_add_up_to_the_wall_clock() -> None:
    outcome = contender().run([1, 2, 3], 20, Sampling(), 0)
    assert sum(outcome.statistics.seconds.values()) == pytest.approx(outcome.wall)
    assert min(outcome.statistics.seconds.values()) >= 0


def test_rows_in_the_file_are_the_rows_that_come_back(tmp_path: Path) -> None:
    rows = evaluate(target(), [contender()], SUITE, CONFIG, tmp_path / "results.jsonl")
    assert read_rows(tmp_path / "results.jsonl") == rows


def test_an_interrupted_run_goes_on_where_it_was_and_gives_the_same_rows(tmp_path: Path) -> None:
    whole = evaluate(target(), [contender()], SUITE, CONFIG, tmp_path / "whole" / "results.jsonl")
    out = tmp_path / "half" / "results.jsonl"
    first, second = Spy(contender(), stop_at=2), Spy(contender())
    with pytest.raises(KeyboardInterrupt):
        evaluate(target(), [first], SUITE, CONFIG, out)
    assert not out.exists()
    rows = evaluate(target(), [second], SUITE, CONFIG, out)
    assert len(first.prompts) == len(second.prompts) == 2
    assert len(rows) == len(whole)
    for ours, theirs in zip(rows, whole, strict=True):
        assert (ours.measured.tau, ours.measured.alpha, ours.measured.rounds, ours.measured.looping) == (
            theirs.measured.tau, theirs.measured.alpha, theirs.measured.rounds, theirs.measured.looping
        )  # fmt: skip


def test_rows_name_the_code_that_decoded_and_both_where_it_changed_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["before", "after", "later"])
    monkeypatch.setattr("drafttrain.evaluation.bench.commit", lambda: next(commits))
    out = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(target(), [Spy(contender(), stop_at=2)], SUITE, CONFIG, out)
    assert {row.commit for row in evaluate(target(), [contender()], SUITE, CONFIG, out)} == {"before, after"}
    with monkeypatch.context() as patch:  # nothing is left to decode: the code that only adds up is not named
        patch.setattr("drafttrain.evaluation.bench.read_rows", lambda path: [])
        assert {row.commit for row in evaluate(target(), [contender()], SUITE, CONFIG, out)} == {"before, after"}


class Doubled(Spy):
    """Begins the same run once more while it runs."""

    def run(self, prompt: list[int], max_new_tokens: int, sampling: Sampling, seed: int) -> Outcome:
        evaluate(target(), [self.inner], SUITE, CONFIG, Path(self.label))
        raise AssertionError("both were let in")


def test_a_run_that_is_being_measured_already_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    with pytest.raises(UserError, match="another process writes it now"):
        evaluate(target(), [Doubled(contender(str(out)))], SUITE, CONFIG, out)


def test_a_torn_last_line_of_the_journal_is_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(target(), [Spy(contender(), stop_at=3)], SUITE, CONFIG, out)
    (journal,) = (tmp_path / "measurements").glob("*.jsonl")
    journal.write_bytes(journal.read_bytes()[:-20])
    again = Spy(contender())
    evaluate(target(), [again], SUITE, CONFIG, out)
    assert len(again.prompts) == 2  # the torn one and the one that was never begun
    assert [entry["item"] for entry in journaled(tmp_path)] == ["a", "b", "c", "d"]


def test_a_finished_run_is_measured_anew_and_its_counts_are_equal_to_the_last_digit(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    first = evaluate(target(), [contender()], SUITE, CONFIG, out)
    second = evaluate(target(), [contender()], SUITE, CONFIG, out)
    assert lines(out) == len(first) + len(second)
    assert first[0].run.removesuffix("-1") == second[0].run.removesuffix("-2")
    assert [row.measured.tau for row in first] == [row.measured.tau for row in second]


def test_another_configuration_is_another_run(tmp_path: Path) -> None:
    changes = [{}, {"max_new_tokens": 16}, {"seed": 1}, {"limit": 1}]
    configs = [CONFIG.model_copy(update=change) for change in changes]
    runs = [evaluate(target(), [], SUITE, config, tmp_path / "results.jsonl")[0].run for config in configs]
    assert len({run.removesuffix("-1") for run in runs}) == len(changes)
    assert all(run.endswith("-1") for run in runs)


def test_every_runner_is_warmed_up_on_the_longest_prompts_untimed(tmp_path: Path) -> None:
    spy = Spy(contender())
    evaluate(target(), [spy], SUITE, CONFIG.model_copy(update={"warmup": 1}), tmp_path / "results.jsonl")
    assert spy.prompts[0] == Letters()(":;<=>?@")["input_ids"]
    assert len(spy.prompts) == 1 + len(SUITE.items)


def test_runners_take_turns_in_going_first_and_in_following_each_other() -> None:
    runners = [contender(name) for name in "abc"]
    orders = ["".join(runner.label for runner in in_turn(runners, place)) for place in range(6)]
    assert Counter(order[0] for order in orders) == {"a": 2, "b": 2, "c": 2}
    pairs = Counter(order[at : at + 2] for order in orders for at in (0, 1))
    assert pairs == dict.fromkeys(["ab", "bc", "ca", "ba", "cb", "ac"], 2)


def test_an_output_that_leaves_plain_decoding_is_counted_with_the_targets_margin(tmp_path: Path) -> None:
    rows = evaluate(target(), [Wrong(contender())], SUITE, CONFIG, tmp_path / "results.jsonl")
    exactness = pick(rows, contender().label).measured.exactness
    assert exactness is not None
    assert (exactness.different, exactness.prompts) == (4, ("a", "b", "c", "d"))
    prompt = Letters()(SUITE.items[0].turns[0])["input_ids"]
    plain = contender().decoder.generate([prompt], max_new_tokens=20)[0].tokens
    logits = target().model(torch.tensor([prompt + plain[:5]])).logits[0, -1]
    assert exactness.margins[0] == pytest.approx(float(logits[plain[5]] - logits[plain[5] ^ 1]), rel=1e-4)
    assert all(margin is not None and margin > 0 for margin in exactness.margins)


def test_a_second_turn_follows_plain_decodings_own_answer(tmp_path: Path) -> None:
    suite = Suite("talk", (Item("x", "chat", ("ABC", "DEF")),))
    spy = Spy(contender())
    evaluate(target(), [spy], suite, CONFIG, tmp_path / "results.jsonl")
    answer = contender().decoder.generate([spy.prompts[0]], max_new_tokens=20)[0].tokens
    assert spy.prompts[1] == Letters()("ABC")["input_ids"] + answer + Letters()("DEF")["input_ids"]
    assert pick(read_rows(tmp_path / "results.jsonl"), PLAIN).measured.prompts == 2


def test_mt_bench_is_asked_turn_by_turn_behind_plain_decodings_answers_whoever_else_answers(tmp_path: Path) -> None:
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["ABC", "DEF"]},
        {"question_id": 111, "category": "math", "turns": ["5:<N3", "@?>", "AB"], "reference": ["1", "2", "3"]},
    ]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    spy = Wrong(contender())
    config = CONFIG.model_copy(update={"turns": 3})
    rows = evaluate(target(), [spy], load_suite(f"mt_bench:{tmp_path}"), config, tmp_path / "results.jsonl")
    expected = []
    for question in questions:
        heard: list[int] = []
        for turn in question["turns"]:
            heard += Letters()(turn)["input_ids"]
            expected.append(list(heard))
            heard += contender().decoder.generate([heard], max_new_tokens=20)[0].tokens
    assert spy.prompts == expected
    assert [pick(rows, PLAIN, task).measured.prompts for task in ("writing", "math", "all")] == [2, 3, 5]


def test_a_conversation_that_outgrows_the_context_stops_there(tmp_path: Path) -> None:
    suite = Suite("talk", (Item("x", "chat", ("ABC", "D" * 240, "EF")),))
    rows = evaluate(target(), [], suite, CONFIG.model_copy(update={"turns": 3}), tmp_path / "results.jsonl")
    assert pick(rows, PLAIN).measured.prompts == 1


def test_sampled_texts_depend_on_seed_item_and_repeat_only_and_are_not_called_inexact(tmp_path: Path) -> None:
    suite = Suite("same", (Item("a", "letters", ("ABC",)), Item("b", "letters", ("ABC",))))
    config = CONFIG.model_copy(update={"temperature": 1.0, "repeats": 2})
    for name in ("one", "two"):
        rows = evaluate(target(), [contender()], suite, config, tmp_path / name / "results.jsonl")
    samples = [[one for entry in journaled(tmp_path / name) for one in entry["samples"]] for name in ("one", "two")]
    texts = [[one["outcome"]["tokens"] for one in run] for run in samples]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts[0]}) == len(texts[0])
    assert all(one["difference"] is None for one in samples[0])
    row = pick(rows, contender().label)
    assert (row.measured.rule, row.measured.draws, row.temperature) == ("rejection", "iid", 1.0)
    assert row.measured.exactness is None


def test_a_prompt_beyond_the_context_is_refused_by_its_id_before_anything_is_decoded(tmp_path: Path) -> None:
    suite = Suite("long", (*SUITE.items, Item("much", "signs", ("A" * 250,))))
    spy = Spy(contender())
    with pytest.raises(UserError, match=r"item 'much': 250 prompt tokens and 20 new ones .* context of 256"):
        evaluate(target(), [spy], suite, CONFIG, tmp_path / "results.jsonl")
    assert spy.prompts == []


def test_by_default_every_turn_is_asked_and_generate_is_the_second_baseline() -> None:
    config = EvaluationConfig()
    assert config.chosen(Suite("talk", (Item("x", "chat", ("ABC", "DEF")),))).items[0].turns == ("ABC", "DEF")
    assert [peer.label for peer in peers(target(), config)] == [GENERATE]


@pytest.mark.parametrize("labels", [("a", "a"), ("a", PLAIN), ("a", GENERATE)])
def test_labels_that_could_be_confused_are_refused(tmp_path: Path, labels: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="label"):
        evaluate(target(), [contender(label) for label in labels], SUITE, CONFIG, tmp_path / "results.jsonl")


def test_results_that_cannot_be_read_or_written_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "results.jsonl")
    (tmp_path / "results.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="line 1: not JSON"):
        read_rows(tmp_path / "results.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        evaluate(target(), [], SUITE, CONFIG, tmp_path / "file" / "results.jsonl")


def test_contenders_come_from_folders_with_names_and_fingerprints_of_their_files(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_drafter(tiny_eagle3(target(), seed), tmp_path / f"run{seed}" / "drafter")
    wide = RuntimeConfig(shape=Dynamic(depth=2, beam=2, top_k=2, nodes=5))
    more = (ContenderConfig(label="wide", runtime=wide), ContenderConfig(label="other", drafter=str(tmp_path / "run1")))
    config = CONFIG.model_copy(update={"contenders": more})
    made = contenders(target(), tmp_path / "run0" / "drafter", RuntimeConfig(shape=Chain(length=2)), config)
    facts = [one.facts(Sampling()) for one in made]
    assert [one.label for one in made] == ["eagle3 chain-2", "wide", "other"]
    assert [fact.slots for fact in facts] == [2, 5, 2]
    assert facts[0].drafter_fingerprint == facts[1].drafter_fingerprint != facts[2].drafter_fingerprint


def test_a_drafters_fingerprint_follows_every_byte_of_its_files(tmp_path: Path) -> None:
    drafter = tiny_eagle3(target())
    folder = save_drafter(drafter, tmp_path / "drafter")

    def mark(**around: Any) -> str | None:
        decoder = SpeculativeDecoder(target(), load_drafter(folder), RuntimeConfig(shape=Chain(length=2), **around))
        return Contender("mine", decoder).facts(Sampling()).drafter_fingerprint

    before = mark()
    assert before == mark(hybrid=HybridConfig()) == mark(corrupt=0.5)
    with torch.no_grad():
        next(drafter.parameters()).view(-1)[-1] += 1e-3
    save_drafter(drafter, folder)
    assert mark() != before
    assert contender().facts(Sampling()).drafter_fingerprint == "in-memory"


def test_efficiency_is_measured_once_and_kept_over_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"efficiency": True})

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("drafttrain.evaluation.bench.append_whole", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(target(), [contender()], SUITE, config, tmp_path / "results.jsonl")
    before = journaled(tmp_path)
    rows = evaluate(target(), [contender()], SUITE, config, tmp_path / "results.jsonl")
    assert journaled(tmp_path) == before
    assert set(before[-1]["efficiency"]) == {PLAIN, contender().label}
    assert pick(rows, contender().label).measured.loop_efficiency is not None


def test_two_lookups_with_other_options_are_told_apart_and_equal_ones_are_not() -> None:
    def mark(shortest: int) -> str | None:
        lookup = build(NgramConfig(shortest=shortest), target().shape)
        return Contender("lookup", SpeculativeDecoder(target(), lookup)).facts(Sampling()).drafter_fingerprint

    assert mark(3) == mark(3) != mark(1)
