"""The language model of a checkpoint: itself, or the text model within a vision-language one, which is served without the rest.

Images are refused where prompts are rendered (`template.py`), so a text is what the whole model writes for text alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from drafttrain.core.errors import UserError, first_line
from drafttrain.target.files import text_config

NOT_CAUSAL = ("paligemma",)
"""Models that read a prompt in both directions, which a text model alone does not."""


def auto_class(config: Any, trust_remote_code: bool = False) -> Any:
    """The class of transformers that loads such a checkpoint. Raises `UserError` where there is none that can be served."""
    own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if own_code or (type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and text_config(config) is config):
        return AutoModelForCausalLM
    kind, text = config.model_type, text_config(config)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"target of type '{kind}': no causal language model of transformers; choose a decoder-only text model")
    if kind in NOT_CAUSAL or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"target of type '{kind}': its text model ('{text.model_type}') is not one that stands alone in transformers; choose the "
            f"text-only checkpoint of the same family"
        )
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM


def language_model(whole: Any) -> Any:
    """A causal LM of the parts of `whole` that read and write text: `whole` itself where it has no others."""
    text = text_config(whole.config)
    if text is whole.config:
        return whole
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text, dtype=whole.dtype)
    decoder = whole.get_decoder()
    if type(decoder) is not type(model.base_model):
        kinds = f"a {type(decoder).__name__} where a {type(model.base_model).__name__} is expected"
        raise UserError(f"target of type '{whole.config.model_type}': its text model is {kinds}; choose the text-only checkpoint")
    setattr(model, model.base_model_prefix, decoder)
    model.set_output_embeddings(whole.get_output_embeddings())
    model.generation_config = whole.generation_config
    return model.eval()


def skeleton(config: AutoConfig, trust_remote_code: bool = False) -> Any:
    """The language model without its weights. Raises `UserError` where its configuration makes none (sizes that do not fit)."""
    chosen = auto_class(config, trust_remote_code)
    try:
        with torch.device("meta"):
            return language_model(chosen.from_config(config, trust_remote_code=trust_remote_code))
    except UserError:
        raise
    except Exception as error:  # a model's own code fails in its own ways
        kind = getattr(config, "model_type", "unknown")
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"target of type '{kind}': its config.json makes no model ({said}); mend its sizes") from error


def parameter_name(model: nn.Module, module: nn.Module, name: str = "weight") -> str:
    """The name under which a module's parameter stands in a state dict, also where it is tied to another one."""
    path = next(path for path, child in model.named_modules() if child is module)
    return f"{path}.{name}" if path else name
