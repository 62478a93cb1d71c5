"""GGUF for llama.cpp: an EAGLE-3 drafter (`draft-eagle3`), or a small LM (`--model-draft`); the target beside it where asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.errors import UserError, first_line
from drafttrain.drafters.base import Drafter, DrafterConfig
from drafttrain.drafters.eagle3 import Eagle3, Eagle3Config
from drafttrain.drafters.small_lm import SmallLM, SmallLMConfig
from drafttrain.export.base import FormatConfig, Source, shell
from drafttrain.export.eagle3 import TOP_IDS, check_output, check_three_layers, layer_config, read_eagle3
from drafttrain.export.gguf_file import (
    LLAMA_KEYS,
    Quantization,
    add_rope,
    add_tokenizer,
    add_weight,
    finish,
    layer_sizes,
    llama3_factors,
    new_writer,
    packages,
    pair_rows,
    unpaired,
    write_causal_lm,
)  # fmt: skip
from drafttrain.export.reading import ImportTarget
from drafttrain.export.tensors import MEND, Values, Weights
from drafttrain.target.files import TargetShape, load_config, text_config
from drafttrain.target.head import SafetensorsFolder
from drafttrain.target.rope import rope_parameters

DRAFTER_FILE, TARGET_FILE = "drafter.gguf", "target.gguf"
FIELDS = (
    "target_layers", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.layer_norm_rms_epsilon", "block_count", "norm_before_residual", "norm_before_fc",
)  # fmt: skip
"""What is read of an EAGLE-3 file, behind `eagle3.`."""
OWN_KEYS = {"fc.weight": "fc.weight", "norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


class GGUF(FormatConfig):
    """One file, with the target's tokenizer."""

    name: Literal["gguf"] = "gguf"
    quantization: Quantization = "f16"
    """Of the matrices: `f32`, `f16`, `bf16` or `q8_0`; vectors are fp32 always."""
    target: bool = False
    """Write the target too, as `target.gguf` in the same precision."""
    pre_tokenizer: str | None = None
    """llama.cpp's name of how the tokenizer splits text, where it is not recognised."""

    def check(self, drafter: DrafterConfig, target: TargetShape) -> None:
        self.only(drafter, ["eagle3", "small_lm"], "llama.cpp has no such drafter")
        if isinstance(drafter, Eagle3Config):
            check_output(self, drafter)
            check_three_layers(self, drafter, target, "llama.cpp")

    def write(self, source: Source, folder: Path) -> None:
        drafter = source.drafter
        if isinstance(drafter, Eagle3):
            self._write_eagle3(drafter, source, folder / DRAFTER_FILE)
        else:
            assert isinstance(drafter, SmallLM)
            model: Any = drafter.to_causal_lm(source.head)
            state = model.state_dict()
            self._write_lm(folder / DRAFTER_FILE, model.config, state.__getitem__, source)
        if self.target:
            config = text_config(load_config(source.home, source.target.trust_remote_code))
            self._write_lm(folder / TARGET_FILE, config, SafetensorsFolder(source.home).read, source)

    def _write_lm(self, path: Path, config: Any, weights: Any, source: Source) -> None:
        write_causal_lm(path, config.to_dict(), weights, source.home, self.quantization, self.pre_tokenizer)

    def _write_eagle3(self, drafter: Eagle3, source: Source, path: Path) -> None:
        config, target = layer_config(drafter), drafter.target
        writer = new_writer(path, "eagle3", self.quantization)
        layer_sizes(writer, config, 1)
        writer.add_array("eagle3.target_layers", list(target.aux_layers))  # HS ids
        writer.add_uint32("eagle3.target_hidden_size", target.hidden_size)
        writer.add_bool("eagle3.norm_before_residual", False)
        writer.add_bool("eagle3.norm_before_fc", False)
        add_rope(writer, config)
        add_tokenizer(writer, source.home, target.vocab_size, self.pre_tokenizer)
        for key, weight in drafter.state_dict().items():
            if key != "vocab":
                add_weight(writer, gguf_key(key), pair_rows(key.removesuffix(".weight"), weight, config), self.quantization)
        if len(drafter.vocab) < target.vocab_size:
            kind = packages().GGMLQuantizationType.I64
            writer.add_tensor("d2t", drafter.vocab.cpu().numpy().astype(np.int64), raw_dtype=kind)  # the ids themselves, not offsets
        finish(writer)

    def use(self, target: str) -> str:
        k = self.draft_length
        own = "target.gguf" if self.target else "TARGET.gguf"
        return "`--spec-type draft-eagle3` for EAGLE-3, `draft-simple` for a small LM:\n\n" + shell(
            f"llama-server -m {own} -md drafter.gguf --spec-type draft-eagle3 --spec-draft-n-max {k} --spec-draft-p-min 0"
        )


def gguf_key(key: str) -> str:
    """Our name of an EAGLE-3 weight -> GGUF's."""
    if key in OWN_KEYS:
        return OWN_KEYS[key]
    inner = key.removeprefix("midlayer.").removesuffix(".weight")
    return f"blk.0.{LLAMA_KEYS[inner]}.weight"


def recognises(folder: Path, config: dict[str, Any]) -> bool:
    return folder.suffix == ".gguf" or (folder / DRAFTER_FILE).exists()


