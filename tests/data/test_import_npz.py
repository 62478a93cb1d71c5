"""The importer script for tokenized conversations."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from drafttrain.data.store import Store
from tests.data.stores import make_target

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, target = tmp_path_factory.mktemp("model"), make_target()
    target.model.save_pretrained(folder)
    assert target.tokenizer is not None
    target.tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, conversations: list[list[int]], prompts: list[int], domains: list[str]) -> Path:
    count = len(conversations)
    np.savez(
        path, tokens=np.concatenate(conversations).astype(np.uint16), offsets=np.cumsum([0, *map(len, conversations)]),
        prompt_len=np.array(prompts, dtype=np.int32), domain=(np.arange(count) % len(domains)).astype(np.uint8),
        temperature=np.full(count, 0.7, dtype=np.float16), domains=np.array(domains),
    )
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/import_npz.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)


def here(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The same without a process of its own: its exit code."""
    monkeypatch.setattr(sys, "argv", ["import_npz.py", *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "scripts" / "import_npz.py"), run_name="__main__")
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_tokens_masks_domains_and_temperatures_arrive_file_after_file(tmp_path: Path, model: Path) -> None:
    one = write(tmp_path / "one.npz", [[6, 7, 8], [9, 10, 11, 12]], [1, 2], ["a", "b"])
    two = write(tmp_path / "two.npz", [[20, 21, 22, 23]], [3], ["c"])
    done = run(tmp_path / "s", one, two, "--target", model)
    assert done.returncode == 0, done.stderr
    assert "3 conversations, 11 tokens, 5 of them answers" in done.stdout
    store = Store.open(tmp_path / "s")
    got = [(store[i].tokens.tolist(), int((~store[i].mask).sum()), store[i].meta["domain"]) for i in range(3)]
    assert got == [([6, 7, 8], 1, "a"), ([9, 10, 11, 12], 2, "b"), ([20, 21, 22, 23], 3, "c")]
    assert {store[i].meta["temperature"] for i in range(3)} == {0.7}


def test_a_fraction_is_a_random_part_that_the_seed_chooses(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "one.npz", [[6, 7, 8 + at] for at in range(40)], [1] * 40, ["a"])
    picked = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / f"s{number}"
        assert here(monkeypatch, folder, file, "--target", model, "--fraction", 0.25, "--seed", seed) == 0
        store = Store.open(folder)
        picked.append([store[i].tokens.tolist() for i in range(len(store))])
    assert len(picked[0]) == 10
    assert picked[0] == picked[1] != picked[2]


def test_bad_files_are_one_line_and_exit_code_2(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"no zip")
    lacking = tmp_path / "lacking.npz"
    np.savez(lacking, tokens=np.arange(3))
    foreign = write(tmp_path / "foreign.npz", [[6, 7, 900]], [1], ["a"])
    for file, words in ((broken, "not an npz file"), (lacking, "no array offsets"), (foreign, "outside the vocabulary of 64")):
        assert here(monkeypatch, tmp_path / "s", file, "--target", model) == 2
        said = capsys.readouterr().err
        assert words in said
        assert len(said.strip().splitlines()[-1]) > 20
        assert "Traceback" not in said
