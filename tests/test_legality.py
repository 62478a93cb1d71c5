"""Recipes that cannot work are refused when they are read: at once, before a model is loaded or a file is written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from drafttrain import legality
from drafttrain.core.errors import UserError
from drafttrain.recipe import load_recipe
from drafttrain.target.files import TargetShape

SHAPE = TargetShape(576, 49152, 30, (2, 15, 27), (2,), {"max_position_embeddings": 8192}, "0" * 16)
BASE: dict[str, Any] = {"name": "test", "target": {"model": "smollm2-demo"}, "drafter": {"name": "small_lm"}, "train": {"steps": 10}}
BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)

IMPOSSIBLE: dict[str, tuple[list[str], str]] = {
    "prefetch with a drafter that reads features": (["drafter={name: eagle3}", "runtime.prefetch=4"], "runtime.prefetch 4"),
    "prefetch with medusa": (["drafter={name: medusa}", "runtime.prefetch=2"], "runtime.prefetch 2"),
    "prefetch beside a lookup": (["runtime.prefetch=2", "runtime.hybrid={}"], "runtime.prefetch 2"),
    "prefetch with an adaptive policy": (["runtime.prefetch=2", "runtime.policy=adaptive"], "runtime.prefetch 2"),
    "prefetch with swapped tokens": (["runtime.prefetch=2", "runtime.corrupt=0.5"], "runtime.prefetch 2"),
    "a decision policy without its model": (["runtime.policy=decision"], "decision"),
    "an unknown policy": (["runtime.policy=fixd"], "fixd"),
    "a lookup that never matches": (["runtime.hybrid={lookup: {name: ngram, confidence: 1}}"], "confidence"),
    "a lookup drafter that never matches": (["drafter={name: ngram, confidence: 0}"], "confidence"),
    "a plain causal LM of eagle3": (["drafter={name: eagle3}", "export.formats=[causal_lm]"], "causal_lm"),
    "medusa's format of a small LM": (["export.formats=[medusa]"], "medusa"),
    "speculators' format of medusa": (["drafter={name: medusa}", "export.formats=[speculators]"], "speculators"),
    "an unknown format": (["export.formats=[gguff]"], "gguff"),
    "no format": (["export.formats=[]"], "export.formats"),
    "judging at a temperature nobody drew at": (["train.eval_temperature=0.5", "data.temperatures=[0.0, 0.7]"], "eval_temperature 0.5"),
    "an optimal rule over a real vocabulary": (
        ["runtime.rule={name: multidraft, scheme: optimal}", "evaluation.temperature=1.0", "runtime.shape={shape: static, children: [2]}",
         "runtime.draws=iid"], "49,152"),
    "a chain deeper than Medusa's heads": (
        ["drafter={name: medusa, heads: 3}", "runtime.shape={shape: chain, length: 4}"], "4 tokens deep"),
    "a tree deeper than Medusa's heads": (
        ["drafter={name: medusa, heads: 1}", "runtime.shape={shape: static, children: [2, 2]}"], "2 tokens deep"),
    "a chain deeper than the block": (["drafter={name: dflash, block: 3}", "runtime.shape={shape: chain, length: 4}"], "4 tokens deep"),
    "a contender deeper than the heads": (
        ["drafter={name: medusa, heads: 3}", "runtime.shape={shape: chain, length: 3}",
         "evaluation.contenders=[{label: deep, runtime: {shape: {shape: chain, length: 9}}}]"], "9 tokens deep"),
    "rows shorter than the user turns": (
        ["train.row_length=64", "data.max_new_tokens=32", "data.sources=[{kind: self, max_tokens: 64}]"], "64 tokens"),
    "a chain of a thousand million": (["runtime.shape={shape: chain, length: 1000000000}"], "1000000000"),
    "children of a million million": (["runtime.shape={shape: static, children: [1000000, 1000000]}"], "1,024 nodes"),
    "a dynamic tree of a thousand million": (["runtime.shape={shape: dynamic, nodes: 1000000000}"], "1000000000"),
    "a dynamic depth of a million": (["runtime.shape={shape: dynamic, depth: 1000000}"], "1000000"),
    "a thousand million heads": (["drafter={name: medusa, heads: 1000000000}"], "1000000000"),
    "a block of a thousand million": (["drafter={name: dspark, block: 1000000000}"], "1000000000"),
    "a draft vocabulary larger than the target's": (["drafter={name: eagle3, draft_vocab_size: 50000}"], "50,000"),
    "an answer as long as the context": (["evaluation.max_new_tokens=8192"], "8,192"),
    "drawn siblings in a dynamic tree": (
        ["runtime.shape={shape: dynamic}", "runtime.draws=iid", "evaluation.temperature=0.7"], "dynamic"),
    "drawn tokens beside a lookup": (["runtime.hybrid={}", "runtime.draws=iid", "evaluation.temperature=0.7"], "'iid'"),
    "draws from slots that know later tokens": (
        ["drafter={name: specdiff, order: confidence, passes: 4}", "runtime.draws=iid", "evaluation.temperature=0.7"],
        "runtime.draws 'iid'"),
    "a lookup that draws": (["drafter={name: ngram}", "runtime.draws=iid", "evaluation.temperature=0.7"], "'iid'"),
    "a greedy rule for sampling": (["runtime.rule=greedy", "evaluation.temperature=0.7"], "greedy"),
    "rejection sampling of a tree": (
        ["runtime.rule=rejection", "evaluation.temperature=0.7", "runtime.shape={shape: static, children: [2, 2]}"], "rejection"),
    "confidence beside a lookup": (["runtime.rule=confidence", "runtime.hybrid={}"], "confidence"),
    "open rounds in a dynamic tree": (["runtime.rule=longest", "runtime.shape={shape: dynamic}"], "longest"),
    "a negative temperature": (["evaluation.temperature=-1"], "-1"),
    "top-p of nothing": (["evaluation.top_p=0"], "top_p"),
    "an unknown family": (["drafter={name: eagle4}"], "eagle4"),
    "an unknown key": (["train.stps=3"], "stps"),
    "a path without a parent": (["runtime.shape={shape: static, choices: [[0, 0]]}"], "no parent"),
    "an old name beside its new one": (["drafter={name: eagle3, unroll: 2, ttt_steps: 3}"], "unroll"),
    "a router without a pool": (["runtime.router=hedge"], "router"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE, ids=list(IMPOSSIBLE))
def test_an_impossible_recipe_is_refused_in_under_a_second_and_nothing_is_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, named = IMPOSSIBLE[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    begun = time.process_time()
    with pytest.raises(UserError) as refused:
        legality.check(load_recipe(path, overrides), SHAPE)
    assert time.process_time() - begun < 1
    assert named in str(refused.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_there_are_forty_of_them_and_the_recipe_without_them_is_possible(tmp_path: Path) -> None:
    assert len(IMPOSSIBLE) >= 40
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE))
    legality.check(load_recipe(path), SHAPE)


def test_aliases_that_stand_for_millions_of_values_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(BOMB)
    with pytest.raises(UserError, match="100,000 values"):
        load_recipe(path)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_this_repository_is_possible_for_the_demo_target(path: Path) -> None:
    legality.check(load_recipe(path), SHAPE)
