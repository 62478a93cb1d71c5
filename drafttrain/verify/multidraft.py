"""Multi-draft speculative sampling by canonical decomposition (Khisti et al., 2024, arXiv:2410.18234), for siblings drawn iid.

Of K drafts choose one, Y, by any rule whose marginal law pI is known exactly; then verify Y against pI as a single draft: it stands with
probability min(1, p(Y) / pI(Y)), else the next token comes from max(p - pI, 0). Lossless whatever chooses; the choice decides how often a
draft stands, at most with P* = 1 + min over S of [p(S) - q(S)^K].

    priority    the draft of the highest p / q. pI(y) = T(y)^K - (T(y) - q(y))^K with T(y) the mass of q at or below y's priority
    tournament  the winner of the drafts so far, whose law is known, against the next draft, pair by pair
    truncated   the same, but pairs of the `top` likeliest tokens are decided by a linear program (on the host)
    optimal     a linear program over all sets of drafts (on the host, small vocabularies): reaches P*

p the target's law, q the drafts'. B rows, C children at most, K of them real, V vocabulary.
"""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from drafttrain.core.chance import Chance
from drafttrain.core.errors import UserError
from drafttrain.core.sampling import normalise
from drafttrain.core.tree import Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.verify.base import Rule, RuleConfig

MOST_SETS = 4096
"""Sets of drafts that the linear program of `optimal` may have."""


class MultidraftConfig(RuleConfig):
    """How the one draft is chosen that is then verified."""

    name: Literal["multidraft"] = "multidraft"
    scheme: Literal["priority", "tournament", "truncated", "optimal"] = "priority"
    """`priority` costs O(V log V); `truncated` and `optimal` solve linear programs on the host (needs scipy), `optimal` for small
    vocabularies only."""
    top: int = Field(default=5, ge=2)
    """`truncated`: the likeliest tokens whose pairs the program decides."""


class Multidraft(Rule):
    """See the module."""

    Config = MultidraftConfig
    config: MultidraftConfig
    accepts = frozenset({("iid", "chain"), ("iid", "tree")})

    def __call__(self, tree: Tree, scored: Scored, chance: Chance) -> Verdict:
        scheme = SCHEMES[self.config.scheme](self.config, tree.max_children)
        row = torch.arange(len(tree.tokens), device=tree.tokens.device)
        node = torch.zeros_like(row)  # [B] the deepest node that stands
        going = torch.ones_like(row, dtype=torch.bool)
        fell = torch.zeros_like(going)
        p = scored.law(node[:, None])[:, 0]  # [B, V]
        q_last, K_last = p, torch.ones_like(row)  # of the drafts that fell
        for _ in range(tree.max_depth):
            children = tree.children[row, node]  # [B, C]
            there = (children >= 0) & going[:, None]
            K, safe = there.sum(1), children.clamp_min(0)
            q = tree.law(safe[:, 0])  # [B, V]
            tokens = tree.tokens.gather(1, safe)  # [B, C]
            place, weight = scheme.choose(p, q, tokens, there, chance)
            chosen = safe.gather(1, place[:, None])[:, 0]
            ratio = p[row, tree.tokens[row, chosen]].double() / weight.clamp_min(1e-300)
            stands = chance.bernoulli(torch.where(K > 0, ratio.clamp_max(1.0), 0.0)) & (K > 0)
            falls = (K > 0) & ~stands
            q_last, K_last = torch.where(falls[:, None], q, q_last), torch.where(falls, K, K_last)
            fell, node, going = fell | falls, torch.where(stands, chosen, node), stands
            p = scored.law(node[:, None])[:, 0]
        residual = normalise((p - scheme.law(p, q_last, K_last).to(p.dtype)).clamp_min(0))
        path, length = tree.path_to(node)
        law = torch.where(fell[:, None], residual, p)
        return Verdict(path, length, chance.draw(law[:, None], 1, replace=True)[:, 0, 0])


