"""Verification rules, one file each. `RULES` is the whole list: a new rule adds its line here."""

from __future__ import annotations

from drafttrain.verify.base import Rule, RuleConfig
from drafttrain.verify.confidence import Confidence
from drafttrain.verify.divergence import Divergence
from drafttrain.verify.greedy import Greedy
from drafttrain.verify.judge import Judge
from drafttrain.verify.longest import Longest
from drafttrain.verify.multidraft import Multidraft
from drafttrain.verify.recursive import Recursive
from drafttrain.verify.reflective import Reflective
from drafttrain.verify.rejection import Rejection
from drafttrain.verify.traversal import Traversal
from drafttrain.verify.typical import Typical

RULES: dict[str, type[Rule]] = {
    "greedy": Greedy, "rejection": Rejection, "recursive": Recursive, "traversal": Traversal, "multidraft": Multidraft,
    "typical": Typical, "confidence": Confidence, "judge": Judge, "divergence": Divergence,
    "reflective": Reflective, "longest": Longest,
}  # fmt: skip


def build(config: RuleConfig) -> Rule:
    """The rule that `config.name` names."""
    return RULES[config.name](config)
