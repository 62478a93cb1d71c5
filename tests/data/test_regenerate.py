"""Regeneration: the target's own answers, the same however often the run is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import drafttrain.data.regenerate as module
from drafttrain.core.errors import UserError
from drafttrain.data.capture import capture
from drafttrain.data.prompts import JsonlPrompts, SelfPrompts
from drafttrain.data.regenerate import Budget, DataConfig, collect, regenerate
from drafttrain.data.store import Store
from drafttrain.target.adapter import Target
from drafttrain.target.sample import Sampler
from tests.data.stores import make_target


def prompts_file(folder: Path, count: int = 20) -> str:
    path = folder / "prompts.jsonl"
    lines = [{"prompt": " ".join(f"w{(at * 7 + k) % 50}" for k in range(1 + at % 6)), "domain": f"d{at % 2}"} for at in range(count)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def config(folder: Path, **changes: object) -> DataConfig:
    source = JsonlPrompts(path=prompts_file(folder))
    return DataConfig(**{"sources": (source,), "max_new_tokens": 12, "batch_size": 4, "temperatures": (0.0, 0.9), **changes})  # type: ignore[arg-type]


def content(store: Store) -> list[tuple[list[int], list[bool], dict[str, object]]]:
    return [(store[i].tokens.tolist(), store[i].mask.tolist(), store[i].meta) for i in range(len(store))]


def test_each_prompt_is_answered_once_by_the_target_itself(tmp_path: Path, target: Target) -> None:
    store = regenerate(target, config(tmp_path), tmp_path / "s")
    prompts = collect(target, config(tmp_path), tmp_path, Counter())
    assert len(store) == len(prompts) == 20
    for i, prompt in enumerate(prompts):
        one = store[i]
        T, P = len(one.tokens), len(prompt.tokens)
        assert one.tokens[:P].tolist() == prompt.tokens
        assert one.mask.tolist() == [False] * P + [True] * (T - P)
        assert one.meta == {"domain": f"d{i % 2}", "temperature": (0.0, 0.9)[i % 2], "ended": one.tokens[-1] == 2}
        if i % 2 == 0:
            greedy = target.model(torch.from_numpy(one.tokens).long()[None]).logits[0].argmax(-1)
            assert greedy[P - 1 : T - 1].tolist() == one.tokens[P:].tolist()
    assert any(store[i].meta["ended"] for i in range(20))


def test_answers_drawn_from_a_nucleus_say_which(tmp_path: Path, target: Target) -> None:
    store = regenerate(target, config(tmp_path, top_p=0.8, conversations=4), tmp_path / "s")
    assert [store[i].meta.get("top_p") for i in range(4)] == [None, 0.8, None, 0.8]


def test_more_conversations_than_prompts_take_the_other_temperatures(tmp_path: Path, target: Target) -> None:
    store = regenerate(target, config(tmp_path, conversations=33), tmp_path / "s")
    pairs = [(store[i].prompt_hash, store[i].meta["temperature"]) for i in range(len(store))]
    assert len(pairs) == len(set(pairs)) == 33
    assert len(regenerate(target, config(tmp_path, conversations=99), tmp_path / "s")) == 40  # all there are


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"conversations": 99}, "data.conversations=99 not reached: 20 prompts at 2 temperatures give 40 conversations ("),
        ({"tokens": 9000}, "data.tokens=9,000 not reached: 20 prompts at 2 temperatures give 40 conversations ("),
        ({"tokens": 9000, "conversations": 99}, "data.conversations=99 not reached: 20 prompts at 2 temperatures give 40 conversations ("),
        ({"tokens": 9000, "temperatures": (0.0,)}, "data.tokens=9,000 not reached: 20 prompts at 1 temperature give 20 conversations ("),
        ({"tokens": 9000, "conversations": 40}, None),  # both are as many as were asked for at most
        ({"tokens": 9000, "conversations": 5}, None),
        ({"tokens": 100, "conversations": 99}, None),
        ({"conversations": 40}, None),
        ({}, None),
    ],
)
def test_prompts_that_give_less_than_was_asked_for_are_said_in_one_line(
    tmp_path: Path, target: Target, capsys: pytest.CaptureFixture[str], asked: dict[str, object], said: str | None
) -> None:
    store = regenerate(target, config(tmp_path, **asked), tmp_path / "s")
    lines = [line for line in capsys.readouterr().err.splitlines() if "not reached" in line]
    assert [line.startswith(str(said)) for line in lines] == [True] * (said is not None)
    assert all(f"({store.tokens:,} tokens), no more; add prompts or data.temperatures" in line for line in lines)


def test_a_token_budget_takes_the_fewest_conversations_that_fill_it(tmp_path: Path, target: Target) -> None:
    full = regenerate(target, config(tmp_path, conversations=40), tmp_path / "full")
    store = regenerate(target, config(tmp_path, tokens=200), tmp_path / "s")
    assert content(store) == content(full)[: len(store)]
    assert store.tokens >= 200 > store.tokens - store.lengths[-1]


def test_what_is_written_is_not_added_up_again_for_every_conversation(tmp_path: Path, target: Target) -> None:
    class Lengths(dict[int, int]):
        def values(self) -> NoReturn:
            raise AssertionError("all lengths are read")

    regenerate(target, config(tmp_path, conversations=3), tmp_path / "s")
    prompts = collect(target, config(tmp_path), tmp_path, Counter())
    resumed = module.Regeneration(target, config(tmp_path, tokens=200), prompts, tmp_path / "s", 30.0)
    resumed.writer.lengths = Lengths(resumed.writer.lengths)
    store = resumed.run()
    assert resumed.writer.tokens == Store(store.folder, store.index.model_copy(update={"limit": None})).tokens
    assert resumed.running == 0


def test_a_budget_waits_for_every_conversation_before_its_end() -> None:
    assert Budget(4, None).limit({0: 5, 1: 5, 3: 5}) is None
    assert Budget(4, None).limit({0: 5, 1: 5, 2: 1, 3: 5}) == 4
    assert Budget(4, 10).limit({0: 5, 1: 5, 3: 5}) == 2
    assert Budget(4, 11).limit({0: 5, 1: 5, 3: 5}) is None


def test_a_finished_store_is_not_written_again_and_a_larger_budget_extends_it(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    small = regenerate(target, config(tmp_path, conversations=5), folder)
    forwards = target.forwards
    again = regenerate(target, config(tmp_path, conversations=5), folder)
    assert content(again) == content(small)
    assert target.forwards - forwards <= 1  # the probe
    large = regenerate(target, config(tmp_path), folder)
    assert content(large)[:5] == content(small)
    assert content(large) == content(regenerate(target, config(tmp_path), tmp_path / "other"))


def test_text_does_not_depend_on_the_batch_size(tmp_path: Path, target: Target) -> None:
    one = regenerate(target, config(tmp_path), tmp_path / "a")
    other = regenerate(target, config(tmp_path, batch_size=7), tmp_path / "b")
    assert content(one) == content(other)


def test_features_of_the_writing_pass_equal_a_captured_pass(tmp_path: Path, target: Target) -> None:
    written = regenerate(target, config(tmp_path, capture=("last_hidden_state", "aux_hidden_states")), tmp_path / "a")
    captured = capture(
        target, regenerate(target, config(tmp_path), tmp_path / "b"), tmp_path / "c", ("last_hidden_state", "aux_hidden_states"), 2, 48
    )
    assert content(written) == content(captured)
    for i in range(len(written)):
        for name, value in captured.features(i, ("last_hidden_state", "aux_hidden_states")).items():
            ours = written.features(i, (name,))[name]
            torch.testing.assert_close(ours[:-1], value[:-1], atol=2e-5, rtol=1e-4)  # fp32, sums in another order
            assert not ours[-1].any()
    written.check_head(target.head)
    captured.check_head(target.head)


def test_the_target_writes_its_prompts_too(tmp_path: Path, target: Target) -> None:
    own = tmp_path / "openings.jsonl"
    own.write_text("\n".join(json.dumps({"domain": name, "opening": word}) for name, word in (("a", "w1"), ("b", ""))))
    source = SelfPrompts(count=80, domains=("a", "b"), openings=str(own), max_tokens=60, temperature=1.5, top_p=1.0)
    store = regenerate(target, config(tmp_path, sources=(source,)), tmp_path / "s")
    assert 4 < len(store) <= 80
    assert len({store[i].prompt_hash for i in range(len(store))}) == len(store)
    assert {store[i].meta["domain"] for i in range(len(store))} == {"a", "b"}
    assert target.tokenizer is not None
    for i in range(len(store)):
        prompt = target.tokenizer.decode(store[i].tokens[~store[i].mask])
        assert prompt.startswith("<s> <user> ")
        assert prompt.endswith(" <end> <assistant>")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_what_is_finished_is_saved_when_interrupted(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    whole = content(regenerate(target, config(tmp_path), tmp_path / "whole"))
    plain = Sampler.run

    def failing(self: object, *args: object) -> object:
        for count, one in enumerate(plain(self, *args)):  # type: ignore[arg-type]
            if count == 9:
                raise failure
            yield one

    monkeypatch.setattr(Sampler, "run", failing)
    with pytest.raises(failure):
        regenerate(target, config(tmp_path), tmp_path / "s")
    assert len(Store.open(tmp_path / "s")) == 9
    monkeypatch.undo()
    taken: list[int] = []
    monkeypatch.setattr(module.DataConfig, "job", _noting(taken))
    assert content(regenerate(target, config(tmp_path), tmp_path / "s")) == whole
    assert len(set(taken)) == 11, "conversations that were safe were written again"


def _noting(taken: list[int]) -> object:
    plain = DataConfig.job

    def job(self: DataConfig, prompts: list[object], id: int) -> object:
        taken.append(id)
        return plain(self, prompts, id)  # type: ignore[arg-type]

    return job


SCRIPT = """
import sys, time, torch
from pathlib import Path
from typing import NoReturn
torch.set_num_threads(1)
from drafttrain.data.regenerate import regenerate
from tests.data.stores import make_target
from tests.data.test_regenerate import config
target = make_target()
plain = target.score
def slow(*args, **kwargs):
    time.sleep(0.02)
    return plain(*args, **kwargs)