def read(folder: Path, config: dict[str, Any], target: ImportTarget) -> Drafter:
    """A GGUF drafter as one of ours."""
    path = folder if folder.suffix == ".gguf" else folder / DRAFTER_FILE
    file = _opened(path)
    kind = _field(file, "general.architecture")
    if kind == "eagle3":
        return _read_eagle3(path, file, target)
    return _read_lm(path, target)


def _opened(path: Path) -> Any:
    try:
        return packages().GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}': truncated or no GGUF file ({first_line(error)}); {MEND}") from error


def _field(file: Any, key: str) -> Any:
    field = file.get_field(key)
    return None if field is None else field.contents()


def _read_eagle3(path: Path, file: Any, target: ImportTarget) -> Drafter:
    fields = {key: _field(file, f"eagle3.{key}") for key in FIELDS}
    found = Values(path, {key: value for key, value in fields.items() if value is not None})
    for key in ("norm_before_residual", "norm_before_fc"):
        if found.flag(key, False):
            raise found.unfit(key, "false: EAGLE-3 here computes no such thing")
    tensors = _tensors(path, file)
    draft_ids = tensors.pop("d2t", None)
    size = target.shape.vocab_size if draft_ids is None else len(draft_ids)
    if draft_ids is not None:
        tensors["d2t"] = draft_ids - torch.arange(size)
    config = _as_config(found, file, tensors, target, size)
    values = Values(path, config)
    for key, heads in (("q_proj", values.number("num_attention_heads")), ("k_proj", values.number("num_key_value_heads"))):
        name = f"midlayer.self_attn.{key}.weight"
        if name in tensors and tensors[name].shape[0] % (2 * heads) == 0:
            tensors[name] = unpaired(tensors[name], heads)
    return read_eagle3(values, values, Weights(path.parent, tensors, path.name), "midlayer", target)


def _as_config(found: Values, file: Any, tensors: dict[str, Tensor], target: ImportTarget, draft_size: int) -> dict[str, Any]:
    """GGUF's fields under the names of config.json."""
    heads = found.number("attention.head_count")
    head_dim = found.number("attention.key_length", found.number("embedding_length") // heads)
    config = {
        TOP_IDS: list(found.numbers("target_layers") or ()),
        "vocab_size": target.shape.vocab_size,
        "draft_vocab_size": draft_size,
        "hidden_size": found.number("embedding_length"),
        "intermediate_size": found.number("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": found.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _as_written(found.real("attention.layer_norm_rms_epsilon"), target),
        "num_hidden_layers": found.number("block_count"),
    }
    return config | _rope(found, file, tensors, target, head_dim)


def _as_written(eps: float, target: ImportTarget) -> float:
    """The file's 32 bits stand for the target's number where they are equal to it as such."""
    own = float(target.shape.text_config.get("rms_norm_eps") or 1e-5)
    return own if np.float32(own) == np.float32(eps) else eps


def _rope(found: Values, file: Any, tensors: dict[str, Tensor], target: ImportTarget, head_dim: int) -> dict[str, Any]:
    """The target's rotary positions, if the file's are those; llama3's factors cannot be turned back into its options."""
    own = rope_parameters(target.shape.text_config)
    base = _field(file, "eagle3.rope.freq_base")
    if base is None or np.float32(base) != np.float32(own["rope_theta"]):
        raise UserError(f"'{found.path}': key 'eagle3.rope.freq_base' is {base}, expected the target's {own['rope_theta']}; {MEND}")
    kind = _field(file, "eagle3.rope.scaling.type") or ("llama3" if "rope_freqs.weight" in tensors else "default")
    if kind != (own["rope_type"] or "default"):
        raise UserError(f"'{found.path}': rotary scaling is '{kind}', expected the target's, '{own['rope_type'] or 'default'}'")
    factors = tensors.pop("rope_freqs.weight", None)
    if factors is not None and not torch.allclose(factors, llama3_factors(own, head_dim), rtol=1e-5):
        raise UserError(f"'{found.path}': tensor 'rope_freqs.weight' is not the target's llama3 scaling, which ours follows")
    return {"rope_parameters": own}


def _tensors(path: Path, file: Any) -> dict[str, Tensor]:
    """All tensors under our names, as fp32 or int64."""
    quants, names = packages().quants, {gguf: own for own, gguf in OWN_KEYS.items()}
    names |= {f"blk.0.{theirs}.weight": f"midlayer.{own}.weight" for own, theirs in LLAMA_KEYS.items()}
    names["token_embd.weight"] = "embed_tokens.weight"
    tensors = {}
    for entry in file.tensors:
        whole = entry.tensor_type.name.startswith("I")
        try:
            values = entry.data if whole else quants.dequantize(entry.data, entry.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"'{path}': tensor '{entry.name}' is of type {entry.tensor_type.name}, which is not read here") from error
        tensors[names.get(entry.name, entry.name)] = torch.from_numpy(np.array(values))
    return tensors


def _read_lm(path: Path, target: ImportTarget) -> Drafter:
    """A causal LM: transformers turns its rows back."""
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        quantized = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, quantization_config=quantized, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"'{path}': no causal LM that transformers reads ({first_line(error)}); {MEND}") from error
    drafter = SmallLM(SmallLMConfig(path=str(path), architecture=model.config.to_dict()), target.shape)
    drafter.lm.load_state_dict(model.state_dict())
    return drafter.eval()
