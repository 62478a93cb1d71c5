"""Rules on the same logged trees."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic, Static
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored
from drafttrain.evaluation import rule_rows, rules
from drafttrain.evaluation.bench import EvaluationConfig
from drafttrain.evaluation.limits import ACCEPTANCE
from drafttrain.evaluation.rule_rows import RuleRow, read_rule_rows
from drafttrain.evaluation.rules import Levels, RuleOnTrial, RuleOutcome, compare, judge_rounds, judges, replay_rules
from drafttrain.evaluation.runners import Contender
from drafttrain.report.rule_tables import figures_table, rules_table
from drafttrain.report.tables import render, stale
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.rounds import LoggedProbs, RoundLog, joined, log_rounds
from drafttrain.verify import RULES, build
from drafttrain.verify.multidraft import limit
from tests.evaluation.toys import SUITE, contender, target

WARM = Sampling(temperature=0.9)
PROMPTS = [[5, 9, 11, 30, 2, 7], [1, 2, 3], [40, 41, 42, 43], [7, 7]]


def rule(name: str, form: Any = "whole", **options: Any) -> RuleOnTrial:
    return RuleOnTrial(build(RULES[name].Config(name=name, **options)), form)


def logged(folder: Path, shape: Any, new: int = 40, sampling: Sampling = WARM, **runtime: Any) -> tuple[RoundLog, LoggedProbs]:
    drafter = contender().decoder.drafter
    assert drafter is not None
    decoder = SpeculativeDecoder(target(), drafter, RuntimeConfig(shape=shape, **runtime))
    log = log_rounds(decoder, PROMPTS * 3, sampling, new, folder, "d")
    return log, LoggedProbs(log.info, drafter, target().head)


@pytest.mark.parametrize("shape", [Chain(length=3), Static(children=(3, 2)), Dynamic(depth=3, beam=2, top_k=3, nodes=7)])
def test_a_rule_replayed_on_its_own_rounds_gives_the_accepted_length_that_decoding_logged(shape: Any, tmp_path: Path) -> None:
    log, logged_probs = logged(tmp_path, shape)
    (judged,) = judge_rounds(log, logged_probs, [rule(log.info.rule)], chances=32, seed=7)
    accepted = torch.cat([part.accepted for part in log.parts()]).numpy()
    residual = accepted - judged.lengths  # of mean 0, whatever the tree
    assert abs(residual.mean()) < 3 * residual.std() / np.sqrt(len(residual))
    assert residual.std() < accepted.std()  # and smaller than what trees differ by
    assert judged.reached[0] > 0.05


def test_rejection_has_its_closed_form_on_chains_and_recursive_agrees(tmp_path: Path) -> None:
    log, logged_probs = logged(tmp_path, Chain(length=3))
    rounds = joined(list(log.parts()))
    assert rounds.q is not None
    stands = (rounds.p / rounds.q)[:, 1:].clamp_max(1).double().cumprod(1)  # [n, K]
    rejection, recursive = judge_rounds(log, logged_probs, [rule("rejection"), rule("recursive")], chances=400)
    noise = rejection.lengths.std() / np.sqrt(400)
    assert abs(rejection.lengths.mean() - stands.sum(1).mean().item()) < 0.02
    np.testing.assert_allclose(rejection.lengths, stands.sum(1).numpy(), atol=5 * max(noise, 0.07))
    np.testing.assert_allclose(recursive.lengths.mean(), stands.sum(1).mean().item(), atol=0.02)
    np.testing.assert_allclose(rejection.reached, stands.mean(0).numpy(), atol=0.01)


def test_the_first_chain_of_a_tree_is_judged_as_the_chain_it_is(tmp_path: Path) -> None:
    log, logged_probs = logged(tmp_path, Static(children=(3, 2)))
    rounds = joined(list(log.parts()))
    assert rounds.q is not None
    nodes = [1, 4]  # first child of the root, its first child
    stands = (rounds.p / rounds.q)[:, nodes].clamp_max(1).cumprod(1).sum(1)
    (chain,) = judge_rounds(log, logged_probs, [rule("rejection", "first chain")], chances=200)
    assert abs(chain.lengths.mean() - stands.mean().item()) < 0.02
    np.testing.assert_allclose(chain.lengths, stands.numpy(), atol=0.25)


def test_the_result_does_not_depend_on_how_rounds_and_chances_are_grouped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, logged_probs = logged(tmp_path, Static(children=(3, 2)), new=12)
    every = [rule("recursive"), rule("rejection", "first chain")]
    whole = judge_rounds(log, logged_probs, every, chances=6, seed=1)
    for elements in (1, 64 * 14 * 4, 64 * 14 * 20):
        monkeypatch.setattr(rules, "ELEMENTS", elements)
        for one, other in zip(judge_rounds(log, logged_probs, every, chances=6, seed=1), whole, strict=True):
            np.testing.assert_array_equal(one.lengths, other.lengths)


def test_every_registered_rule_is_judged_or_left_out_with_a_reason(tmp_path: Path) -> None:
    for shape, topology in ((Chain(length=2), "chain"), (Static(children=(2, 2)), "tree")):
        log, _ = logged(tmp_path / topology, shape, new=6)
        every, left_out = judges(log.info)
        whole = {judge.rule.config.name for judge in every if judge.form == "whole"}
        assert whole | {note.partition(":")[0] for note in left_out} == set(RULES)
        fits = {
            name for name, kind in RULES.items()
            if kind.lossless and kind.temperatures != "zero" and (log.info.draws, topology) in kind.accepts
            and not any(field.is_required() for field in kind.Config.model_fields.values())
        }  # fmt: skip
        assert whole == fits
        assert every[0].label == ("rejection" if topology == "chain" else "recursive")
        assert ([judge.label for judge in every if judge.form != "whole"] == ["rejection, first chain"]) == (topology == "tree")


def test_intervals_are_over_prompts_and_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(40), 25)
    base = rng.normal(2, 0.5, 1000) + rng.normal(0, 1, 40)[prompt]  # prompts differ far more than rules
    first, second = (RuleOutcome(rule("recursive"), lengths, np.zeros(2)) for lengths in (base, base + 0.05 + rng.normal(0, 0.01, 1000)))
    own, other = compare([first, second], prompt)
    assert own.tau.value == pytest.approx(base.mean() + 1)
    assert own.difference.value == own.difference.low == 0
    assert other.difference.low is not None and other.difference.high is not None
    assert 0.045 < other.difference.low < 0.05 < other.difference.high < 0.055
    assert own.tau.low is not None and own.tau.high is not None
    half = (own.tau.high - own.tau.low) / 2
    assert half > 0.15  # as 40 prompts allow, not 1000 rounds
    assert other.relative.value == pytest.approx(other.tau.value / own.tau.value - 1)


def test_rows_name_what_was_measured_and_rounds_are_logged_once(tmp_path: Path) -> None:
    config = EvaluationConfig(max_new_tokens=20, temperature=1.0, repeats=2)
    trees = RuntimeConfig(shape=Static(children=(2, 2)))
    both = [Contender("chain", contender().decoder), Contender("tree", SpeculativeDecoder(target(), contender().decoder.drafter, trees))]
    rows, left_out = replay_rules(target(), both, SUITE, config, tmp_path, chances=4)
    assert any(note.startswith("greedy: for temperature 0 only") for note in left_out)
    assert {row.contender for row in rows} == {"chain", "tree"}
    assert all(row.prompts == 4 and row.probs_gap < 1e-5 for row in rows)
    by_rule = {row.rule: row for row in rows if row.contender == "chain"}
    assert by_rule["rejection"].decoded_by == "rejection"
    assert by_rule["rejection"].tau.value == pytest.approx(by_rule["rejection"].decoded_tau, abs=0.3)
    assert len(list((tmp_path / "rounds").iterdir())) == 2
    before = target().forwards
    again, _ = replay_rules(target(), both, SUITE, config, tmp_path, chances=4)
    assert target().forwards == before
    assert [row.tau for row in again] == [row.tau for row in rows]
    written = [json.loads(line) for line in (tmp_path / "rules.jsonl").read_text().splitlines()]
    assert len(written) == 2 * len(rows)
    assert written[0]["rule"] == rows[0].rule and written[0]["format"] == rule_rows.FORMAT
    table = rules_table(rows + again)
    assert table.count("| rejection |") == 1  # the chain's, once, though it was measured twice
    assert table.count("| rejection, first chain |") == 1


ROWS = 100_000
TOP_DOWN = [("recursive", {}), ("recursive", {"naive": True}), ("multidraft", {}), ("multidraft", {"scheme": "tournament"})]


@pytest.mark.parametrize(("name", "options"), TOP_DOWN)
@pytest.mark.parametrize("K", [1, 2, 3])
def test_the_acceptance_that_is_set_beside_the_limit_is_the_rules_own(name: str, options: dict[str, Any], K: int) -> None:
    """On 100,000 draws of K iid siblings: to 5 standard errors."""
    p, q = torch.tensor([[0.4, 0.05, 0.3, 0.1, 0.1, 0.05], [0.1, 0.4, 0.2, 0.05, 0.05, 0.2]])
    rng = SeededRng(K, torch.arange(ROWS))
    drawn = rng.draw(q.expand(ROWS, 1, -1), K, replace=True)[:, 0]
    tokens = torch.cat([torch.zeros(ROWS, 1).long(), drawn], 1)
    zeros = torch.zeros_like(tokens)
    tree = Tree(tokens, zeros, zeros == 0, "iid", 1, K, draft_probs=q.expand(ROWS, 1, -1), probs_row=zeros)
    judge = rule(name, **options)
    verdict = judge.rule(tree, Scored(p.log().expand(ROWS, K + 1, -1), Sampling(1.0)), rng)
    expected = float(ACCEPTANCE[name](judge.rule.config, p[None], q[None], K)[0])
    assert abs(verdict.length.double().mean().item() - expected) < 5 * np.sqrt(0.25 / ROWS)
    assert expected <= float(limit(p, q, K)) + 1e-6  # fp32 distributions


def test_the_limit_stands_beside_acceptance_at_the_nodes_whose_children_were_tried(tmp_path: Path) -> None:
    log, logged_probs = logged(tmp_path, Static(children=(3, 2)), draws="iid")
    recursive, multidraft, traversal, chain = judge_rounds(
        log, logged_probs, [rule("recursive"), rule("multidraft"), rule("traversal"), rule("rejection", "first chain")], chances=32
    )
    assert traversal.levels is None and chain.levels is None  # not top-down; another tree
    own, other = recursive.levels, multidraft.levels
    assert own is not None and other is not None
    np.testing.assert_array_equal(own.visits[:, 0], 1.0)  # the root is tried in every round
    np.testing.assert_allclose(own.visits[:, 1].mean(), recursive.reached[0], atol=1e-9)  # and a child of it where one stood
    np.testing.assert_array_equal(own.visits, other.visits)
    np.testing.assert_array_equal(own.limit, other.limit)
    assert (own.accepted <= own.limit + 1e-6).all() and (other.accepted <= other.limit + 1e-6).all()
    achieved = recursive.reached[1] / recursive.reached[0]
    for level, stood in enumerate((recursive.reached[0], achieved)):  # what the rule did, and what it does in expectation
        assert own.accepted[:, level].sum() / own.visits[:, level].sum() == pytest.approx(stood, abs=0.08)


def test_the_limit_of_a_round_is_that_of_the_distributions_at_its_nodes(tmp_path: Path) -> None:
    log, logged_probs = logged(tmp_path, Static(children=(2,)), draws="iid", new=8)
    (judged,) = judge_rounds(log, logged_probs, [rule("recursive")], chances=2)
    rounds = joined(list(log.parts()))
    tree, p = logged_probs.tree(rounds), log.info.sampling.probs(logged_probs.logits(rounds))
    assert judged.levels is not None and tree.draft_probs is not None
    np.testing.assert_allclose(judged.levels.limit[:, 0], limit(p[:, 0], tree.draft_probs[:, 0], 2).numpy(), atol=1e-9)


def test_shares_of_the_limit_are_pooled_over_visits_and_their_intervals_over_prompts() -> None:
    visits = np.array([[1.0, 0.5], [1.0, 0.0], [1.0, 1.0]])
    most, accepted = visits * [[0.8, 0.5]], visits * [[0.4, 0.5]]
    both = [RuleOutcome(rule("recursive"), np.ones(3), np.zeros(2), Levels(visits, most, accepted))]
    (one,) = compare(both, np.array([0, 0, 1]))
    np.testing.assert_allclose(one.limit, (0.8, 0.5))
    np.testing.assert_allclose(one.accepted, (0.4, 0.5))
    assert [share.value for share in one.of_limit] == pytest.approx([0.5, 1.0])
    assert all(share.low == pytest.approx(share.value) == pytest.approx(share.high) for share in one.of_limit)


def written(tmp_path: Path) -> tuple[Path, list[RuleRow]]:
    config = EvaluationConfig(max_new_tokens=16, temperature=1.0)
    shape = Static(children=(2, 2))
    drawn = [RuntimeConfig(shape=shape), RuntimeConfig(shape=shape, draws="iid")]
    every = [Contender(how.draws, SpeculativeDecoder(target(), contender().decoder.drafter, how)) for how in drawn]
    rows, _ = replay_rules(target(), every, SUITE, config, tmp_path, chances=2)
    return tmp_path / "rules.jsonl", rows


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    path, rows = written(tmp_path)
    assert read_rule_rows(path) == rows
    assert {bool(row.limit) for row in rows if row.draws == "iid" and row.rule != "traversal" and "chain" not in row.rule} == {True}
    assert not any(row.limit for row in rows if row.draws != "iid")
    entry = json.loads(path.read_text().splitlines()[0])
    for wrong, reason in (({**entry, "format": 1}, "not a row of rules in format"), ({**entry, "speed": 1}, "a broken row of rules")):
        path.write_text(json.dumps(wrong) + "\n")
        with pytest.raises(UserError, match=reason):
            read_rule_rows(path)
    with pytest.raises(UserError, match="no such file"):
        read_rule_rows(tmp_path / "gone.jsonl")


def test_a_page_of_rules_that_differs_from_its_rows_is_stale(tmp_path: Path) -> None:
    _, rows = written(tmp_path)
    page = tmp_path / "rules.md"
    page.write_text("<!-- results:rules figures -->\n<!-- /results:rules -->\n\n<!-- results:rules rules -->\n<!-- /results:rules -->\n")
    assert stale(page, tmp_path) == ["rules", "rules"]
    assert render(page, tmp_path)
    assert stale(page, tmp_path) == []
    text = page.read_text()
    assert figures_table(rows) in text and rules_table(rows) in text
    assert text.count("| P* 1 .. |") == 1  # the iid log's table alone
    shown = f"{next(row for row in rows if row.rule == 'traversal').tau.value:.3f}"
    page.write_text(text.replace(shown, "9.999", 1))
    assert stale(page, tmp_path) == ["rules"]


def test_the_figures_are_those_of_the_rows(tmp_path: Path) -> None:
    _, rows = written(tmp_path)
    lines = [line.strip("| ").split(" | ") for line in figures_table(rows).splitlines()[2:]]
    assert [(name.split("`")[1], draws) for name, draws, *_ in lines] == [
        ("traversal", "without_replacement"), ("traversal", "iid"), ("recursive", "without_replacement"), ("multidraft", "iid"),
        ("multidraft", "iid"),
    ]  # fmt: skip
    tau = {row.rule: row.tau.value for row in rows if row.draws == "without_replacement"}
    assert lines[2][-2].startswith(f"{tau['recursive'] / tau['rejection, first chain'] - 1:+.1%}")
    least = min(share.value for row in rows if row.rule == "multidraft" for share in row.of_limit)
    assert lines[4][-2].startswith(f"{least - 1:+.1%}")


@pytest.mark.parametrize("shape", [Chain(length=3), Static(children=(3, 2))])
def test_a_log_keeps_the_answers_whose_rounds_it_holds(shape: Any, tmp_path: Path) -> None:
    decoder = SpeculativeDecoder(target(), contender().decoder.drafter, RuntimeConfig(shape=shape))
    log = log_rounds(decoder, PROMPTS * 3, WARM, 24, tmp_path, "d", seed=3)
    rounds = joined(list(log.parts()))
    for number, tokens in enumerate(log.answers()):
        own = rounds.prompt == number
        roots = [0, *(rounds.accepted[own] + 1).cumsum(0)[:-1].tolist()]  # where each round began
        assert [tokens[place] for place in roots] == rounds.tokens[own, 0].tolist()


def test_rows_tell_what_was_accepted_of_the_answers_that_do_not_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = cycle(range(len(SUITE.items)))
    monkeypatch.setattr(rules, "loops", lambda _: next(places) == 0)  # the first answer of each log
    path, rows = written(tmp_path)
    log = RoundLog.open(tmp_path / "rounds" / rows[0].log)
    prompt = torch.cat([part.prompt for part in log.parts()]).numpy()
    assert rows[0].looping == 1 / len(SUITE.items)
    logged_probs = LoggedProbs(log.info, contender().decoder.drafter, target().head)
    (judged,) = judge_rounds(log, logged_probs, [rule("recursive")], chances=2)
    calm = [row.not_looping for row in rows if row.log == rows[0].log]
    assert calm[0] is not None and calm[0].tau.value == pytest.approx(judged.lengths[prompt != 0].mean() + 1)
    assert calm[0].tau != rows[0].tau
    assert read_rule_rows(path) == rows
    table = line_of(rules_table(rows), "traversal")
    assert calm[1] is not None and table["no loops [95%]"].startswith(f"{calm[1].tau.value:.3f}")
    assert table["relative, no loops [95%]"].startswith(f"{calm[1].relative.value:+.1%}")
    assert f"| {calm[1].relative.value:+.1%} [" in figures_table(rows)
    assert "25% of the answers loop" in rules_table(rows)


def test_rows_of_an_older_file_have_dashes_where_nobody_knows_what_looped(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    older = [json.loads(text) for text in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({key: one[key] for key in one if "looping" not in key}) + "\n" for one in older))
    rows = read_rule_rows(path)
    assert line_of(rules_table(rows), "traversal")["relative, no loops [95%]"] == "–"
    assert all(text.endswith("| – |") for text in figures_table(rows).splitlines()[2:])
    assert "loop;" not in rules_table(rows)


def line_of(table: str, rule_name: str) -> dict[str, str]:
    """The first table's line of a rule: head -> cell."""
    cells = [[cell.strip() for cell in text.strip("|").split(" | ")] for text in table.splitlines() if text.startswith("|")]
    return dict(zip(cells[0], next(line for line in cells if line[0] == rule_name), strict=True))


def test_temperature_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"temperature 0: all lossless rules keep the same tokens"):
        replay_rules(target(), [contender()], SUITE, EvaluationConfig(), tmp_path)
