"""The plain causal-LM directory: an ordinary transformers model with the target's tokenizer, for `small_lm` drafters.

Whatever loads a causal LM can draft with it: transformers' `assistant_model`, engines that take a draft model by its folder.
"""

from __future__ import annotations

from pathlib import Path

from drafttrain.core.errors import UserError
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.files import load_drafter
from drafttrain.drafters.small_lm import SmallLM
from drafttrain.target.adapter import load_tokenizer
from drafttrain.target.files import TargetConfig, resolve, target_fingerprint
from drafttrain.target.head import TargetHead


def export_plain(source: Path, folder: Path, target: TargetConfig) -> None:
    """Writes the drafter in `source` as a causal LM of the target's precision; borrowed embedding and head are filled in.

    Raises `UserError` for a family that is no language model of its own, and for a drafter of another target.
    """
    home = resolve(target)
    drafter = language_model(load_drafter(source, target_fingerprint(home)))
    model = drafter.to_causal_lm(TargetHead.from_folder(home, trust_remote_code=target.trust_remote_code))
    model.to(target.torch_dtype()).save_pretrained(folder)
    load_tokenizer(home, target.trust_remote_code).save_pretrained(folder)


def language_model(drafter: Drafter) -> SmallLM:
    """The drafter, or a `UserError` where it cannot write text without its target."""
    if not isinstance(drafter, SmallLM):
        raise UserError(
            f"export format 'plain': a {drafter.config.name} drafter reads its target's hidden states and is no causal LM of its own; "
            f"use 'native', or train a small_lm"
        )
    return drafter