class Scheme(Protocol):
    """Which of K drafts is verified, and the law of that choice. most: the drafts that there can be."""

    def __init__(self, config: MultidraftConfig, most: int) -> None: ...

    def choose(self, p: Tensor, q: Tensor, tokens: Tensor, there: Tensor, chance: Chance) -> tuple[Tensor, Tensor]:
        """p, q [B, V]; the drafts' tokens [B, C], those that are `there` first -> [B] the chosen one's place, [B] pI of its token, fp64."""
        ...

    def law(self, p: Tensor, q: Tensor, K: Tensor) -> Tensor:
        """[B, V] p and q, [B] how many drafts -> [B, V] pI, fp64."""
        ...


class Priority:
    """The draft of the highest p / q; of equals the lower id."""

    def __init__(self, config: MultidraftConfig, most: int) -> None:
        self.most = most

    def choose(self, p: Tensor, q: Tensor, tokens: Tensor, there: Tensor, chance: Chance) -> tuple[Tensor, Tensor]:
        merit = priority(p, q)
        drafts = torch.where(there, merit.gather(1, tokens), -1.0)  # [B, C]
        best = drafts.amax(1, keepdim=True)
        place = torch.where(drafts == best, tokens, q.shape[-1]).argmin(1)
        token = tokens.gather(1, place[:, None])  # [B, 1]
        ids = torch.arange(q.shape[-1], device=q.device)
        below = (merit < best) | ((merit == best) & (ids >= token))  # [B, V] of this priority or less
        tail = (q.double() * below).sum(1)
        return place, _first_of(tail, q.gather(1, token)[:, 0].double(), there.sum(1), self.most)

    def law(self, p: Tensor, q: Tensor, K: Tensor) -> Tensor:
        bits = priority(p, q).flip(1).view(torch.int32)  # order as the numbers do, which are not negative, and sort faster
        order = q.shape[-1] - 1 - bits.sort(dim=1, stable=True).indices  # the lowest first, of equals the higher id
        mass = q.gather(1, order).double()
        return torch.zeros_like(mass).scatter_(1, order, _first_of(mass.cumsum(1), mass, K[:, None], self.most))


def priority(p: Tensor, q: Tensor) -> Tensor:
    """[B, V] p / q, infinite where nothing is ever drafted."""
    return torch.where(q > 0, p / q.clamp_min(1e-38), float("inf"))


def _first_of(tail: Tensor, mass: Tensor, K: Tensor, most: int) -> Tensor:
    """Probability that of K draws, at most `most`, none stands above a token and one is it: tail^K - (tail - mass)^K, which is
    mass times the sum over i < K of tail^i (tail - mass)^(K - 1 - i)."""
    below, power = (tail - mass).clamp_min(0), torch.ones_like(tail)
    total = torch.zeros_like(tail)
    for draft in range(most):
        total = torch.where(draft < K, total * below + power, total)
        power = power * tail
    return mass * total


