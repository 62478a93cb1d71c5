"""Every registered rule, beside everything that may draft: what cannot work is refused before decoding, and the rest decodes."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic, Shape, Static
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.hybrid import HybridConfig
from drafttrain.recipe import check_recipe
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.target.adapter import Target
from drafttrain.verify import RULES, build
from drafttrain.verify.base import RuleConfig
from drafttrain.verify.confidence import ConfidenceConfig
from drafttrain.verify.divergence import DivergenceConfig
from drafttrain.verify.judge import JudgeConfig, JudgeHead
from drafttrain.verify.recursive import RecursiveConfig
from drafttrain.verify.reflective import ReflectiveConfig
from tests.families import tiny_drafter
from tests.tiny import tiny_target

FOLDER = TemporaryDirectory()  # a judge's head
PROMPTS = [[1, 2, 3, 4, 1, 2, 3], [5, 6, 5, 6, 5]]
SHAPES: list[Shape] = [Chain(length=2), Static(children=(2, 1)), Dynamic(depth=2, beam=2, top_k=2, nodes=4)]
AROUND: list[dict[str, Any]] = [{}, {"policy": "adaptive"}, {"corrupt": 0.5}]


@lru_cache
def target() -> Target:
    return tiny_target(3)


@lru_cache
def drafter(family: str) -> Drafter:
    return tiny_drafter(family, target())


def rule_config(name: str) -> RuleConfig:
    """With its default options, and what it cannot do without."""
    if name == "judge":
        return JudgeConfig(head=str(JudgeHead(32, target().fingerprint).save(Path(FOLDER.name))))
    return {"reflective": ReflectiveConfig(prompt=(1, 2)), "naive": RecursiveConfig(naive=True)}.get(name) or RULES[name].Config(name=name)


def refused(runtime: RuntimeConfig, temperature: float, family: str) -> str:
    """Why, or nothing."""
    try:
        runtime.fitted(Sampling(temperature), drafter(family))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", ["small_lm", "ngram"])
@pytest.mark.parametrize("name", [*RULES, "naive"])
def test_a_rule_that_cannot_work_is_refused_before_decoding_and_any_other_decodes(name: str, family: str) -> None:
    config = rule_config(name)
    decoded = 0
    for shape, beside, temperature, around in product(SHAPES, (None, HybridConfig(draft_cost=0.0)), (0.0, 1.0), AROUND):
        runtime = RuntimeConfig(shape=shape, rule=config, hybrid=beside, **around)
        lawless = build(config).needs_draft_probs and (beside is not None or family == "ngram")
        refusal = refused(runtime, temperature, family)
        assert ("reads draft distributions" in refusal) == lawless
        if refusal:
            continue
        answers = SpeculativeDecoder(target(), drafter(family), runtime).generate(PROMPTS, 14, temperature=temperature, seed=1)
        assert [len(one.tokens) for one in answers] == [14, 14]
        decoded += 1
    needs_trained = (
        build(config).needs_draft_probs or build(config).leaves_next_open or name == "multidraft"
    )  # a lookup's draws are not iid
    assert decoded > 0 or (needs_trained and family == "ngram")


@pytest.mark.parametrize("config", [ConfidenceConfig(tau_base=1.0), DivergenceConfig(bound=0.0)])
def test_a_rule_that_is_off_reads_no_distributions(config: RuleConfig) -> None:
    rule, plan = RuntimeConfig(rule=config, hybrid=HybridConfig()).fitted(Sampling())
    assert not rule.needs_draft_probs and not plan.record_probs


@pytest.mark.parametrize("name", ["confidence", "divergence"])
def test_a_recipe_whose_contender_has_no_distributions_for_its_rule_is_refused_when_it_is_read(name: str) -> None:
    def read(contender: dict[str, Any], **runtime: Any) -> None:
        given = {"label": "x", **contender}
        check_recipe({"drafter": {"name": "eagle3"}, "train": {"steps": 1}, "runtime": runtime, "evaluation": {"contenders": [given]}}, "r")

    read({}, rule=name)
    for contender, runtime in (
        ({"drafter": {"name": "ngram"}}, {"rule": name}),
        ({"runtime": {"rule": name, "hybrid": {}}}, {}),
        ({}, {"rule": name, "hybrid": {}}),
    ):
        with pytest.raises(UserError, match=f"rule '{name}' reads draft distributions"):
            read(contender, **runtime)
