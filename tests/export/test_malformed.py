"""Damaged and foreign folders: one error each, which names the file and the key. More than 300 of them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafttrain.core.errors import UserError
from drafttrain.export.base import FormatConfig
from drafttrain.export.gguf import GGUF
from drafttrain.export.load import load_drafter
from drafttrain.export.medusa import MedusaFormat
from drafttrain.export.sglang import SGLang
from drafttrain.export.speculators import Speculators
from drafttrain.target.adapter import Target
from drafttrain.target.files import TargetConfig
from tests.export.published import random_drafter, save_target, source_of, written

FORMS: dict[str, tuple[FormatConfig, str, dict[str, Any]]] = {
    "speculators": (Speculators(), "eagle3", {"draft_vocab_size": 20, "norm_features": True}),
    "sglang": (SGLang(), "eagle3", {"draft_vocab_size": 20}),
    "medusa": (MedusaFormat(), "medusa", {"heads": 2, "own_heads": True}),
}
ALWAYS_READ = {
    "speculators": ("norm_before_residual", "transformer_layer_config"),
    "sglang": ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "rms_norm_eps"),
    "medusa": ("hidden_size", "vocab_size", "num_heads", "medusa_fc_bias"),
}
"""Keys of config.json without which a folder cannot be read."""
UNFIT = {"text": "many", "zero": 0, "negative": -3, "fraction": 2.5, "list": ["x"], "null": None}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target.load(save_target(tmp_path_factory.mktemp("target") / "target"))


@pytest.fixture(scope="module")
def folders(target: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One sound folder of each format."""
    home = tmp_path_factory.mktemp("sound")
    config = TargetConfig(model=target.name, dtype="float32", device="cpu")
    sound = {}
    for name, (form, family, options) in FORMS.items():
        source = source_of(random_drafter(config, family, **options), config, home / f"{name}-drafter")
        sound[name] = written(form, source, home / name)
    source = source_of(random_drafter(config, "eagle3", draft_vocab_size=20), config, home / "gguf-drafter")
    sound["gguf"] = written(GGUF(quantization="f32"), source, home / "gguf")
    return sound


def missing(tensors: dict[str, Tensor], key: str) -> None:
    del tensors[key]


