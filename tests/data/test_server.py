"""A server as the writer: the target's own texts whatever goes wrong, nothing lost or paid twice, and no other model's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from drafttrain.core.config import parse
from drafttrain.core.errors import UserError
from drafttrain.core.sampling import Sampling
from drafttrain.data.regenerate import TURNS, DataConfig, regenerate
from drafttrain.data.server import AnswerJournal, ServerConfig, ServerWriter, greedy_gap, http_client
from drafttrain.data.store import Store, StoreWriter
from drafttrain.target.adapter import Target
from drafttrain.target.sample import Job
from tests.data.loopback import Loopback, know, serving
from tests.data.stores import make_target
from tests.data.test_regenerate import config, content

FAULTS = {
    0: "500", 1: "half", 2: "cut", 3: "foreign ids", 5: "another prompt", 6: "two answers", 7: "429", 9: "runs on", 11: "no ids", 12: "503",
}  # fmt: skip
MEETING = {14: "meet", 15: "meet", 16: "meet"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, target: Target) -> Store:
    """What the target writes itself."""
    folder = tmp_path_factory.mktemp("own")
    store = regenerate(target, config(folder, temperatures=(0.0,)), folder / "s")
    know(store)
    return store


def asking(folder: Path, *servers: Loopback, **changes: object) -> DataConfig:
    known = {"concurrency", "retries", "timeout", "model"}
    options = {"pause": 0.001, **{key: value for key, value in changes.items() if key in known}}
    writer = {"kind": "openai", "endpoints": [server.url for server in servers], **options}
    others = {key: value for key, value in changes.items() if key not in known}
    return config(folder, writer=writer, **{"temperatures": (0.0,), **others})


def test_a_misbehaving_server_gives_the_store_that_the_target_writes_itself(tmp_path: Path, target: Target, own: Store) -> None:
    with serving(Loopback(target, FAULTS | MEETING)) as server:
        store = regenerate(target, asking(tmp_path, server, concurrency=4, retries=12), tmp_path / "s")
        assert content(store) == content(own)
        assert set(server.answered.values()) == {1}
        assert 3 <= server.most_under_way <= 4
        assert server.number == len(own) + len(FAULTS)
        assert not (tmp_path / "s" / "answers.jsonl").exists()
        again = server.number
        assert content(regenerate(target, asking(tmp_path, server), tmp_path / "s")) == content(own)
        assert server.number == again, "a finished store asked again"


def test_a_slow_endpoint_and_a_broken_one_lose_nothing_while_another_answers(tmp_path: Path, target: Target, own: Store) -> None:
    slow, broken = Loopback(target, {0: "slow"}), Loopback(target, always="500")
    with serving(slow), serving(broken), serving(Loopback(target)) as good:
        asked = asking(tmp_path, slow, broken, good, conversations=6, timeout=1.5, concurrency=1)
        assert content(regenerate(target, asked, tmp_path / "s")) == content(own)[:6]
        assert min(slow.number, broken.number, good.number) > 0
        assert not broken.answered


def test_sampled_answers_carry_options_and_seeds_of_their_own(tmp_path: Path, target: Target) -> None:
    with serving(Loopback(target)) as server:
        asked = asking(tmp_path, server, temperatures=(0.9,), top_p=0.8, conversations=5)
        store = regenerate(target, asked, tmp_path / "s")
        assert content(regenerate(target, asked, tmp_path / "again")) == content(store)
    bodies = server.bodies[2:7]
    assert len({body["seed"] for body in bodies}) == 5
    assert {(body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) for body in bodies} == {(0.9, 0.8, -1, 1.0)}
    assert all(body["return_token_ids"] and body["stop_token_ids"] == [2] for body in bodies)
    assert store[0].meta["top_p"] == 0.8


def test_turns_end_with_tokens_of_their_own_and_are_drawn_apart_from_answers(tmp_path: Path, target: Target) -> None:
    job = Job(3, [1, 3], 20, Sampling(1.5), ends=(11, 12))
    with serving(Loopback(target)) as server:
        config = ServerConfig(kind="openai", endpoints=(server.url,))
        turns, answers = (ServerWriter(config, target, 40, 0, tmp_path, purpose) for purpose in (TURNS, 0))
        written = next(iter(turns.run([job])))
    assert turns.body(job)["stop_token_ids"] == [2, 11, 12]
    assert turns.body(job)["seed"] != answers.body(job)["seed"]
    assert written.tokens[:2] == [1, 3]
    assert written.ended == (written.tokens[-1] in (2, 11, 12))


def test_a_killed_run_pays_no_answer_twice_that_had_arrived(
    tmp_path: Path, target: Target, own: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, saved = tmp_path / "s", tmp_path / "saved"
    plain = StoreWriter.append

    def dying(self: StoreWriter, *args: object) -> None:
        if len(self.lengths) == 7:
            shutil.copytree(folder, saved)  # what a SIGKILL at this moment leaves on the disk
            raise KeyboardInterrupt
        plain(self, *args)  # type: ignore[arg-type]

    with serving(Loopback(target)) as server:
        asked = asking(tmp_path, server, concurrency=3)
        monkeypatch.setattr(StoreWriter, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            regenerate(target, asked, folder)
        monkeypatch.undo()
        assert len(Store.open(saved)) == 0, "nothing was flushed yet"
        kept = len((saved / "answers.jsonl").read_bytes().splitlines())
        assert kept >= 7
        with (saved / "answers.jsonl").open("ab") as file:
            file.write(b'["half a li')
        paid = sum(server.answered.values())
        assert content(regenerate(target, asked, saved)) == content(own)
        assert sum(server.answered.values()) - paid == len(own) - kept
        twice = [key for key, count in server.answered.items() if count > 1]
        assert len(twice) <= paid - kept <= 3, "more than what was under way was asked again"


def test_what_was_answered_is_kept_where_a_request_fails_for_good(tmp_path: Path, target: Target, own: Store) -> None:
    with serving(Loopback(target, dict.fromkeys(range(6, 99), "500"))) as server:
        with pytest.raises(UserError, match=r"not written in 2 tries, the last at 'http://127.0.0.1:\d+/v1': status 500.*is kept"):
            regenerate(target, asking(tmp_path, server, concurrency=1, retries=1), tmp_path / "s")
        journal = AnswerJournal(tmp_path / "s")
        journal.close()
        assert len(journal.known) == 6
        server.faults = {}
        store = regenerate(target, asking(tmp_path, server, concurrency=1), tmp_path / "s")
    assert content(store) == content(own)
    assert set(server.answered.values()) == {1}


def other_tokenizer() -> Target:
    other = make_target()
    assert other.tokenizer is not None
    other.tokenizer.add_tokens(["foxes"])  # of the sample text
    return other


@pytest.mark.parametrize(
    ("server", "changes", "said"),
    [
        (lambda: Loopback(make_target(seed=1)), {}, "writes other greedy tokens than target 'in-memory'"),
        (lambda: Loopback(other_tokenizer()), {}, "its tokenizer cuts a sample text otherwise"),
        (lambda: Loopback(make_target(), {-2: "no ids"}), {}, "gives no token ids"),
        (lambda: Loopback(make_target(), {-1: "cut"}), {}, "answers a probe with half an answer"),
        (lambda: Loopback(make_target(), context=10), {}, "serves texts of 10 tokens, but the longest prompt"),
        (lambda: Loopback(make_target(), {-2: "404"}), {}, "refuses the request \\(status 404.*check the address"),
        (lambda: Loopback(make_target(), {-2: "500"}), {"retries": 1}, "status 500, 2 times in a row"),
        (lambda: Loopback(make_target()), {"model": "tini"}, r"data.writer.model 'tini' \(did you mean 'tiny'\?\)"),
    ],
)
def test_a_server_that_does_not_serve_the_target_is_refused_before_any_work(
    tmp_path: Path, target: Target, server: object, changes: dict[str, object], said: str
) -> None:
    with serving(server()) as running, pytest.raises(UserError, match=said):  # type: ignore[operator]
        regenerate(target, asking(tmp_path, running, **changes), tmp_path / "s")
    assert running.number == 0


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path, target: Target) -> None:
    server = Loopback(target)
    server.server_close()
    with pytest.raises(UserError, match=r"cannot be reached .* is the server up"):
        regenerate(target, asking(tmp_path, server), tmp_path / "s")


def test_what_a_request_cannot_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a server gives none; leave it out"):
        parse(DataConfig, {"capture": ["last_hidden_state"], "writer": {"kind": "openai", "endpoints": ["http://a"]}}, "recipe")
    odd = make_target()
    odd.own_options = {"no_repeat_ngram_size": 3}
    with serving(Loopback(odd)) as server, pytest.raises(UserError, match=r"asks for no_repeat_ngram_size=3, which cannot be asked"):
        regenerate(odd, asking(tmp_path, server), tmp_path / "s")
    with pytest.raises(UserError, match="endpoints 'localhost:8000': expected an address"):
        regenerate(make_target(), config(tmp_path, writer={"kind": "openai", "endpoints": ["localhost:8000"]}), tmp_path / "t")


def test_the_key_is_read_from_the_environment_alone(tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OPENAI_API_KEY", "k-1")
    with http_client(ServerConfig(kind="openai", endpoints=("http://a",))) as client:
        assert client.headers["Authorization"] == "Bearer k-1"


def test_greedy_tokens_that_tie_in_low_precision_pass(target: Target) -> None:
    prompt = [1, 7, 9]
    likeliest = int(target.model(torch.tensor([prompt])).logits[0, -1].argmax())
    assert greedy_gap(target, prompt, [likeliest]) == 0
    assert greedy_gap(target, prompt, [(likeliest + 1) % 64]) > 1e-3
