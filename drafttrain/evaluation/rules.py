"""Rules compared on the same trees: real rounds are logged once, and every rule judges each of them.

The expected accepted length of a rule on a tree (its tokens and the distributions p and q fixed) is a mean over `chances` runs of the rule
itself, whose random numbers are spread evenly and the same for every rule. Differences are paired round by round; intervals are
bootstraps over prompts.

Where siblings were drawn iid, the limit P* of every rule's acceptance (`limits.py`) stands beside that of each top-down rule, at the nodes
whose children the first rule tried: no chance is left in them but which nodes were reached.
n rounds, N nodes, K levels, R distributions, V vocabulary, S chances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.config import fingerprint
from drafttrain.core.errors import UserError
from drafttrain.core.rng import SpreadRng
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.evaluation.bench import EvaluationConfig
from drafttrain.evaluation.journal import append_whole
from drafttrain.evaluation.limits import ACCEPTANCE, Tried, tries
from drafttrain.evaluation.loops import loops
from drafttrain.evaluation.machine import commit, device_name, versions
from drafttrain.evaluation.rows import Interval
from drafttrain.evaluation.rule_rows import Form, RuleComparison, RuleRow
from drafttrain.evaluation.runners import Contender
from drafttrain.evaluation.suites import Suite
from drafttrain.runtime.rounds import LoggedProbs, RoundLog, RoundsInfo, log_rounds
from drafttrain.target.adapter import Target
from drafttrain.verify import RULES, build
from drafttrain.verify.base import Rule, RuleConfig

RESAMPLES = 10_000
ELEMENTS = 1 << 26
"""Probabilities that one call of a rule may look at, about."""

@dataclass(frozen=True)
class RuleOnTrial:
    """A rule, and what it is shown of each tree."""

    rule: Rule
    form: Form = "whole"

    @property
    def label(self) -> str:
        options = self.rule.config.model_dump(exclude_defaults=True, exclude={"name"})
        given = "".join(f" {value}" for value in options.values())
        return f"{self.rule.config.name}{given}" + ("" if self.form == "whole" else f", {self.form}")


@dataclass
class Levels:
    """By level, at the nodes whose children the first judge tried: [n, K] sums over its visits, as shares of the chances."""

    visits: np.ndarray
    limit: np.ndarray  # of P*
    accepted: np.ndarray  # of the probability that this judge's rule accepts one of the children


@dataclass
class RuleOutcome:
    """What one judge made of all rounds."""

    judge: RuleOnTrial
    lengths: np.ndarray  # [n] expected accepted length of each round, the bonus token not counted
    reached: np.ndarray  # [K] share of rounds in which a node at depth 1, 2, ... stood
    levels: Levels | None = None  # of iid draws, and rules that go from the root down

    def of(self, some: np.ndarray) -> RuleOutcome:
        """Of the rounds [n] bool alone; `reached` stays that of all."""
        levels = None if self.levels is None else Levels(*(level[some] for level in vars(self.levels).values()))
        return replace(self, lengths=self.lengths[some], levels=levels)


def judges(info: RoundsInfo, further: Sequence[RuleConfig] = ()) -> tuple[list[RuleOnTrial], list[str]]:
    """Every registered rule that is exact for such trees, and `further` ones with their options; why the others are left out.

    The first one is what the others are compared with: `recursive` for trees, `rejection` for chains.
    """
    topology = "chain" if info.max_children <= 1 else "tree"
    chosen: dict[str, RuleOnTrial] = {}
    left_out: list[str] = []
    for name, kind in RULES.items():
        reason = _unfit(kind, info.draws, topology, info.temperature)
        if reason is None:
            judge = RuleOnTrial(build(kind.Config(name=name)))
            chosen[judge.label] = judge
        else:
            left_out.append(f"{name}: {reason}")
    for config in further:
        kind = RULES[config.name]
        if kind.lossless and (info.draws, topology) in kind.accepts:
            judge = RuleOnTrial(build(config))
            chosen[judge.label] = judge
    first = "recursive" if topology == "tree" else "rejection"
    order = sorted(chosen.values(), key=lambda judge: judge.label != first)
    if topology == "tree":
        order.append(RuleOnTrial(build(RULES["rejection"].Config(name="rejection")), "first chain"))
    return order, left_out


def _unfit(kind: type[Rule], draws: str, topology: str, temperature: float) -> str | None:
    if not kind.lossless:
        return "lossy, and a length says nothing without the quality it cost"
    if kind.temperatures == "zero" and temperature > 0:
        return "for temperature 0 only"
    if (draws, topology) not in kind.accepts:
        return f"not exact for {draws} draws in a {topology}"
    if any(field.is_required() for field in kind.Config.model_fields.values()):
        return "has options without a default; give them in a contender's runtime.rule"
    return None


@torch.inference_mode()
def judge_rounds(
    log: RoundLog, logged_probs: LoggedProbs, every: Sequence[RuleOnTrial], chances: int = 16, seed: int = 0
) -> list[RuleOutcome]:
    """The expected accepted lengths of all rounds under each judge, in the log's order."""
    info = log.info
    lengths: list[list[np.ndarray]] = [[] for _ in every]
    stood = [np.zeros(info.max_depth) for _ in every]
    tried: list[Tried] = []
    asked = {one.label: one.rule.config for one in every if one.form == "whole" and one.rule.config.name in ACCEPTANCE}
    first = 0
    for shard in log.parts():
        size = shard.tokens.shape[1] + (0 if shard.states is None else shard.states.shape[1])
        whole = max(1, ELEMENTS // (chances * size * logged_probs.head.vocab_size))
        together = chances if whole > 1 else max(1, min(chances, ELEMENTS // (size * logged_probs.head.vocab_size)))
        for rounds in shard.split(whole):
            tree, logits = logged_probs.tree(rounds), logged_probs.logits(rounds)
            scored = Scored(logits, info.sampling, {"last_hidden_state": rounds.last.to(logits.device)})
            for place, judge in enumerate(every):
                verdict = _verdicts(judge, tree, scored, first, chances, together, seed)
                found = verdict.length.view(-1, chances).cpu().numpy()  # [C, S]
                lengths[place].append(found.mean(1))
                stood[place] += (found[..., None] > np.arange(info.max_depth)).mean(1).sum(0)
                if place == 0 and info.draws == "iid":
                    tried.append(tries(tree, scored.target_probs, _visits(tree, verdict, chances), asked))
            first += len(rounds)
    levels = [_levels(tried, judge) for judge in every]
    rest = zip(every, lengths, stood, levels, strict=True)
    return [RuleOutcome(judge, np.concatenate(parts), reach / first, level) for judge, parts, reach, level in rest]


def _verdicts(judge: RuleOnTrial, tree: Tree, scored: Scored, first: int, chances: int, together: int, seed: int) -> Verdict:
    """Of C trees, the first of which has number `first`, each judged S times: path [C * S, D], length [C * S]."""
    if judge.form == "first chain":
        tree, scored = first_chain(tree, scored)
    C, device = len(tree.tokens), tree.tokens.device
    paths, lengths = [], []
    for begin in range(0, chances, together):
        runs = torch.arange(begin, min(begin + together, chances), device=device)
        times, numbers = len(runs), first + torch.arange(C, device=device)
        shown = Scored(_repeat(scored.logits, times), scored.sampling, {name: _repeat(x, times) for name, x in scored.features.items()})
        shown.target_probs = _repeat(scored.target_probs, times)
        verdict = judge.rule(_repeated(tree, times), shown, SpreadRng(seed, _repeat(numbers, times), runs.repeat(C), chances))
        paths.append(verdict.path.unflatten(0, (C, times)))
        lengths.append(verdict.length.view(C, times))
    return Verdict(torch.cat(paths, 1).flatten(0, 1), torch.cat(lengths, 1).flatten(), None)


def _visits(tree: Tree, verdict: Verdict, chances: int) -> Tensor:
    """[C, N] share of the chances in which a node stood, the root among them."""
    padded = torch.arange(verdict.path.shape[1], device=verdict.path.device) >= verdict.length[:, None]
    nodes = torch.cat([torch.zeros_like(verdict.length)[:, None], verdict.path.masked_fill(padded, 0)], 1)
    stood = torch.zeros(len(nodes), tree.tokens.shape[1], device=nodes.device).scatter(1, nodes, 1.0)
    return stood.view(-1, chances, stood.shape[1]).mean(1)


def _levels(tried: Sequence[Tried], judge: RuleOnTrial) -> Levels | None:
    if not tried or judge.label not in tried[0].accepted:
        return None
    parts = [(one.visits, one.limit, one.accepted[judge.label]) for one in tried]
    return Levels(*(torch.cat(level).numpy() for level in zip(*parts, strict=True)))


def _repeat(x: Tensor, times: int) -> Tensor:
    """[C, ...] -> [C * times, ...], each row `times` times; a view where C is 1."""
    return x[:, None].expand(-1, times, *x.shape[1:]).flatten(0, 1)


def _repeated(tree: Tree, times: int) -> Tree:
    logged_probs, probs_row = (None if value is None else _repeat(value, times) for value in (tree.draft_probs, tree.probs_row))
    tokens, parents, live = (_repeat(value, times) for value in (tree.tokens, tree.parents, tree.live))
    return replace(tree, tokens=tokens, parents=parents, live=live, draft_probs=logged_probs, probs_row=probs_row)


def first_chain(tree: Tree, scored: Scored) -> tuple[Tree, Scored]:
    """The chain of first-born children below the root, and what the target said there.

    A first sibling is drawn from the whole distribution whether or not the later ones are put back, so this chain is one of `iid` draws.
    """
    nodes, real = tree.first_born()  # [B, K + 1]
    parents = (torch.arange(nodes.shape[1], device=nodes.device) - 1).clamp_min(0).expand_as(nodes)
    chain = Tree(
        tree.tokens.gather(1, nodes), parents, real, "deterministic" if tree.draws == "deterministic" else "iid", tree.max_depth, 1,
        draft_probs=tree.draft_probs, probs_row=None if tree.probs_row is None else tree.probs_row.gather(1, nodes),
    )
    at = (torch.arange(len(nodes), device=nodes.device)[:, None], nodes)
    shown = Scored(scored.logits[at], scored.sampling, {name: value[at] for name, value in scored.features.items()})
    shown.target_probs = scored.target_probs[at]
    return chain, shown


def compare(judged: Sequence[RuleOutcome], prompt: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> list[RuleComparison]:
    """Pooled over rounds; intervals are the middle 95% over resampled prompts. prompt: [n] the prompt of each round."""
    _, place = np.unique(prompt, return_inverse=True)
    prompts = int(place.max()) + 1
    sums = np.stack([np.bincount(place, one.lengths + 1, prompts) for one in judged])  # [E, P]
    rounds = np.bincount(place, minlength=prompts)  # [P]
    drawn = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    means = (drawn @ sums.T) / (drawn @ rounds)[:, None]  # [resamples, E]
    value = sums.sum(1) / rounds.sum()

    def interval(point: float, spread: np.ndarray) -> Interval:
        if prompts < 2:
            return Interval(point, None, None)
        low, high = np.percentile(spread, [2.5, 97.5])
        return Interval(point, float(low), float(high))

    def shares(levels: Levels | None) -> dict[str, Any]:
        if levels is None:
            return {}
        visits, most, accepted = (np.stack([np.bincount(place, level, prompts) for level in part.T], 1) for part in vars(levels).values())
        tried = visits.sum(0) > 0  # [K] levels that were reached
        most, accepted, over = most[:, tried], accepted[:, tried], visits.sum(0)[tried]  # [P, K], [K]
        with np.errstate(invalid="ignore"):  # resampled prompts that never came so deep
            spread = (drawn @ accepted) / (drawn @ most)  # [resamples, K]
        share = accepted.sum(0) / most.sum(0)
        return {
            "limit": tuple((most.sum(0) / over).tolist()), "accepted": tuple((accepted.sum(0) / over).tolist()),
            "of_limit": tuple(interval(float(one), deep[~np.isnan(deep)]) for one, deep in zip(share, spread.T, strict=True)),
        }  # fmt: skip

    return [
        RuleComparison(
            interval(float(value[e]), means[:, e]),
            interval(float(value[e] - value[0]), means[:, e] - means[:, 0]),
            interval(float(value[e] / value[0] - 1), means[:, e] / means[:, 0] - 1),
            **shares(judged[e].levels),
        )
        for e in range(len(judged))
    ]


def replay_rules(
    target: Target, contenders: Sequence[Contender], suite: Suite, config: EvaluationConfig, folder: Path, chances: int = 16
) -> tuple[list[RuleRow], list[str]]:
    """Logs the rounds of every contender on the suite's first turns, and judges them by every rule; the rows, which also stand at the end
    of `folder`/rules.jsonl, and which rules were left out.

    Logs lie in `folder`/rounds and are made once. Raises `UserError` at temperature 0, where all rules agree.
    """
    if config.temperature == 0:
        raise UserError("evaluation.temperature 0: all lossless rules keep the same tokens then; set evaluation.temperature=0.7, or 1.0")
    chosen = config.chosen(suite)
    if not chosen.items:
        raise UserError(f"suite '{suite.name}': no item is left by evaluation.tasks and evaluation.limit")
    further = [one.decoder.runtime.rule for one in contenders]
    rows: list[RuleRow] = []
    notes: dict[str, None] = {}
    for contender in contenders:
        log = _logged(target, contender, chosen, config, folder / "rounds")
        every, left_out = judges(log.info, [rule for rule in further if not isinstance(rule, str)])
        rows += _judged_by(every, log, target, contender, chosen, config, chances)
        notes |= dict.fromkeys(left_out)
    append_whole(folder / "rules.jsonl", [row.to_json() for row in rows])
    return rows, list(notes)


def _logged(target: Target, contender: Contender, suite: Suite, config: EvaluationConfig, folder: Path) -> RoundLog:
    """The contender's rounds on the suite, in a folder inside `folder` that is named by what they depend on."""
    decoder = contender.decoder
    mark = contender.facts(config.sampling).drafter_fingerprint or "in-memory"
    prompts = [decoder.tokenize(item.opening()) for item in suite.items for _ in range(config.repeats)]
    made_from = {
        "suite": suite.name, "hash": suite.hash, "runtime": decoder.runtime.model_dump(mode="json"), "repeats": config.repeats,
    }  # fmt: skip
    name = fingerprint(target.fingerprint, str(target.dtype), mark, config.sampling, config.seed, config.max_new_tokens, made_from)
    return log_rounds(decoder, prompts, config.sampling, config.max_new_tokens, folder / name, mark, config.seed, made_from=made_from)


def _judged_by(
    every: Sequence[RuleOnTrial], log: RoundLog, target: Target, contender: Contender, suite: Suite, config: EvaluationConfig, chances: int
) -> list[RuleRow]:
    """A row for each of `every` rule: what it accepts in the log, and that over the first one's."""
    decoder = contender.decoder
    assert decoder.drafter is not None
    logged_probs = LoggedProbs(log.info, decoder.drafter, target.head)
    gap = logged_probs.check(next(next(log.parts()).split(8)))
    judged = judge_rounds(log, logged_probs, every, chances, config.seed)
    prompt = torch.cat([part.prompt for part in log.parts()]).numpy()
    accepted = torch.cat([part.accepted for part in log.parts()]).float()
    looping = np.array([loops(tokens) for tokens in log.answers()])
    straight = ~looping[prompt]
    calm = compare([one.of(straight) for one in judged], prompt[straight] // config.repeats) if straight.any() else [None] * len(judged)
    return [
        RuleRow(
            log=log.folder.name, contender=contender.label, target=target.name, target_fingerprint=target.fingerprint, dtype=log.info.dtype,
            drafter_fingerprint=log.info.drafter, suite=suite.name, suite_hash=suite.hash, temperature=config.temperature,
            top_k=config.top_k, top_p=config.top_p,
            max_new_tokens=config.max_new_tokens, seed=config.seed, shape=decoder.runtime.shape.model_dump(mode="json"),
            draws=log.info.draws, decoded_by=log.info.rule, decoded_tau=float(accepted.mean()) + 1, rounds=len(log),
            prompts=len(np.unique(prompt // config.repeats)), chances=chances, rule=one.judge.label,
            reached=tuple(float(share) for share in one.reached), against=every[0].label, probs_gap=gap,
            device=device_name(target.device), versions=versions(), commit=commit(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"), **vars(found),
            looping=float(looping.mean()), not_looping=not_looping,
        )
        for one, found, not_looping in zip(judged, compare(judged, prompt // config.repeats), calm, strict=True)
    ]  # fmt: skip
