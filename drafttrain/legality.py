"""What fits together: a recipe's configurations and the target's shape, asked when a recipe is read, by `doctor` and by every stage before
its first work.

Nothing is loaded, and no file is written. Families, rules, policies and formats say by their own configuration what they can do. The
decoder, which is below this file, asks `RuntimeConfig.fitted` itself; sizes that only the target's shape tells are asked here alone.
"""

from __future__ import annotations

from typing import Protocol

from drafttrain.core.errors import UserError
from drafttrain.core.sampling import Sampling
from drafttrain.data.prompts import SelfPrompts
from drafttrain.data.regenerate import DataConfig
from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.base import DrafterConfig
from drafttrain.evaluation.bench import EvaluationConfig
from drafttrain.export import ExportConfig
from drafttrain.runtime.decoder import RuntimeConfig
from drafttrain.target.files import TargetConfig, TargetShape
from drafttrain.train.loop import TrainConfig
from drafttrain.verify.multidraft import MultidraftConfig


class Sections(Protocol):
    """What is read of a recipe, which stands above this file."""

    @property
    def target(self) -> TargetConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def drafter(self) -> DrafterConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def runtime(self) -> RuntimeConfig: ...
    @property
    def evaluation(self) -> EvaluationConfig: ...
    @property
    def export(self) -> ExportConfig: ...


LARGEST_PROGRAM = 64
"""Tokens of the largest vocabulary for which `multidraft: optimal` solves its linear program over all sets of drafts."""


def check(recipe: Sections, target: TargetShape | None = None) -> None:
    """A `UserError` that names the first thing in a recipe that cannot work. target: where it is known already, sizes are compared too."""
    sampling = recipe.evaluation.sampling.check()
    check_runtime(recipe.runtime, sampling, recipe.drafter, target)
    for contender in recipe.evaluation.contenders:
        runtime = contender.runtime or recipe.runtime
        if isinstance(contender.drafter, str):  # a folder's family is not known yet
            runtime.fitted(sampling)
        else:
            check_runtime(runtime, sampling, contender.drafter or recipe.drafter, target)
    _check_training(recipe)
    if target is not None:
        _check_sizes(recipe, target)
        recipe.export.check(recipe.drafter, target)


def check_runtime(runtime: RuntimeConfig, sampling: Sampling, drafter: DrafterConfig, target: TargetShape | None = None) -> None:
    """A `UserError` where this drafter could not be decoded with so, or not exactly."""
    family = DRAFTERS[drafter.name]
    rule, plan = runtime.fitted(sampling, family)
    drafter.check_draws(plan.draws)
    runtime.planner(plan)
    deepest = drafter.max_depth
    if deepest is not None and runtime.shape.depth > deepest:
        raise UserError(
            f"runtime.shape drafts {runtime.shape.depth} tokens deep, but this {drafter.name} drafter gives {deepest} at most; choose a "
            f"shallower shape, or a drafter of more"
        )
    if runtime.prefetch:
        runtime.check_prefetch(drafter.name, family.needs, family.trainable)
    config = rule.config
    if target is not None and isinstance(config, MultidraftConfig) and config.scheme == "optimal" and target.vocab_size > LARGEST_PROGRAM:
        raise UserError(
            f"rule 'multidraft' with scheme 'optimal' solves a linear program over all sets of drafts, for vocabularies of "
            f"{LARGEST_PROGRAM} tokens at most; this target has {target.vocab_size:,}: choose scheme 'priority' or 'truncated'"
        )


def _check_training(recipe: Sections) -> None:
    data, train = recipe.data, recipe.train
    temperature = train.eval_temperature
    if data.existing is None and temperature and temperature not in data.temperatures:
        drawn = ", ".join(map(str, data.temperatures))
        raise UserError(
            f"train.eval_temperature {temperature}: no answer is drawn at it (data.temperatures: {drawn}); take one of these"
        )
    longest_turn = max((source.max_tokens for source in data.sources if isinstance(source, SelfPrompts)), default=0)
    if data.existing is None and longest_turn >= train.row_length:
        raise UserError(
            f"data.sources: user turns of {longest_turn:,} tokens (max_tokens) leave no room in rows of {train.row_length:,} "
            f"(train.row_length); make rows longer, or turns shorter"
        )


def _check_sizes(recipe: Sections, target: TargetShape) -> None:
    """What only the target's shape tells."""
    context = recipe.target.max_context or target.max_context
    evaluation = recipe.evaluation
    if evaluation.max_new_tokens >= context:
        raise UserError(
            f"evaluation.max_new_tokens {evaluation.max_new_tokens:,} leaves no room for a prompt: the target has {context:,} positions"
        )
    if recipe.data.existing is None and recipe.data.max_new_tokens >= context:
        longest = recipe.data.max_new_tokens
        raise UserError(f"data.max_new_tokens {longest:,} leaves no room for a prompt: the target has {context:,} positions")
    size = getattr(recipe.drafter, "draft_vocab_size", None)
    if size is not None and size > target.vocab_size:
        raise UserError(f"drafter.draft_vocab_size {size:,} is more than the target's {target.vocab_size:,} tokens; take fewer")
