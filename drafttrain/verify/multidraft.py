"""Multi-draft speculative sampling by canonical decomposition (Khisti et al., 2024, arXiv:2410.18234), for siblings drawn iid.

Of K draft tokens choose one, Y, by any rule whose marginal distribution pI is known exactly. Then verify Y against pI by rejection
sampling:
accept it with probability min(1, p(Y) / pI(Y)), else draw from max(p - pI, 0). Lossless whatever chooses; the choice decides how often a
token is accepted, at most with P* = 1 + min over S of [p(S) - q(S)^K].

    priority    the draft of the highest priority: p / q, which a draft may give up by lot for one drawn anew (see `Priority`); all but P*
    tournament  the winner of the drafts so far, whose distribution is known, against the next draft, pair by pair
    truncated   the same, but pairs of the `top` likeliest tokens are decided by a linear program (on the host)
    optimal     a linear program over all sets of drafts (on the host, small vocabularies): reaches P*

p the target's distribution, q the drafts'. B rows, C children at most, K of them real, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from drafttrain.core.errors import UserError
from drafttrain.core.rng import Rng, draw_one
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
    """`priority` costs O(V); `truncated` and `optimal` solve linear programs on the host (needs scipy), `optimal` for small
    vocabularies only."""
    top: int = Field(default=5, ge=2)
    """`truncated`: the likeliest tokens whose pairs the program decides."""


class Multidraft(Rule):
    """Exact for independent drafts: chooses one of the siblings by a rule whose distribution is known, and verifies that one."""

    Config = MultidraftConfig
    config: MultidraftConfig
    accepts = frozenset({("iid", "chain"), ("iid", "tree")})

    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        scheme = SCHEMES[self.config.scheme](self.config, tree.max_children)
        row = torch.arange(len(tree.tokens), device=tree.tokens.device)
        node = torch.zeros_like(row)  # [B] the deepest node that is accepted
        going = torch.ones_like(row, dtype=torch.bool)
        rejected = torch.zeros_like(going)
        p = scored.probs_at(node[:, None])[:, 0]  # [B, V]
        chosen_by = torch.zeros_like(p, dtype=torch.float64)  # [B, V] pI of the draft that was rejected, if one was
        for _ in range(tree.max_depth):
            children = tree.children[row, node]  # [B, C]
            safe, real = children.clamp_min(0), (children[:, 0] >= 0) & going  # [B, C], [B]
            # where none is, the first is as good as any
            there = torch.cat([torch.ones_like(real)[:, None], (children[:, 1:] >= 0) & going[:, None]], 1)
            q, tokens = tree.draft_probs_at(safe[:, 0]), tree.tokens.gather(1, safe)  # [B, V], [B, C]
            place, probs = scheme.choose(p, q, tokens, there, rng)
            token = tokens.gather(1, place[:, None])
            ratio = p.gather(1, token).double() / probs.gather(1, token).clamp_min(1e-300)
            accepted = real & rng.bernoulli(torch.where(real, ratio[:, 0].clamp_max(1.0), 0.0))
            rejects = real & ~accepted
            chosen_by = torch.where(rejects[:, None], probs, chosen_by)
            rejected, node, going = rejected | rejects, torch.where(accepted, safe.gather(1, place[:, None])[:, 0], node), accepted
            p = scored.probs_at(node[:, None])[:, 0]
        residual = normalise((p - chosen_by.to(p.dtype)).clamp_min(0))
        path, length = tree.path_to(node)
        probs = torch.where(rejected[:, None], residual, p)
        return Verdict(path, length, draw_one(rng, probs))


class Scheme(Protocol):
    """Which of K drafts is verified, and the distribution of that choice. most: the drafts that there can be."""

    def __init__(self, config: MultidraftConfig, most: int) -> None: ...

    def choose(self, p: Tensor, q: Tensor, tokens: Tensor, there: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """p, q [B, V]; the drafts' tokens [B, C], those that are `there` first, one at least -> [B] the chosen one's place, [B, V] pI."""
        ...

    def probs(self, p: Tensor, q: Tensor, K: Tensor) -> Tensor:
        """[B, V] p and q, [B] how many drafts -> [B, V] pI, fp64."""
        ...


class Priority:
    """Tokens fall into R ranks by p / q, and the draft of the highest rank would be chosen: a rank of mass Q with T at or below it then
    gets f Q = T^K - (T - Q)^K. Of a good drafter that is too much for the highest ranks, so before they are compared each draft of rank r
    gives its rank up with probability lot(r) for one drawn anew, in proportion to lot Q. That leaves ranks as they were distributed, hence

        pI(y) = q(y) (f + lot (m - f)),  m the mean of f over ranks drawn anew.

    lot is what makes pI the nearest to p that lies between f and one level m for all ranks. B rows, C drafts, R ranks, V vocabulary.
    """

    def __init__(self, config: MultidraftConfig, most: int) -> None:
        self.most = most

    def choose(self, p: Tensor, q: Tensor, tokens: Tensor, there: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        ranks = Ranks.of(p, q, there.sum(1), self.most)
        wins = highest(ranks, ranks.of_token.gather(1, tokens), there)
        return draw_one(rng, wins), ranks.chosen()

    def probs(self, p: Tensor, q: Tensor, K: Tensor) -> Tensor:
        return Ranks.of(p, q, K, self.most).chosen()


@dataclass
class Ranks:
    """Of one node's tokens by p / q, the lowest first; see `Priority`."""

    q: Tensor  # [B, V] fp64
    of_token: Tensor  # [B, V]
    mass: Tensor  # [B, R] Q, fp64
    first: Tensor  # [B, R] f
    lot: Tensor  # [B, R]

    @classmethod
    def of(cls, p: Tensor, q: Tensor, K: Tensor, most: int) -> Ranks:
        """[B, V] p and q, [B] how many drafts, at most `most`."""
        ratio = torch.where(q > 0, p / q.clamp_min(1e-38), 0.0)
        of_token, least = ranked(ratio)
        empty = torch.zeros(len(p), least.shape[1], dtype=torch.float64, device=p.device)
        q = q.double()
        q = q / q.sum(1, keepdim=True)
        mass = empty.scatter_add(1, of_token, q)
        wanted = empty.scatter_add(1, of_token, torch.where(q > 0, p, 0.0).double()) / mass.clamp_min(1e-300)
        wanted = torch.where(mass > 0, wanted, least.double())  # [B, R] p / q
        first = slope_of_power(mass.cumsum(1), mass, K[:, None], most)
        return cls(q, of_token, mass, first, lots(wanted, first, mass))

    def chosen(self) -> Tensor:
        """[B, V] pI."""
        again = self.lot * self.mass
        mean = (again * self.first).sum(1, keepdim=True) / again.sum(1, keepdim=True).clamp_min(1e-300)
        share = self.first + self.lot * (mean - self.first)
        return share.gather(1, self.of_token) * self.q


