"""The judge: which state it reads, what it adds to its inner rule, its files, its labels and its training."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain
from drafttrain.core.sampling import Sampling
from drafttrain.core.types import Scored
from drafttrain.recipe import load_recipe, stage_fingerprint
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.generate import RoundRecord
from drafttrain.train.heads import auroc
from drafttrain.train.judge import PART, PENALTIES, JudgeExamples, JudgeTrainConfig, Mismatch, ask, fit, label, labelled, mismatches, spoil
from drafttrain.verify.judge import Judge, JudgeConfig, JudgeHead
from tests.tiny import greedy_text, tiny_target
from tests.verify.logged import COLD, PROMPTS, SHAPES, WARM, drafter, lengths, rounds, target


def judge(head: JudgeHead, threshold: float = 0.5) -> Judge:
    rule = Judge(JudgeConfig(head="in memory", threshold=threshold))
    rule.head = head
    return rule


def any_head(seed: int = 0, hidden: int = 32) -> JudgeHead:
    torch.manual_seed(seed)
    return JudgeHead(hidden, "in-memory")


def reading_first_number() -> JudgeHead:
    """Says yes where a state's first number is positive."""
    head = any_head(hidden=1)
    torch.nn.init.ones_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)
    return head


@pytest.mark.parametrize("sampling", [COLD, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_lower_threshold_accepts_no_less_on_any_logged_tree(shape: str, sampling: Sampling) -> None:
    head = any_head()
    steps = [lengths(judge(head, threshold), rounds(shape, sampling)) for threshold in (0.999999, 0.9, 0.6, 0.4, 0.1, 0.0)]
    for tighter, looser in pairwise(steps):
        assert (looser >= tighter).all()
    depth = torch.cat([torch.where(one.tree.live, one.tree.depth, 0).amax(1) for one in rounds(shape, sampling)])
    assert (steps[0] < depth).any()
    if shape != "dynamic":  # there a leaf may stand before the deepest level
        assert torch.equal(steps[-1], depth)  # whatever is drafted stands


@pytest.mark.parametrize("sampling", [COLD, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_judge_that_never_agrees_leaves_the_inner_verdict(shape: str, sampling: Sampling) -> None:
    never = any_head()
    torch.nn.init.constant_(never.linear.bias, -1e4)
    off = Judge(JudgeConfig(threshold=1.0))
    for one in rounds(shape, sampling):
        ours, theirs = one.judged(judge(never)), one.judged(off)
        assert ours.next is not None and theirs.next is not None
        assert torch.equal(ours.length, theirs.length) and torch.equal(ours.next, theirs.next)
        inside = torch.arange(ours.path.shape[1]) < ours.length[:, None]
        assert torch.equal(ours.path[inside], theirs.path[inside])


def test_on_a_chain_a_token_stands_iff_it_is_the_argmax_or_the_state_at_the_token_itself_is_liked() -> None:
    pushes = 0
    for number, logged in enumerate(rounds("chain", COLD)):
        tree, scored = logged.tree, logged.scored
        generator = torch.Generator().manual_seed(number)
        state = torch.randn(*tree.tokens.shape, 1, generator=generator)
        got = replace(logged, scored=Scored(scored.logits, scored.sampling, {"last_hidden_state": state})).judged(
            judge(reading_first_number())
        )
        for row in range(len(tree.tokens)):
            standard = tree.tokens[row, 1:] == scored.top[row, :-1]
            liked = state[row, 1:, 0] > 0
            expected = int((standard | liked).long().cumprod(0).sum())
            assert int(got.length[row]) == expected
            assert got.next is not None and int(got.next[row]) == int(scored.top[row, expected])
            pushes += int((liked & ~standard)[:expected].sum())
    assert pushes > 0


def test_in_a_tree_the_child_that_the_judge_likes_best_stands_where_the_inner_rule_stops() -> None:
    pushes = 0
    for logged in rounds("static", COLD):
        tree, scored = logged.tree, logged.scored
        state = torch.randn(*tree.tokens.shape, 1, generator=torch.Generator().manual_seed(3))
        got = replace(logged, scored=Scored(scored.logits, scored.sampling, {"last_hidden_state": state})).judged(
            judge(reading_first_number())
        )
        for row in range(len(tree.tokens)):
            node, path = 0, []
            while True:
                children = [child for child in tree.children[row, node].tolist() if child >= 0]
                argmax = [child for child in children if tree.tokens[row, child] == scored.top[row, node]]
                liked = sorted((child for child in children if state[row, child] > 0), key=lambda child: -float(state[row, child]))
                if not argmax and not liked:
                    break
                pushes += not argmax
                node = (argmax or liked)[0]
                path.append(node)
            assert got.path[row, : int(got.length[row])].tolist() == path
    assert pushes > 0


def test_decoding_with_a_judge_that_always_agrees_takes_every_draft(tmp_path: Path) -> None:
    always = any_head()
    torch.nn.init.constant_(always.linear.bias, 1e4)
    always.save(tmp_path / "judge")
    runtime = RuntimeConfig(shape=Chain(length=4), rule=JudgeConfig(head=str(tmp_path / "judge")))
    made = SpeculativeDecoder(target(), drafter(), runtime).generate(PROMPTS, 26)
    assert [one.statistics.accepts for one in made] == [[5, 5, 5, 5]] * 3
    assert {one.statistics.tau for one in made} == {5.0}


# -- files --------------------------------------------------------------------------------------------------------------------------------


def test_a_saved_head_comes_back_and_is_refused_for_another_target(tmp_path: Path) -> None:
    head = any_head()
    head.save(tmp_path, {"auc": 0.8})
    again = JudgeHead.load(tmp_path, "in-memory")
    assert {name: value.tolist() for name, value in again.state_dict().items()} == {n: v.tolist() for n, v in head.state_dict().items()}
    with pytest.raises(UserError, match="trained on the states of target in-memory, but this target is other"):
        JudgeHead.load(tmp_path, "other")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))  # still whole, with one bit of a weight turned
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        JudgeHead.load(tmp_path)
    weights.write_bytes(b"cut")
    with pytest.raises(UserError, match=r"model\.safetensors: missing, truncated"):
        JudgeHead.load(tmp_path)
    with pytest.raises(UserError, match=r"no config\.json"):
        JudgeHead.load(tmp_path / "nowhere")


def test_an_evaluation_is_not_done_once_the_judge_it_names_was_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    rule = f"{{name: judge, head: {tmp_path / 'judge'}}}"
    path.write_text(f"drafter: {{name: eagle3}}\ntrain: {{steps: 1}}\nruntime: {{rule: {rule}}}\n")
    marks = []
    for seed in (0, 1, 1):
        any_head(seed).save(tmp_path / "judge")
        marks.append(stage_fingerprint(load_recipe(path), "eval"))
    assert marks[0] != marks[1] == marks[2]


# -- labels and training ------------------------------------------------------------------------------------------------------------------


def answers_are_even(number: int, answer: list[int]) -> bool:
    """A made-up check that depends on all that was written."""
    return sum(answer) % 2 == 0


def test_mismatches_are_the_places_where_a_drafted_chain_of_one_is_rejected() -> None:
    answered = ask(target(), PROMPTS, 20)
    assert [one.answer for one in answered] == [greedy_text(target().model, prompt, 20) for prompt in PROMPTS]
    found = mismatches(target(), drafter(), answered)
    assert found
    for number, one in enumerate(answered):
        rejected: dict[int, int] = {}
        written = [1]

        def log(record: RoundRecord, rejected: dict[int, int] = rejected, written: list[int] = written) -> None:
            tree, verdict = record.tree, record.verdict
            if int(verdict.length[0]) == 0:
                rejected[written[0]] = int(tree.tokens[0, 1])
            written[0] += int(verdict.length[0]) + 1

        decoder = SpeculativeDecoder(target(), drafter(), RuntimeConfig(shape=Chain(length=1)))
        decoder.generate(one.prompt, 20, on_round=log)
        ours = {place.at: place.drafted for place in found if place.question == number}
        assert rejected
        assert {at: token for at, token in rejected.items() if at < 20}.items() <= ours.items()


def test_a_mismatch_is_good_iff_the_target_going_on_from_it_is_still_right_and_its_state_is_the_one_at_the_token() -> None:
    prompts = [*PROMPTS, [7, 8], [9, 1, 33], [50, 3], [12]]
    answered = ask(target(), prompts, 12)
    solved = [number for number, one in enumerate(answered) if answers_are_even(number, one.answer)]
    assert 0 < len(solved) < len(prompts)
    found = [Mismatch(number, at, (one.answer[at] + 7) % 64) for number, one in enumerate(answered) for at in (1, 6, 11)]
    got = label(target(), answered, found, answers_are_even, 12, batch=4)
    kept = [one for one in found if one.question in solved]
    assert got.question.tolist() == [one.question for one in kept]
    assert 0 < int(got.good.sum()) < len(kept)
    for index, one in enumerate(kept):
        text = [*prompts[one.question], *answered[one.question].answer[: one.at], one.drafted]
        answer = [*text, *greedy_text(target().model, text, 12 - one.at - 1)][len(prompts[one.question]) :]
        assert len(answer) == 12
        assert bool(got.good[index]) == answers_are_even(one.question, answer)
        state = target().model.model(torch.tensor([text])).last_hidden_state[0, -1]
        torch.testing.assert_close(got.last[index], state, atol=1e-4, rtol=1e-4)  # fp32, summed in another order


def test_a_drafted_end_ends_the_answer_there() -> None:
    ending = tiny_target(eos_token_id=5)
    answered = ask(ending, [[1, 2, 3]], 8)
    seen: list[list[int]] = []

    def right(number: int, answer: list[int]) -> bool:
        seen.append(answer)
        return True

    label(ending, answered, [Mismatch(0, 2, 5)], right, 8)
    assert seen[-1] == [*answered[0].answer[:2], 5]


def test_questions_that_the_target_gets_wrong_teach_nothing() -> None:
    answered = ask(target(), PROMPTS, 4)
    with pytest.raises(UserError, match=r"the target is right on 0 of 3 questions"):
        label(target(), answered, [Mismatch(0, 1, 5)], lambda number, answer: False, 4)


def test_labels_are_made_once_part_by_part_and_are_those_of_all_questions_together(tmp_path: Path) -> None:
    prompts = [[3 + number, 9, number % 7 + 1] for number in range(PART + 4)]
    answered = ask(target(), prompts, 10)
    expected = label(target(), answered, mismatches(target(), drafter(), answered), answers_are_even, 10)
    checked: list[int] = []

    def right(number: int, answer: list[int]) -> bool:
        checked.append(number)
        return answers_are_even(number, answer)

    for again in (False, True):
        got = labelled(target(), drafter(), prompts, right, 10, tmp_path)
        assert got.solved == sum(answers_are_even(number, one.answer) for number, one in enumerate(answered))
        drafted = ~got.examples.random
        assert torch.equal(got.examples.question[drafted], expected.question) and torch.equal(got.examples.good[drafted], expected.good)
        torch.testing.assert_close(got.examples.last[drafted], expected.last, atol=1e-4, rtol=1e-4)  # batched otherwise
        assert bool(checked) is not again
        checked.clear()
    (tmp_path / f"{PART:06d}.safetensors").unlink()
    labelled(target(), drafter(), prompts, right, 10, tmp_path)
    assert checked and min(checked) == PART  # only what was missing


def test_beside_every_mismatch_a_random_token_of_the_same_answer_is_called_bad() -> None:
    prompts = [[3 + number, 9, number + 1] for number in range(4)]
    answered = ask(target(), prompts, 10)
    found = mismatches(target(), drafter(), answered)
    made = spoil(target(), answered, found)
    assert len(found) > 1 and made.question.tolist() == [one.question for one in found]
    assert made.random.all() and not made.good.any()
    assert len(made.last.unique(dim=0)) > len(found) // 2  # at places of their own
    torch.testing.assert_close(spoil(target(), answered, found).last, made.last)  # the same ones again
    both = labelled_in_memory(prompts)
    assert int(both.random.sum()) == int((~both.random).sum()) > 0


def labelled_in_memory(prompts: list[list[int]]) -> JudgeExamples:
    with TemporaryDirectory() as folder:
        return labelled(target(), drafter(), prompts, lambda number, answer: True, 10, Path(folder)).examples


@pytest.mark.slow
def test_random_tokens_that_can_be_told_from_drafted_ones_are_not_let_through_once_they_are_learnt() -> None:
    known = planted()
    strange = known.last.clone()
    strange[:, 3] += 40.0  # where no mismatch ever is
    bad = torch.zeros(400, dtype=torch.bool)
    two = (torch.cat([known.last, strange]), torch.cat([known.good, bad]), known.question.repeat(2), torch.cat([bad, ~bad]))
    ignorant, taught = fit(known, "x", JudgeTrainConfig()), fit(JudgeExamples(*two), "x", JudgeTrainConfig())
    assert ignorant.let_through is None and (ignorant.head(strange) > 0).float().mean() > 0.1
    assert taught.let_through is not None and taught.let_through < 0.05
    assert taught.auc is not None and taught.auc > 0.9 and taught.held_out == 80


def planted(count: int = 400, noise: float = 0.3, hidden: int = 8) -> JudgeExamples:
    generator = torch.Generator().manual_seed(0)
    last = 5 + 3 * torch.randn(count, hidden, generator=generator)
    good = last[:, 2] - 0.3 * last[:, 5] + noise * torch.randn(count, generator=generator) > 4.5
    return JudgeExamples(last, good, torch.arange(count) // 4, torch.zeros(count, dtype=torch.bool))


def test_training_finds_what_was_planted_on_questions_it_has_not_seen() -> None:
    result = fit(planted(), "in-memory", JudgeTrainConfig())
    assert result.auc is not None and result.auc > 0.95
    assert (result.trained_on, result.held_out) == (320, 80)
    examples = planted()
    right = (result.head(examples.last).sigmoid() > 0.5) == examples.good
    assert right.float().mean() > 0.9  # on the raw states: the scaling has moved into the weights
    assert sum(p.numel() for p in result.head.parameters()) == 9


def test_where_examples_are_few_for_their_weights_a_penalty_chosen_without_the_held_out_ones_judges_them_better() -> None:
    few = planted(240, noise=1.0, hidden=100)
    chosen, free = (fit(few, "x", JudgeTrainConfig(penalty=penalty)) for penalty in (None, 0.0))
    assert chosen.penalty in PENALTIES and chosen.auc is not None and free.auc is not None
    assert chosen.auc > free.auc + 0.05


def test_labels_that_carry_nothing_give_an_auc_of_a_half() -> None:
    examples = planted(2000)
    shuffled = replace(examples, good=examples.good[torch.randperm(2000, generator=torch.Generator().manual_seed(1))])
    got = fit(shuffled, "in-memory", JudgeTrainConfig()).auc
    assert got is not None and abs(got - 0.5) < 0.1  # 400 held out: three deviations


@pytest.mark.slow
def test_a_weight_on_bad_tokens_makes_the_judge_stricter() -> None:
    agreed = [fit(planted(noise=3.0), "x", JudgeTrainConfig(wrong_weight=weight)).head(planted().last) > 0 for weight in (0.2, 1.0, 5.0)]
    assert agreed[0].sum() > agreed[1].sum() > agreed[2].sum()


def test_the_loss_is_the_weighted_cross_entropy_of_the_paper() -> None:
    head, last, good = any_head(hidden=4), torch.randn(6, 4), torch.tensor([True, False, True, False, False, True])
    s = head(last).sigmoid()
    expected = -(good * s.log() + 3.0 * (~good) * (1 - s).log())
    torch.testing.assert_close(head.loss(last, good, 3.0), expected)


def test_one_sided_labels_are_refused() -> None:
    with pytest.raises(UserError, match="320 of the 320 to train on are good"):
        fit(replace(planted(), good=torch.ones(400, dtype=torch.bool)), "x", JudgeTrainConfig())


def test_auc_counts_pairs() -> None:
    assert auroc(np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False])) == (1 + 1 + 0 + 0.5) / 4


def test_training_a_judge_leaves_the_target_as_it_was() -> None:
    before = {name: value.clone() for name, value in target().model.state_dict().items()}
    answered = ask(target(), PROMPTS, 8)
    found = mismatches(target(), drafter(), answered)
    label(target(), answered, found, lambda number, answer: True, 8)
    assert all(torch.equal(value, before[name]) for name, value in target().model.state_dict().items())
