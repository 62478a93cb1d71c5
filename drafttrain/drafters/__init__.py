"""Drafter families, one file each. `DRAFTERS` is the whole list: a new family adds its line here."""

from __future__ import annotations

from drafttrain.drafters.base import Drafter, DrafterConfig
from drafttrain.drafters.consensus import Consensus
from drafttrain.drafters.ctc import Ctc
from drafttrain.drafters.dflash import DFlash
from drafttrain.drafters.dflash2 import DFlash2
from drafttrain.drafters.domino import Domino
from drafttrain.drafters.dspark import DSpark
from drafttrain.drafters.eagle import Eagle
from drafttrain.drafters.eagle3 import Eagle3
from drafttrain.drafters.hidden_ar import HiddenAr
from drafttrain.drafters.hydra import Hydra
from drafttrain.drafters.jetspec import JetSpec
from drafttrain.drafters.medusa import Medusa
from drafttrain.drafters.mlp_speculator import MLPSpeculator
from drafttrain.drafters.mtp import MTP
from drafttrain.drafters.ngram import Ngram
from drafttrain.drafters.p_eagle import PEagle
from drafttrain.drafters.small_lm import SmallLM
from drafttrain.drafters.specdiff import SpecDiff
from drafttrain.target.files import TargetShape

DRAFTERS: dict[str, type[Drafter]] = {
    "small_lm": SmallLM, "medusa": Medusa, "eagle3": Eagle3, "ngram": Ngram, "dflash": DFlash, "dspark": DSpark, "jetspec": JetSpec,
    "domino": Domino, "dflash2": DFlash2, "specdiff": SpecDiff,
    "eagle": Eagle, "mtp": MTP, "hydra": Hydra, "mlp_speculator": MLPSpeculator,
    "ctc": Ctc, "hidden_ar": HiddenAr, "p_eagle": PEagle,
    "consensus": Consensus,
}  # fmt: skip


def build(config: DrafterConfig, target: TargetShape) -> Drafter:
    """A fresh drafter of the family that `config.name` names."""
    return DRAFTERS[config.name](config, target)
