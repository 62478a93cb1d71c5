"""Which target a folder holds: the same weights and forward give the same fingerprint, whoever wrote the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafttrain.core.errors import UserError
from drafttrain.target.files import PUBLISHED, TargetConfig, demo_folder, target_fingerprint
from tests.tiny import tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(0).save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    path.unlink()
    change(weights)


WRITTEN = [{"transformers_version": "4.0"}, {"_name_or_path": "elsewhere"}, {"use_cache": False}, {"new_key": None}]
COMPUTED = [{"rms_norm_eps": 1e-3}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"hidden_act": "gelu"}]


@pytest.mark.parametrize("changes", WRITTEN)
def test_who_wrote_the_files_is_no_part_of_the_fingerprint(folder: Path, changes: dict[str, Any]) -> None:
    before = target_fingerprint(folder)
    edit(folder, **changes)
    assert target_fingerprint(folder) == before


def test_other_files_with_the_same_weights_have_the_same_fingerprint(folder: Path) -> None:
    before = target_fingerprint(folder)

    def in_two_files(weights: dict[str, torch.Tensor]) -> None:
        names = sorted(weights, reverse=True)
        places = {}
        for number, half in enumerate((names[::2], names[1::2])):
            part = f"part-{number}.safetensors"
            save_file({name: weights[name] for name in half}, folder / part, {"format": "pt", "by": "another"})
            places |= dict.fromkeys(half, part)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    rewrite(folder, in_two_files)
    assert target_fingerprint(folder) == before


@pytest.mark.parametrize("changes", COMPUTED)
def test_a_key_that_changes_the_forward_changes_the_fingerprint(folder: Path, changes: dict[str, Any]) -> None:
    before = target_fingerprint(folder)
    edit(folder, **changes)
    assert target_fingerprint(folder) != before


def test_every_tensor_counts(folder: Path) -> None:
    original = load_file(folder / "model.safetensors")
    marks = {target_fingerprint(folder)}
    for name, value in original.items():
        save_file({**original, name: value + 1}, folder / "model.safetensors", {"format": "pt"})
        marks.add(target_fingerprint(folder))
    assert len(marks) == len(original) + 1


@pytest.mark.parametrize("left", [0, 5, 100])
def test_a_file_cut_in_its_header_is_refused(folder: Path, left: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
        target_fingerprint(folder)


@pytest.mark.demo
def test_the_demo_target_keeps_the_fingerprint_under_which_results_are_published() -> None:
    assert target_fingerprint(demo_folder()) in PUBLISHED.values()


@pytest.mark.parametrize(("device", "message"), [("gpu0", "is no device; expected auto"), ("cuda:99", "CUDA devices here; use auto")])
def test_a_device_that_is_not_there_is_refused_by_name(device: str, message: str) -> None:
    with pytest.raises(UserError, match=f"target.device '{device}'.*{message}"):
        TargetConfig(device=device).torch_device()
