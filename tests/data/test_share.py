"""Several processes write one store: that of one process, whoever is killed and however many go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.data.capture import capture
from drafttrain.data.regenerate import regenerate, regenerate_share
from drafttrain.data.share import Share, part_of
from drafttrain.data.store import Store, StoreWriter
from drafttrain.target.adapter import Target
from tests.data.test_regenerate import config, content

NAMES = ("last_hidden_state",)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, target: Target) -> Store:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("own")
    return regenerate(target, config(folder), folder / "s")


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, begun = StoreWriter.append, []

    def dying(self: StoreWriter, *args: object) -> None:
        begun.append(1)
        if len(begun) > count:
            raise KeyboardInterrupt
        plain(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(StoreWriter, "append", dying)


def test_shares_give_the_store_of_one_process_whoever_dies_and_however_many_go_on(
    tmp_path: Path, target: Target, own: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = tmp_path / "s", config(tmp_path)
    assert regenerate_share(target, asked, folder, Share(0, 2)) is None
    interrupt_after(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        regenerate_share(target, asked, folder, Share(1, 2))
    monkeypatch.undo()
    appended: list[int] = []
    plain = StoreWriter.append
    monkeypatch.setattr(StoreWriter, "append", lambda self, one, *rest: (appended.append(one.id), plain(self, one, *rest)))
    assert regenerate_share(target, asked, folder, Share(2, 3)) is None
    assert regenerate_share(target, asked, folder, Share(0, 3)) is None
    store = regenerate_share(target, asked, folder, Share(1, 3, waits=True))
    assert store is not None
    assert content(store) == content(own)
    assert len(appended) == len(set(appended)) == 20 - 10 - 4, "written twice, or not at all"
    assert not list(folder.glob("part-*"))
    assert content(regenerate(target, asked, folder)) == content(own)


def test_one_process_goes_on_with_what_shares_left(tmp_path: Path, target: Target, own: Store) -> None:
    assert regenerate_share(target, config(tmp_path), tmp_path / "s", Share(1, 2)) is None
    assert content(regenerate(target, config(tmp_path), tmp_path / "s")) == content(own)
    assert not list((tmp_path / "s").glob("part-*"))


def test_features_that_shares_captured_are_those_of_one_process(tmp_path: Path, target: Target, own: Store) -> None:
    whole = capture(target, own, tmp_path / "whole", NAMES, 1, 48)
    assert whole is not None
    assert capture(target, own, tmp_path / "s", NAMES, 1, 48, share=Share(1, 2)) is None
    shared = capture(target, own, tmp_path / "s", NAMES, 1, 48, share=Share(0, 2))
    assert shared is not None
    assert content(shared) == content(whole)
    for i in range(len(whole)):
        assert torch.equal(shared.features(i, NAMES)[NAMES[0]], whole.features(i, NAMES)[NAMES[0]])


def test_a_part_that_was_taken_up_before_its_process_could_remove_it_counts_once(tmp_path: Path, target: Target, own: Store) -> None:
    folder, asked = tmp_path / "s", config(tmp_path)
    plain = Path.unlink
    with pytest.MonkeyPatch.context() as patch:  # killed between the index that lists the shards and the removal of the part

        def dying(self: Path, missing_ok: bool = False) -> None:
            if self.name == "index.json":
                raise KeyboardInterrupt
            plain(self, missing_ok)

        patch.setattr(Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            regenerate_share(target, asked, folder, Share(0, 2))
    store = regenerate_share(target, asked, folder, Share(1, 2))
    assert store is not None
    assert content(store) == content(own)
    assert sum(shard.conversations for shard in store.index.shards) == 20


def test_other_divisions_at_work_the_same_share_and_token_budgets_are_refused(tmp_path: Path, target: Target) -> None:
    folder, asked = tmp_path / "s", config(tmp_path)
    folder.mkdir()
    with part_of(folder, Share(0, 2)):
        with pytest.raises(UserError, match="of another number of shares"):
            regenerate_share(target, asked, folder, Share(0, 3))
        with pytest.raises(UserError, match="of another number of shares"):
            regenerate(target, asked, folder)
        with pytest.raises(UserError, match="another process writes it now"):
            regenerate_share(target, asked, folder, Share(0, 2))
    with pytest.raises(UserError, match="cannot be shared among processes"):
        regenerate_share(target, config(tmp_path, tokens=50), folder, Share(0, 2))


@pytest.mark.parametrize("text", ["4/4", "1", "-1/2", "a/b", "1/"])
def test_a_share_that_is_none_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"expected I/N"):
        Share.parse(text)
    assert Share.parse("0/4") == Share(0, 4)