class Tournament:
    """Winner by winner: in each pair the token of the higher p / (q1 + q2) goes on; pairs of equal tokens need no choice."""

    def __init__(self, config: MultidraftConfig, most: int) -> None:
        self.top, self.most = config.top, most

    def choose(self, p: Tensor, q: Tensor, tokens: Tensor, there: Tensor, chance: Chance) -> tuple[Tensor, Tensor]:
        place, winner, law = torch.zeros_like(tokens[:, 0]), tokens[:, 0], q.double()
        for draft in range(1, tokens.shape[1]):
            here, other = there[:, draft], tokens[:, draft]
            first, joint = self.pair(p.double(), law, q.double(), winner, other)
            loses = here & ~chance.bernoulli(torch.where(here & (winner != other), first, 1.0))
            place, winner = torch.where(loses, draft, place), torch.where(loses, other, winner)
            law = torch.where(here[:, None], joint, law)
        return place, law.gather(1, winner[:, None])[:, 0]

    def law(self, p: Tensor, q: Tensor, K: Tensor) -> Tensor:
        law = q.double()
        for draft in range(1, self.most):
            _, joint = self.pair(p.double(), law, q.double(), torch.zeros_like(K), torch.zeros_like(K))
            law = torch.where((draft < K)[:, None], joint, law)
        return law

    def pair(self, p: Tensor, one: Tensor, two: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Laws [B, V] of two independent drafts, and what they drew [B] -> [B] probability that the first wins, [B, V] the winner's law."""
        order = best_first(p, one, two)
        rank = turns(order)
        tails = [law.gather(1, order).flip(1).cumsum(1).flip(1) for law in (one, two)]
        below = [torch.cat([tail[:, 1:], torch.zeros_like(tail[:, :1])], 1) for tail in tails]
        joint = torch.zeros_like(p).scatter(1, order, tails[0] * tails[1] - below[0] * below[1])
        wins = rank.gather(1, first[:, None]) <= rank.gather(1, second[:, None])
        return wins[:, 0].double(), joint


def best_first(p: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """[B, V] token ids by p / (one + two), of equals the lower id first."""
    return priority(p, (one + two) / 2).sort(dim=1, descending=True, stable=True).indices


def turns(order: Tensor) -> Tensor:
    """[B, V] token ids, the best first -> [B, V] each token's place among them."""
    return torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


class Truncated(Tournament):
    """A tournament whose pairs of likely tokens are decided by a linear program: on the host."""

    def pair(self, p: Tensor, one: Tensor, two: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        wins, joint = super().pair(p, one, two, first, second)
        top = (one + two).topk(min(self.top, p.shape[-1])).indices  # [B, s]
        rank = turns(best_first(p, one, two))
        for row in range(len(p)):
            ids = top[row].tolist()
            change, weights = _decide_pairs(*(part[row, top[row]].tolist() for part in (p, joint, one, two, rank)))
            joint[row, top[row]] += torch.tensor(change, dtype=joint.dtype, device=joint.device)
            known = {(ids[i], ids[j]): weight for (i, j), weight in weights.items()}
            drawn = int(first[row]), int(second[row])
            wins[row] = known.get(drawn, 1 - known[drawn[::-1]] if drawn[::-1] in known else wins[row])
        return wins, joint


def _decide_pairs(
    p: list[float], joint: list[float], one: list[float], two: list[float], rank: list[int]
) -> tuple[np.ndarray, dict[tuple[int, int], float]]:
    """For some tokens: how their probabilities in the winner's law change, and with which probability i wins against j.

    Maximises sum min(p, joint + change) over the tokens.
    """
    pairs = list(combinations(range(len(p)), 2))
    meet = np.array([one[i] * two[j] + one[j] * two[i] for i, j in pairs])
    ahead = np.array([float(rank[i] < rank[j]) for i, j in pairs])  # who wins by priority, as in `Tournament.pair`
    flow = np.zeros((len(p), len(pairs)))  # change of a token's probability for a unit of a pair's weight
    for column, (i, j) in enumerate(pairs):
        flow[i, column], flow[j, column] = meet[column], -meet[column]
    cost = np.concatenate([-np.ones(len(p)), np.zeros(len(pairs))])  # maximise the s_y
    above = np.hstack([np.eye(len(p)), -flow])  # s_y - flow w <= joint - flow w0
    limits = np.array(joint) - flow @ ahead
    bounds = [(0.0, value) for value in p] + [(0.0, 1.0)] * len(pairs)
    weights = _solve(cost, bounds, above=above, limits=limits)[len(p) :]
    return flow @ (weights - ahead), dict(zip(pairs, weights.tolist(), strict=True))


class Optimal:
    """The program over all sets of drafts: on the host, small vocabularies only."""

    def __init__(self, config: MultidraftConfig, most: int) -> None: ...

    def choose(self, p: Tensor, q: Tensor, tokens: Tensor, there: Tensor, chance: Chance) -> tuple[Tensor, Tensor]:
        counts = there.sum(1).tolist()
        choice, weight = torch.zeros(*tokens.shape, dtype=torch.float64), torch.ones(len(tokens), dtype=torch.float64)
        laws = []
        for row, K in enumerate(counts):
            law, chosen = best_choice(p[row].tolist(), q[row].tolist(), max(K, 1))
            drawn = tokens[row, : max(K, 1)].tolist()
            for token in set(drawn):
                choice[row, drawn.index(token)] = chosen[frozenset(drawn)][token]
            laws.append(law)
        place = chance.draw(choice[:, None].to(p.device), 1, replace=True)[:, 0, 0]
        for row, (law, at) in enumerate(zip(laws, place.tolist(), strict=True)):
            weight[row] = law[tokens[row, at]]
        return place, weight.to(p.device)

    def law(self, p: Tensor, q: Tensor, K: Tensor) -> Tensor:
        laws = [best_choice(p[row].tolist(), q[row].tolist(), drafts)[0] for row, drafts in enumerate(K.tolist())]
        return torch.tensor(np.array(laws), device=p.device)


def best_choice(p: list[float], q: list[float], K: int) -> tuple[np.ndarray, dict[frozenset[int], dict[int, float]]]:
    """pI [V] of the choice that makes a draft stand as often as possible, and for every set of drafted tokens whom it chooses."""
    V = len(p)
    count = sum(comb(V, size) for size in range(1, min(K, V) + 1))
    if count > MOST_SETS:
        raise UserError(f"rule 'multidraft', scheme 'optimal': {K} drafts of {V} tokens make {count} sets; use scheme 'priority'")
    sets = [frozenset(members) for size in range(1, min(K, V) + 1) for members in combinations(range(V), size)]
    chances = np.array([_drawn_exactly(q, members, K) for members in sets])
    columns = [(index, token) for index, members in enumerate(sets) for token in sorted(members)]
    reach = np.zeros((V, len(columns)))  # pI = reach @ beta
    total = np.zeros((len(sets), len(columns)))
    for column, (index, token) in enumerate(columns):
        reach[token, column] = chances[index]
        total[index, column] = 1.0
    cost = np.concatenate([-np.ones(V), np.zeros(len(columns))])
    bounds = [(0.0, value) for value in p] + [(0.0, 1.0)] * len(columns)
    equal = np.hstack([np.zeros((len(sets), V)), total])
    beta = _solve(cost, bounds, above=np.hstack([np.eye(V), -reach]), limits=np.zeros(V), equal=equal, sums=np.ones(len(sets)))[V:]
    chosen: dict[frozenset[int], dict[int, float]] = {members: {} for members in sets}
    for (index, token), share in zip(columns, beta.tolist(), strict=True):
        chosen[sets[index]][token] = share
    return reach @ beta, chosen


def _drawn_exactly(q: list[float], members: frozenset[int], K: int) -> float:
    """Probability that K draws show these tokens, all of them and no other."""
    total = 0.0
    for size in range(1, len(members) + 1):
        for part in combinations(sorted(members), size):
            total += (-1.0) ** (len(members) - size) * sum(q[token] for token in part) ** K
    return max(total, 0.0)


def _solve(
    cost: np.ndarray, bounds: list[tuple[float, float]], above: np.ndarray, limits: np.ndarray, equal: np.ndarray | None = None,
    sums: np.ndarray | None = None,
) -> np.ndarray:
    try:
        from scipy.optimize import linprog
    except ImportError as error:
        raise UserError("rule 'multidraft': schemes 'truncated' and 'optimal' need scipy; pip install scipy, or use 'priority'") from error
    found = linprog(cost, A_ub=above, b_ub=limits, A_eq=equal, b_eq=sums, bounds=bounds, method="highs")
    assert found.success, found.message
    return found.x


SCHEMES: dict[str, type[Scheme]] = {"priority": Priority, "tournament": Tournament, "truncated": Truncated, "optimal": Optimal}


def limit(p: Tensor, q: Tensor, K: int) -> Tensor:
    """P*, the probability that one of K iid drafts stands, at best: [..., V] laws -> [...], fp64.

    1 + min over S of [p(S) - q(S)^K]; the best S holds the tokens of the lowest p / q.
    """
    order = priority(p, q).argsort(dim=-1)
    gap = p.double().gather(-1, order).cumsum(-1) - q.double().gather(-1, order).cumsum(-1) ** K
    return 1 + gap.amin(-1).clamp_max(0)


def acceptance(p: Tensor, q: Tensor, K: int, config: MultidraftConfig) -> Tensor:
    """The probability that one of K iid drafts stands: [B, V] laws -> [B], fp64."""
    law = SCHEMES[config.scheme](config, K).law(p, q, torch.full(p.shape[:1], K, device=p.device))
    return torch.minimum(p.double(), law).sum(-1)
