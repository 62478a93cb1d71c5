"""A drafter's folder: what is damaged in it is refused in one line, never loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drafttrain.core.errors import UserError
from drafttrain.drafters.files import load_drafter, save_drafter
from tests.tiny import tiny_eagle3, tiny_target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_drafter(tiny_eagle3(tiny_target()), tmp_path / "drafter")


def test_weights_damaged_behind_an_intact_header_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"drafter '.*': model\.safetensors is damaged .* differs from the hash in config\.json; restore"):
        load_drafter(folder)


def test_a_drafter_of_an_earlier_version_loads_without_a_hash(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["weights_sha256"]
    path.write_text(json.dumps(config))
    assert load_drafter(folder).config.name == "eagle3"


NO_CONFIGS = (b"\xff\xfe{}", b"{", b"[]", b'"text"', b'{"drafter": 5}', b'{"drafter": {"name": "eagle3"}, "target": 5}')


@pytest.mark.parametrize("content", NO_CONFIGS)
def test_a_config_that_is_not_a_drafters_is_refused_with_its_path(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"drafter '.*': config\.json is (not a drafttrain drafter's|corrupt)"):
        load_drafter(folder)


def test_a_family_that_is_no_name_is_unknown(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["drafter"]["name"] = ["eagle3"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="unknown family"):
        load_drafter(folder)