RANK_BITS = 16
"""Of an fp32 number's bits, those that a rank leaves out: 128 ranks from a power of 2 to the next."""
LOWEST, HIGHEST = (127 - 12) << 7, (127 + 6) << 7
"""Bits of the ratios 2^-12 and 2^6; what lies beyond shares a rank: below it there is little to win, and above it all fall short alike."""


def ranked(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """[B, V] p / q -> [B, V] each token's rank, and the least ratio of each rank, [B, R] or [1, R]: of a vocabulary no larger than the
    ranks every token has its own, else the leading bits tell, which needs no sort."""
    if ratio.shape[1] <= HIGHEST - LOWEST:
        least, order = ratio.sort(dim=1, stable=True)
        place = torch.arange(ratio.shape[1], device=ratio.device).expand_as(order)
        return torch.zeros_like(order).scatter(1, order, place), least
    of_token = (ratio.view(torch.int32) >> RANK_BITS).clamp(LOWEST, HIGHEST).long() - LOWEST
    bits = torch.arange(LOWEST, HIGHEST + 1, dtype=torch.int32, device=ratio.device) << RANK_BITS
    return of_token, bits.view(torch.float32)[None]


def slope_of_power(tail: Tensor, mass: Tensor, K: Tensor, most: int) -> Tensor:
    """(tail^K - (tail - mass)^K) / mass, for K up to `most`: the sum over i < K of tail^i (tail - mass)^(K - 1 - i)."""
    below, power, total = (tail - mass).clamp_min(0), torch.ones_like(tail), torch.zeros_like(tail)
    for draft in range(most):
        total = torch.where(draft < K, total * below + power, total)
        power = power * tail
    return total


def lots(wanted: Tensor, first: Tensor, mass: Tensor) -> Tensor:
    """[B, R] p / q and f, both rising, and the mass -> [B, R] the probability that a draft gives its rank up.

    With a level m, ranks of f < m rise to p / q where that lies between f and m, to m where it lies above; those of f > m sink likewise.
    What rises must equal what sinks, which fixes m: the sum is linear in m between the values that p / q and f take.
    """
    rising = torch.maximum(wanted, first).cummax(1).values  # of rounding
    sinking = torch.minimum(wanted, first).cummax(1).values
    risen, above, so_far = (_before(part) for part in (rising * mass, sinking * mass, mass))  # [B, R + 1]

    def at(level: Tensor, right: bool) -> tuple[Tensor, Tensor]:
        """What lies off the level, and the mass that lies on it."""
        low, high = (torch.searchsorted(part, level, right=right) for part in (rising, sinking))
        return risen.gather(1, low) + above[:, -1:] - above.gather(1, high), so_far.gather(1, high) - so_far.gather(1, low)

    levels = torch.cat([rising, sinking], 1)
    off, on = at(levels, False)
    level = torch.where(off + levels * on <= 1, levels, 0.0).amax(1, keepdim=True)
    off, on = at(level, True)
    level = torch.where(on > 0, (1 - off) / on.clamp_min(1e-300), level)
    goal = torch.where(first < level, torch.minimum(rising, level), torch.maximum(sinking, level))
    return torch.where(first == level, 0.0, (goal - first) / (level - first)).clamp(0, 1)


def _before(part: Tensor) -> Tensor:
    """[B, R] -> [B, R + 1] sums of all before, and of all."""
    return torch.cat([torch.zeros_like(part[:, :1]), part.cumsum(1)], 1)


def highest(ranks: Ranks, own: Tensor, there: Tensor) -> Tensor:
    """[B, C] the drafts' ranks, and which are there -> [B, C] the probability that each is the first of the highest after the lots."""
    lot = torch.where(there, ranks.lot.gather(1, own), 0.0)[..., None]  # [B, C, 1]
    again = ranks.lot * ranks.mass
    again = (again / again.sum(1, keepdim=True).clamp_min(1e-300))[:, None]  # [B, 1, R]
    rank = torch.arange(again.shape[-1], device=own.device)
    stays = torch.where(there, own, -1)[..., None]  # one that isn't there is below all
    at = (1 - lot) * (stays == rank) + lot * again  # [B, C, R]
    upto = (1 - lot) * (stays <= rank) + lot * again.cumsum(-1)
    below = (upto - at).clamp_min(0)
    return torch.stack([_beats(at, below, upto, draft) for draft in range(own.shape[1])], 1)


def _beats(at: Tensor, below: Tensor, upto: Tensor, draft: int) -> Tensor:
    return (at[:, draft] * below[:, :draft].prod(1) * upto[:, draft + 1 :].prod(1)).sum(-1)


def priority(p: Tensor, q: Tensor) -> Tensor:
    """[B, V] p / q, infinite where nothing is ever drafted."""
    return torch.where(q > 0, p / q.clamp_min(1e-38), float("inf"))


class Tournament:
    """Winner by winner: in each pair the token of the higher p / (q1 + q2) goes on; pairs of equal tokens need no choice."""

    def __init__(self, config: MultidraftConfig, most: int) -> None:
        self.top, self.most = config.top, most

    def choose(self, p: Tensor, q: Tensor, tokens: Tensor, there: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        place, winner, probs = torch.zeros_like(tokens[:, 0]), tokens[:, 0], q.double()
        for draft in range(1, tokens.shape[1]):
            here, other = there[:, draft], tokens[:, draft]
            first, joint = self.pair(p.double(), probs, q.double(), winner, other)
            loses = here & ~rng.bernoulli(torch.where(here & (winner != other), first, 1.0))
            place, winner = torch.where(loses, draft, place), torch.where(loses, other, winner)
            probs = torch.where(here[:, None], joint, probs)
        return place, probs

    def probs(self, p: Tensor, q: Tensor, K: Tensor) -> Tensor:
        probs = q.double()
        for draft in range(1, self.most):
            _, joint = self.pair(p.double(), probs, q.double(), torch.zeros_like(K), torch.zeros_like(K))
            probs = torch.where((draft < K)[:, None], joint, probs)
        return probs

    def pair(self, p: Tensor, one: Tensor, two: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Distributions [B, V] of two independent drafts, and what they drew [B] -> [B] probability that the first wins, [B, V] the
        winner's distribution."""
        order = best_first(p, one, two)
        rank = turns(order)
        tails = [probs.gather(1, order).flip(1).cumsum(1).flip(1) for probs in (one, two)]
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
    """For some tokens: how their probabilities in the winner's distribution change, and with which probability i wins against j.

    Maximises sum min(p, joint + change) over the tokens.
    """
    pairs = list(combinations(range(len(p)), 2))
    meet = np.array([one[i] * two[j] + one[j] * two[i] for i, j in pairs])
    ahead = np.array([float(rank[i] < rank[j]) for i, j in pairs])  # who wins by priority
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

    def choose(self, p: Tensor, q: Tensor, tokens: Tensor, there: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        choice, distributions = torch.zeros(*tokens.shape, dtype=torch.float64), []
        for row, K in enumerate(there.sum(1).tolist()):
            probs, chosen = best_choice(p[row].tolist(), q[row].tolist(), K)
            drawn = tokens[row, :K].tolist()
            for token in set(drawn):
                choice[row, drawn.index(token)] = chosen[frozenset(drawn)][token]
            distributions.append(probs)
        place = draw_one(rng, choice.to(p.device))
        return place, torch.tensor(np.array(distributions), device=p.device)

    def probs(self, p: Tensor, q: Tensor, K: Tensor) -> Tensor:
        distributions = [best_choice(p[row].tolist(), q[row].tolist(), drafts)[0] for row, drafts in enumerate(K.tolist())]
        return torch.tensor(np.array(distributions), device=p.device)


def best_choice(p: list[float], q: list[float], K: int) -> tuple[np.ndarray, dict[frozenset[int], dict[int, float]]]:
    """pI [V] of the choice that makes a draft token accepted as often as possible, and for every set of drafted tokens whom it chooses."""
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
    """P*, the probability that one of K iid drafts is accepted, at best: [..., V] distributions -> [...], fp64.

    1 + min over S of [p(S) - q(S)^K]; the best S holds the tokens of the lowest p / q.
    """
    order = priority(p, q).argsort(dim=-1)
    gap = p.double().gather(-1, order).cumsum(-1) - q.double().gather(-1, order).cumsum(-1) ** K
    return 1 + gap.amin(-1).clamp_max(0)


def acceptance(p: Tensor, q: Tensor, K: int, config: MultidraftConfig) -> Tensor:
    """The probability that one of K iid drafts is accepted: [B, V] distributions -> [B], fp64."""
    probs = SCHEMES[config.scheme](config, K).probs(p, q, torch.full(p.shape[:1], K, device=p.device))
    return torch.minimum(p.double(), probs).sum(-1)
