"""Rules compared on the same trees: real rounds are logged once, and every rule judges each of them.

The expected accepted length of a rule on a tree (its tokens and the laws p and q fixed) is a mean over `chances` runs of the rule
itself, whose random numbers are spread evenly and the same for every rule. Differences are paired round by round; intervals are
bootstraps over prompts.

Where siblings were drawn iid, the probability that one of them stands has a limit for every rule, P* (Khisti et al., 2024,
arXiv:2410.18234). At the nodes whose children the first rule tried it stands beside the probability that each top-down rule has there, both
over the siblings that could have been drawn: no chance is left in them but which nodes were reached.
n rounds, N nodes, K levels, R laws, V vocabulary, S chances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.chance import Spread
from drafttrain.core.config import fingerprint
from drafttrain.core.errors import UserError
from drafttrain.core.sampling import normalise
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.evaluation.bench import EvaluationConfig
from drafttrain.evaluation.journal import append_whole, parse_lines
from drafttrain.evaluation.machine import commit, device_name, versions
from drafttrain.evaluation.rows import Interval
from drafttrain.evaluation.runners import Contender
from drafttrain.evaluation.suites import Suite
from drafttrain.runtime.rounds import Laws, RoundLog, RoundsInfo, log_rounds
from drafttrain.target.adapter import Target
from drafttrain.verify import RULES, build
from drafttrain.verify.base import Rule, RuleConfig
from drafttrain.verify.multidraft import MultidraftConfig, acceptance, limit
from drafttrain.verify.recursive import RecursiveConfig

FORMAT = 2
RESAMPLES = 10_000
TOGETHER = 16
"""Nodes whose laws are sorted at once."""
ELEMENTS = 1 << 26
"""Probabilities that one call of a rule may look at, about."""

CHAIN: Literal["first chain"] = "first chain"
Form = Literal["whole", "first chain"]
"""The tree as it was logged, or the chain of first-born children in it: a chain drawn as a chain would have been, on the same contexts."""


@dataclass(frozen=True)
class Judge:
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
class Judged:
    """What one judge made of all rounds."""

    judge: Judge
    lengths: np.ndarray  # [n] expected accepted length of each round, the bonus token not counted
    reached: np.ndarray  # [K] share of rounds in which a node at depth 1, 2, ... stood
    levels: Levels | None = None  # of iid draws, and rules that go from the root down


@dataclass(frozen=True)
class RuleRow:
    """A line of rules.jsonl: one rule on one log of rounds."""

    log: str
    contender: str
    target: str
    target_fingerprint: str
    dtype: str
    drafter_fingerprint: str
    suite: str
    suite_hash: str
    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    seed: int
    shape: dict[str, Any]
    draws: str
    decoded_by: str
    decoded_tau: float
    """Mean tokens a round when the rounds were logged, uncut by ends of texts."""
    rounds: int
    prompts: int
    chances: int
    rule: str
    tau: Interval
    reached: tuple[float, ...]
    against: str
    difference: Interval
    relative: Interval
    limit: tuple[float, ...]
    """P* by level: the mean over the nodes whose children `against` tried; none where siblings were not drawn iid."""
    accepted: tuple[float, ...]
    """At the same nodes, the probability that this rule accepts one of the children."""
    of_limit: tuple[Interval, ...]
    """The second over the first."""
    law_gap: float
    """Largest difference between recomputed and logged probabilities of drafted tokens, over the first rounds."""
    device: str
    versions: dict[str, str]
    commit: str | None
    date: str

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> RuleRow:
        """Raises `UserError` for a row of another format, or a broken one."""
        if data.get("format") != FORMAT:
            raise UserError(f"{where}: not a row of rules in format {FORMAT}; replay again with this drafttrain")
        given = {name: value for name, value in data.items() if name != "format"}
        try:
            for name in ("tau", "difference", "relative"):
                given[name] = Interval(**given[name])
            for name in ("reached", "limit", "accepted"):
                given[name] = tuple(given[name])
            given["of_limit"] = tuple(Interval(**share) for share in given["of_limit"])
            return cls(**given)
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: a broken row of rules ({error}); replay again, or remove the line") from error


def read_rule_rows(path: Path) -> list[RuleRow]:
    """All rows of a rules.jsonl, in the order in which they were made."""
    if not path.is_file():
        raise UserError(f"results '{path}': no such file; `drafttrain eval --replay-rules` writes it")
    lines = parse_lines(path.read_text(encoding="utf-8"), path)
    return [RuleRow.from_json(entry, f"'{path}', line {number}") for number, entry in enumerate(lines, 1)]


def judges(info: RoundsInfo, further: Sequence[RuleConfig] = ()) -> tuple[list[Judge], list[str]]:
    """Every registered rule that is exact for such trees, and `further` ones with their options; why the others are left out.

    The first one is what the others are compared with: `recursive` for trees, `rejection` for chains.
    """
    topology = "chain" if info.max_children <= 1 else "tree"
    chosen: dict[str, Judge] = {}
    left_out: list[str] = []
    for name, kind in RULES.items():
        reason = _unfit(kind, info.draws, topology, info.temperature)
        if reason is None:
            judge = Judge(build(kind.Config(name=name)))
            chosen[judge.label] = judge
        else:
            left_out.append(f"{name}: {reason}")
    for config in further:
        kind = RULES[config.name]
        if kind.lossless and (info.draws, topology) in kind.accepts:
            judge = Judge(build(config))
            chosen[judge.label] = judge
    first = "recursive" if topology == "tree" else "rejection"
    order = sorted(chosen.values(), key=lambda judge: judge.label != first)
    if topology == "tree":
        order.append(Judge(build(RULES["rejection"].Config(name="rejection")), "first chain"))
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
def judge_rounds(log: RoundLog, laws: Laws, every: Sequence[Judge], chances: int = 16, seed: int = 0) -> list[Judged]:
    """The expected accepted lengths of all rounds under each judge, in the log's order."""
    info = log.info
    lengths: list[list[np.ndarray]] = [[] for _ in every]
    stood = [np.zeros(info.max_depth) for _ in every]
    tried: list[Tried] = []
    first = 0
    for shard in log.parts():
        size = shard.tokens.shape[1] + (0 if shard.states is None else shard.states.shape[1])
        whole = max(1, ELEMENTS // (chances * size * laws.head.vocab_size))
        together = chances if whole > 1 else max(1, min(chances, ELEMENTS // (size * laws.head.vocab_size)))
        for rounds in shard.split(whole):
            tree, logits = laws.tree(rounds), laws.logits(rounds)
            scored = Scored(logits, info.sampling, {"last": rounds.last.to(logits.device)})
            for place, judge in enumerate(every):
                verdict = _verdicts(judge, tree, scored, first, chances, together, seed)
                found = verdict.length.view(-1, chances).cpu().numpy()  # [C, S]
                lengths[place].append(found.mean(1))
                stood[place] += (found[..., None] > np.arange(info.max_depth)).mean(1).sum(0)
                if place == 0 and info.draws == "iid":
                    tried.append(tries(tree, scored.p, _visits(tree, verdict, chances), every))
            first += len(rounds)
    levels = [_levels(tried, judge) for judge in every]
    rest = zip(every, lengths, stood, levels, strict=True)
    return [Judged(judge, np.concatenate(parts), reach / first, level) for judge, parts, reach, level in rest]


def _verdicts(judge: Judge, tree: Tree, scored: Scored, first: int, chances: int, together: int, seed: int) -> Verdict:
    """Of C trees, the first of which has number `first`, each judged S times: path [C * S, D], length [C * S]."""
    if judge.form == "first chain":
        tree, scored = first_chain(tree, scored)
    C, device = len(tree.tokens), tree.tokens.device
    paths, lengths = [], []
    for begin in range(0, chances, together):
        runs = torch.arange(begin, min(begin + together, chances), device=device)
        times, numbers = len(runs), first + torch.arange(C, device=device)
        shown = Scored(_repeat(scored.logits, times), scored.sampling, {name: _repeat(x, times) for name, x in scored.features.items()})
        shown.p = _repeat(scored.p, times)
        verdict = judge.rule(_repeated(tree, times), shown, Spread(seed, _repeat(numbers, times), runs.repeat(C), chances))
        paths.append(verdict.path.unflatten(0, (C, times)))
        lengths.append(verdict.length.view(C, times))
    return Verdict(torch.cat(paths, 1).flatten(0, 1), torch.cat(lengths, 1).flatten(), None)


def _visits(tree: Tree, verdict: Verdict, chances: int) -> Tensor:
    """[C, N] share of the chances in which a node stood, the root among them."""
    padded = torch.arange(verdict.path.shape[1], device=verdict.path.device) >= verdict.length[:, None]
    nodes = torch.cat([torch.zeros_like(verdict.length)[:, None], verdict.path.masked_fill(padded, 0)], 1)
    stood = torch.zeros(len(nodes), tree.tokens.shape[1], device=nodes.device).scatter(1, nodes, 1.0)
    return stood.view(-1, chances, stood.shape[1]).mean(1)


@dataclass
class Tried:
    """What a group of rounds gives to `Levels`: [C, K] each, the last by the judge's label."""

    visits: Tensor
    limit: Tensor
    accepted: dict[str, Tensor]


def tries(tree: Tree, p: Tensor, visits: Tensor, every: Sequence[Judge]) -> Tried:
    """P* and each top-down rule's acceptance at the visited nodes that have children, summed up by level, weighted by `visits` [C, N].

    tree: of iid draws; p: [C, N, V] the target's laws.
    """
    assert tree.draws == "iid" and tree.law_rows is not None and tree.law_of is not None
    children = (tree.children >= 0).sum(-1)  # [C, N]
    asked = [judge for judge in every if judge.form == "whole" and judge.rule.config.name in ACCEPTANCE]
    shape = (len(visits), tree.max_depth)
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in (VISITS, LIMIT, *(judge.label for judge in asked))}
    for K in range(1, tree.max_children + 1):
        rows, nodes = ((children == K) & (visits > 0)).nonzero(as_tuple=True)
        for row, node in zip(rows.split(TOGETHER), nodes.split(TOGETHER), strict=True):
            child = tree.children[row, node, 0]
            target, drafted = p[row, node], tree.law_rows[row, tree.law_of[row, child]]  # [M, V]
            weight, level = visits[row, node].double().cpu(), tree.depth[row, node].cpu()
            values = {VISITS: torch.ones_like(weight), LIMIT: limit(target, drafted, K).cpu()}
            for judge in asked:
                config = judge.rule.config
                values[judge.label] = ACCEPTANCE[config.name](config, target, drafted, K).cpu()
            for name, value in values.items():
                sums[name].index_put_((row.cpu(), level), weight * value, accumulate=True)
    return Tried(sums.pop(VISITS), sums.pop(LIMIT), sums)


VISITS, LIMIT = "visits", "limit"


def one_by_one(config: RuleConfig, p: Tensor, q: Tensor, K: int) -> Tensor:
    """The probability that `recursive` accepts one of K iid drafts, or `rejection` its only one: [M, V] laws -> [M], fp64."""
    if isinstance(config, RecursiveConfig) and config.naive:  # the token drawn from p is among the drafts
        return (p.double() * (1 - (1 - q.double()) ** K)).sum(-1)
    P, q, falls = p.double(), q.double(), torch.ones(len(p), dtype=torch.float64, device=p.device)
    for _ in range(K):
        falls = falls * (1 - torch.minimum(P, q).sum(-1))
        P = normalise((P - q).clamp_min(0))
    return 1 - falls


def chosen_one(config: RuleConfig, p: Tensor, q: Tensor, K: int) -> Tensor:
    """The probability that `multidraft` accepts the draft it chooses: [M, V] laws -> [M], fp64."""
    assert isinstance(config, MultidraftConfig)
    return acceptance(p, q, K, config)


ACCEPTANCE: dict[str, Callable[[RuleConfig, Tensor, Tensor, int], Tensor]] = {
    "recursive": one_by_one, "rejection": one_by_one, "multidraft": chosen_one,
}  # fmt: skip
"""Rules that go from the root down, so that which nodes they reach says nothing about the tokens below; `traversal` does not."""


def _levels(tried: Sequence[Tried], judge: Judge) -> Levels | None:
    if not tried or judge.form != "whole" or judge.label not in tried[0].accepted:
        return None
    parts = [(one.visits, one.limit, one.accepted[judge.label]) for one in tried]
    return Levels(*(torch.cat(level).numpy() for level in zip(*parts, strict=True)))


def _repeat(x: Tensor, times: int) -> Tensor:
    """[C, ...] -> [C * times, ...], each row `times` times; a view where C is 1."""
    return x[:, None].expand(-1, times, *x.shape[1:]).flatten(0, 1)


def _repeated(tree: Tree, times: int) -> Tree:
    laws, law_of = (None if value is None else _repeat(value, times) for value in (tree.law_rows, tree.law_of))
    tokens, parents, live = (_repeat(value, times) for value in (tree.tokens, tree.parents, tree.live))
    return replace(tree, tokens=tokens, parents=parents, live=live, law_rows=laws, law_of=law_of)


def first_chain(tree: Tree, scored: Scored) -> tuple[Tree, Scored]:
    """The chain of first-born children below the root, and what the target said there.

    A first sibling is drawn from the whole law whether or not the later ones are put back, so this chain is one of `iid` draws.
    """
    nodes, real = tree.first_born()  # [B, K + 1]
    parents = (torch.arange(nodes.shape[1], device=nodes.device) - 1).clamp_min(0).expand_as(nodes)
    chain = Tree(
        tree.tokens.gather(1, nodes), parents, real, "point" if tree.draws == "point" else "iid", tree.max_depth, 1,
        law_rows=tree.law_rows, law_of=None if tree.law_of is None else tree.law_of.gather(1, nodes),
    )
    at = (torch.arange(len(nodes), device=nodes.device)[:, None], nodes)
    shown = Scored(scored.logits[at], scored.sampling, {name: value[at] for name, value in scored.features.items()})
    shown.p = scored.p[at]
    return chain, shown


@dataclass(frozen=True)
class Comparison:
    """One judge against the first."""

    tau: Interval  # tokens a round, the bonus token counted
    difference: Interval
    relative: Interval
    limit: tuple[float, ...] = ()
    accepted: tuple[float, ...] = ()
    of_limit: tuple[Interval, ...] = ()


def compare(judged: Sequence[Judged], prompt: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> list[Comparison]:
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
        Comparison(
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
    further = [one.decoder.runtime.rule for one in contenders]
    rows: list[RuleRow] = []
    notes: dict[str, None] = {}
    for contender in contenders:
        decoder = contender.decoder
        assert decoder.drafter is not None
        prompts = [decoder.tokenize(item.opening()) for item in chosen.items for _ in range(config.repeats)]
        if not prompts:
            raise UserError(f"suite '{suite.name}': no item is left by evaluation.tasks and evaluation.limit")
        mark = contender.facts(config.sampling).drafter_fingerprint or "in-memory"
        made_from = {
            "suite": suite.name, "hash": chosen.hash, "runtime": decoder.runtime.model_dump(mode="json"), "repeats": config.repeats,
        }  # fmt: skip
        name = fingerprint(target.fingerprint, str(target.dtype), mark, config.sampling, config.seed, config.max_new_tokens, made_from)
        log = log_rounds(
            decoder, prompts, config.sampling, config.max_new_tokens, folder / "rounds" / name, mark, config.seed, made_from=made_from
        )
        every, left_out = judges(log.info, [rule for rule in further if not isinstance(rule, str)])
        notes |= dict.fromkeys(left_out)
        laws = Laws(log.info, decoder.drafter, target.head)
        gap = laws.check(next(next(log.parts()).split(8)))
        judged = judge_rounds(log, laws, every, chances, config.seed)
        prompt = torch.cat([part.prompt for part in log.parts()]).numpy()
        accepted = torch.cat([part.accepted for part in log.parts()]).float()
        for one, found in zip(judged, compare(judged, prompt // config.repeats), strict=True):
            rows.append(
                RuleRow(
                    log=name, contender=contender.label, target=target.name, target_fingerprint=target.fingerprint, dtype=log.info.dtype,
                    drafter_fingerprint=mark, suite=suite.name, suite_hash=chosen.hash, **config.sampling._asdict(),
                    max_new_tokens=config.max_new_tokens, seed=config.seed, shape=decoder.runtime.shape.model_dump(mode="json"),
                    draws=log.info.draws, decoded_by=log.info.rule, decoded_tau=float(accepted.mean()) + 1, rounds=len(log),
                    prompts=len(np.unique(prompt // config.repeats)), chances=chances, rule=one.judge.label,
                    reached=tuple(float(share) for share in one.reached), against=every[0].label, law_gap=gap,
                    device=device_name(target.device), versions=versions(), commit=commit(),
                    date=datetime.now(timezone.utc).isoformat(timespec="seconds"), **vars(found),
                )
            )
    append_whole(folder / "rules.jsonl", [row.to_json() for row in rows])
    return rows, list(notes)
