"""Files and folders are whole whenever a process dies, and have one writer at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drafttrain.core import disk
from drafttrain.core.errors import UserError


@pytest.fixture
def umask() -> Iterator[int]:
    mask = os.umask(0o027)
    yield 0o027
    os.umask(mask)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_failed_write_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    disk.write_text(path, "older")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        disk.write_whole(path, fail)
    assert path.read_text() == "older"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive = (tmp_path / f".file.{pid}.partial" for pid in (ended.pid, os.getppid()))
    dead.touch()
    alive.touch()
    disk.write_text(tmp_path / "file", "new")
    assert not dead.exists()
    assert alive.exists()


def test_links_stay_links_and_their_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("older")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    disk.write_text(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_pipes_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    disk.write_text(pipe, "through")
    reader.join(10)
    assert read == ["through"]
    assert pipe.is_fifo()
    disk.write_text(Path("/dev/null"), "nothing")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("kind", ["folder", "loop"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    with pytest.raises(UserError, match="name"):
        disk.write_text(path, "text")


def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    disk.write_text(tmp_path / "file", "text")
    with disk.whole_folder(tmp_path / "folder") as partial:
        (partial / "inner").touch(mode=0o600)
    modes = [mode(tmp_path / name) for name in ("file", "folder", "folder/inner")]
    assert modes == [0o666 & ~umask, 0o777 & ~umask, 0o666 & ~umask]


def filled(folder: Path, text: str) -> None:
    with disk.whole_folder(folder) as partial:
        (partial / "file").write_text(text)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_and_one_stands_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    folder = tmp_path / "folder"
    filled(folder, "older")
    seen: list[str] = []
    rename = os.replace

    def watched(source: Path, place: Path) -> None:
        rename(source, place)
        seen.append((disk.standing(folder) / "file").read_text())

    monkeypatch.setattr(os, "replace", watched)
    if not exchange:
        monkeypatch.setattr(disk, "_exchanged", lambda *_: False)
    filled(folder, "new")
    assert (folder / "file").read_text() == "new"
    assert seen == ([] if exchange else ["older", "new"])
    assert sorted(os.listdir(tmp_path)) == [".folder.lock", "folder"]


def test_the_next_writer_brings_back_what_a_kill_left_aside_and_removes_copies(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in (".folder.old", ".folder.partial", ".folder-a1b2c3d4", ".old-folder-a1b2c3d4"):
        (tmp_path / name).mkdir()
    (tmp_path / ".folder.old" / "file").write_text("only copy")
    assert (disk.standing(folder) / "file").read_text() == "only copy"
    disk.sweep_folder(folder)
    assert (folder / "file").read_text() == "only copy"
    assert os.listdir(tmp_path) == ["folder"]


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from drafttrain.core.disk import only_writer\nwith only_writer(Path(sys.argv[1])): pass"
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with disk.only_writer(tmp_path / "out"):
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "UserError" in refused.stderr
        assert "another process writes it now" in refused.stderr
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null"])
def test_a_damaged_json_file_is_named_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "index.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"store 'x': index\.json is corrupt .*; make it again"):
        disk.read_json(path, "store 'x'", "make it again")


def test_a_closed_file_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", closed)
    with pytest.raises(UserError, match="another user's") as refusal:
        disk.read_json(tmp_path / "index.json", "store 'x'", "delete it")
    assert "delete" not in str(refusal.value)


@pytest.mark.parametrize("version", [99, "1", True, None])
def test_another_format_is_refused(version: object) -> None:
    with pytest.raises(UserError, match=r"format .* but this drafttrain reads 1; make it again"):
        disk.check_format({"format": version}, 1, "it", "make it again")
