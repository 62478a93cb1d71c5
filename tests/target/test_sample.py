"""Continuous batched generation against the target run alone, row by row."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drafttrain.core.errors import UserError
from drafttrain.core.sampling import Sampling
from drafttrain.target.adapter import Target
from drafttrain.target.sample import Finished, Job, Sampler

V = 61
HOT = Sampling(temperature=1.0, top_k=20)


@pytest.fixture(scope="module")
def target() -> Target:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=36, initializer_range=0.2,
    )
    return Target(LlamaForCausalLM(config))


def jobs(count: int, limit: int = 17) -> list[Job]:
    """Prompts of many lengths, greedy and sampled rows mixed."""
    generator = torch.Generator().manual_seed(5)
    out = []
    for id in range(count):
        prompt = torch.randint(8, V, (1 + id % 9,), generator=generator).tolist()
        out.append(Job(id, prompt, 1 + (id * 5) % limit, (Sampling(), HOT, Sampling(0.7))[id % 3]))
    return out


def run(target: Target, work: list[Job], batch: int, features: tuple[str, ...] = ()) -> dict[int, Finished]:
    done = list(Sampler(target, batch, 64, seed=3).run(work, features))
    assert len({one.id for one in done}) == len(done) == len(work)
    return {one.id: one for one in done}


def alone(target: Target, job: Job) -> list[int]:
    """Greedy decoding by whole forwards."""
    tokens = list(job.prompt)
    for _ in range(job.max_new_tokens):
        tokens.append(int(target.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] in target.eos_ids:
            break
    return tokens


def test_greedy_rows_equal_the_target_decoding_alone(target: Target) -> None:
    work = jobs(24)
    done = run(target, work, batch=5)
    greedy = [job for job in work if job.sampling.greedy]
    assert any(done[job.id].ended for job in greedy), "no answer ended: the test would not see EOS"
    for job in greedy:
        assert done[job.id].tokens == alone(target, job)
        assert done[job.id].prompt_len == len(job.prompt)


def test_short_rows_go_on_beside_a_finished_long_one(target: Target) -> None:
    work = [Job(0, [9] * 90, 2), *(Job(id, [9, 9 + id], 30) for id in range(1, 8))]
    done = {one.id: one.tokens for one in Sampler(target, 8, 100).run(work)}
    assert done == {job.id: alone(target, job) for job in work}


def test_a_jobs_text_does_not_depend_on_its_batch(target: Target) -> None:
    work = jobs(24)
    together, single = run(target, work, batch=7), run(target, work[::-1], batch=1)
    assert {id: one.tokens for id, one in together.items()} == {id: one.tokens for id, one in single.items()}


def test_sampled_tokens_follow_the_targets_distribution(target: Target) -> None:
    count, sampling = 4000, Sampling(temperature=0.8, top_k=6)
    done = run(target, [Job(id, [9, 11], 1, sampling) for id in range(count)], batch=500)
    seen = torch.bincount(torch.tensor([one.tokens[-1] for one in done.values()]), minlength=V) / count
    probs = sampling.probs(target.model(torch.tensor([[9, 11]])).logits[0, -1])
    # 6 outcomes, 4000 draws: a total variation of 0.04 is beyond 4 standard deviations
    assert float((seen - probs).abs().sum() / 2) < 0.04


def test_successive_tokens_are_drawn_independently(target: Target) -> None:
    count, sampling = 4000, Sampling(temperature=1.0, top_k=3)
    done = run(target, [Job(id, [9, 11], 2, sampling) for id in range(count)], batch=500)
    seen = torch.zeros(V, V)
    for one in done.values():
        pair = [*one.tokens[2:], 0][:2]  # an answer that ended at once counts as followed by 0
        seen[pair[0], pair[1]] += 1 / count
    first = sampling.probs(target.model(torch.tensor([[9, 11]])).logits[0, -1])
    wanted = torch.zeros(V, V)
    for token in first.nonzero()[:, 0].tolist():
        second = sampling.probs(target.model(torch.tensor([[9, 11, token]])).logits[0, -1])
        wanted[token] = first[token] * (torch.eye(V)[0] if token in target.eos_ids else second)
    # at most 9 outcomes, 4000 draws: a total variation of 0.05 is beyond 4 standard deviations
    assert float((seen - wanted).abs().sum() / 2) < 0.05


def test_an_answer_stops_at_the_end_token_or_its_limit(target: Target) -> None:
    for job, one in zip(jobs(24), sorted(run(target, jobs(24), 6).values(), key=lambda one: one.id), strict=True):
        answer = one.tokens[one.prompt_len :]
        assert 1 <= len(answer) <= job.max_new_tokens
        assert not set(answer[:-1]) & set(target.eos_ids)
        assert one.ended == (answer[-1] in target.eos_ids)
        assert one.ended or len(answer) == job.max_new_tokens


def test_features_equal_one_plain_pass_and_are_zero_at_the_last_token(target: Target) -> None:
    for one in run(target, jobs(24), 5, ("last_hidden_state", "aux_hidden_states")).values():
        tokens = torch.tensor([one.tokens])
        document, position = torch.zeros_like(tokens), torch.arange(tokens.shape[1])[None]
        plain = target.encode(tokens, position, document, ("last_hidden_state", "aux_hidden_states"))
        for name in ("last_hidden_state", "aux_hidden_states"):
            assert one.features[name].shape == plain[name][0].shape
            # fp32, other shapes of the same sums
            torch.testing.assert_close(one.features[name][:-1], plain[name][0, :-1], atol=2e-5, rtol=1e-4)
            assert not one.features[name][-1].any()


def test_what_prompts_begin_with_is_read_once(target: Target) -> None:
    system = list(range(20, 36))
    work = [Job(job.id, [*system, *job.prompt], job.max_new_tokens) for job in jobs(24)]
    work[17].prompt[9] = 50  # one that leaves the others half way
    work.append(Job(24, system, 5))  # one that ends where the others go on
    sampler = Sampler(target, 5, 64)
    done = {one.id: one for one in sampler.run(work, ("last_hidden_state",))}
    assert {id: one.tokens for id, one in done.items()} == {job.id: alone(target, job) for job in work}
    # all but the first share it; those two, and at most four that are read beside each, share less
    assert sampler.read <= sum(len(job.prompt) for job in work) - 16 * (len(work) - 1 - 2 * 5)
    for one in done.values():
        tokens = torch.tensor([one.tokens])
        plain = target.encode(tokens, torch.arange(tokens.shape[1])[None], torch.zeros_like(tokens), ("last_hidden_state",))
        torch.testing.assert_close(one.features["last_hidden_state"][:-1], plain["last_hidden_state"][0, :-1], atol=2e-5, rtol=1e-4)


def test_finished_rows_are_replaced_at_once(target: Target) -> None:
    lengths = [40, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    sampler = Sampler(Target(target.model, aux_layers=(1, 2, 3)), 2, 64)
    sampler.target.eos_ids = ()
    order = [one.id for one in sampler.run([Job(id, [9, 10 + id], n) for id, n in enumerate(lengths)])]
    assert order == [*range(1, 11), 0]
    assert sampler.steps == 39  # the prefill gives the first of the long answer's 40 tokens


def test_a_step_waits_for_the_host_once(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    work, waits = jobs(16), 0

    def counting(name: str) -> None:
        plain = getattr(torch.Tensor, name)

        def wrapped(self: torch.Tensor, *args: object) -> object:
            nonlocal waits
            waits += 1
            return plain(self, *args)

        monkeypatch.setattr(torch.Tensor, name, wrapped)

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        counting(name)
    sampler = Sampler(target, 4, 64)
    finished = list(sampler.run(work, ("last_hidden_state",)))
    assert len(finished) == 16
    assert waits == sampler.steps


def test_jobs_are_taken_only_when_there_is_room(target: Target) -> None:
    taken: list[int] = []

    def stream() -> object:
        for job in jobs(9):
            taken.append(job.id)
            yield job

    results = Sampler(target, 3, 64).run(stream())  # type: ignore[arg-type]
    next(results)
    assert len(taken) == 3


@pytest.mark.parametrize(("prompt", "limit", "words"), [([], 4, "is empty"), ([9] * 60, 5, "60 tokens and 5 new ones")])
def test_bad_prompts_are_refused_by_number(target: Target, prompt: list[int], limit: int, words: str) -> None:
    with pytest.raises(UserError, match=f"prompt 12.*{words}"):
        list(Sampler(target, 2, 64).run([Job(12, prompt, limit)]))


def test_no_jobs_give_no_answers(target: Target) -> None:
    assert list(Sampler(target, 2, 64).run([])) == []


def test_a_jobs_own_end_tokens_end_it_too(target: Target) -> None:
    plain = alone(target, Job(0, [9, 11], 12))
    answer = plain[2:]
    done = run(target, [Job(0, [9, 11], 12, ends=(answer[3],))], 1)[0]
    assert done.tokens == plain[: 2 + answer.index(answer[3]) + 1]
    assert done.ended