def wider(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = torch.cat([tensors[key], tensors[key][:1]])


def of_another_type(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = tensors[key].to(torch.int16 if tensors[key].is_floating_point() else torch.float32)


def with_nan(tensors: dict[str, Tensor], key: str) -> None:
    if tensors[key].is_floating_point():
        tensors[key].view(-1)[0] = float("nan")
    else:
        tensors[key].view(-1)[0] = 1 - tensors[key].view(-1)[0].long()  # a map that names other tokens


def twice(tensors: dict[str, Tensor], key: str) -> None:
    tensors[f"{key}.again"] = tensors[key].clone()


DAMAGE: dict[str, Callable[[dict[str, Tensor], str], None]] = {
    "missing": missing, "wider": wider, "type": of_another_type, "nan": with_nan, "extra": twice,
}  # fmt: skip
OPTIONAL = {"t2d", "embed_tokens.weight"}
"""Tensors that a folder may leave out."""


def damaged_tensors(sound: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Every kind of damage to every tensor, one at a time: (file, key)."""
    file = folder / "model.safetensors"
    for key in load_file(sound / file.name):
        for kind, damage in DAMAGE.items():
            if (kind == "missing" and key in OPTIONAL) or (kind == "type" and key == "t2d"):
                continue
            tensors = load_file(sound / file.name)
            damage(tensors, key)
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
            yield file.name, key
    shutil.copy(sound / file.name, file)


def damaged_files(sound: Path, folder: Path, name: str, cuts: int) -> Iterator[tuple[str, str]]:
    """The file cut off at `cuts` places, with a huge header, and empty."""
    file, whole = folder / name, (sound / name).read_bytes()
    for cut in range(cuts):
        file.write_bytes(whole[: len(whole) * cut // cuts])
        yield name, ""
    if name.endswith(".safetensors"):
        for size in (2**63, 10**12, len(whole) - 7):
            file.write_bytes(struct.pack("<Q", size) + whole[8:])
            yield name, ""
    file.write_bytes(whole)


def damaged_config(sound: Path, folder: Path, form: str) -> Iterator[tuple[str, str]]:
    """Every key that is always read: missing, or of an unfit value; and files that are no object."""
    file = folder / "config.json"
    for key in ALWAYS_READ[form]:
        config = json.loads((sound / file.name).read_text())
        del config[key]
        file.write_text(json.dumps(config))
        yield file.name, key
        for value in UNFIT.values():
            file.write_text(json.dumps({**config, key: value}))
            yield file.name, key
    for text in ("", "{", "[]", "null", '"x"'):
        file.write_text(text)
        yield file.name, ""
    shutil.copy(sound / file.name, file)


def refused(folder: Path, target: Target, file: str, key: str) -> None:
    with pytest.raises(UserError) as error:
        load_drafter(folder, target=target)
    said = str(error.value)
    assert file in said and key.removesuffix(".again") in said and "\n" not in said, (file, key, said)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_damaged_folders_are_refused_by_file_and_key(tmp_path: Path, folders: dict[str, Path], target: Target, form: str) -> None:
    sound, folder = folders[form], tmp_path / "damaged"
    shutil.copytree(sound, folder)
    load_drafter(folder, target=target)
    cases = 0
    for damage in (
        damaged_tensors(sound, folder), damaged_files(sound, folder, "model.safetensors", 25), damaged_config(sound, folder, form)
    ):
        for file, key in damage:
            refused(folder, target, file, key)
            cases += 1
    load_drafter(folder, target=target)
    assert cases >= 80  # 300 and more, all formats together


def test_gguf_files_cut_off_are_refused(tmp_path: Path, folders: dict[str, Path], target: Target) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(folders["gguf"], folder)
    for file, _ in damaged_files(folders["gguf"], folder, "drafter.gguf", 40):
        refused(folder, target, file, "")


def test_pickles_are_never_opened(tmp_path: Path, folders: dict[str, Path], target: Target) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(folders["sglang"], folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle, which can run code and is not read"):
        load_drafter(folder, target=target)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm_before_residual": True}, "key 'norm_before_residual' is True"),
        ({"norm_output": True}, "key 'norm_output' is True"),
        ({"norm_before_fc": True}, "key 'norm_before_fc' is True"),
        ({"speculators_model_type": "dflash"}, "only 'eagle3' has a family here"),
    ],
)
def test_a_head_that_computes_something_else_is_refused(
    tmp_path: Path, folders: dict[str, Path], target: Target, changes: dict[str, Any], reason: str
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(folders["speculators"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=reason):
        load_drafter(folder, target=target)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, "'rope_theta' is 10000.0, the target's is 20000.0"),
        ({"head_dim": 16}, "key 'head_dim' is 16"),
        ({"rms_norm_eps": 1e-5}, "key 'rms_norm_eps' is 1e-05"),
        ({"attention_bias": True}, "key 'attention_bias' is True"),
        ({"num_hidden_layers": 2}, "key 'num_hidden_layers' is 2"),
    ],
)
def test_a_layer_that_differs_from_the_targets_is_refused(
    tmp_path: Path, folders: dict[str, Path], target: Target, changes: dict[str, Any], reason: str
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(folders["sglang"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=reason):
        load_drafter(folder, target=target)


def test_a_folder_of_no_known_format_says_what_is_known(tmp_path: Path, target: Target) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["SomethingElse"]}))
    with pytest.raises(UserError, match="of no format known here; known: native"):
        load_drafter(tmp_path, target=target)


def test_a_head_that_does_not_name_its_target_asks_for_it(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="say which it is"):
        load_drafter(folders["sglang"])


def test_another_embedding_than_the_targets_is_refused(tmp_path: Path, folders: dict[str, Path], target: Target) -> None:
    folder = tmp_path / "other"
    shutil.copytree(folders["speculators"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"'embed_tokens.weight' is not this target's embedding"):
        load_drafter(folder, target=target)
