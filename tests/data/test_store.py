"""Stores: what is written is read, and what is broken is named."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import drafttrain.data.store as store_module
from drafttrain.core.errors import UserError
from drafttrain.data.origin import Origin, take_probe
from drafttrain.data.store import Conversation, Store, StoreWriter, bytes_per_token, feature_widths
from drafttrain.target.adapter import Target
from drafttrain.target.files import TargetConfig
from tests.data.stores import V, conversation, make_store, make_target, numbered


def test_conversations_and_features_come_back_in_the_order_of_their_ids(tmp_path: Path, target: Target) -> None:
    store = make_store(tmp_path / "s", target, features=("last_hidden_state", "aux_hidden_states"))
    again = Store.open(tmp_path / "s")
    generator = np.random.default_rng(1)
    assert len(again) == len(store) == 24
    for id in range(24):
        wanted, got = conversation(id, generator), again[id]
        assert got.id == id
        assert np.array_equal(got.tokens, wanted.tokens)
        assert np.array_equal(got.mask, wanted.mask)
        assert (got.prompt_hash, got.meta) == (wanted.prompt_hash, wanted.meta)
        assert again.lengths[id] == len(wanted.tokens)
        for name, value in numbered(wanted, {"last_hidden_state": 32, "aux_hidden_states": 96}).items():
            assert torch.equal(again.features(id, [name])[name], value)


def test_index_names_origin_features_and_counts(tmp_path: Path, target: Target) -> None:
    store = make_store(tmp_path / "s", target, features=("last_hidden_state",))
    assert store.index.origin.target == "tiny"
    assert store.index.origin.aux_layers == target.aux_layers
    assert store.index.features == {"last_hidden_state": 32}
    assert store.index.complete
    assert sum(shard.tokens for shard in store.index.shards) == store.tokens == store.lengths.sum()


def test_bytes_on_disk_are_as_computed(tmp_path: Path, target: Target) -> None:
    store = make_store(tmp_path / "s", target, count=200, features=("last_hidden_state", "aux_hidden_states"), per_shard=200)
    data = sum(shard.bytes for shard in store.index.shards)
    wanted = bytes_per_token(("last_hidden_state", "aux_hidden_states"), 32, 3, "float32") * store.tokens
    notes = 200 * 200  # ids, offsets, prompt hashes and meta: at most so much a conversation
    assert wanted <= data <= wanted + notes
    assert bytes_per_token(("aux_hidden_states", "last_hidden_state"), 576, 3, "bfloat16") == 5 + 4 * 576 * 2


def test_split_by_prompt_is_stable_and_puts_equal_prompts_on_one_side(tmp_path: Path, target: Target) -> None:
    writer = StoreWriter(tmp_path / "s", Origin.of_target(target))
    for id in range(400):
        writer.append(Conversation.answered([6 + id % 50, 7 + id % 40, 8, 9, 10 + id % 9], 2, {}, id))
    store = writer.finish()
    train, held_out = store.split("train", 0.2, 1), store.split("held_out", 0.2, 1)
    assert sorted(train + held_out) == list(range(400))
    assert 0.1 < len(held_out) / 400 < 0.3
    assert not {store[i].prompt_hash for i in train} & {store[i].prompt_hash for i in held_out}
    assert held_out != store.split("held_out", 0.2, 2)
    assert store.split("held_out", 0.0) == []


def test_answer_counts_leave_prompts_out(tmp_path: Path, target: Target) -> None:
    writer = StoreWriter(tmp_path / "s", Origin.of_target(target))
    writer.append(Conversation.answered([9, 9, 9, 11, 11, 12], 3, {}, 0))
    counts = writer.finish().answer_counts(V)
    assert counts.shape == (V,)
    assert counts[11] == 2
    assert counts[12] == 1
    assert counts.sum() == 3


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9] + b"x" * 9), "is corrupt"),
    ],
)
def test_a_damaged_shard_is_named_in_one_line(tmp_path: Path, target: Target, damage: object, words: str) -> None:
    make_store(tmp_path / "s", target)
    damage(tmp_path / "s" / "shard-00001.safetensors")  # type: ignore[operator]
    with pytest.raises(UserError, match=rf"shard-00001\.safetensors.*{words}.*delete the store") as caught:
        Store.open(tmp_path / "s")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("{", "corrupt"), ("[]", "corrupt"), ('{"format": 9}', "format 9"), ('{"format": 1}', "origin")]
)
def test_a_damaged_index_is_named(tmp_path: Path, target: Target, text: str, words: str) -> None:
    make_store(tmp_path / "s", target)
    (tmp_path / "s" / "index.json").write_text(text)
    with pytest.raises(UserError, match=words):
        Store.open(tmp_path / "s")


def test_a_folder_without_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no index\.json"):
        Store.open(tmp_path)


def test_another_target_tokenizer_layers_or_dtype_is_refused(tmp_path: Path, target: Target) -> None:
    store = make_store(tmp_path / "s", target, features=("aux_hidden_states",))
    origin = Origin.of_target(target)
    store.check_target(origin)
    changes = [{"target": "b"}, {"tokenizer": "b"}, {"template": "b"}, {"aux_layers": (1, 1, 2)}, {"dtype": "bfloat16"}]
    for change in changes:
        with pytest.raises(UserError, match=f"its {next(iter(change))} is .* but the target at hand has"):
            store.check_target(origin.model_copy(update=change))
    with pytest.raises(UserError, match="last_hidden_is_normed"):
        store.check_target(origin.model_copy(update={"last_hidden_is_normed": False}))


def test_a_store_of_texts_alone_fits_any_precision(tmp_path: Path, target: Target) -> None:
    origin = Origin.of_target(target).model_copy(update={"dtype": "bfloat16", "aux_layers": (1, 2, 2)})
    make_store(tmp_path / "s", target).check_target(origin)


def test_a_head_that_does_not_give_the_targets_logits_is_refused(tmp_path: Path, target: Target) -> None:
    store = make_store(tmp_path / "s", target, features=("last_hidden_state",))
    store.check_head(target.head)
    with pytest.raises(UserError, match="other logits than the target"):
        store.check_head(make_target(seed=1).head)


def test_a_head_behind_unnormed_states_is_refused(tmp_path: Path, target: Target) -> None:
    probe = take_probe(target)
    probe["last_hidden_state"] = probe["last_hidden_state"] * 1.3
    writer = StoreWriter(tmp_path / "s", Origin.of_target(target), {"last_hidden_state": 32}, probe=probe)
    with pytest.raises(UserError, match="other logits than the target"):
        writer.finish().check_head(target.head)


def test_a_missing_feature_is_named(tmp_path: Path, target: Target) -> None:
    store = make_store(tmp_path / "s", target, features=("last_hidden_state",))
    store.require(("last_hidden_state",))
    with pytest.raises(UserError, match=r"no feature aux_hidden_states \(it holds last_hidden_state\)"):
        store.require(("last_hidden_state", "aux_hidden_states"))


def test_writing_goes_on_behind_what_is_safe(tmp_path: Path, target: Target) -> None:
    generator, origin = np.random.default_rng(1), Origin.of_target(target)
    made = [conversation(id, generator) for id in range(9)]
    first = StoreWriter(tmp_path / "s", origin, stage="a")
    for one in made[:4]:
        first.append(one)
    first.flush()
    first.append(made[4])  # never flushed: lost with the process
    second = StoreWriter(tmp_path / "s", origin, stage="a")
    assert set(second.lengths) == {0, 1, 2, 3}
    assert second.tokens == sum(len(one.tokens) for one in made[:4])
    for one in made[4:]:
        second.append(one)
    store = second.finish()
    assert [store[i].tokens.tolist() for i in range(9)] == [one.tokens.tolist() for one in made]


def test_another_stage_feature_set_or_target_does_not_go_on(tmp_path: Path, target: Target) -> None:
    origin = Origin.of_target(target)
    StoreWriter(tmp_path / "s", origin, {"last_hidden_state": 32}, "a").finish()
    with pytest.raises(UserError, match=r"begun with other options.*choose another output folder"):
        StoreWriter(tmp_path / "s", origin, {"last_hidden_state": 32}, "b")
    with pytest.raises(UserError, match="begun with other options"):
        StoreWriter(tmp_path / "s", origin, {}, "a")
    with pytest.raises(UserError, match="its target is"):
        StoreWriter(tmp_path / "s", origin.model_copy(update={"target": "b"}), {"last_hidden_state": 32}, "a")


def test_a_shard_without_an_index_entry_does_not_count(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, origin = np.random.default_rng(1), Origin.of_target(target)
    made = [conversation(id, generator) for id in range(6)]
    writer = StoreWriter(tmp_path / "s", origin)
    for one in made[:3]:
        writer.append(one)
    writer.flush()
    writer.append(made[3])
    monkeypatch.setattr(store_module, "write_index", lambda folder, index: 1 / 0)  # dies between shard and index
    with pytest.raises(ZeroDivisionError):
        writer.flush()
    monkeypatch.undo()
    assert (tmp_path / "s" / "shard-00001.safetensors").exists()
    again = StoreWriter(tmp_path / "s", origin)
    assert set(again.lengths) == {0, 1, 2}
    for one in made[3:]:
        again.append(one)
    assert [one.id for one in map(again.finish().__getitem__, range(6))] == list(range(6))


def test_a_full_disk_is_one_line_and_keeps_what_was_written(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(1)
    writer = StoreWriter(tmp_path / "s", Origin.of_target(target))
    writer.append(conversation(0, generator))
    writer.flush()
    writer.append(conversation(1, generator))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module, "save_file", full)
    with pytest.raises(UserError, match="the disk is full; make room") as caught:
        writer.flush()
    assert "\n" not in str(caught.value)
    assert len(Store.open(tmp_path / "s")) == 1
    assert not list((tmp_path / "s").glob("*.partial"))
    monkeypatch.undo()
    writer.flush()
    assert len(Store.open(tmp_path / "s")) == 2


def test_conversations_beyond_the_limit_are_not_part_of_the_store_but_kept(tmp_path: Path, target: Target) -> None:
    generator, origin = np.random.default_rng(1), Origin.of_target(target)
    writer = StoreWriter(tmp_path / "s", origin)
    for id in range(5):
        writer.append(conversation(id, generator))
    assert len(writer.finish(limit=3)) == 3
    grown = StoreWriter(tmp_path / "s", origin)
    assert set(grown.lengths) == {0, 1, 2, 3, 4}
    assert len(grown.finish()) == 5


@pytest.mark.parametrize("token", [V, -1])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path, target: Target, token: int) -> None:
    writer = StoreWriter(tmp_path / "s", Origin.of_target(target))
    with pytest.raises(UserError, match=r"token id .* is outside the vocabulary of 64.*tokenized for another model"):
        writer.append(Conversation.answered([9, token, 9], 1, {}, 0))


def test_origin_needs_no_loaded_target(tmp_path: Path) -> None:
    target = make_target()
    target.model.save_pretrained(tmp_path / "m")
    target.tokenizer.save_pretrained(tmp_path / "m")  # type: ignore[union-attr]
    config = TargetConfig(model=str(tmp_path / "m"), dtype="float32", device="cpu")
    assert Origin.of_config(config) == Origin.of_target(Target.load(config))


def test_feature_widths_are_those_the_target_gives(target: Target) -> None:
    tokens = torch.tensor([[7, 8, 9]])
    got = target.encode(tokens, torch.arange(3)[None], torch.zeros_like(tokens), ("last_hidden_state", "aux_hidden_states"))
    widths = feature_widths(("last_hidden_state", "aux_hidden_states"), 32, len(target.aux_layers))
    assert {name: value.shape[-1] for name, value in got.items()} == widths


def test_index_is_plain_json(tmp_path: Path, target: Target) -> None:
    make_store(tmp_path / "s", target)
    assert json.loads((tmp_path / "s" / "index.json").read_text())["format"] == 1