target.score = slow
regenerate(target, config(Path(sys.argv[1]), capture=("last",)), Path(sys.argv[1]) / "s", flush_seconds=0.0)
"""


def test_killed_at_any_moment_and_resumed_gives_the_uninterrupted_store(tmp_path: Path, target: Target) -> None:
    whole = regenerate(target, config(tmp_path, capture=("last_hidden_state",)), tmp_path / "whole")
    index = tmp_path / "s" / "index.json"
    root = str(Path(__file__).parents[2])
    for shards in (2, 5):
        command, environment = [sys.executable, "-c", SCRIPT, str(tmp_path)], {**os.environ, "PYTHONPATH": root}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        for _ in range(2000):
            if process.poll() is not None or (index.exists() and index.read_text().count('"sha256"') >= shards):
                break
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    resumed = regenerate(target, config(tmp_path, capture=("last_hidden_state",)), tmp_path / "s")
    assert content(resumed) == content(whole)
    for i in range(len(whole)):
        # fp32: a resumed answer was computed in another batch
        torch.testing.assert_close(
            resumed.features(i, ("last_hidden_state",))["last_hidden_state"],
            whole.features(i, ("last_hidden_state",))["last_hidden_state"],
            atol=2e-5,
            rtol=1e-4,
        )


def test_capture_goes_on_where_it_stopped(tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    source = regenerate(target, config(tmp_path), tmp_path / "a")
    whole = capture(target, source, tmp_path / "whole", ("last_hidden_state",), 1, 64)
    plain, calls = target.encode, []

    def dying(*args: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(target, "encode", dying)
    with pytest.raises(KeyboardInterrupt):
        capture(target, source, tmp_path / "s", ("last_hidden_state",), 1, 64)
    assert 0 < len(Store.open(tmp_path / "s")) < len(whole)
    again = capture(target, source, tmp_path / "s", ("last_hidden_state",), 1, 64)
    assert content(again) == content(whole)
    assert all(
        torch.equal(
            again.features(i, ("last_hidden_state",))["last_hidden_state"], whole.features(i, ("last_hidden_state",))["last_hidden_state"]
        )
        for i in range(len(whole))
    )


def test_capture_refuses_another_targets_conversations(tmp_path: Path, target: Target) -> None:
    source = regenerate(target, config(tmp_path), tmp_path / "a")
    with pytest.raises(UserError, match="its target is tiny"):
        capture(make_target(fingerprint="other"), source, tmp_path / "b", ("last_hidden_state",))


def test_an_existing_store_is_used_as_it_is(tmp_path: Path, target: Target) -> None:
    made = regenerate(target, config(tmp_path), tmp_path / "a")
    used = regenerate(target, DataConfig(existing=str(tmp_path / "a")), tmp_path / "b")
    assert content(used) == content(made)
    assert not (tmp_path / "b").exists()
    with pytest.raises(UserError, match="its target is tiny"):
        regenerate(make_target(fingerprint="other"), DataConfig(existing=str(tmp_path / "a")), tmp_path / "b")


def test_a_prompt_beyond_the_context_is_an_error_or_left_out_and_counted(
    tmp_path: Path, target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": " ".join(["w1"] * count)}) for count in (3, 90)))
    long = config(tmp_path, sources=(JsonlPrompts(path=str(path)),))
    with pytest.raises(UserError, match=r"94 tokens and 12 new ones exceed the target's context of 96.*max_prompt_tokens to 84"):
        regenerate(target, long, tmp_path / "s")
    path.write_text(path.read_text() + "\n" + json.dumps({"prompt": "w1 w1 w1"}))
    store = regenerate(target, long.model_copy(update={"max_prompt_tokens": 84}), tmp_path / "s")
    assert len(store) == 1
    assert store.index.left_out == {"equal prompts": 1, "prompts longer than 84 tokens (data.max_prompt_tokens)": 1}
    said = capsys.readouterr().err
    assert "left out: 1 equal prompts" in said
    assert "left out: 1 prompts longer than 84 tokens" in said
    with pytest.raises(UserError, match="no prompt is left of 2"):
        regenerate(target, long.model_copy(update={"max_prompt_tokens": 2}), tmp_path / "s")


def test_a_target_without_an_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no end token.*eos_token_id in generation_config"):
        regenerate(make_target(eos=None), config(tmp_path), tmp_path / "s")


def test_other_options_do_not_mix_into_a_store(tmp_path: Path, target: Target) -> None:
    regenerate(target, config(tmp_path, conversations=3), tmp_path / "s")
    with pytest.raises(UserError, match="begun with other options"):
        regenerate(target, config(tmp_path, max_new_tokens=13), tmp_path / "s")
